"""Stage 0: a world small enough for any desk.

Draws pictures of coloured things (a red bus, a small blue fish ...), with a caption for each in a file apart, and
trains a small CLIP on drawings and captions. That CLIP stands in for OpenAI's, and like OpenAI's it has read captions;
the VQGAN and the GPT of the later stages see the pictures alone, and not all of them: drawings of the pairs in UNSEEN
(a purple bus ...) lie in a folder apart, for CLIP only. Whoever draws such a pair has composed it. With OpenAI's
weights and your own photos this stage is not needed."""
import csv
import json
import math
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from common import (Amount, Clip, Count, Device, Dtype, Machine, Progress, Run, Whole, clip_package, configure, fail,
                    learning_rate, millions, open_picture, resized, save_grid, to_tensor, whole, write_json)


@dataclass
class Config:
    data: str = "data/toy"              # the world: train/, unseen/, heldout/ and captions.tsv
    out: str = "out/toy"                # clip.pt, and the run that made it
    seed: Whole = 0                     # of drawing and training
    # the world
    train_pictures: Count = 20000       # drawings to learn from: train/ for all stages, an eighth, unseen/, for CLIP
    heldout_pictures: Count = 2000      # drawings kept for judging
    image_size: Count = 64              # pixels a side
    # the toy CLIP
    vision_width: Count = 16            # of the ModifiedResNet, a multiple of 2
    text_width: Count = 64              # of the text transformer, a multiple of 64
    text_layers: Count = 2              # its depth
    context: Count = 24                 # tokens of text it reads
    embed_dim: Count = 64               # size of the shared embedding
    max_steps: Count = 450              # training steps
    batch_size: Count = 128             # pairs a step
    learning_rate: Amount = 2e-3        # peak, AdamW
    warmup: Whole = 40                  # steps of linear warm-up
    save_every: Count = 150             # steps between checkpoints
    workers: Whole = 2                  # drawing processes
    device: Device = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "auto"               # of autocast: auto, float32, bfloat16, float16


OBJECTS = ("bus", "car", "house", "tree", "boat", "fish", "star", "heart", "moon", "flower", "cup", "mushroom")
COLOURS = {"red": (214, 34, 38), "yellow": (240, 204, 24), "green": (32, 150, 58), "blue": (34, 78, 204),
           "purple": (126, 42, 168), "pink": (248, 120, 186), "brown": (122, 74, 34), "black": (26, 26, 30)}
BACKGROUNDS = {"white": (250, 250, 248), "grey": (168, 170, 174), "sky": (166, 214, 246), "sand": (234, 212, 166)}
SIZES = {"small": (0.29, 0.34), "medium": (0.34, 0.38), "large": (0.38, 0.43)}  # half the width, in picture sides
UNSEEN = (("purple", "bus"), ("green", "car"), ("blue", "house"), ("pink", "tree"), ("black", "boat"),
          ("yellow", "fish"), ("brown", "star"), ("green", "heart"), ("red", "moon"), ("blue", "flower"),
          ("pink", "cup"), ("black", "mushroom"))  # what neither the VQGAN nor the GPT ever sees together
CAPTIONS = ("a {colour} {object}", "a {size} {colour} {object}", "a {colour} {object} on a {background} background",
            "a {size} {colour} {object} on a {background} background", "a {object}", "something {colour}")


def circle(x, y, r, n=40, start=0.0, turn=1.0):
    angles = [2 * math.pi * (start + turn * i / n) for i in range(n + 1)]
    return [(x + r * math.cos(a), y + r * math.sin(a)) for a in angles]


