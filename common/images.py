"""One image in, of whatever mode, as 8-bit RGB; crops; and labelled grids of images out."""
import contextlib
import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont

from common.files import atomic_write

MAX_PIXELS = 100_000_000                          # of an image in: more is a decompression bomb
MIN_TILE, MAX_COLUMNS, MAX_WIDTH = 96, 16, 1800   # of a grid out


def open_image(path):
    """An image of any mode as 8-bit RGB, turned as its EXIF says, sRGB, transparency over white.
    Raises OSError or ValueError."""
    try:
        with Image.open(path) as im:
            if im.width * im.height > MAX_PIXELS:
                raise ValueError(f"{im.width} x {im.height} pixels are too many")
            if max(im.size) > 100 * min(im.size):
                raise ValueError(f"{im.width} x {im.height} pixels are too thin")
            orientation = read_orientation(im)
            profile, transparency = im.info.get("icc_profile"), "transparency" in im.info
            if im.mode in ("I", "F") or im.mode.startswith("I;16"):
                im = to_8_bit(im)
            if im.mode in ("LA", "PA", "La", "RGBa") or transparency:
                im = im.convert("RGBA")
            im = convert_profile(im, profile)
            if im.mode == "RGBA":
                im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
            im = im.convert("RGB")
            return im.transpose(orientation) if orientation is not None else im
    except (OSError, ValueError):
        raise
    except Exception as e:  # Pillow's readers raise many kinds on damaged files
        raise ValueError(f"{type(e).__name__}: {e}") from e


def read_orientation(im):
    """How to turn an image, by its EXIF, whose other entries may be damaged: a transposition."""
    turns = Image.Transpose
    with contextlib.suppress(Exception):
        return {2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM,
                5: turns.TRANSPOSE, 6: turns.ROTATE_270, 7: turns.TRANSVERSE,
                8: turns.ROTATE_90}.get(im.getexif().get(0x0112))
    return None


def to_8_bit(im):
    """Integer and floating-point images -> 8-bit grey, scaled by the range that mode or values
    tell: 1, 255, 65,535, or the values' own."""
    x = np.asarray(im).astype(np.float64)
    if not np.isfinite(x).all():
        raise ValueError("pixels that are not finite")
    low, high = float(x.min()), float(x.max())
    if low < 0:                                    # signed: by its own range
        x, top = x - low, high - low
    elif im.mode.startswith("I;16"):
        top = 65535.0
    elif im.mode == "F" and high <= 1:
        top = 1.0
    else:
        top = 255.0 if high <= 255 and im.mode == "F" else 65535.0 if high <= 65535 else high
    scaled = x * (255 / (top or 1)) if top != 65535.0 else x.astype(np.float32) / 257
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8))


def convert_profile(im, profile):
    """Colours of an embedded ICC profile other than sRGB -> sRGB; as they are if that fails."""
    with contextlib.suppress(Exception):
        if profile and im.mode in ("RGB", "RGBA", "L", "CMYK"):
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(source):
                mode = "RGBA" if im.mode == "RGBA" else "RGB"
                return ImageCms.profileToProfile(im, source, ImageCms.createProfile("sRGB"),
                                                 outputMode=mode)
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


def save_grid(path, rows, labels, across=1):
    """Rows of Pillow images of one size -> one PNG, tiles enlarged to at least 96 pixels, a label
    above each row. `across` rows lie side by side; a row of over 16 images is wrapped."""
    tile = max(1, -(-MIN_TILE // rows[0][0].width))
    w, h = rows[0][0].width * tile, rows[0][0].height * tile
    longest = max(len(row) for row in rows)
    columns = min(longest, MAX_COLUMNS)
    head, gap = 18, 4
    row_width, row_height = columns * (w + gap), math.ceil(longest / columns) * (h + gap) + head
    across = max(1, min(across, MAX_WIDTH // row_width))
    size = (across * row_width + gap, math.ceil(len(rows) / across) * row_height + gap)
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, (row, label) in enumerate(zip(rows, labels)):
        left, top = gap + i % across * row_width, gap + i // across * row_height
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
