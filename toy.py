"""Stage 0: a world small enough for any desk.

Draws images of coloured things (a red bus, a small blue fish ...), with a caption for each in a
file apart, and trains a small CLIP on drawings and captions. That CLIP stands in for OpenAI's, and
like OpenAI's it has read captions; the VQGAN and the GPT of the later stages see the images alone,
and not all of them: drawings of the pairs in UNSEEN (a purple bus ...) lie in a folder apart, for
CLIP only. Whoever draws such a pair has composed it. With OpenAI's weights and your own photos this
stage is not needed."""
import csv
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.clip_training import make_clip_state, train_clip
from common.drawings import BACKGROUNDS, COLOURS, OBJECTS, SIZES, draw, read_world
from common.files import save_tensors, write_json
from common.images import resize, save_grid, to_tensor
from common.openai_clip import Clip
from common.options import check_range, fail, format_command, parse_options
from common.process import run_main, start_worker
from common.progress import Progress
from common.runs import Run
from common.runtime import Runtime, format_size


@dataclass
class Config:
    data: str = "data/toy"           # the world: train/, unseen/, heldout/ and captions.tsv
    out: str = "out/toy"             # clip.pt, and the run that made it
    fresh: bool = False              # replace the run that is in --out
    seed: int = 0                    # of drawing and training
    # the world
    train_images: int = 20000        # to learn from; an eighth, in unseen/, is for CLIP alone
    heldout_images: int = 2000       # kept for judging
    image_size: int = 64             # pixels a side
    # the toy CLIP
    vision_width: int = 16           # of the ModifiedResNet, a multiple of 2
    text_width: int = 64             # of the text transformer, a multiple of 64
    text_layers: int = 2             # its depth
    context: int = 24                # tokens of text it reads
    embed_dim: int = 64              # length of an embedding
    max_steps: int = 450             # training steps
    batch_size: int = 128            # pairs a step
    learning_rate: float = 2e-3      # peak, Muon and AdamW
    warmup: int = 40                 # steps of linear warm-up
    save_every: int = 150            # steps between checkpoints
    workers: int = 2                 # drawing processes
    device: str = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"              # of autocast: auto, float32, bfloat16, float16


UNSEEN = (("purple", "bus"), ("green", "car"), ("blue", "house"), ("pink", "tree"),
          ("black", "boat"), ("yellow", "fish"), ("brown", "star"), ("green", "heart"),
          ("red", "moon"), ("blue", "flower"), ("pink", "cup"), ("black", "mushroom"))
CAPTIONS = {  # template: its probability
    "a {colour} {object}": .2, "a {object} that is {colour}": .25, "a {object}": .1,
    "a {size} {colour} {object}": .1, "a {colour} {object} on a {background} background": .15,
    "a {size} {colour} {object} on a {background} background": .1, "something {colour}": .1}


def draw_one(folder, seed, i, size, split):
    """Draw image number i of the world into its file and return its row of captions.tsv. Training
    images that show an unseen pair go to the split of that name."""
    rng = np.random.default_rng((seed, i))
    kinds = {"object": OBJECTS, "colour": COLOURS, "background": BACKGROUNDS, "size": SIZES}
    fact = {name: str(rng.choice(list(options))) for name, options in kinds.items()}
    x, y = rng.uniform(0.42, 0.58, 2)
    radius, shade = rng.uniform(*SIZES[fact["size"]]), rng.uniform(0.9, 1.1)
    colour, background = COLOURS[fact["colour"]], BACKGROUNDS[fact["background"]]
    image = draw(size, fact["object"], colour, background, radius, x, y, shade)
    caption = str(rng.choice(list(CAPTIONS), p=list(CAPTIONS.values())))
    if fact["size"] == "medium":
        caption = caption.replace("{size} ", "")
    if split == "train" and (fact["colour"], fact["object"]) in UNSEEN:
        split = "unseen"
    path = f"{split}/{i:06d}.png"
    image.save(f"{folder}/{path}", compress_level=1)
    return {"path": path, **fact, "caption": caption.format(**fact), "split": split}