def box(left, top, right, bottom):
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def shapes(name):
    """The polygons of an object in a square of side 2 around 0, as (fill, points). Fills: c its colour, d the same but
    darker, w white, k dark grey."""
    if name == "bus":
        yield from [("c", box(-1, -.62, 1, .42)), ("d", box(-1, .2, 1, .42))]
        yield from [("w", box(x, -.44, x + .38, -.04)) for x in (-.86, -.36, .14)] + [("w", box(.66, -.44, .92, .2))]
        yield from [("k", circle(x, .44, .22)) for x in (-.55, .5)]
    elif name == "car":
        yield from [("c", box(-1, -.1, 1, .38)), ("c", [(-.62, -.1), (-.36, -.56), (.3, -.56), (.62, -.1)])]
        yield from [("w", [(-.44, -.1), (-.28, -.44), (-.06, -.44), (-.06, -.1)]),
                    ("w", [(.06, -.1), (.06, -.44), (.24, -.44), (.44, -.1)])]
        yield from [("k", circle(x, .4, .25)) for x in (-.55, .55)]
    elif name == "house":
        yield from [("c", box(-.7, -.1, .7, .9)), ("d", [(-1, -.1), (0, -.95), (1, -.1)])]
        yield from [("k", box(-.5, .3, -.12, .9)), ("w", box(.16, .2, .52, .56))]
    elif name == "tree":
        yield ("k", box(-.13, .5, .13, 1))
        yield from [("c", [(-w, y), (0, y - h), (w, y)]) for w, y, h in ((.85, .6, .8), (.68, .14, .7), (.5, -.3, .65))]
    elif name == "boat":
        yield from [("c", [(-1, .3), (1, .3), (.62, .8), (-.62, .8)]), ("k", box(-.06, -.9, .04, .3))]
        yield from [("d", [(.1, -.85), (.1, .16), (.8, .16)]), ("w", [(-.12, -.6), (-.12, .16), (-.7, .16)])]
    elif name == "fish":
        yield from [("d", [(.4, 0), (1, -.5), (1, .5)]), ("c", [(x * 1.15 - .2, y * .8) for x, y in circle(0, 0, .7)])]
        yield from [("w", circle(-.6, -.12, .15)), ("k", circle(-.63, -.12, .075))]
    elif name == "star":
        yield ("c", [(r * math.sin(a), -r * math.cos(a)) for i in range(10)
                     for r, a in [((1, .42)[i % 2], math.pi * i / 5)]])
    elif name == "heart":
        yield ("c", [(.062 * 16 * math.sin(a) ** 3, -.06 * (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a)
                      - math.cos(4 * a)) - .08) for a in (2 * math.pi * i / 60 for i in range(60))])
    elif name == "moon":  # along the outer circle, and back along the one that cuts it
        yield ("c", circle(0, 0, .95, 40, .07, .61) + circle(.4, -.27, .77, 40, .705, -.665))
    elif name == "flower":
        yield ("k", box(-.06, .1, .06, 1))
        yield from [("c", circle(x, y, .32)) for x, y in circle(0, -.3, .42, 6)]
        yield ("w", circle(0, -.3, .24))
    elif name == "cup":
        yield from [("d", circle(.62, .05, .38)), ("b", circle(.62, .05, .2))]
        yield from [("c", [(-.8, -.65), (.6, -.65), (.48, .75), (-.68, .75)]), ("w", box(-.8, -.75, .6, -.58))]
    elif name == "mushroom":
        yield from [("w", box(-.26, 0, .26, .9)), ("d", box(-.26, 0, .26, .12)), ("c", circle(0, .05, .98, 40, .5, .5))]
        yield from [("w", circle(x, y, .14)) for x, y in ((-.5, -.25), (.05, -.6), (.5, -.2))]


def draw(size, object, colour, background, radius, x, y, shade):
    """One anti-aliased drawing: the thing at (x, y) with half-width `radius` (all in picture sides), its colour's
    brightness changed by the factor `shade`. Returns a Pillow picture."""
    big = size * 4
    c = tuple(min(255, int(v * shade)) for v in COLOURS[colour])
    fills = {"c": c, "d": tuple(int(v * 0.72) for v in c), "w": (255, 255, 255), "k": (64, 60, 62),
             "b": BACKGROUNDS[background]}
    im = Image.new("RGB", (big, big), BACKGROUNDS[background])
    pen = ImageDraw.Draw(im)
    for fill, points in shapes(object):
        pen.polygon([((x + px * radius) * big, (y + py * radius) * big) for px, py in points], fill=fills[fill])
    return im.resize((size, size), Image.Resampling.BOX)


