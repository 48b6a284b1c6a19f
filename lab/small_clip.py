"""A CLIP for whoever has none: trains a small one, of OpenAI's form, on captioned images.

    python -m lab.small_clip --data=images --captions=captions.tsv --out=out/small_clip
captions.tsv has a header line and the columns path and caption, divided by a tab, nothing quoted;
an image may have several lines. Like OpenAI's, this CLIP reads captions; VQGAN and GPT never do.
Every stage takes the result by --clip=out/small_clip/clip.pt."""
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common.batches import read_any
from common.clip_training import make_clip_state, train_clip
from common.files import file_sha256, read_pairs, save_tensors
from common.images import crop, random_crop, to_tensor
from common.openai_clip import Clip
from common.options import check_range, fail, parse_options
from common.process import run_main
from common.runs import Run
from common.runtime import Runtime, format_size
from common.sources import BadImages, ImageSource, split_names


@dataclass
class Config:
    data: str = "data/cifar10-50k.tar"          # a folder or tar of images
    captions: str = "data/cifar10-captions.tsv" # path and caption, several lines an image allowed
    out: str = "out/small_clip"                 # clip.pt, and the run that made it
    fresh: bool = False                         # replace the run that is in --out
    seed: int = 0                               # of the weights and of every batch
    val_percent: float = 2.0                    # of the images that accuracy is measured on
    max_bad: float = 0.5                        # stop if more of the images than this can't be read
    # network
    image_size: int = 32                        # pixels a side, a multiple of 32
    blocks: tuple = (1, 1, 1, 1)                # of the ModifiedResNet's four stages
    vision_width: int = 32                      # of the ModifiedResNet, a multiple of 2
    text_width: int = 64                        # of the text transformer, a multiple of 64
    text_layers: int = 2                        # its depth
    context: int = 24                           # tokens of text it reads
    embed_dim: int = 128                        # length of an embedding
    # training
    min_zoom: float = 0.7                       # random crops show this share of the side, or more
    max_steps: int = 900                        # training steps
    batch_size: int = 128                       # pairs a step
    learning_rate: float = 1.5e-3               # peak, Muon and AdamW
    warmup: int = 50                            # steps of linear warm-up
    save_every: int = 300                       # steps between checkpoints
    device: str = "auto"                        # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"                         # of autocast: auto, float32, bfloat16, float16


def read_captions(path, names):
    """captions.tsv -> (distinct captions, {name: indices of its captions}) of the images `names`.
    """
    wanted = set(names)
    rows = [(name, " ".join(caption.split())) for name, caption in read_pairs(path, "caption")
            if name in wanted and caption and caption.strip()]
    if not rows:
        fail(f"no image of --data has a caption in {path}; its paths are like {names[0]}")
    texts = sorted({caption for _, caption in rows})
    number, captions = {text: i for i, text in enumerate(texts)}, defaultdict(list)
    for name, caption in rows:
        captions[name].append(number[caption])
    return texts, captions


def make_batch(source, names, captions, cfg, bad, step):
    """Random crops, uint8 (B, S, S, 3), each with the number (B,) of one of its image's captions: a
    function of (seed, step). An image that can't be read is replaced by another."""
    rng = np.random.default_rng((cfg.seed, 1, step))
    images, index, failed = [], [], {}
    for j, i in enumerate(rng.integers(len(names), size=cfg.batch_size)):
        i, image = read_any(source, names, i, (cfg.seed, 1, step, j), failed)
        bad.add(failed, stop=image is None)
        images.append(random_crop(image, cfg.image_size, rng.random(4), cfg.min_zoom, flip=True))
        index.append(rng.choice(captions[names[i]]))
    return np.stack(images), np.array(index)


@torch.no_grad()
def zero_shot(clip, texts, source, names, captions):
    """For each image that can be read: is its nearest caption, among all, one of its own?"""
    embeds = clip.encode_text(texts)                                         # (texts, D)
    hits = []
    for name in names:
        try:
            image = source.open(name)
        except (OSError, ValueError):
            continue
        pixels = to_tensor(crop(image, clip.size))[None].to(clip.device)         # (1, 3, C, C)
        hits.append((clip.encode_image(pixels) @ embeds.T).argmax().item() in captions[name])
    return hits


def check(cfg):
    """Refuse options that make no sense."""
    check_range(cfg, 1, 2 ** 62, "vision_width", "text_layers", "embed_dim", "max_steps",
                "save_every")
    check_range(cfg, 1, 1024, "text_width")  # of a wider one load_clip knows no number of heads
    check_range(cfg, 2, 2 ** 62, "batch_size")
    check_range(cfg, 3, 2 ** 62, "context")
    check_range(cfg, 0.1, 1, "min_zoom")
    check_range(cfg, 0, 1, "max_bad")
    clip, checkpoint = Path(cfg.out, "clip.pt"), Path(cfg.out, "small_clip.ckpt")
    if clip.exists() and not checkpoint.exists() and not cfg.fresh:
        fail(f"{clip} is there without {checkpoint.name}, so something else made it: choose "
             f"another --out, or --fresh=True to replace it")
    if len(cfg.blocks) != 4 or not min(cfg.blocks):
        fail(f"--blocks={','.join(map(str, cfg.blocks))} makes no sense: four numbers of 1 or more")
    if cfg.image_size % 32 or not cfg.image_size or cfg.text_width % 64 or cfg.vision_width % 2:
        fail("--image_size must be a multiple of 32, --text_width of 64, --vision_width of 2")


def main():
    cfg = parse_options(Config)
    check(cfg)
    runtime = Runtime(cfg.device, cfg.dtype)
    source = ImageSource(cfg.data)
    runtime.print0(source.account())
    texts, captions = read_captions(cfg.captions, source.names)
    train_names, val_names = ([n for n in names if n in captions]
                              for names in split_names(source, cfg.val_percent))
    if not train_names:
        fail(f"{cfg.captions} has captions of held-out images only, none is left to train on: "
             f"caption more, or lower --val_percent")
    inputs = {"images": source.sha256, "caption file": file_sha256(cfg.captions)}
    run = Run("small_clip", cfg, runtime, inputs, about={}, code=__file__)
    if run.finished and Path(cfg.out, "clip.pt").is_file():
        return 0
    state = make_clip_state(cfg, cfg.image_size, runtime, cfg.blocks)
    if run.resume:
        state.load(run.resume, run.path)
    runtime.print0(f"small CLIP: {format_size(state.model)}, {len(texts)} captions of "
                   f"{len(train_names)} images, {len(val_names)} held out; {cfg.max_steps} steps "
                   f"of {cfg.batch_size} on {runtime}; writes {cfg.out}/clip.pt")
    run.catch_signals()

    def judge(model):
        clip = Clip(model.eval(), "small", runtime.device)
        hits = zero_shot(clip, texts, source, val_names[:1000], captions)
        accuracy = float(np.mean(hits)) if hits else float("nan")
        runtime.print0(f"names {accuracy:.1%} of {len(hits)} held-out images: of all "
                       f"captions the nearest is one of theirs")
        return {"zero_shot": accuracy}

    bad = BadImages(cfg.max_bad, len(train_names), cfg.data)
    batch = partial(make_batch, source, train_names, captions, cfg, bad)
    if not train_clip(state, batch, texts, cfg, run, runtime, judge):
        save_tensors(Path(cfg.out, "clip.pt"), state.model.state_dict())
    return run.finish(f"and {cfg.out}/clip.pt")


if __name__ == "__main__":
    run_main(main)
