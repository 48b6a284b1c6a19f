"""How good are photographs by words? A table of figures, for photographs that have classes.

    python -m lab.photos --models=out/photos --data=data/cifar10-50k
A classifier, trained on the true photographs and on nothing else, says whether a sample shows the
class that its prompt names; the prompts are in wordings that the small CLIP has never read. It
judges the true held-out photographs and their reconstructions too, which is as well as any
generator behind this VQGAN could do. The row that counts is the one with most right samples among
those whose diversity within a class is at least --min_diversity of the photographs' own."""
import itertools
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import sample
from common.checkpoints import load_checkpoint
from common.files import atomic_write, write_json
from common.images import save_grid
from common.options import check_range, fail, parse_options
from common.process import run_main
from common.runtime import Runtime
from lab import photo_judge
from lab.baselines import vqgan_clip_baseline
from lab.cifar import caption
from lab.metrics import clip_embeddings, ratio, thumbnails
from lab.painter import make_painter
from lab.photo_judge import get_judge, look, read_photos
from lab.photo_table import Table, distances

PROMPTS = ("a photograph of a {}", "there is a {} in this photograph", "an image that shows a {}",
           "here you see a {}")  # none of lab.cifar's WORDINGS


@dataclass
class Config:
    data: str = "data/cifar10-50k"   # .tar of photographs and .tsv of their classes: see lab.cifar
    models: str = "out/photos"       # gpt.pt, and the vqgan.pt and clip.pt that it goes with
    captioned: str = ""              # gpt.pt of the captioned control: see lab.caption_dump
    out: str = ""                    # photos.md, .json, nearest.png, judge.pt (empty: --models)
    n: int = 64                      # samples of each of the four prompts of a class
    best_of: int = 16                # of so many samples CLIP chooses one; divides n
    guidance: str = "1,2,3,4,6"      # values to try, divided by commas
    variety: str = "0.5,1"           # values to try
    temperature: float = 1.0         # as in sample.py
    captioned_guidance: str = "1,2,3,4,6"  # values to try for the captioned control
    captioned_variety: str = "0,1"   # values to try for it
    min_diversity: float = 0.8       # of the row that counts, relative to the photographs'
    optimise: int = 10               # prompts to optimise against CLIP
    seed: int = 0                    # of the samples
    val_percent: float = 2.0         # as in vqgan.py and prepare.py
    judge_steps: int = 2400          # training steps of the judge
    batch_size: int = 64             # images at a time
    device: str = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"              # auto (float32 on a CPU), float32, bfloat16, float16


def numbers(cfg, name):
    """An option of several numbers -> them."""
    try:
        values = [float(x) for x in getattr(cfg, name).split(",")]
        if not all(0 <= x < 1e6 for x in values):
            raise ValueError
        return values
    except ValueError:
        fail(f"--{name}={getattr(cfg, name)[:60]} makes no sense: it takes numbers of 0 or more, "
             f"divided by commas, like 1,2.5,4")


# ------------------------------------------------------------------------------------------- rows


def add_photographs(table, painter):
    """Photographs, and what the VQGAN makes of them. Those that were trained on give the floors of
    the distances: their reconstructions share no photograph with the held-out ones."""
    photos = table.photos
    index = np.random.default_rng(1).permutation(len(photos.train))[:len(photos.heldout)]
    for name, images, labels in (
            ("held-out photographs", photos.heldout, photos.heldout_labels),
            ("photographs trained on", photos.train[index], photos.train_labels[index])):
        table.add(name, images, labels)
        table.add(f"reconstructions of {name}", painter.reconstruct(images), labels)


def add_sweep(table, name, painter, options, guidances, varieties):
    """Samples at all these values. Returns the name of the row that counts."""
    names = []
    for guidance, variety in itertools.product(guidances, varieties):
        names.append(f"{name}, guidance {guidance:g}, variety {variety:g}")
        changes = {"guidance": guidance, "variety": variety}
        table.add_samples(names[-1], painter, options | changes)
    enough = [n for n in names if table.rows[n]["diversity"] >= table.cfg.min_diversity]
    if enough:
        return max(enough, key=lambda n: table.rows[n]["right"]["share"])
    return max(names, key=lambda n: table.rows[n]["diversity"])


def add_others(table, painter, name):
    """What the samples of the row `name` are compared with."""
    photos, row = table.photos, table.rows[name]
    table.add_samples("nothing: guidance 0", painter, row["options"] | {"guidance": 0.0})
    keys = map(str, range(len(photos.heldout)))
    embeds = clip_embeddings(table.clip, photos.heldout)
    table.add("samples of held-out photographs' embeddings",
              painter(embeds, keys, 1, row["options"], "image"), photos.heldout_labels)
    for n in (1, min(table.cfg.n, len(photos.train))):
        index = (table.texts @ table.train_embeds.T).topk(n).indices.flatten().cpu()   # (P*n,)
        table.add(f"retrieval: the {n} nearest of a prompt by CLIP", photos.train[index],
                  table.labels.repeat(n))
    if table.cfg.optimise:
        chosen = np.arange(min(table.cfg.optimise, len(table.texts)))
        images, = vqgan_clip_baseline(painter.vqgan, table.clip, table.texts[chosen],
                                      (100 * row["seconds"],), painter.gpt.cfg.grid,
                                      table.cfg.seed, table.runtime, crops=4, learning_rate=0.1)
        table.add("optimisation against CLIP, 100 times a sample's time", images,
                  table.labels[chosen])


