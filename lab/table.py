"""The table of figures, a row for each kind of image; and charts."""
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.files import atomic_write
from lab.judge import judge_features, match
from lab.metrics import clip_embeddings, quality, retrieval, thumbnails


class Table:
    """`rows` of figures by name; `sheet`, images to show of them; `findings` and `sentences`, what
    follows from them. `judge` is the toy world's, else None, and CLIP judges."""

    def __init__(self, data, n, clip, judge_clip, judge, runtime):
        self.data, self.n, self.clip, self.judge_clip = data, n, clip, judge_clip
        self.judge, self.runtime = judge, runtime
        self.rows, self.sheet, self.findings, self.sentences = {}, {}, {}, []
        self.texts = clip.encode_text(data.prompts)                                # (P, D)
        is_own = judge_clip is clip
        self.judge_text_embeds = self.texts if is_own else judge_clip.encode_text(data.prompts)
        self.own = np.arange(len(data.prompts)).repeat(n)  # number of each sample's prompt (P*n,)
        # as many images in every Frechet distance
        self.frechet_n = min(len(data.heldout) // 2, len(self.own))
        self.reference = self.features(data.heldout)                               # (M, F)
        self.train_thumbnails = thumbnails(data.train)

    def features(self, images):
        if self.judge:
            return judge_features(self.judge, images, self.runtime)
        return clip_embeddings(self.judge_clip, images).cpu().double().numpy()

    def add(self, name, images, wanted, groups, own=None):
        """A row: all that can be said of images, uint8 (N, S, S, 3). `wanted`: attributes of each;
        `groups`: its prompt or kind; `own`: the number of its prompt."""
        row = match(self.judge, images, wanted, self.runtime) if self.judge else {}
        if own is not None:
            row |= retrieval(self.judge_clip, images, self.judge_text_embeds, own)
        row |= quality(self.features, images, groups, self.reference, self.train_thumbnails,
                       self.frechet_n)
        self.rows[name] = row
        right = f"right object and colour {row['both']['share']:.1%}, " if self.judge else ""
        self.runtime.print0(f"{name}: {right}Frechet distance {row['frechet']['mean']:.2f}")

    def add_samples(self, name, painter, texts, options, show=True):
        """The row of n samples of each prompt, of embeddings texts (P, D). Returns the samples."""
        prompts, wanted = self.data.prompts, self.data.wanted
        images = painter(texts, prompts, self.n, options)
        self.add(name, images, wanted and [wanted[i] for i in self.own],
                 [prompts[i] for i in self.own], self.own)
        if show:
            self.sheet[name] = images[::self.n]
        return images

    def to_markdown(self):
        """All rows, every figure with its interval and the number of samples."""
        labels = ["object", "colour", "both", "unseen", "background"] if self.judge else []
        lines = []
        for columns in (labels + ["similarity", "retrieval"], ["frechet", "diversity", "nearest"]):
            lines.append("| images | " + " | ".join(columns) + " |")
            lines.append("| --- |" + " --- |" * len(columns))
            for name, row in self.rows.items():
                cells = [format_figure(row.get(column)) for column in columns]
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
            lines.append("")
        return "\n".join(lines + self.sentences)


def format_figure(x):
    if x is None:
        return ""
    if "share" in x:
        return f"{x['share']:.1%} ({x['low']:.1%}–{x['high']:.1%}), n={x['n']}"
    half = f" ± {x['half']:.3f}" if x["half"] is not None else ""
    return f"{x['mean']:.3f}{half}, n={x['n']}"


def save_chart(path, title, xlabel, lines):
    """A line chart, PNG: lines is {name: [(x, y, low, high)]}, y a share in [0, 1] with its
    interval."""
    w, h, left, top = 680, 400, 60, 40
    colours = ("#1f5fbf", "#d0442e", "#2e8b4a", "#8a5aa8", "#c58a1b")
    sheet = Image.new("RGB", (w, h), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    points = [point for line in lines.values() for point in line]
    xs, bottom = [p[0] for p in points], math.floor(10 * min(p[2] for p in points)) / 10

    def at(x, y):
        return (left + (w - left - 190) * (x - min(xs)) / (max(xs) - min(xs) or 1),
                top + (h - top - 50) * (1 - (y - bottom) / (1 - bottom or 1)))
    pen.text((left, 10), title, fill="black", font=font)
    pen.text((left, h - 22), xlabel, fill="black", font=font)
    for y in np.linspace(bottom, 1, 6):
        pen.line([at(min(xs), y), at(max(xs), y)], fill="#dddddd")
        pen.text((8, at(0, y)[1] - 8), f"{y:.0%}", fill="black", font=font)
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
