"""Images in: every mode, damaged ones, tars; what else lies in a folder; grids out."""
import contextlib
import io
import os
import socket
import struct
import sys
import tarfile
import tempfile
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from common.images import crop, open_image, save_each, save_grid
from common.sources import BadImages, ImageSource
from tests.helpers import PHOTOS, needs_photos, one_line_error, run_stage, stage_error

RAMP = np.linspace(0, 1, 16)[None].repeat(20, 0)          # (20, 16), from black to white
GREY = (RAMP * 255).round().astype(int)                   # what it is in 8 bits


def pixels_of(path):
    return np.asarray(open_image(path)).astype(int)       # (H, W, 3)


def save_tiff(path, array, sample_format):
    """A grey TIFF of any number type, which Pillow writes only some of. 1: unsigned, 2: signed."""
    data, (height, width) = array.tobytes(), array.shape
    entries = [(256, 4, width), (257, 4, height), (258, 3, array.dtype.itemsize * 8), (259, 3, 1),
               (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(data)),
               (339, 3, sample_format)]
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data +
                     struct.pack("<H", len(entries)) + table + bytes(4))


# -------------------------------------------------------------------------------------- modes


def test_images_of_every_mode(tmp_path):
    base = np.zeros((20, 30, 3), np.uint8)
    base[:, :10], base[:, 10:] = (200, 40, 40), (40, 40, 200)
    rgb = Image.fromarray(base)
    rgb.save(tmp_path / "rgb.png")
    rgb.quantize(8).save(tmp_path / "palette.png")
    rgb.convert("L").save(tmp_path / "grey.png")
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    deep = np.asarray(rgb.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    clear = Image.merge("RGBA", (*rgb.split(), Image.new("L", rgb.size, 0)))
    clear.save(tmp_path / "clear.png")
    rgb.save(tmp_path / "film.gif", save_all=True, append_images=[Image.new("RGB", rgb.size)])
    exif = Image.Exif()
    exif[0x112] = 6  # turn by 90 degrees
    rgb.save(tmp_path / "turned.jpg", exif=exif, quality=95)

    images = {name: open_image(tmp_path / name) for name in os.listdir(tmp_path)}
    assert all(im.mode == "RGB" for im in images.values())
    for name, im in images.items():
        assert im.size == ((20, 30) if name == "turned.jpg" else (30, 20))
    for name in ("palette.png", "film.gif", "cmyk.jpg"):
        difference = np.asarray(images[name]).astype(int)[10, [3, 25]] - base[10, [3, 25]]
        assert np.abs(difference).max() < 25, name
    grey = np.asarray(rgb.convert("L")).astype(int)[:, :, None]
    assert np.abs(np.asarray(images["deep.png"]).astype(int) - grey).max() <= 1
    assert np.abs(np.asarray(images["grey.png"]).astype(int) - grey).max() == 0
    assert np.asarray(images["clear.png"]).min() == 255


NUMBERS = {  # name: (array, what its TIFF says of the numbers: 0 as Pillow writes it)
    "floats from 0 to 1": (RAMP.astype(np.float32), 0),
    "floats a little above 1": ((RAMP * 1.01).astype(np.float32), 0),
    "floats from 0 to 255": ((RAMP * 255).astype(np.float32), 0),
    "floats from 0 to 65535": ((RAMP * 65535).astype(np.float32), 0),
    "floats from -1 to 1": ((RAMP * 2 - 1).astype(np.float32), 0),
    "16 bits": ((RAMP * 65535).astype("<u2"), 1),
    "16 bits, signed": (((RAMP * 2 - 1) * 32767).astype("<i2"), 2),
    "16 bits, signed, none below 0": ((RAMP * 32767).astype("<i2"), 2),
    "32 bits from 0 to 255": ((RAMP * 255).astype("<i4"), 0),
    "32 bits from 0 to 65535": ((RAMP * 65535).astype("<i4"), 2),
    "32 bits": ((RAMP * (2 ** 32 - 1)).astype("<u4"), 1),
    "32 bits, signed": (((RAMP * 2 - 1) * (2 ** 31 - 1)).astype("<i4"), 2),
    "8 bits, signed": (((RAMP * 2 - 1) * 127).astype("i1"), 2),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_every_range_become_the_same_greys(tmp_path, name):
    """Neither black nor white: scaled by what the file, or else its values, say of the range."""
    array, sample_format = NUMBERS[name]
    if sample_format:
        save_tiff(tmp_path / "x.tif", array, sample_format)
    else:
        Image.fromarray(array).save(tmp_path / "x.tif")
    pixels = pixels_of(tmp_path / "x.tif")
    assert pixels.shape == (20, 16, 3)
    assert np.abs(pixels - GREY[:, :, None]).max() <= (3 if "above" in name else 1)


def test_a_dark_16_bit_image_stays_dark(tmp_path):
    Image.fromarray((RAMP * 6553.5).astype(np.uint16)).save(tmp_path / "x.png")
    header = b"P5 16 20 65535\n"
    (tmp_path / "x.pgm").write_bytes(header + (RAMP * 6553.5).astype(">u2").tobytes())
    for name in ("x.png", "x.pgm"):
        assert np.abs(pixels_of(tmp_path / name) - GREY[:, :, None] / 10).max() <= 1


def test_numbers_that_are_not_finite_are_refused(tmp_path):
    for value in (np.nan, np.inf):
        array = RAMP.astype(np.float32)
        array[3, 3] = value
        Image.fromarray(array).save(tmp_path / "x.tif")
        with pytest.raises(ValueError, match="not finite"):
            open_image(tmp_path / "x.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I",
                                  "F", "I;16"])
def test_a_grey_is_the_same_in_every_mode(tmp_path, mode):
    """(In the black and white of mode 1, white.)"""
    value = 255 if mode == "1" else 120
    im = Image.new("RGB", (12, 9), (value,) * 3)
    if mode == "I;16":
        im = Image.fromarray(np.full((9, 12), value * 257, np.uint16))
    elif mode in ("I", "F"):
        im = im.convert("L").convert(mode)
    elif mode == "LAB":
        im = ImageCms.profileToProfile(im, ImageCms.createProfile("sRGB"),
                                       ImageCms.createProfile("LAB"), outputMode="LAB")
    elif mode == "P":
        im = im.quantize(2)
    else:
        im = im.convert(mode)
    path = tmp_path / ("x.png" if mode in ("1", "P", "RGBA", "LA") else "x.tif")
    im.save(path)
    assert np.abs(pixels_of(path) - value).max() <= 3


def test_transparency_of_every_kind_is_over_white(tmp_path):
    grey = Image.fromarray(GREY.astype(np.uint8))
    grey.save(tmp_path / "key.png", transparency=0)
    Image.merge("LA", (grey, Image.new("L", grey.size, 128))).save(tmp_path / "la.png")
    grey.convert("P").save(tmp_path / "palette.png", transparency=bytes([0] * 100))
    grey.convert("RGB").save(tmp_path / "colour.png", transparency=(0, 0, 0))
    assert pixels_of(tmp_path / "key.png")[0, 0].tolist() == [255] * 3
    assert pixels_of(tmp_path / "key.png")[0, 8].tolist() == [136] * 3
    assert np.abs(pixels_of(tmp_path / "la.png")[:, :, 0] - (GREY + 255) / 2).max() <= 2
    assert pixels_of(tmp_path / "palette.png")[0, 0].tolist() == [255] * 3
    assert pixels_of(tmp_path / "colour.png")[0, [0, 15], 0].tolist() == [255, 255]


def swapped_profile():
    """sRGB's ICC profile with red and blue changed places, under sRGB's own name."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = data.index(b"rXYZ"), data.index(b"bXYZ")     # in the table of tags: name, offset
    data[red:red + 4], data[blue:blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(data)


def test_colours_of_another_profile_are_converted(tmp_path):
    colours = np.uint8([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [90, 90, 90]]]).repeat(4, 0)
    rgb, other = Image.fromarray(colours), swapped_profile()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rgb.save(tmp_path / "plain.png", icc_profile=srgb)
    assert np.array_equal(pixels_of(tmp_path / "plain.png"), colours)    # to the last bit
    rgb.save(tmp_path / "other.png", icc_profile=other)
    swapped = colours[:, :, ::-1].astype(int)
    assert np.abs(pixels_of(tmp_path / "other.png") - swapped).max() <= 3
    rgb.quantize(4).save(tmp_path / "palette.png", icc_profile=other)
    assert np.abs(pixels_of(tmp_path / "palette.png") - swapped).max() <= 3
    clear = Image.merge("RGBA", (*rgb.split(), Image.new("L", rgb.size, 0)))
    clear.save(tmp_path / "clear.png", icc_profile=other)
    assert pixels_of(tmp_path / "clear.png").min() == 255    # alpha is kept
    for nonsense in (b"no profile", other[:300]):
        rgb.save(tmp_path / "bad.png", icc_profile=nonsense)
        assert np.array_equal(pixels_of(tmp_path / "bad.png"), colours)


# ----------------------------------------------------------------------------------- metadata


def turned_exif(entry):
    """EXIF data: orientation 6 (turn right), then another entry (tag, type, count, value)."""
    entries = [(0x112, 3, 1, 6), entry]
    table = b"".join(struct.pack("<HHII", *e) for e in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4)


@pytest.mark.parametrize("entry", [(0x11a, 5, 1, 0xfffffff0),    # a resolution outside the file
                                   (0x8769, 4, 1, 0xffffff00),   # its table of entries too
                                   (0x9201, 10, 0xffffff, 60),   # one of millions of numbers
                                   (0x112, 99, 7, 3)], ids=str)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_damaged_exif_entry_costs_neither_pixels_nor_orientation(tmp_path, entry, suffix):
    base = np.zeros((20, 30, 3), np.uint8)
    base[:, :15] = 255                                        # white on the left
    Image.fromarray(base).save(tmp_path / f"x.{suffix}", exif=turned_exif(entry), quality=95)
    pixels = pixels_of(tmp_path / f"x.{suffix}")
    assert pixels.shape == (30, 20, 3)
    assert pixels[:12].min() > 230 and pixels[18:].max() < 25    # white above


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_pillows(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    noise = np.random.default_rng(0).integers(256, size=(20, 30, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as im:
        expected = np.asarray(ImageOps.exif_transpose(im))
    assert np.array_equal(pixels_of(tmp_path / "x.png"), expected)


@pytest.mark.parametrize("length, compressed", [(2 ** 22, True), (2 ** 22, False),
                                                (2 ** 26, False)])
def test_a_png_with_a_long_text_is_read(tmp_path, length, compressed):
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * length, zip=compressed)
    info.add_itxt("prompt", "y" * length, zip=compressed)
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(GREY.astype(np.uint8)).save(tmp_path / "x.png", pnginfo=info, exif=exif)
    assert np.array_equal(pixels_of(tmp_path / "x.png")[:, :, 0], np.rot90(GREY, -1))
    data = io.BytesIO((tmp_path / "x.png").read_bytes())      # as from a tar
    assert np.array_equal(np.asarray(open_image(data))[:, :, 0], np.rot90(GREY, -1))


# --------------------------------------------------------------------------- folders and tars


def save_images(folder, *names, size=(40, 32)):
    """Images of random colours under these names."""
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = tuple(zlib.crc32(name.encode()) >> shift & 255 for shift in (0, 8, 16))
        Image.new("RGB", size, colour).save(path, "PNG")


def test_a_tar_is_read_as_the_folder_it_was_made_of(tmp_path, capsys):
    """Same names, same images; links, devices, absolute and climbing names are inert: nothing is
    ever unpacked."""
    accented = "b/\N{LATIN SMALL LETTER E WITH ACUTE}.png"
    save_images(tmp_path / "a", "z.png", "b/x.png", accented)
    (tmp_path / "a/notes.txt").write_text("no image")
    kinds = {"link.png": tarfile.SYMTYPE, "dev.png": tarfile.CHRTYPE, "hard.png": tarfile.LNKTYPE}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a", ".")
        for name, kind in kinds.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        for name in ("../up.png", "/tmp/abs.png"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"nope"))

    folder, tar = ImageSource(tmp_path / "a"), ImageSource(str(tmp_path / "a.tar"))
    assert len(folder.names) == 3
    assert tar.names == sorted([*folder.names, "../up.png", "/tmp/abs.png"])
    for name in folder.names:
        assert np.array_equal(np.asarray(folder.open(name)), np.asarray(tar.open(name)))
    for name in ("../up.png", "/tmp/abs.png"):
        with pytest.raises((OSError, ValueError)):
            tar.open(name)
    assert sorted(name for name, _ in tar.skipped) == sorted(kinds)
    assert folder.ignored == tar.ignored == {".txt": 1}

    (tmp_path / "shards").mkdir()
    for n in "12":
        (tmp_path / f"shards/s{n}.tar").write_bytes((tmp_path / "a.tar").read_bytes())
    for many in (tmp_path / "shards", f"{tmp_path}/shards/*.tar"):
        assert len(ImageSource(many).names) == 10
    (tmp_path / "bad.tar").write_bytes(b"not a tar" * 100)
    with one_line_error(capsys, "bad.tar"):
        ImageSource(str(tmp_path / "bad.tar"))


def test_a_tar_unpacked_where_it_lies_collides_with_nothing(tmp_path):
    """With and without a folder of its name."""
    for colour, folder in (("red", "x"), ("green", "."), ("blue", "in_tar")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), colour).save(tmp_path / folder / "a.png")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "in_tar/a.png", "a.png")
    mixed = ImageSource(tmp_path)
    assert mixed.names == ["a.png", "in_tar/a.png", "x.tar/a.png", "x/a.png"]
    colours = [mixed.open(name).getpixel((0, 0)) for name in mixed.names]
    assert colours == [(0, 128, 0), (0, 0, 255), (0, 0, 255), (255, 0, 0)]


def test_a_cut_and_a_compressed_tar_say_so(tmp_path, capsys):
    save_images(tmp_path / "a", *(f"{i}.png" for i in range(30)))
    for mode, name in (("w", "cut.tar"), ("w:gz", "packed.tar")):
        with tarfile.open(tmp_path / name, mode) as tar:
            tar.add(tmp_path / "a", ".")
    data = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[:len(data) // 3])
    with one_line_error(capsys, "cut.tar", "cut or damaged"):
        ImageSource(tmp_path / "cut.tar")
    with one_line_error(capsys, "packed.tar", "unpack"):
        ImageSource(tmp_path / "packed.tar")


def test_damaged_small_and_monstrous_images_give_a_reason(tmp_path):
    good, noise = io.BytesIO(), np.random.default_rng(0).integers(256, size=(40, 40, 3))
    Image.fromarray(noise.astype(np.uint8)).save(good, "PNG")
    good = good.getvalue()
    ihdr = good.index(b"IHDR")
    bomb = good[:ihdr + 4] + (40000).to_bytes(4, "big") * 2 + good[ihdr + 12:]
    crc = zlib.crc32(bomb[ihdr:ihdr + 17]).to_bytes(4, "big")
    bomb = bomb[:ihdr + 17] + crc + bomb[ihdr + 21:]
    (tmp_path / "text.jpg").write_text("this is no image")
    for name, data in (("cut.png", good[:len(good) // 2]), ("bomb.png", bomb), ("empty.gif", b"")):
        (tmp_path / name).write_bytes(data)
    Image.new("RGB", (12, 90)).save(tmp_path / "thin.png")
    source = ImageSource(tmp_path)
    assert len(source.names) == 5
    for name in source.names:
        with pytest.raises((OSError, ValueError)) as e:
            source.open(name, 64)
        assert str(e.value) and "0x" not in str(e.value) and str(tmp_path) not in str(e.value)
    assert source.open("thin.png", 48).size == (12, 90)


@needs_photos
def test_real_photographs_are_read_and_cropped():
    source = ImageSource(PHOTOS)
    assert len(source.names) == 96
    for name in source.names[:12]:
        photo = source.open(name)
        small, large = (crop(photo, size, 1.1, 0.3, 0.8) for size in (64, 224))
        thumbnail = Image.fromarray(large).resize((64, 64), Image.Resampling.BICUBIC)
        thumbnail = np.asarray(thumbnail).astype(float)
        moved = crop(photo, 64, 1.1, 0.5, 0.4).astype(float)
        # the two networks see the same part of the image
        assert np.abs(thumbnail - small).mean() < 0.5 * np.abs(thumbnail - moved).mean()


# --------------------------------------------------------------- whatever else a folder holds


def make_a_mess(folder):
    """Ten images, and of each thing that is none the number that the name says."""
    save_images(folder, *(f"{i}.png" for i in range(8)), "deep/er/8.jfif", "9.PNG")
    for name in ("._0.png", "deep/._8.jfif", "__MACOSX/0.png", "__MACOSX/deep/x.jpg"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0\5\x16\7 a companion, no image")
    for name in ("a.heic", "b.HEIC", "c.heif", "x.tar.gz", "notes.txt", "README"):
        (folder / name).write_bytes(b"something else")
    os.mkfifo(folder / "pipe.png")
    (folder / "album.jpg").mkdir()
    os.symlink(folder / "nowhere", folder / "dangling.png")
    with contextlib.chdir(folder), socket.socket(socket.AF_UNIX) as s:
        s.bind("socket.png")


def test_every_file_of_a_folder_is_accounted_for(tmp_path):
    make_a_mess(tmp_path)
    source = ImageSource(tmp_path)
    assert source.names == sorted(["deep/er/8.jfif", "9.PNG", *(f"{i}.png" for i in range(8))])
    assert source.ignored == {"companion of macOS": 4, ".heic": 2, ".heif": 1, ".tar.gz": 1,
                              ".txt": 1, "file without suffix": 1}
    reasons = dict(source.skipped)
    assert reasons == {"pipe.png": "not a plain file", "socket.png": "not a plain file",
                       "album.jpg": "a folder",
                       "dangling.png": "can't be opened: No such file or directory"}
    line = source.account()
    assert "\n" not in line and line.startswith("10 images in ")
    for words in ("4 companion of macOS", "2 .heic", "1 .tar.gz", "pillow-heif", "unpacked first",
                  "skipped 4", "2 like pipe.png: not a plain file"):
        assert words in line, line


def test_every_file_of_a_tar_is_accounted_for(tmp_path):
    make_a_mess(tmp_path / "a")
    os.unlink(tmp_path / "a/socket.png")                     # a tar has no sockets
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a", ".")
    folder, tar = ImageSource(tmp_path / "a"), ImageSource(tmp_path / "a.tar")
    assert tar.names == folder.names and tar.ignored == folder.ignored
    assert sorted(n for n, _ in tar.skipped) == ["album.jpg", "dangling.png", "pipe.png"]


def test_the_stages_wait_for_no_pipe_and_say_what_they_passed_over(world, tmp_path):
    """By the command line: in a folder, in a shard's or image's place, and beside good images."""
    d, _ = world
    make_a_mess(tmp_path / "mess")
    output = run_stage("prepare.py", f"--data={tmp_path}/mess", f"--out={tmp_path}/d",
                       "--workers=0", "--max_bad=0", cwd=d, timeout=60).stdout
    line, = [x for x in output.splitlines() if "companion of macOS" in x]
    assert line == ImageSource(tmp_path / "mess").account()
    os.mkfifo(tmp_path / "pipe.tar")
    assert "not a plain file" in stage_error(
        "prepare.py", f"--data={tmp_path}/pipe.tar", f"--out={tmp_path}/p", cwd=d, timeout=60)
    assert "not a plain file" in stage_error(
        "sample.py", f"--image={tmp_path}/mess/pipe.png", cwd=d, timeout=60)


def test_linked_folders_are_entered_once_and_cycles_end(tmp_path):
    save_images(tmp_path, "data/a/1.png", "data/b/2.png", "elsewhere/3.png", "elsewhere/in/4.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "data/class")
    os.symlink(tmp_path / "elsewhere", tmp_path / "data/class_again")
    os.symlink(tmp_path / "data", tmp_path / "elsewhere/in/cycle")
    os.symlink(tmp_path / "data/a/1.png", tmp_path / "data/b/link.png")
    source = ImageSource(tmp_path / "data")
    assert source.names == ["a/1.png", "b/2.png", "b/link.png", "class/3.png", "class/in/4.png"]
    assert source.open("class/3.png").size == (40, 32)
    os.symlink(tmp_path / "data", tmp_path / "link")
    assert ImageSource(tmp_path / "link").names == source.names


def test_a_folder_that_cannot_be_opened_is_said():
    """As a user without rights, which the superuser can become for a moment."""
    with tempfile.TemporaryDirectory() as folder:
        save_images(folder, "open/1.png", "closed/2.png", "closed/3.png")
        os.chmod(folder, 0o755)
        os.chmod(Path(folder, "closed"), 0)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        try:
            source = ImageSource(folder)
        finally:
            if is_root:
                os.seteuid(0)
            os.chmod(Path(folder, "closed"), 0o700)
    assert source.names == ["open/1.png"]
    assert "closed" in source.account() and "can't be opened: Permission denied" in source.account()


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path, monkeypatch, capsys):
    save_images(tmp_path, "a.heic")                           # PNG's form: Pillow goes by content
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with one_line_error(capsys, "no images", "1 .heic", "pillow-heif"):
        ImageSource(tmp_path)
    heif = types.ModuleType("pillow_heif")
    heif.register_heif_opener = lambda: None
    monkeypatch.setitem(sys.modules, "pillow_heif", heif)
    source = ImageSource(tmp_path)
    assert source.names == ["a.heic"] and source.open("a.heic").size == (40, 32)
    assert "ignored" not in source.account()


def test_a_source_is_known_by_sizes_and_times_too(tmp_path):
    save_images(tmp_path, "a.png", "b.png")
    before = ImageSource(tmp_path).sha256
    assert ImageSource(f"{tmp_path}/").sha256 == before
    save_images(tmp_path, "a.png", size=(60, 50))             # another image under its name
    assert ImageSource(tmp_path).sha256 != before


def test_an_image_or_a_pattern_in_a_folders_place_is_recognised(tmp_path):
    save_images(tmp_path, "one.jpg", "two.jpg")
    for data in ("one.jpg", "*.jpg"):
        line = stage_error("vqgan.py", f"--data={data}", cwd=tmp_path)
        assert "one.jpg is a single image" in line and "folder" in line


def test_one_line_for_each_kind_of_reason_and_max_bad_decides(capsys):
    bad = BadImages(0.5, 400, "photos")
    bad.add({f"thumbs/{i:03d}.png": f"{i} x 3 pixels are too few for 64" for i in range(150)})
    bad.add({"z.png": "truncated"})
    out = capsys.readouterr().out
    assert out.count("\n") == 2 and "thumbs/000.png" in out and "z.png (truncated)" in out
    with one_line_error(capsys, "201 of 400", "--max_bad=0.5", "150 like thumbs", "51 like"):
        bad.add({f"y{i}.png": "truncated" for i in range(50)})


# --------------------------------------------------------------------------------- images out


def test_grids_have_tiles_one_can_see_and_labels(tmp_path):
    images = [Image.new("RGB", (32, 32), (i * 20, 0, 0)) for i in range(6)]
    save_grid(tmp_path / "g.png", [images[:3], images[3:]], ["photographs", "by the VQGAN"])
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    assert grid.shape[1] >= 3 * 96 and grid.shape[0] >= 2 * (96 + 12)
    for i in range(6):
        assert (grid == [i * 20, 0, 0]).all(-1).sum() >= 96 * 96 * (1 if i else 0)
    assert (grid[:16] < 100).all(-1).sum() > 50                # the first label, in black
    save_grid(tmp_path / "c.png", [images[3:]] * 2, ["ours", "theirs"],
              column_labels=["a", "b", "c"])
    columns = np.asarray(Image.open(tmp_path / "c.png"))
    assert columns.shape == (grid.shape[0] + 18, *grid.shape[1:])
    assert all((columns[:18, x:x + 96] < 100).all(-1).any() for x in (4, 104, 204))
    save_grid(tmp_path / "many.png", [images * 200], ["a\nprompt of two lines"])
    assert Image.open(tmp_path / "many.png").width < 3000


def test_files_of_an_earlier_call_do_not_mix_with_later_ones(tmp_path):
    image = Image.new("RGB", (8, 8))
    (tmp_path / "s").mkdir()
    (tmp_path / "s/mine.png").write_bytes(b"the user's own")
    save_each(tmp_path / "s", ["a-0.png", "a-1.png"], [image] * 2)
    save_each(tmp_path / "s", ["b-0.png"], [image])
    assert sorted(p.name for p in (tmp_path / "s").glob("*.png")) == ["b-0.png", "mine.png"]
    assert (tmp_path / "s/mine.png").read_bytes() == b"the user's own"
