"""The modality gap: where CLIP keeps texts, what they leave open, estimated without a caption."""
import numpy as np
import torch
import torch.nn.functional as F

# Everyday phrases: tied to no image. None names an object, colour or background of the toy world.
GENERIC = [f"the {noun}" for noun in (
    "person man woman child face hand dog cat bird horse cow insect butterfly snake bear sheep "
    "elephant leaf fruit vegetable cake pizza plate bottle table chair bed lamp room kitchen "
    "window door building church tower bridge street road truck train bicycle plane mountain hill "
    "beach river lake forest field garden cloud sunset ball toy clock book phone computer sign "
    "letter shoe hat shirt bag ring painting drawing photo map crowd team game market shop fire "
    "animal machine food meal island desert wall roof stone rope basket coat glove mirror guitar "
    "drum camera spoon knife").split()]
GENERIC += [f"a {kind} thing" for kind in "bright dark shiny wooden striped round".split()]


def text_mean(phrases, images, scale):
    """The mean text embedding, weighted by CLIP's zero-shot probability: phrases (P, D), each
    weighted by how often CLIP names it when asked what an image (N, D) shows -> (D,). No image has
    a caption for that, and most phrases suit no image at hand. `scale` is exp(logit_scale)."""
    return (scale * images @ phrases.T).softmax(1).mean(0) @ phrases


def shrinkage(model, image_embeds, max_rows=50000):
    """The matrix M (D, D) that brings texts to where images are: norm(c M) keeps of each direction
    the share v / (v + 1/D), v being the variance of images' conditions there, 1/D on average. That
    is the Wiener filter for noise of length 1: what a text has and no image varies by is noise.
    `model` is a GPT, image_embeds (N, D) an array."""
    embeds = image_embeds[::-(-len(image_embeds) // max_rows)].astype(np.float32)
    c = model.condition(torch.from_numpy(embeds).to(model.means.device)).cpu().double()  # (n, D)
    second = c.T @ c / len(c)                                                        # (D, D)
    return torch.linalg.solve(second + torch.eye(len(second)) / len(second), second).float()


def gap_noise(cosine):
    """Noise that fits a gap. norm(c + r u), u a random unit vector, has the cosine 1/sqrt(1 + r^2)
    to c, so r = sqrt(1/q^2 - 1) moves an image as far as the nearest phrase is, cosine q. Half of
    it: a phrase names a part of an image, and its own text is nearer; the half was chosen on the
    toy. q under 0.1 is chance."""
    if cosine is None:  # a dump that does not say
        return 0.5
    return round(0.5 * (1 / min(max(cosine, 0.1), 1) ** 2 - 1) ** 0.5, 2)


def measure_gap(clip, images, image_mean):
    """text_mean for images' embeddings (N, D) of this CLIP, and the cosine of an image to the
    nearest phrase, both centred. Returns (text mean (D,), cosine, line that says so)."""
    phrases = clip.encode_text(GENERIC).cpu()                          # (P, D)
    text = text_mean(phrases, images, clip.model.logit_scale.exp().item())
    nearest = (images @ phrases.T).max(1).values.mean().item()
    centred = F.normalize(images - image_mean, dim=-1) @ F.normalize(phrases - text, dim=-1).T
    cosine = centred.max(1).values.mean().item()
    return text, cosine, (
        f"modality gap: {(image_mean - text).norm():.3f} between the mean embeddings of images and "
        f"of {len(GENERIC)} generic phrases, each weighted by how often it suits one; cosine of an "
        f"image to the nearest phrase {nearest:.3f}, centred {cosine:.3f}, so train_gpt.py takes "
        f"--noise={gap_noise(cosine)}, half of what brings an image's condition as far from it")


@torch.no_grad()
def neighbour_spread(model, clip_embeds, seed, neighbours=0.01, anchors=256, max_rows=50000):
    """A factor R (D, D) of the mean local covariance: e R, e standard normal, varies as the image
    embeddings nearest to one of them, the share `neighbours` of all (N, D), do around their mean.

    A text is one point where the images it fits are a cloud: "a red bus" says nothing of the
    background. With noise of this shape in training the GPT learns what a text leaves open;
    sample.py moves each image's condition by it, so that images of one text vary as they should."""
    chosen = np.random.default_rng((seed, 2)).permutation(len(clip_embeds))[:max_rows]
    embeds = torch.from_numpy(clip_embeds[np.sort(chosen)].astype(np.float32))
    c = model.condition(embeds.to(model.means.device))                           # (N, D)
    k = min(max(2, round(len(c) * neighbours)), len(c))
    covariance = torch.zeros_like(c[0].outer(c[0]))                              # (D, D)
    anchor_rows = range(0, len(c), -(-len(c) // anchors))
    for i in anchor_rows:
        nearest = c[(c @ c[i]).topk(k).indices]                                  # (k, D)
        nearest = nearest - nearest.mean(0)
        covariance += nearest.T @ nearest / max(1, len(nearest) - 1) / len(anchor_rows)
    values, vectors = np.linalg.eigh(covariance.cpu().double().numpy())
    root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T                   # (D, D)
    return torch.from_numpy(root.astype(np.float32))
