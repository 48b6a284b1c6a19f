"""Images of embeddings, as sample.py draws them; and a modality gap, put on another CLIP."""
import copy
import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from common.modality import GENERIC, measure_gap, text_mean
from common.runtime import Runtime
from lab.metrics import clip_embeddings, in_batches, to_uint8
from model import GPT, VQGAN
from sample import accelerate, conditions_and_uniforms, draw

CONSTANT_GAP = 0.8  # of lab/explain.py: between the mean embeddings of OpenAI's CLIP


@dataclass
class Painter:
    """Draws images: a GPT, what fast.accelerate makes of it, and a VQGAN."""
    gpt: GPT
    generator: object
    vqgan: VQGAN
    runtime: Runtime
    seed: int = 0
    batch_size: int = 96

    def __call__(self, embeds, keys, n, options, modality="text"):
        """n images of each embedding (P, D), uint8 (P*n, S, S, 3); their random numbers depend on
        (seed, key, i)."""
        variety = options["variety"] if modality == "text" else 0.0
        starts = [conditions_and_uniforms(self.gpt, e[None], modality, self.seed, key, n, variety)
                  for e, key in zip(embeds, keys)]
        cond, uniform = map(torch.cat, zip(*starts))                   # (P*n, D), (P*n, T)
        images, _ = draw(self.generator, self.vqgan, cond, uniform, options, self.runtime,
                         self.batch_size)
        return to_uint8(torch.stack(images))

    def reconstruct(self, images):
        """What the VQGAN makes of images, uint8 (N, S, S, 3)."""
        def reconstruct(x):
            tokens = self.vqgan.encode(x.to(self.runtime.device) * 2 - 1)
            with self.runtime.autocast():  # as samples are decoded
                return self.vqgan.decode(tokens).float().cpu()
        return to_uint8(in_batches(reconstruct, images, self.vqgan.cfg.image_size))


def make_painter(gpt, vqgan, runtime, **changes):
    return Painter(gpt, accelerate(gpt, runtime.dtype), vqgan, runtime, **changes)


# ------------------------------------------------------------------------------------------- gaps


def own_vectors(texts, dim, draw=0):
    """A random unit vector for each text (N, D), a function of (draw, text) alone."""
    rngs = [np.random.default_rng(list(hashlib.sha256(f"{draw} {text}".encode()).digest()))
            for text in texts]
    vectors = np.stack([rng.standard_normal(dim, np.float32) for rng in rngs])     # (N, D)
    return F.normalize(torch.from_numpy(vectors), dim=-1)


def move(embeds, texts, length, draw=0):
    """The unit embeddings (N, D) of texts, each moved by its own random vector of this length."""
    vectors = own_vectors(texts, embeds.shape[1], draw).to(embeds.device)          # (N, D)
    return F.normalize(embeds + length * vectors, dim=-1)


def with_gap(clip, length):
    """The CLIP, but for its texts, which `move` has moved: no centring brings them back. 1.2 leaves
    a cosine of 0.63 to where a text was, 2.4 one of 0.38; OpenAI's ViT-B/32 has about 0.3."""
    moved = copy.copy(clip)
    moved.encode_text = lambda texts: move(clip.encode_text(texts), texts, length)
    return moved


def painter_for(painter, clip, image_embeds):
    """The painter, its GPT's text mean being what prepare.py finds for this CLIP, given some
    training images' embeddings (N, D)."""
    images = image_embeds.cpu()
    return with_shifted_text_mean(painter, measure_gap(clip, images, images.mean(0))[0])


@torch.no_grad()
def shift(embeds, length):
    """Unit embeddings (N, D) moved by one constant vector of this length: a gap that centring alone
    undoes, for lab/explain.py."""
    rng = torch.Generator().manual_seed(0)
    direction = F.normalize(torch.randn(embeds.shape[1], generator=rng), dim=0)
    return F.normalize(embeds + length * direction.to(embeds.device), dim=-1)


@torch.no_grad()
def shifted_text_mean(clip, length, images):
    """The mean (D,) that prepare.py would have found for texts where `shift` moves them to, given
    some training images, uint8 (N, S, S, 3)."""
    phrases, scale = shift(clip.encode_text(GENERIC), length), clip.model.logit_scale.exp()
    return text_mean(phrases, clip_embeddings(clip, images), scale)


def with_shifted_text_mean(painter, mean):
    """A painter whose GPT expects texts around another mean (D,), if it centres them at all."""
    gpt = copy.copy(painter.gpt)  # the weights are shared, the means are not
    gpt._buffers = {name: buffer.clone() for name, buffer in gpt._buffers.items()}
    if gpt.means[1].any():
        gpt.means[1] = mean
    return replace(painter, gpt=gpt)