def save_nearest(path, table, name, count=30):
    """Samples, each beside the nearest photograph that was trained on: by pixels, and by what the
    judge is given. A copy would be seen here."""
    images, train = table.images[name], table.photos.train
    index = np.arange(count) * len(images) // count
    images, labels = images[index], [table.prompts[i // table.cfg.n] for i in index]
    train_features = look(table.judge, train, table.runtime)[0]                # (N, F)
    by_pixels = distances(thumbnails(images), table.train_thumbnails).argmin(1)
    features = look(table.judge, images, table.runtime)[0]
    by_features = distances(features, train_features).argmin(1)
    rows = [[Image.fromarray(x) for x in triple]
            for triple in zip(images, train[by_pixels], train[by_features])]
    save_grid(path, rows, labels, across=5)


# ------------------------------------------------------------------------------------------- main


def write_results(table, best, sentences, out):
    markdown = "\n".join([table.to_markdown(), "", *sentences])
    print(markdown, flush=True)
    with atomic_write(out / "photos.md") as f:
        f.write_text(markdown + "\n", encoding="utf-8")
    write_json(out / "photos.json", {
        "config": asdict(table.cfg), "row": best, "findings": sentences, "table": table.rows})
    save_nearest(out / "nearest.png", table, best)
    print(f"wrote {out}/photos.md, photos.json and nearest.png: samples, each beside the nearest "
          f"photograph trained on, by pixels and by the judge's features")


def load_guided(path, cfg, runtime):
    """GPT, VQGAN, CLIP and the sampling options, as sample.py loads them."""
    networks = sample.load(sample.Config(gpt=path, temperature=cfg.temperature), runtime)
    if networks[-1]["guidance"] == 1:
        fail(f"{path} can't be guided: it needs a GPT that is not classic, trained with dropped "
             f"conditions (--cond_drop_prob)")
    return networks


def load_captioned(cfg, gpt, vqgan, clip, runtime):
    """The captioned control of `gpt`. It strays by the images' spread, if a variety suits it, and
    takes texts as they are, for that is what it has learnt from."""
    captioned, *others, _ = load_guided(cfg.captioned, cfg, runtime)
    if [x.sha256 for x in others] != [vqgan.sha256, clip.sha256]:
        fail(f"--captioned={cfg.captioned} goes with another VQGAN or CLIP than the GPT of "
             f"--models={cfg.models}")
    captioned.spread.copy_(gpt.spread)
    captioned.shrink.copy_(torch.eye(len(gpt.shrink)))
    return captioned


def check_split(cfg, photos, vqgan):
    """Refuse photographs of which other ones were held out when the VQGAN was trained, unless it is
    a published one."""
    checkpoint = load_checkpoint(vqgan.path, "vqgan")
    if "inputs" in checkpoint and not (
            photos.sha256.startswith(checkpoint["inputs"]["images"])
            and checkpoint["config"]["val_percent"] == cfg.val_percent):
        fail(f"{vqgan.path} was trained on other photographs than {cfg.data}.tar with "
             f"--val_percent={cfg.val_percent:g} leaves: name those")


def main():
    cfg = parse_options(Config)
    check_range(cfg, 1, 2 ** 62, "n", "best_of", "batch_size", "judge_steps")
    if cfg.n % cfg.best_of:
        fail(f"--n={cfg.n} does not divide by --best_of={cfg.best_of}")
    values = {name: numbers(cfg, name) for name in
              ("guidance", "variety", "captioned_guidance", "captioned_variety")}
    out = Path(cfg.out or cfg.models)
    judge_cfg = photo_judge.Config(cfg.data, str(out), cfg.val_percent, cfg.judge_steps,
                                   device=cfg.device)
    photos = read_photos(cfg.data, cfg.val_percent)
    if np.bincount(photos.heldout_labels).max() < 2:
        fail(f"--val_percent={cfg.val_percent:g} holds out no two photographs of a class, too few "
             f"to compare with")
    runtime = Runtime(cfg.device, cfg.dtype, training=False)
    gpt, vqgan, clip, options = load_guided(f"{cfg.models}/gpt.pt", cfg, runtime)
    check_split(cfg, photos, vqgan)
    captioned = cfg.captioned and load_captioned(cfg, gpt, vqgan, clip, runtime)
    judge = get_judge(photos, judge_cfg, Runtime(cfg.device, judge_cfg.dtype))
    runtime = Runtime(cfg.device, cfg.dtype, training=False)  # training allows TF32 on a GPU

    prompts = [caption(wording, c) for wording in PROMPTS for c in photos.classes]
    table = Table(photos, judge, clip, prompts, cfg, runtime)
    painter = make_painter(gpt, vqgan, runtime, seed=cfg.seed, batch_size=cfg.batch_size)
    add_photographs(table, painter)
    best = add_sweep(table, "samples", painter, options, values["guidance"], values["variety"])
    sentences = [f"The row that counts, chosen on its own samples: {best}."]
    if table.rows[best]["diversity"] < cfg.min_diversity:
        sentences.append(f"No row has a diversity of {cfg.min_diversity:g} or more.")
    add_others(table, painter, best)
    if captioned:
        other = make_painter(captioned, vqgan, runtime, seed=cfg.seed, batch_size=cfg.batch_size)
        control = add_sweep(table, "captioned control", other, options,
                            values["captioned_guidance"], values["captioned_variety"])
        found = ratio(table.rows[best]["right"], table.rows[control]["right"])
        sentences.append("Its right classes / those of the {}: {ratio:.3f} "
                         "({low:.3f}–{high:.3f}).".format(control, **found))
    write_results(table, best, sentences, out)
    return 0


if __name__ == "__main__":
    run_main(main)
