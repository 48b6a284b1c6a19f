"""What lab/explain.py draws with: labelled tiles, sheets of them, grids of text, charts."""
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.files import atomic_write

COLOURS = ("#1f5fbf", "#d0442e", "#2e8b4a", "#8a5aa8", "#c58a1b")
FONT = ImageFont.load_default(13)


def write_text(sheet, text, x, y):
    """A line of text, centred at x, below y."""
    ImageDraw.Draw(sheet).text((x, y), text, fill="black", font=FONT, anchor="ma")


def tile(image, text="", side=96, mark=None, cells=4):
    """A Pillow image at side x side, a line of text below; `mark` (row, column) frames a cell."""
    sheet = Image.new("RGB", (side, side + (18 if text else 0)), "white")
    sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (0, 0))
    pen = ImageDraw.Draw(sheet)
    if mark is not None:
        y, x = (m * side / cells for m in mark)
        pen.rectangle([x, y, x + side / cells - 1, y + side / cells - 1], outline="red", width=2)
    write_text(sheet, text, side / 2, side + 2)
    return sheet


def to_palette(sheet, colours):
    """An image in the colours that stand for all of it best, found on a ninth of its pixels; white
    and black stay as they are."""
    small = sheet.resize((sheet.width // 3, sheet.height // 3), Image.Resampling.NEAREST)
    best = small.quantize(colours - 2, kmeans=2, dither=Image.Dither.NONE).getpalette()
    palette = Image.new("P", (1, 1))
    palette.putpalette([255, 255, 255, 0, 0, 0, *best[:3 * (colours - 2)]])
    return sheet.quantize(palette=palette, dither=Image.Dither.NONE)


def save_sheet(path, rows, titles=(), gap=4, colours=255):
    """Rows of Pillow images -> one PNG in a palette, a title above each row that has one."""
    titles = [*titles, *[""] * (len(rows) - len(titles))]
    heights = [max(x.height for x in row) + gap + (20 if title else 0)
               for row, title in zip(rows, titles)]
    width = max(sum(x.width + gap for x in row) for row in rows) + gap
    sheet, top = Image.new("RGB", (width, sum(heights) + gap), "white"), gap
    pen = ImageDraw.Draw(sheet)
    for row, title, height in zip(rows, titles, heights):
        pen.text((gap, top), title, fill="black", font=FONT)
        left = gap
        for image in row:
            sheet.paste(image, (left, top + (20 if title else 0)))
            left += image.width + gap
        top += height
    with atomic_write(path) as f:
        to_palette(sheet, colours).save(f, format="PNG", optimize=True)


def text_grid(texts, width, height, image=None, shades=None):
    """Texts, a list of rows, in the cells of a grid: over an image, or over shades in [0, 1]."""
    sheet = Image.new("RGB", (width, height), "white")
    if image is not None:
        pale = Image.blend(image.convert("RGB"), Image.new("RGB", image.size, "white"), 0.45)
        sheet.paste(pale.resize((width, height), Image.Resampling.NEAREST))
    pen = ImageDraw.Draw(sheet)
    h, w = height / len(texts), width / len(texts[0])
    for y, row in enumerate(texts):
        for x, text in enumerate(row):
            box = [x * w, y * h, (x + 1) * w - 1, (y + 1) * h - 1]
            shade = 0.0 if shades is None else float(shades[y][x])
            blue = tuple(int(255 - shade * (255 - c)) for c in (31, 95, 191))
            pen.rectangle(box, fill=None if shades is None else blue, outline="#999999")
            pen.text((box[0] + w / 2, box[1] + h / 2), text, font=FONT, anchor="mm",
                     fill="white" if shade > 0.6 else "black", stroke_width=2 * (image is not None),
                     stroke_fill="white")
    return sheet


def axes(title, xs, ys, width=330, height=250):
    """An empty panel (sheet, pen, at): at(x, y) is the place of a point whose coordinates lie in
    the ranges xs and ys, (low, high), which are written at the axes."""
    sheet = Image.new("RGB", (width, height), "white")
    pen, left, top, bottom = ImageDraw.Draw(sheet), 44, 26, height - 24

    def at(x, y):
        return (left + (width - left - 10) * (x - xs[0]) / (xs[1] - xs[0] or 1),
                bottom - (bottom - top) * (y - ys[0]) / (ys[1] - ys[0] or 1))
    pen.text((left, 4), title, fill="black", font=FONT)
    pen.rectangle([at(xs[0], ys[1]), at(xs[1], ys[0])], outline="#bbbbbb")
    for end, anchor in zip((0, 1), ("la", "ra")):
        pen.text((at(xs[end], ys[0])[0], bottom + 4), f"{xs[end]:.3g}", fill="black", font=FONT,
                 anchor=anchor)
        pen.text((left - 5, at(xs[0], ys[end])[1]), f"{ys[end]:.3g}", fill="black", font=FONT,
                 anchor="rs" if end == 0 else "rt")
    return sheet, pen, at


def legend(sheet, names):
    """Names in the colours of what they name, at the right of a panel's title."""
    right = sheet.width - 10
    for i, name in reversed(list(enumerate(names))):
        ImageDraw.Draw(sheet).text((right, 4), name, fill=COLOURS[i], font=FONT, anchor="ra")
        right -= FONT.getlength(name) + 10


def line_chart(title, lines, low=None):
    """A panel of lines {name: [(x, y)]} from `low` on; few points get dots."""
    points = [point for line in lines.values() for point in line]
    x, y = np.array(points, float).T
    low = y.min() if low is None else low
    sheet, pen, at = axes(title, (x.min(), x.max()), (low, y.max()))
    for i, line in enumerate(lines.values()):
        places = [at(*point) for point in line]
        pen.line(places, fill=COLOURS[i], width=1 if len(line) > 50 else 2)
        for px, py in places if len(line) < 50 else ():
            pen.ellipse([px - 3, py - 3, px + 3, py + 3], fill=COLOURS[i])
    legend(sheet, lines)
    return sheet


def scatter(title, groups, shown=None, width=330, height=270):
    """A panel of points {name: (N, 2)}; it reaches as far as the points `shown` (M, 2) do, or as
    its own."""
    shown = np.concatenate(list(groups.values())) if shown is None else shown
    (x0, y0), (x1, y1) = shown.min(0), shown.max(0)
    sheet, pen, at = axes(title, (x0, x1), (y0, y1), width, height)
    for i, group in enumerate(groups.values()):
        for x, y in group.tolist():
            px, py = at(x, y)
            pen.ellipse([px - 2, py - 2, px + 2, py + 2], fill=COLOURS[i])
    legend(sheet, groups)
    return sheet


def bars(title, values, pictures, texts, side=48, height=70):
    """A panel of bars, values in [0, 1] (n,), each over a picture (Pillow) and a text."""
    width = len(values) * (side + 6) + 8
    sheet = Image.new("RGB", (width, 20 + height + 16 + side + 18), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((4, 2), title, fill="black", font=FONT)
    for i, (value, picture, text) in enumerate(zip(values, pictures, texts)):
        left, base = 4 + i * (side + 6), 36 + height
        pen.rectangle([left + 8, base - value * height, left + side - 8, base], fill=COLOURS[0])
        pen.text((left + side / 2, base - value * height - 2), f"{value:.0%}", fill="black",
                 font=FONT, anchor="ms")
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, base + 2))
        pen.text((left + side / 2, base + side + 4), text, fill="black", font=FONT, anchor="ma")
    return sheet
