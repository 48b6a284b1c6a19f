"""The figures by which images are judged, each with its uncertainty and the number of samples.

Images are uint8 (N, S, S, 3) throughout, as they are saved."""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common.images import crop, to_image, to_tensor

# ----------------------------------------------------------------------------- numbers of numbers


def proportion(hits):
    """Share of hits with Wilson's 95% interval: {"share", "low", "high", "n"}; None of no hits."""
    if not hits:
        return None
    n, p, z = len(hits), sum(hits) / len(hits), 1.96
    center = (p + z * z / 2 / n) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + (z / 2 / n) ** 2) / (1 + z * z / n)
    return {"share": p, "low": center - half, "high": center + half, "n": n}


def mean(x):
    """{"mean", "half", "n"}: 1.96 standard errors either way."""
    half = float(1.96 * np.std(x, ddof=1) / len(x) ** 0.5) if len(x) > 1 else None
    return {"mean": float(np.mean(x)), "half": half, "n": len(x)}


def ratio(a, b):
    """The ratio of two proportions; its interval, from the ends of theirs, is on the safe side."""
    eps = 1e-9
    return {"ratio": a["share"] / max(eps, b["share"]), "low": a["low"] / b["high"],
            "high": a["high"] / max(eps, b["low"])}


def frechet(a, b):
    """Frechet distance of features (N, F) and (M, F) as Gaussians (Heusel et al. 2017)."""
    mean_a, mean_b = a.mean(0), b.mean(0)
    a = (a - mean_a) / math.sqrt(len(a) - 1)                       # covariance a'a (F, F)
    b = (b - mean_b) / math.sqrt(len(b) - 1)
    values, vectors = np.linalg.eigh(b.T @ b)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T    # (F, F), of b's covariance
    cross = np.linalg.svd(a @ root, compute_uv=False).sum()        # trace of sqrt(cov_a cov_b)
    squares = ((mean_a - mean_b) ** 2).sum() + (a ** 2).sum() + (b ** 2).sum()
    return float(squares - 2 * cross)


