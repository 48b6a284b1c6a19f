"""The drawings of the toy world, each object as a few polygons; and how they are read back."""
import csv
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common.images import open_image
from common.options import fail

OBJECTS = ("bus", "car", "house", "tree", "boat", "fish", "star", "heart", "moon", "flower", "cup",
           "mushroom")
COLOURS = {"red": (214, 34, 38), "yellow": (240, 204, 24), "green": (32, 150, 58),
           "blue": (34, 78, 204), "purple": (126, 42, 168), "pink": (248, 120, 186),
           "brown": (122, 74, 34), "black": (26, 26, 30)}
BACKGROUNDS = {"white": (250, 250, 248), "grey": (168, 170, 174), "sky": (166, 214, 246),
               "sand": (234, 212, 166)}
SIZES = {"small": (0.29, 0.34), "medium": (0.34, 0.38), "large": (0.38, 0.43)}  # half the width

def circle(x, y, r, n=40, start=0.0, turn=1.0):
    angles = [2 * math.pi * (start + turn * i / n) for i in range(n + 1)]
    return [(x + r * math.cos(a), y + r * math.sin(a)) for a in angles]


def box(left, top, right, bottom):
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def shapes(name):
    """The polygons of an object in a square of side 2 around 0, as (fill, points). Fills: c its
    colour, d the same but darker, w white, k dark grey, b the background."""
    if name == "bus":
        yield from [("c", box(-1, -.62, 1, .42)), ("d", box(-1, .2, 1, .42))]
        yield from [("w", box(x, -.44, x + .38, -.04)) for x in (-.86, -.36, .14)]
        yield ("w", box(.66, -.44, .92, .2))
        yield from [("k", circle(x, .44, .22)) for x in (-.55, .5)]
    elif name == "car":
        yield ("c", box(-1, -.1, 1, .38))
        yield ("c", [(-.62, -.1), (-.36, -.56), (.3, -.56), (.62, -.1)])
        yield ("w", [(-.44, -.1), (-.28, -.44), (-.06, -.44), (-.06, -.1)])
        yield ("w", [(.06, -.1), (.06, -.44), (.24, -.44), (.44, -.1)])
        yield from [("k", circle(x, .4, .25)) for x in (-.55, .55)]
    elif name == "house":
        yield from [("c", box(-.7, -.1, .7, .9)), ("d", [(-1, -.1), (0, -.95), (1, -.1)])]
        yield from [("k", box(-.5, .3, -.12, .9)), ("w", box(.16, .2, .52, .56))]
    elif name == "tree":
        yield ("k", box(-.13, .5, .13, 1))
        for w, y, h in ((.85, .6, .8), (.68, .14, .7), (.5, -.3, .65)):
            yield ("c", [(-w, y), (0, y - h), (w, y)])
    elif name == "boat":
        yield ("c", [(-1, .3), (1, .3), (.62, .8), (-.62, .8)])
        yield ("k", box(-.06, -.9, .04, .3))
        yield ("d", [(.1, -.85), (.1, .16), (.8, .16)])
        yield ("w", [(-.12, -.6), (-.12, .16), (-.7, .16)])
    elif name == "fish":
        yield ("d", [(.4, 0), (1, -.5), (1, .5)])
        yield ("c", [(x * 1.15 - .2, y * .8) for x, y in circle(0, 0, .7)])
        yield from [("w", circle(-.6, -.12, .15)), ("k", circle(-.63, -.12, .075))]
    elif name == "star":
        corners = [((1, .42)[i % 2], math.pi * i / 5) for i in range(10)]
        yield ("c", [(r * math.sin(a), -r * math.cos(a)) for r, a in corners])
    elif name == "heart":
        yield ("c", [heart(2 * math.pi * i / 60) for i in range(60)])
    elif name == "moon":  # along the outer circle, and back along the one that cuts it
        inner = circle(.4, -.27, .77, 40, .705, -.665)
        yield ("c", circle(0, 0, .95, 40, .07, .61) + inner)
    elif name == "flower":
        yield ("k", box(-.06, .1, .06, 1))
        yield from [("c", circle(x, y, .32)) for x, y in circle(0, -.3, .42, 6)]
        yield ("w", circle(0, -.3, .24))
    elif name == "cup":
        yield from [("d", circle(.62, .05, .38)), ("b", circle(.62, .05, .2))]
        yield ("c", [(-.8, -.65), (.6, -.65), (.48, .75), (-.68, .75)])
        yield ("w", box(-.8, -.75, .6, -.58))
    elif name == "mushroom":
        yield from [("w", box(-.26, 0, .26, .9)), ("d", box(-.26, 0, .26, .12))]
        yield ("c", circle(0, .05, .98, 40, .5, .5))
        yield from [("w", circle(x, y, .14)) for x, y in ((-.5, -.25), (.05, -.6), (.5, -.2))]


def heart(a):
    """The point of a heart's outline at angle a."""
    y = 13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
    return .062 * 16 * math.sin(a) ** 3, -.06 * y - .08


def draw(size, object_name, colour, background, radius, x, y, shade):
    """An anti-aliased drawing as a Pillow image: an object at (x, y) of half-width `radius`, all in
    image sides, its colour (r, g, b) made brighter by the factor `shade`."""
    big = size * 4
    c = tuple(min(255, int(v * shade)) for v in colour)
    fills = {"c": c, "d": tuple(int(v * 0.72) for v in c), "w": (255, 255, 255),
             "k": (64, 60, 62), "b": background}
    im = Image.new("RGB", (big, big), background)
    pen = ImageDraw.Draw(im)
    for fill, points in shapes(object_name):
        points = [((x + px * radius) * big, (y + py * radius) * big) for px, py in points]
        pen.polygon(points, fill=fills[fill])
    return im.resize((size, size), Image.Resampling.BOX)


def read_world(folder, *splits):
    """Images of these splits, uint8 (N, S, S, 3), and their rows of captions.tsv. For stage 0
    and the evaluation alone."""
    try:
        with open(Path(folder) / "captions.tsv", newline="") as f:
            rows = list(csv.DictReader(f, delimiter="\t"))
        world = json.loads(Path(folder, "world.json").read_text())
        if len(rows) != world["train_images"] + world["heldout_images"] or (
                {row["split"] for row in rows} - {"train", "unseen", "heldout"}):
            raise ValueError("captions.tsv is cut")
        rows = [row for row in rows if row["split"] in splits]
        images = [np.asarray(open_image(Path(folder) / row["path"])) for row in rows]
    except OSError as e:
        fail(f"{folder} is no whole toy world ({e.filename}: {e.strerror}); draw it with toy.py")
    except (ValueError, KeyError, TypeError) as e:
        fail(f"{folder} is a damaged toy world ({e}); remove it and draw it again with toy.py")
    return np.stack(images), rows
