"""The table of lab/photos.py: a row of figures for each kind of image."""
import time

import numpy as np

from lab.metrics import clip_embeddings, cmmd, frechet, nearest, proportion, thumbnails
from lab.photo_judge import look
from lab.table import format_figure, markdown_table

COLUMNS = {"right": "right class", "best": "best of {best_of} by CLIP", "diversity": "diversity",
           "frechet": "Fréchet", "cmmd": "CMMD", "nearest": "nearest"}
NOTE = (
    "{prompts} prompts, seed {seed}. Shares with Wilson's 95% intervals. Diversity: mean distance "
    "of the judge's features within a class, as a share of the held-out photographs'. Fréchet: "
    "distance of the judge's features, and CMMD: of the small CLIP's embeddings, to the {heldout} "
    "held-out photographs, of as many images. The judge has learnt the photographs trained on; "
    "the CLIP guides the GPT, so CMMD flatters the samples. Nearest: distance to the nearest "
    "photograph trained on, RMS over pixels at 16 x 16.")


def distances(a, b):
    """Squared distances of features (N, F) and (M, F): (N, M)."""
    return np.maximum((a ** 2).sum(1)[:, None] - 2 * a @ b.T + (b ** 2).sum(1), 0)


def diversity(features, labels):
    """Mean distance of two images of a class, by features (N, F); None if no class has two."""
    means = []
    for label in set(labels.tolist()):
        x = features[labels == label]                                          # (n, F)
        if len(x) > 1:
            means.append(np.sqrt(distances(x, x)).sum() / (len(x) * (len(x) - 1)))
    return float(np.mean(means)) if means else None


class Table:
    """`rows` of figures by name, and their `images`. Distances of distributions are to the held-out
    photographs, of as many images as there are of these."""

    def __init__(self, photos, judge, clip, prompts, cfg, runtime):
        self.photos, self.judge, self.clip, self.cfg = photos, judge, clip, cfg
        self.runtime, self.rows, self.images = runtime, {}, {}
        # every class in one wording, then in the next
        self.prompts, self.texts = prompts, clip.encode_text(prompts)          # (P, D)
        self.labels = np.arange(len(prompts)) % len(photos.classes)            # (P,)
        self.reference = look(judge, photos.heldout, runtime)[0]               # (M, F)
        self.reference_embeds = clip_embeddings(clip, photos.heldout).cpu().numpy()
        self.own_diversity = diversity(self.reference, photos.heldout_labels)
        self.train_thumbnails = thumbnails(photos.train)                       # (N, 768)
        self.train_embeds = clip_embeddings(clip, photos.train)                # (N, D)

    def add(self, name, images, labels, are_samples=False):
        """A row of images, uint8 (N, S, S, 3), that should show classes (N,). `are_samples`: n of
        each prompt, of which CLIP chooses."""
        features, classes = look(self.judge, images, self.runtime)
        embeds, hits = clip_embeddings(self.clip, images), classes == labels
        row, n = {"right": proportion(hits.tolist())}, len(self.reference)
        if are_samples:
            row["best"] = proportion(hits[self.best(embeds)].tolist())
        found = diversity(features, labels)
        row["diversity"] = found and found / self.own_diversity
        index = np.random.default_rng(0).permutation(len(images))[:n]
        # of fewer images the distance is greater; of the held-out ones to themselves it is none
        if len(index) == n and images is not self.photos.heldout:
            row["frechet"] = frechet(features[index], self.reference)
            row["cmmd"] = cmmd(embeds[index].cpu().numpy(), self.reference_embeds)
        row["nearest"] = nearest(images[index], self.train_thumbnails)["mean"]
        self.rows[name], self.images[name] = row, images
        self.runtime.print0(f"{name}: {row['right']['share']:.1%} right")

    def best(self, embeds):
        """The numbers of the samples (P*n, D) that CLIP likes best, one of each `best_of`."""
        texts = self.texts.repeat_interleave(self.cfg.n, 0)                    # (P*n, D)
        scores = (embeds * texts).sum(1).view(-1, self.cfg.best_of)
        return scores.argmax(1).cpu().numpy() + np.arange(len(scores)) * self.cfg.best_of

    def add_samples(self, name, painter, options):
        start = time.time()
        images = painter(self.texts, self.prompts, self.cfg.n, options)
        seconds = (time.time() - start) / len(images)
        self.add(name, images, self.labels.repeat(self.cfg.n), are_samples=True)
        self.rows[name] |= {"seconds": seconds, "options": options}

    def to_markdown(self):
        names = [name.format(best_of=self.cfg.best_of) for name in COLUMNS.values()]
        rows = [[name, *(format_figure(row.get(column)) for column in COLUMNS)]
                for name, row in self.rows.items()]
        lines = markdown_table(["images", *names], rows)
        note = NOTE.format(prompts=len(self.prompts), heldout=len(self.reference),
                           seed=self.cfg.seed)
        return "\n".join([*lines, "", note])
