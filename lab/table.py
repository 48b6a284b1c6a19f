"""The table of figures, a row for each kind of image; and charts."""
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common.files import atomic_write
from lab.judge import judge_features, match
from lab.metrics import (
    Reference,
    clip_embeddings,
    diversity,
    nearest,
    retrieval,
    thumbnails,
)


class Table:
    """`rows` of figures by name; `sheet`, images to show of them; `findings` and `sentences`, what
    follows from them; `notes`, why words may mean little here. `judge` is the toy world's, else
    None, and CLIP judges."""

    def __init__(self, data, n, clip, judge_clip, judge, runtime, notes=()):
        self.data, self.n, self.clip, self.judge_clip = data, n, clip, judge_clip
        self.judge, self.runtime, self.notes = judge, runtime, notes
        self.rows, self.sheet, self.findings, self.sentences, self.floors = {}, {}, {}, [], {}
        self.numbers = {text: i for i, text in enumerate(data.prompts.texts)}
        self.texts = clip.encode_text(data.prompts.texts)                          # (P, D)
        is_own = judge_clip is clip
        self.judge_text_embeds = self.texts if is_own else judge_clip.encode_text(
            data.prompts.texts)
        self.train_embeds = clip_embeddings(clip, data.train[data.is_learnt])      # (N, D)
        self.train_thumbnails = thumbnails(data.train)
        # as many images in every Frechet distance
        self.distance_n = min(len(data.heldout) // 2, n * len(data.prompts.texts))
        self.true = self.describe(data.train[:4000])
        self.reference = Reference(*self.describe(data.heldout))

    def describe(self, images):
        """Images -> features (N, F) and the judging CLIP's embeddings (N, D)."""
        embeds = clip_embeddings(self.judge_clip, images).cpu().numpy()
        if self.judge:
            return judge_features(self.judge, images, self.runtime), embeds
        return embeds.astype(np.float64), embeds

    def add(self, name, images, wanted, groups, own=None):
        """A row: all that can be said of images, uint8 (N, S, S, 3). `wanted`: attributes of each;
        `groups`: its prompt or kind; `own`: the number of its prompt."""
        row = match(self.judge, images, wanted, self.runtime) if self.judge else {}
        features, embeds = self.describe(images)                                   # (N, F), (N, D)
        if own is not None:
            texts = self.judge_text_embeds.cpu()                                   # (P, D)
            row |= retrieval(torch.from_numpy(embeds), texts, own)
        index = np.random.default_rng(0).permutation(len(images))[:self.distance_n]
        row |= self.reference.judge(features[index], embeds[index])
        n = len(index)
        if n not in self.floors:
            self.floors[n] = self.reference.floor(*self.true, n)
        row |= self.floors[n] | {"diversity": diversity(features, groups),
                                 "nearest": nearest(images[index], self.train_thumbnails)}
        self.rows[name] = row
        right = f"right object and colour {row['both']['share']:.1%}, " if self.judge else ""
        self.runtime.print0(f"{name}: {right}Frechet distance {row['frechet']['mean']:.2f}")

    def add_samples(self, name, painter, options, prompts=None, embeds=None, show=True):
        """The row of n samples of each prompt, by default of those that the table is about, drawn
        from their embeddings (P, D), by default CLIP's own. Returns the samples."""
        if embeds is None:
            embeds = self.clip.encode_text(prompts.texts) if prompts else self.texts
        prompts = prompts or self.data.prompts
        n = self.n * prompts.times
        images = painter(embeds, prompts.texts, n, options)
        number = np.arange(len(prompts.texts)).repeat(n)  # of each sample's prompt (P*n,)
        texts = [prompts.texts[i] for i in number]
        own = [self.numbers[text] for text in texts if text in self.numbers]
        self.add(name, images, prompts.wanted and [prompts.wanted[i] for i in number], texts,
                 own if len(own) == len(texts) else None)
        if show and prompts is self.data.prompts:
            self.sheet[name] = images[::n]
        return images

    def to_markdown(self):
        """All rows, every figure with its interval and the number of samples."""
        labels = ["object", "colour", "both", "unseen", "background"] if self.judge else []
        distances = ["frechet", "frechet_floor", "cmmd", "cmmd_floor", "diversity", "nearest"]
        by_clip = ["similarity", "retrieval", "cmmd"] + ([] if self.judge else ["frechet"])
        lines = []
        for columns in (labels + ["similarity", "retrieval"], distances):
            titles = [f"{c} †" if self.notes and c in by_clip else c for c in columns]
            rows = [[name, *(format_figure(row.get(column)) for column in columns)]
                    for name, row in self.rows.items()]
            titles = [title.replace("_", " ") for title in ["images", *titles]]
            lines += [*markdown_table(titles, rows), ""]
        return "\n".join(lines + [f"† {note}" for note in self.notes] + self.sentences)


def format_figure(x):
    if x is None:
        return ""
    if isinstance(x, float):
        return f"{x:.4g}"  # CMMD is small
    if "share" in x:
        return f"{x['share']:.1%} ({x['low']:.1%}–{x['high']:.1%}), n={x['n']}"
    half = f" ± {x['half']:.3f}" if x["half"] is not None else ""
    return f"{x['mean']:.3f}{half}, n={x['n']}"


def markdown_table(titles, rows):
    """Lines of a table in Markdown: titles, and rows of cells."""
    return ["| " + " | ".join(cells) + " |" for cells in (titles, ["---"] * len(titles), *rows)]


def over_seeds(values, factor, digits):
    """Figures of several seeds -> "mean (lowest–highest)"."""
    values = [factor * v for v in values]
    mean, low, high = (f"{x:.{digits}f}" for x in (np.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}–{high})"


def find_doubts(prompts, clip, judge_clip, is_toy):
    """Where words mean little to the CLIP that judges, one line each."""
    doubts = []
    if not is_toy and is_toy_clip(judge_clip):
        doubts.append(f"{judge_clip.name} was trained on the toy world alone: of other images and "
                      f"words it knows nothing, and these figures mean nothing.")
    if judge_clip.sha256 == clip.sha256:
        doubts.append("By the CLIP that conditioned the GPT: it flatters the GPT." +
                      " Another one judges with --judge." * (not is_toy))
    if len(prompts) < 10:
        doubts.append(f"Of {len(prompts)} prompts chance alone finds {1 / len(prompts):.0%}.")
    return doubts


def is_toy_clip(clip):
    """Whether toy.py trained this CLIP: its run lies beside it."""
    return Path(clip.name).with_name("toy.pt").is_file()


def save_chart(path, title, xlabel, lines, log=False):
    """A line chart, PNG: lines is {name: [(x, y, low, high)]}, y a share in [0, 1] with its
    interval; with `log` the x axis is logarithmic."""
    w, h, left, top = 680, 400, 60, 40
    colours = ("#1f5fbf", "#d0442e", "#2e8b4a", "#8a5aa8", "#c58a1b")
    sheet = Image.new("RGB", (w, h), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    points = [point for line in lines.values() for point in line]
    xs, bottom = [p[0] for p in points], math.floor(10 * min(p[2] for p in points)) / 10
    scale = math.log if log else float
    first, last = scale(min(xs)), scale(max(xs))

    def at(x, y):
        return (left + (w - left - 190) * (scale(x) - first) / (last - first or 1),
                top + (h - top - 50) * (1 - (y - bottom) / (1 - bottom or 1)))
    pen.text((left, 10), title, fill="black", font=font)
    pen.text((left, h - 22), xlabel, fill="black", font=font)
    for y in np.linspace(bottom, 1, 6):
        pen.line([at(min(xs), y), at(max(xs), y)], fill="#dddddd")
        pen.text((8, at(min(xs), y)[1] - 8), f"{y:.0%}", fill="black", font=font)
    for x in sorted(set(xs)):
        pen.text((at(x, bottom)[0] - 8, h - 45), f"{x:g}", fill="black", font=font)
    for i, ((name, line), colour) in enumerate(zip(lines.items(), colours)):
        pen.line([at(x, y) for x, y, _, _ in line], fill=colour, width=2)
        for x, y, low, high in line:
            pen.line([at(x, low), at(x, high)], fill=colour)
            px, py = at(x, y)
            pen.ellipse([px - 3, py - 3, px + 3, py + 3], fill=colour)
        pen.text((w - 170, top + 18 * i), name, fill=colour, font=font)
    with atomic_write(path) as f:
        sheet.save(f)
