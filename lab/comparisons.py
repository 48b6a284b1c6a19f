"""The rows of lab/evaluate.py's table by other means: the same GPT trained on captions or on
nothing, and optimisation against CLIP. Each is given the options that suit it best, chosen on
prompts of which none is reported (lab/prompts.py)."""
import itertools
import time
from pathlib import Path

import numpy as np
import torch

from common.progress import Progress
from common.sampling import format_options
from lab.baselines import vqgan_clip_baseline
from lab.judge import match
from lab.metrics import clip_embeddings, frechet_win_rate, ratio
from lab.painter import make_painter
from lab.rows import row_name, share_line
from lab.table import save_chart

GRID = {"guidance": (1.0, 1.5, 2.0, 3.0), "temperature": (0.7, 1.0), "variety": (0.0, 0.25, 0.5)}
CROPS, RATES = (1, 4, 16), (0.05, 0.1, 0.2)
TIMES = (3, 10, 30, 100, 300)  # of one sample of ours, that optimisation takes
TRIED = 100                    # of these, while its crops and rate are chosen

# --------------------------------------------------------------------------------------- controls


def choose_options(table, painter, options, prompts):
    """The sampling options in GRID that suit a GPT: those that draw most right objects and colours,
    and of several the ones with the smallest Frechet distance."""
    results, n = [], max(1, table.n // 2)
    wanted = [w for w in prompts.wanted for _ in range(n)]
    embeds = table.clip.encode_text(prompts.texts)                                 # (P, D)
    for values in itertools.product(*GRID.values()):
        changes = dict(zip(GRID, values))
        images = painter(embeds, prompts.texts, n, options | changes)
        right = match(table.judge, images, wanted, table.runtime)["both"]["share"]
        distance = table.reference.distances(*table.describe(images))[0]
        results.append({**changes, "both": right, "frechet": distance})
    chosen = max(results, key=lambda result: (result["both"], -result["frechet"]))
    return options | {name: chosen[name] for name in GRID}, results


def add_controls(table, controls, painter, options):
    """Samples by the same GPT trained otherwise, and what captions would have bought."""
    data = table.data
    name = "control: the same GPT trained on {}"
    painters = {}
    for what, gpt in controls.items():
        painters[what] = make_painter(gpt, painter.vqgan, table.runtime, seed=painter.seed,
                                      batch_size=painter.batch_size)
    # trained without a spread, the captioned GPT strays by ours, if a variety suits it; and it
    # takes texts as they are, for that is what it learnt from
    controls["captions"].spread.copy_(painter.gpt.spread)
    controls["captions"].shrink.copy_(torch.eye(len(controls["captions"].shrink)))
    table.add_samples(name.format("nothing"), painters["nothing"], options | {"guidance": 0.0})
    found = {}
    for what, p in (("captions", painters["captions"]), ("images", painter)):
        found[what], table.findings[f"grid, {what}"] = choose_options(table, p, options,
                                                                      data.choosing)
        table.sentences.append(f"On the first set of prompts the GPT trained on {what} is best at "
                               f"{format_options(found[what])}.")
    for kind, prompts in {"plain": None, **data.kinds}.items():
        row = name.format("captions") + ("" if kind == "plain" else f", {kind} prompts")
        table.add_samples(row, painters["captions"], found["captions"], prompts)
        bought = ratio(table.rows[row_name(kind)]["both"], table.rows[row]["both"])
        table.findings[f"language-free / captioned, {kind}"] = bought
        table.sentences.append(
            "Right object and colour of {kind} prompts, language-free / captioned: {ratio:.3f} "
            "({low:.3f}–{high:.3f}).".format(kind=kind, **bought))


# ----------------------------------------------------------------------------------- optimisation


def pick(prompts, count):
    """The numbers of `count` of the prompts."""
    return np.random.default_rng(0).permutation(len(prompts.texts))[:count]


def time_of_one(painter, text, options):
    """Seconds that one sample takes."""
    painter(text, ["warm-up"], 1, options)
    start = time.time()
    for i in range(10):
        painter(text, [str(i)], 1, options)
    return (time.time() - start) / 10


class Optimiser:
    """Images of prompts by optimisation against CLIP, eight prompts at a time."""

    def __init__(self, table, painter, seed):
        self.table, self.painter, self.seed = table, painter, seed

    def __call__(self, texts, seconds, progress, **options):
        """Images (N, S, S, 3) for each of `seconds` an image, of embeddings texts (N, D)."""
        results = []
        for rows in np.array_split(np.arange(len(texts)), -(-len(texts) // 8)):
            results.append(vqgan_clip_baseline(
                self.painter.vqgan, self.table.clip, texts[rows], seconds,
                self.painter.gpt.cfg.grid, self.seed, self.table.runtime, **options))
            progress(len(rows))
        return list(map(np.concatenate, zip(*results)))

    def choose(self, prompts, count, seconds, progress):
        """The crops and learning rate that draw most right objects and colours of `count` prompts,
        and if several do, those whose images CLIP finds nearest."""
        rows, results = pick(prompts, count), []
        texts = self.table.clip.encode_text([prompts.texts[i] for i in rows])      # (N, D)
        for crops, rate in itertools.product(CROPS, RATES):
            images, = self(texts, [seconds], progress, crops=crops, learning_rate=rate)
            right = match(self.table.judge, images, [prompts.wanted[i] for i in rows],
                          self.table.runtime)["both"]["share"]
            cosine = (clip_embeddings(self.table.clip, images) * texts).sum(1).mean().item()
            results.append({"crops": crops, "learning_rate": rate, "both": right,
                            "cosine": cosine})
        best = max(results, key=lambda r: (r["both"], r["cosine"]))
        return {name: best[name] for name in ("crops", "learning_rate")}, results


def add_optimised(table, painter, images, options, cfg):
    """Images optimised against CLIP until that no longer pays, beside the first sample of the same
    prompts, and a chart of match against time."""
    data, texts, runtime = table.data, table.texts, table.runtime
    chosen, tried = pick(data.prompts, cfg.optimise), -(-cfg.optimise // 3) * bool(table.judge)
    wanted = data.prompts.wanted and [data.prompts.wanted[i] for i in chosen]
    seconds = time_of_one(painter, texts[:1], options)
    optimise, settings = Optimiser(table, painter, cfg.seed), {"crops": 4, "learning_rate": 0.1}
    count = tried * len(CROPS) * len(RATES)
    minutes = seconds * (TIMES[-1] * len(chosen) + TRIED * count) / 60
    runtime.print0(f"optimisation takes {minutes:.1f} minutes")
    progress = Progress(len(chosen) + count, unit="prompt optimised")
    if runtime.device.type == "cuda":  # loads kernels before the clock counts
        optimise(texts[:8], [0.1], lambda n: None, **settings)
    if tried:
        settings, table.findings["grid, optimisation"] = optimise.choose(
            data.choosing, tried, TRIED * seconds, progress)
    results = optimise(texts[chosen], [factor * seconds for factor in TIMES], progress, **settings)
    first, name = images[chosen * table.n], f"our first images of {len(chosen)} prompts"
    table.add(name, first, wanted, list(chosen), chosen)
    rows = [f"those by optimisation against CLIP, {factor} times our time" for factor in TIMES]
    for row, optimised in zip(rows, results):
        table.add(row, optimised, wanted, list(chosen), chosen)
    table.sheet[row] = np.zeros_like(images[::table.n])
    table.sheet[row][chosen] = optimised
    wins = frechet_win_rate(table.describe(first)[0], table.describe(optimised)[0],
                            table.reference.features)
    table.findings["optimisation"] = settings | {"seconds": seconds, "frechet_win_rate": wins}
    table.sentences.append(
        "Optimisation with {crops} crops and a learning rate of {learning_rate:g}; one sample of "
        "ours takes {ms:.0f} ms. ".format(**settings, ms=seconds * 1e3) +
        f"Our Fréchet distance is smaller than at {TIMES[-1]} times that in {wins:.0%} of 40 "
        f"resamplings of the {len(chosen)} prompts.")
    key = "both" if table.judge else "retrieval"
    lines = share_line(table, key, "ours", [(1, name)]) | share_line(
        table, key, "optimised", list(zip(TIMES, rows)))
    save_chart(Path(cfg.out, "optimised.png"), f"match against time, seed {cfg.seed}, 95% "
               f"intervals", "times the time that one sample of ours takes", lines, log=True)