def kernel(a, b, sigma=10.0):
    """Gaussian kernel of rows (N, D) and (M, D) -> (N, M), float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    squares = (a ** 2).sum(1)[:, None] - 2 * a @ b.T + (b ** 2).sum(1)         # (N, M)
    return np.exp(-squares / (2 * sigma ** 2))


def mean_of_pairs(a, sigma=10.0):
    """The mean kernel of two different rows of a (N, D)."""
    k = kernel(a, a, sigma)
    return (k.sum() - np.trace(k)) / (len(a) * (len(a) - 1))


def cmmd(a, b, sigma=10.0, pairs_b=None):
    """CLIP maximum mean discrepancy (Jayasumana et al. 2024): unit embeddings (N, D) and (M, D) ->
    1000 times the unbiased estimate of the squared distance of their distributions, by a Gaussian
    kernel of width sigma. About 0, and as often below, for two samples of one distribution.
    pairs_b: mean_of_pairs(b), where it is known."""
    pairs_b = mean_of_pairs(b, sigma) if pairs_b is None else pairs_b
    return float(1000 * (mean_of_pairs(a, sigma) + pairs_b - 2 * kernel(a, b, sigma).mean()))


def frechet_win_rate(a, b, reference, rounds=40):
    """The share of resamplings in which features a (N, F) have a smaller Frechet distance to the
    reference than b (N, F), the same rows being taken of both."""
    picks = [np.random.default_rng((0, i)).integers(len(a), size=len(a)) for i in range(rounds)]
    return float(np.mean([frechet(a[i], reference) < frechet(b[i], reference) for i in picks]))


# -------------------------------------------------------------------------------------- of images


def to_uint8(x):
    """(N, 3, S, S) in [-1, 1] -> images, rounded as saved ones are."""
    return np.stack([np.asarray(to_image(image)) for image in x])


@torch.no_grad()
def in_batches(function, images, size=0):
    """function(float (n, 3, S, S) in [0, 1]) of all images, about 64 at a time, concatenated; with
    `size`, of their centre crops of that side."""
    batches = np.array_split(images, 1 + len(images) // 64)
    if size:  # a batch at a time: all crops of large data do not fit into memory
        batches = (np.stack([crop(Image.fromarray(x), size) for x in batch]) for batch in batches)
    return torch.cat([function(to_tensor(batch)) for batch in batches])


def downscale(pixels, side):
    """(B, 3, S, S) -> (B, 3, side, side)."""
    return F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)


def thumbnails(images):
    """Images -> (N, 768), their pixels in [0, 1] at 16 x 16."""
    return in_batches(lambda x: downscale(x, 16).flatten(1), images).numpy()


def clip_embeddings(clip, images):
    """Images -> unit embeddings (N, D)."""
    return in_batches(lambda x: clip.encode_image(x.to(clip.device)), images, clip.size)


def retrieval(embeds, texts, own):
    """CLIP's mean cosine of each image (N, D) to its own text, number own[i] of texts (P, D), and
    the share of images that are nearer to it than to any other."""
    cosines = embeds @ texts.T                                                 # (N, P)
    own = torch.as_tensor(own, device=cosines.device)                          # (N,)
    similarity = cosines.gather(1, own[:, None])[:, 0].cpu().numpy()           # (N,)
    hits = (cosines.argmax(1) == own).tolist()
    return {"similarity": mean(similarity), "retrieval": proportion(hits)}


@dataclass
class Reference:
    """True images, as features (M, F) and embeddings (M, D), and how far images are from them."""
    features: np.ndarray
    embeds: np.ndarray

    def __post_init__(self):
        self.pairs = mean_of_pairs(self.embeds)

    def distances(self, features, embeds):
        """(Frechet distance, CMMD) of images' features (N, F) and embeddings (N, D)."""
        return frechet(features, self.features), cmmd(embeds, self.embeds, pairs_b=self.pairs)

    def judge(self, features, embeds):
        """Both distances, each with 1.96 standard deviations over 10 resamplings."""
        rng, n = np.random.default_rng(0), len(features)
        picks = [rng.choice(n, n) for _ in range(10)]
        spread = 1.96 * np.std([self.distances(features[i], embeds[i]) for i in picks], 0)
        return as_figures(self.distances(features, embeds), spread, n)

    def floor(self, features, embeds, n, draws=20):
        """Both distances of n other true images: mean and 1.96 standard deviations over draws of n
        from features (N, F) and embeddings (N, D)."""
        picks = [np.random.default_rng((0, i)).permutation(len(features))[:n] for i in range(draws)]
        found = [self.distances(features[i], embeds[i]) for i in picks]
        return as_figures(np.mean(found, 0), 1.96 * np.std(found, 0), len(picks[0]), "_floor")


def as_figures(values, halves, n, suffix=""):
    return {name + suffix: {"mean": float(value), "half": float(half), "n": n}
            for name, value, half in zip(("frechet", "cmmd"), values, halves)}


def diversity(features, groups):
    """Mean distance of features (N, F) within a group, as of images of one prompt; None if no group
    holds two."""
    distances = []
    for group in sorted(set(groups)):
        rows = features[np.flatnonzero(np.asarray(groups) == group)[:20]]      # (g, F)
        if len(rows) > 1:
            pairs = np.linalg.norm(rows[:, None] - rows[None], axis=-1)        # (g, g)
            distances.append(pairs.sum() / (len(rows) * (len(rows) - 1)))
    return mean(distances) if distances else None


def nearest(images, train_thumbnails):
    """Mean distance of images to the nearest training image, RMS over pixels at 16 x 16."""
    x, t = thumbnails(images), train_thumbnails
    squares = (x ** 2).sum(1)[:, None] - 2 * x @ t.T + (t ** 2).sum(1)         # (n, train images)
    return mean(np.sqrt(np.maximum(squares.min(1), 0) / t.shape[1]))
