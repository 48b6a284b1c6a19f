"""The figures by which images are judged, each with its uncertainty and the number of samples.

Images are uint8 (N, S, S, 3) throughout, as they are saved."""
import math

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


def cmmd(a, b, sigma=10.0):
    """CLIP maximum mean discrepancy (Jayasumana et al. 2024): unit embeddings (N, D) and (M, D) ->
    1000 times the unbiased estimate of the squared distance of their distributions, by a Gaussian
    kernel of width sigma. About 0, and as often below, for two samples of one distribution."""
    def kernel(x, y):
        squares = (x ** 2).sum(1)[:, None] - 2 * x @ y.T + (y ** 2).sum(1)     # (N, M)
        return np.exp(-squares / (2 * sigma ** 2))

    def mean_of_pairs(x):
        k = kernel(x, x)
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(1000 * (mean_of_pairs(a) + mean_of_pairs(b) - 2 * kernel(a, b).mean()))


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
    if size:
        images = np.stack([crop(Image.fromarray(x), size) for x in images])
    batches = np.array_split(images, 1 + len(images) // 64)
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


def retrieval(clip, images, texts, own):
    """CLIP's mean cosine of each image to its own text, number own[i] of embeddings (P, D), and the
    share of images that are nearer to it than to any other."""
    cosines = clip_embeddings(clip, images) @ texts.T                          # (N, P)
    own = torch.as_tensor(own, device=cosines.device)                          # (N,)
    similarity = cosines.gather(1, own[:, None])[:, 0].cpu().numpy()           # (N,)
    hits = (cosines.argmax(1) == own).tolist()
    return {"similarity": mean(similarity), "retrieval": proportion(hits)}


def quality(features, images, groups, reference, train_thumbnails, n):
    """Figures that need no labels. "frechet": distance of n of the images to the reference's
    features (M, F), with 1.96 standard deviations over 10 resamplings; "diversity": mean distance
    of features within a group (images of one prompt); "nearest": distance to the nearest training
    image, RMS over pixels at 16 x 16. `features` is a function, images -> (N, F)."""
    rng, f = np.random.default_rng(0), features(images)
    index = rng.permutation(len(f))[:n]
    resampled = [frechet(f[rng.choice(index, len(index))], reference) for _ in range(10)]
    distances = []
    for group in sorted(set(groups)):
        rows = f[np.flatnonzero(np.asarray(groups) == group)[:20]]             # (g, F)
        if len(rows) > 1:
            pairs = np.linalg.norm(rows[:, None] - rows[None], axis=-1)        # (g, g)
            distances.append(pairs.sum() / (len(rows) * (len(rows) - 1)))
    x, t = thumbnails(images[index]), train_thumbnails
    squares = (x ** 2).sum(1)[:, None] - 2 * x @ t.T + (t ** 2).sum(1)         # (n, train images)
    nearest = np.sqrt(np.maximum(squares.min(1), 0) / t.shape[1])              # (n,)
    return {"frechet": {"mean": frechet(f[index], reference),
                        "half": float(1.96 * np.std(resampled)), "n": len(index)},
            "diversity": mean(distances) if distances else None, "nearest": mean(nearest)}