class Drawings(torch.utils.data.Dataset):
    """Item c: images 100c .. 100c+99 drawn into their files, as a list of their rows."""

    def __init__(self, folder, cfg):
        self.folder, self.cfg = folder, cfg
        self.total = cfg.train_images + cfg.heldout_images

    def __len__(self):
        return -(-self.total // 100)

    def __getitem__(self, c):
        cfg, numbers = self.cfg, range(100 * c, min(self.total, 100 * c + 100))
        return [draw_one(self.folder, cfg.seed, i, cfg.image_size,
                         "train" if i < cfg.train_images else "heldout") for i in numbers]


def draw_world(cfg):
    """Draw all images and captions.tsv into cfg.data, whole or not at all."""
    chosen = ("seed", "train_images", "heldout_images", "image_size")
    world = {k: v for k, v in asdict(cfg).items() if k in chosen}
    world |= {"unseen": [" ".join(pair) for pair in UNSEEN], "captions": CAPTIONS}
    folder = Path(cfg.data)
    if folder.exists():
        try:
            found = json.loads((folder / "world.json").read_text())
        except (OSError, ValueError):
            fail(f"{folder} exists and is no toy world; choose another folder with --data")
        if found != world:
            fail(f"{folder} holds a world drawn with {found}; repeat that, or choose another "
                 f"folder with --data")
        return
    partial = folder.with_name(folder.name + ".partial")
    marker = partial / "toy-world-in-progress"
    if partial.exists() and not marker.exists():
        fail(f"{partial} exists and was not made by this program; choose another --data")
    shutil.rmtree(partial, ignore_errors=True)
    drawings = Drawings(str(partial), cfg)
    progress = Progress(drawings.total, unit="drawing")
    for split in ("train", "unseen", "heldout"):
        (partial / split).mkdir(parents=True)
    marker.touch()
    with open(partial / "captions.tsv", "w", newline="") as f:
        columns = ["path", "object", "colour", "background", "size", "caption", "split"]
        rows = csv.DictWriter(f, columns, delimiter="\t", lineterminator="\n")
        rows.writeheader()
        for batch in torch.utils.data.DataLoader(drawings, None, num_workers=cfg.workers,
                                                 worker_init_fn=start_worker):
            rows.writerows(batch)
            progress(len(batch))
    write_json(partial / "world.json", world)
    marker.unlink()
    partial.rename(folder)


@torch.no_grad()
def zero_shot(clip, images, rows):
    """Share of images whose own "a {colour} {object}" is nearest among all such prompts."""
    pairs = [(c, o) for c in COLOURS for o in OBJECTS]
    texts = clip.encode_text([f"a {c} {o}" for c, o in pairs])                       # (96, D)
    embeds = [clip.encode_image(resize(to_tensor(batch), clip.size).to(clip.device))
              for batch in np.array_split(images, 20)]
    hits = (torch.cat(embeds) @ texts.T).argmax(1).tolist()                          # (N,)
    return float(np.mean([pairs[h] == (r["colour"], r["object"]) for h, r in zip(hits, rows)]))


def check(cfg):
    """Refuse options that make no sense."""
    check_range(cfg, 1, 2 ** 62, "train_images", "heldout_images", "vision_width", "text_layers",
                "embed_dim", "max_steps", "save_every")
    check_range(cfg, 1, 1024, "text_width")  # of a wider one load_clip knows no number of heads
    if cfg.image_size < 32 or cfg.text_width % 64 or cfg.vision_width % 2 or cfg.batch_size < 2:
        fail("--image_size must be 32 or more, --batch_size 2, --text_width a multiple of 64, "
             "--vision_width of 2")
    check_range(cfg, 3, 2 ** 62, "context")


def main():
    cfg = parse_options(Config)
    check(cfg)
    runtime = Runtime(cfg.device, cfg.dtype)
    run = Run("toy", cfg, runtime, inputs={}, about={}, code=__file__)
    if run.finished and Path(cfg.out, "clip.pt").is_file():
        return 0
    runtime.print0(f"toy: {cfg.train_images} + {cfg.heldout_images} drawings of {cfg.image_size} "
                   f"px in {cfg.data}, then a CLIP of them in {cfg.max_steps} steps of "
                   f"{cfg.batch_size}, on {runtime}; writes {cfg.out}/clip.pt")
    draw_world(cfg)

    state = make_clip_state(cfg, cfg.image_size // 32 * 32, runtime)
    if run.resume:
        state.load(run.resume, run.path)
    images, rows = read_world(cfg.data, "train", "unseen")
    heldout, heldout_rows = read_world(cfg.data, "heldout")
    texts, index = np.unique([r["caption"] for r in rows], return_inverse=True)
    runtime.print0(f"{format_size(state.model)}, {len(texts)} different captions")
    run.catch_signals()

    def judge(model):
        accuracy = zero_shot(Clip(model.eval(), "toy", runtime.device), heldout, heldout_rows)
        runtime.print0(f"toy CLIP names colour and object of {accuracy:.1%} of {len(heldout)} "
                       f"held-out drawings")
        shown = [Image.fromarray(p) for p in heldout[:96]]
        run.show(save_grid, f"{cfg.out}/world.png", [shown], ["held-out drawings"])
        return {"zero_shot": accuracy}

    def batch(step):
        chosen = np.random.default_rng((cfg.seed, 1, step)).choice(len(images), cfg.batch_size)
        return images[chosen], index[chosen]

    stopped = train_clip(state, batch, texts.tolist(), cfg, run, runtime, judge)
    if not stopped:
        save_tensors(f"{cfg.out}/clip.pt", state.model.state_dict())
    following = format_command("vqgan.py", data=f"{cfg.data}/train", clip=f"{cfg.out}/clip.pt",
                               out=cfg.out)
    return run.finish(f"and {cfg.out}/clip.pt and {cfg.out}/world.png; next: {following}")


if __name__ == "__main__":
    run_main(main)