def draw_one(folder, seed, i, size, split):
    """Draw picture number i of the world into its file and return its row of captions.tsv. Pictures to train on that
    show an unseen pair go to the split of that name."""
    rng = np.random.default_rng((seed, i))
    fact = {name: str(rng.choice(list(options))) for name, options in
            (("object", OBJECTS), ("colour", COLOURS), ("background", BACKGROUNDS), ("size", SIZES))}
    x, y = rng.uniform(0.42, 0.58, 2)
    picture = draw(size, fact["object"], fact["colour"], fact["background"], rng.uniform(*SIZES[fact["size"]]), x, y,
                   rng.uniform(0.9, 1.1))
    caption = str(rng.choice(CAPTIONS, p=(.3, .15, .2, .15, .1, .1)))
    caption = caption.replace("{size} ", "" if fact["size"] == "medium" else "{size} ").format(**fact)
    if split == "train" and (fact["colour"], fact["object"]) in UNSEEN:
        split = "unseen"
    path = f"{split}/{i:06d}.png"
    picture.save(f"{folder}/{path}", compress_level=1)
    return {"path": path, **fact, "caption": caption, "split": split}


class Drawings(torch.utils.data.Dataset):
    """Item c: pictures 100c .. 100c+99 drawn into their files, as a list of their rows."""

    def __init__(self, folder, cfg):
        self.folder, self.cfg, self.total = folder, cfg, cfg.train_pictures + cfg.heldout_pictures

    def __len__(self):
        return -(-self.total // 100)

    def __getitem__(self, c):
        return [draw_one(self.folder, self.cfg.seed, i, self.cfg.image_size,
                         "train" if i < self.cfg.train_pictures else "heldout")
                for i in range(100 * c, min(self.total, 100 * c + 100))]


def draw_world(cfg, run):
    """Draw all pictures and captions.tsv into cfg.data, whole or not at all."""
    world = {k: v for k, v in asdict(cfg).items() if k in ("seed", "train_pictures", "heldout_pictures", "image_size")}
    world["unseen"] = [" ".join(pair) for pair in UNSEEN]
    folder = Path(cfg.data)
    if folder.exists():
        try:
            found = json.loads((folder / "world.json").read_text())
        except (OSError, ValueError):
            fail(f"{folder} exists and is no toy world; choose another folder with --data")
        if found != world:
            fail(f"{folder} holds a world drawn with {found}; repeat that, or choose another folder with --data")
        return
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    drawings = Drawings(str(partial), cfg)
    bar = Progress(drawings.total, unit="drawing")
    try:
        for split in ("train", "unseen", "heldout"):
            (partial / split).mkdir(parents=True)
        with open(partial / "captions.tsv", "w", newline="") as f:
            rows = csv.DictWriter(f, ["path", "object", "colour", "background", "size", "caption", "split"],
                                  delimiter="\t", lineterminator="\n")
            rows.writeheader()
            for some in torch.utils.data.DataLoader(drawings, None, num_workers=cfg.workers):
                rows.writerows(some)
                bar(len(some))
                if run.told:
                    print(f"stopped; the same command draws {folder} from the start", flush=True)
                    sys.exit(130)
        write_json(partial / "world.json", world)
        partial.rename(folder)
    except OSError as e:
        fail(f"could not write {partial}: {e.strerror or e}; choose another folder with --data")


def read_world(folder, *splits):
    """Drawings of these splits as uint8 (N, S, S, 3) and their rows of captions.tsv. For this stage and evaluation."""
    try:
        with open(Path(folder) / "captions.tsv", newline="") as f:
            rows = [row for row in csv.DictReader(f, delimiter="\t") if row["split"] in splits]
    except OSError:
        fail(f"{folder} is no toy world (no captions.tsv); draw one with toy.py")
    return np.stack([np.asarray(open_picture(Path(folder) / row["path"])) for row in rows]), rows


@torch.no_grad()
def zero_shot(clip, pictures, rows):
    """Share of pictures whose own "a {colour} {object}" is nearest among all such prompts."""
    pairs = [(c, o) for c in COLOURS for o in OBJECTS]
    texts = clip.text([f"a {c} {o}" for c, o in pairs])                                           # (96, D)
    images = torch.cat([clip.image(resized(to_tensor(part), clip.size).to(clip.device))
                        for part in np.array_split(pictures, 20)])                                # (N, D)
    hits = (images @ texts.T).argmax(1).tolist()
    return float(np.mean([pairs[h] == (r["colour"], r["object"]) for h, r in zip(hits, rows)]))


def main():
    cfg = configure(Config)
    if cfg.image_size < 32 or cfg.text_width % 64 or cfg.vision_width % 2 or cfg.batch_size < 2:
        fail("--image_size must be 32 or more, --batch_size 2, --text_width a multiple of 64, --vision_width of 2")
    machine = Machine(cfg.device, cfg.dtype)
    run = Run("toy", cfg, machine, {})
    machine.say(f"toy: {cfg.train_pictures} + {cfg.heldout_pictures} drawings of {cfg.image_size} px in {cfg.data}, "
                f"then a CLIP of them in {cfg.max_steps} steps of {cfg.batch_size}, on {machine}; "
                f"writes {cfg.out}/clip.pt")
    draw_world(cfg, run)
    if machine.dtype == torch.float16:
        machine.dtype = torch.float32  # small enough to do without, and so without a gradient scaler

    torch.manual_seed(cfg.seed)
    size = cfg.image_size // 32 * 32
    model = clip_package()[0].CLIP(cfg.embed_dim, size, (1, 1, 1, 1), cfg.vision_width, None, cfg.context, 49408,
                                   cfg.text_width, cfg.text_width // 64, cfg.text_layers).to(machine.device)
    optimizer = torch.optim.AdamW(model.parameters(), 0.0, (0.9, 0.98), weight_decay=0.05, fused=machine.fused)
    if run.resume:
        model.load_state_dict(run.resume["model"])
        optimizer.load_state_dict(run.resume["optimizer"])
    pictures, rows = read_world(cfg.data, "train", "unseen")
    clip = Clip(model, "toy", machine.device)
    captions, index = np.unique([r["caption"] for r in rows], return_inverse=True)
    texts = clip.tokenize(captions.tolist())[0]                                                   # (captions, context)
    machine.say(f"{millions(model)}, {len(captions)} different captions")
    bar = Progress(cfg.max_steps, run.step)
    for step in range(run.step, cfg.max_steps):
        rng = np.random.default_rng((cfg.seed, 1, step))
        batch = rng.choice(len(pictures), cfg.batch_size)
        pixels = resized(to_tensor(pictures[batch]).to(machine.device), size)                      # (B, 3, S, S)
        same = torch.as_tensor(index[batch][:, None] == index[batch][None]).float().to(machine.device)
        target = same / same.sum(1, keepdim=True)                                                 # (B, B) equals share
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg.learning_rate, cfg.warmup, cfg.max_steps)
        with machine.autocast():
            image = F.normalize(model.encode_image(clip.normalize(pixels)).float(), dim=-1)       # (B, D)
            text = F.normalize(model.encode_text(texts[index[batch]].to(machine.device)).float(), dim=-1)
        logits = model.logit_scale.exp() * image @ text.T                                         # (B, B)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        good = math.isfinite(loss.item() + norm.item())
        run.skip(step, good)
        if good:
            optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        run.log(step=step + 1, loss=loss.item(), lr=group["lr"])
        bar(loss=loss.item())
        if step + 1 == cfg.max_steps:
            heldout, rows = read_world(cfg.data, "heldout")
            accuracy = zero_shot(Clip(model.eval(), "toy", machine.device), heldout, rows)
            run.log(step=step + 1, zero_shot=accuracy)
            machine.say(f"toy CLIP names colour and object of {accuracy:.1%} of {len(rows)} held-out drawings")
            save_grid(f"{cfg.out}/world.png", [Image.fromarray(p) for p in heldout[:96]], 12)
        if run.asked_to_stop() or (step + 1) % cfg.save_every == 0 or step + 1 == cfg.max_steps:
            run.save(step + 1, model=model.state_dict(), optimizer=optimizer.state_dict())

    with whole(f"{cfg.out}/clip.pt") as f:
        torch.save(model.state_dict(), f)
    run.finish()
    machine.say(f"wrote {cfg.out}/clip.pt and {cfg.out}/world.png; "
                f"next: python vqgan.py --data={cfg.data}/train --clip={cfg.out}/clip.pt --out={cfg.out}")


if __name__ == "__main__":
    main()
