"""One image in, of whatever mode, as 8-bit RGB; crops; and labelled grids of images out."""
import contextlib
import functools
import io
import math
import os
import stat
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont

from common.files import atomic_write

MAX_PIXELS = 100_000_000                          # of an image in: more is a decompression bomb
MIN_TILE, MAX_COLUMNS, MAX_WIDTH = 96, 16, 1800   # of a grid out


def open_image(path):
    """An image of any mode as 8-bit RGB, turned as its EXIF says, sRGB, transparency over white.
    `path` is a regular file or a BytesIO. Raises OSError or ValueError."""
    try:
        if not isinstance(path, io.BytesIO) and not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("not a plain file")  # a named pipe would be waited for
        with warnings.catch_warnings(action="ignore"):  # of damage that costs no pixels
            return decode(path)
    except (OSError, ValueError):
        raise
    except Exception as e:  # Pillow's readers raise many kinds on damaged files
        raise ValueError(f"{type(e).__name__}: {e}") from e


def decode(file):
    """open_image of a file, whose PNG texts are left out if Pillow finds them too long."""
    try:
        return decode_all(file)
    except ValueError as e:
        if "MAX_TEXT" not in str(e):
            raise
        data = file.getvalue() if isinstance(file, io.BytesIO) else Path(file).read_bytes()
        return decode_all(io.BytesIO(drop_png_texts(data)))


def decode_all(file):
    with Image.open(file) as im:
        if im.width * im.height > MAX_PIXELS:
            raise ValueError(f"{im.width} x {im.height} pixels are too many")
        if max(im.size) > 100 * min(im.size):
            raise ValueError(f"{im.width} x {im.height} pixels are too thin")
        orientation = read_orientation(im)
        profile, transparency = im.info.get("icc_profile"), "transparency" in im.info
        if im.mode in ("I", "F") or im.mode.startswith("I;16") or is_signed(im):
            im = to_8_bit(im)
        if im.mode in ("LA", "PA", "La", "RGBa") or transparency:
            im = im.convert("RGBA")
        elif im.mode == "P":
            im = im.convert("RGB")
        im = convert_profile(im, profile)
        if im.mode == "RGBA":
            im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
        im = im.convert("RGB")
        return im.transpose(orientation) if orientation is not None else im


def drop_png_texts(data):
    """A PNG file's bytes without its text chunks, which Pillow refuses if they are long."""
    out, start = [data[:8]], 8
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start:start + 4], "big")
        if data[start + 4:start + 8] not in (b"tEXt", b"zTXt", b"iTXt"):
            out.append(data[start:end])
        start = end
    return b"".join(out)


def read_orientation(im):
    """How to turn an image, by its EXIF, whose other entries may be damaged: a transposition."""
    turns = Image.Transpose
    with contextlib.suppress(Exception):
        return {2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM,
                5: turns.TRANSPOSE, 6: turns.ROTATE_270, 7: turns.TRANSVERSE,
                8: turns.ROTATE_90}.get(im.getexif().get(0x0112))
    return None


def is_signed(im):
    """Whether a TIFF says that its numbers have a sign, which Pillow's mode does not tell."""
    return getattr(im, "tag_v2", {}).get(339) == (2,)


def to_8_bit(im):
    """Integer and floating-point images -> 8-bit grey, scaled by the range that the file or the
    values tell: 1, 255, 32,767, 65,535, or the values' own."""
    x, (bits, *_) = np.asarray(im), getattr(im, "tag_v2", {}).get(258, (0,))
    if im.mode == "L":                             # signed bytes
        x = x.view(np.int8)
    elif im.mode == "I" and bits == 32 and not is_signed(im):
        x = x.view(np.uint32)                      # which Pillow takes as signed
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("pixels that are not finite")
    low, high = float(x.min()), float(x.max())
    if low < 0:
        x, top = x - low, high - low
    elif im.mode == "F" and high <= 16:            # 0 to 1 and a little above, or brighter than 1
        top = 1.0 if high <= 2 else high
    elif is_signed(im) and bits < 32:
        top = 127.0 if bits == 8 else 32767.0
    elif im.mode.startswith("I;16") or im.format == "PPM":
        top = 65535.0
    else:
        top = next((t for t in (255.0, 65535.0) if high <= t), high)
    return Image.fromarray((x * (255 / (top or 1))).round().clip(0, 255).astype(np.uint8))


@functools.lru_cache(16)
def profile_transform(profile, mode):
    """The transform from an ICC profile (bytes) to sRGB, or None where that changes nothing."""
    transform = ImageCms.buildTransform(
        ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), mode,
        "RGBA" if mode == "RGBA" else "RGB")
    if mode != "CMYK":  # whatever its name is: by what it does to 216 colours
        steps = np.arange(0, 256, 51, dtype=np.uint8)
        colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(12, 18, 3)
        probe = Image.fromarray(colours).convert(mode)
        before, after = (np.asarray(x.convert("RGB")).astype(int)
                         for x in (probe, ImageCms.applyTransform(probe, transform)))
        if np.abs(after - before).max() <= 2:
            return None
    return transform


def convert_profile(im, profile):
    """Colours of an embedded ICC profile other than sRGB -> sRGB; as they are if that fails."""
    with contextlib.suppress(Exception):
        if profile and im.mode in ("RGB", "RGBA", "L", "CMYK"):
            transform = profile_transform(profile, im.mode)
            return ImageCms.applyTransform(im, transform) if transform else im
    return im


def crop(image, size, zoom=1.0, x=0.5, y=0.5, flip=False):
    """A size x size crop, uint8 (size, size, 3): the short side is resized to zoom * size (bicubic)
    and the crop taken at x, y in [0, 1] of the room there is. The defaults are CLIP's own."""
    w, h = image.size
    short = round(size * zoom)
    w, h = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    left, top = round((w - size) * x), round((h - size) * y)
    if image.size != (w, h):
        image = image.resize((w, h), Image.Resampling.BICUBIC)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return pixels[:, ::-1] if flip else pixels


def random_crop(image, size, uniform, min_zoom, flip):
    """A random crop by four uniform numbers in [0, 1): zoom, x, y, flip. It shows between
    min_zoom and all of the short side; half of the crops are mirrored if flip."""
    zoom, x, y, mirror = uniform
    return crop(image, size, 1 / (1 - zoom * (1 - min_zoom)), x, y, flip and mirror < 0.5)


def to_tensor(pixels, device="cpu"):
    """uint8 (..., H, W, 3) -> float (..., 3, H, W) in [0, 1], sent to the device as bytes."""
    return torch.from_numpy(np.array(pixels)).to(device).movedim(-1, -3).float() / 255


def resize(pixels, size):
    """Images (B, 3, S, S) -> (B, 3, size, size), bicubic; as they are if they have that size."""
    if pixels.shape[-1] == size:
        return pixels
    return torch.nn.functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True)


# ------------------------------------------------------------------------------------- images out


def to_image(x):
    """An image (3, H, W) in [-1, 1] -> Pillow."""
    pixels = ((x.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.movedim(0, -1).cpu().numpy())


def save_grid(path, rows, labels, across=1, column_labels=()):
    """Rows of Pillow images of one size -> one PNG, tiles enlarged to at least 96 pixels, a label
    above each row. `across` rows lie side by side; a row of over 16 images is wrapped. A line at
    the top says what the columns are, if there are column_labels."""
    tile = max(1, -(-MIN_TILE // rows[0][0].width))
    w, h = rows[0][0].width * tile, rows[0][0].height * tile
    longest = max(len(row) for row in rows)
    columns = min(longest, MAX_COLUMNS)
    head, gap = 18, 4
    row_width, row_height = columns * (w + gap), math.ceil(longest / columns) * (h + gap) + head
    across = max(1, min(across, MAX_WIDTH // row_width))
    start = gap + (head if column_labels else 0)
    size = (across * row_width + gap, math.ceil(len(rows) / across) * row_height + start)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for j, text in enumerate(column_labels):
        pen.text((gap + j * (w + gap), gap), text[:w // 6], fill="black", font=font)
    for i, (row, label) in enumerate(zip(rows, labels)):
        left, top = gap + i % across * row_width, start + i // across * row_height
        for j, image in enumerate(row):
            place = left + j % columns * (w + gap), top + head + j // columns * (h + gap)
            sheet.paste(image.resize((w, h), Image.Resampling.NEAREST), place)
        text = " ".join(label.split())
        if text.encode("latin-1", "ignore").decode("latin-1") != text:
            text = f"{i}"  # the font has no such letters: sample.py says the prompt in its log
        pen.text((left, top), text[:row_width // 7], fill="black", font=font)
    with atomic_write(path) as f:
        sheet.save(f)


def save_each(folder, names, images):
    """Each image by itself, in place of those that an earlier call left in the folder."""
    listing = folder / ".files.txt"
    if listing.is_file():
        for name in listing.read_text(encoding="utf-8").splitlines():
            if name not in names and Path(name).name == name:
                (folder / name).unlink(missing_ok=True)
    for name, image in zip(names, images):
        with atomic_write(folder / name) as f:
            image.save(f)
    with atomic_write(listing) as f:
        f.write_text("\n".join(names), encoding="utf-8")
