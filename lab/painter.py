"""Images of embeddings, as sample.py draws them; and OpenAI's modality gap, put on another CLIP."""
import copy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from common.modality import GENERIC, text_mean
from common.runtime import Runtime
from lab.metrics import clip_embeddings, in_batches, to_uint8
from model import GPT, VQGAN
from sample import accelerate, conditions_and_uniforms, draw


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


@torch.no_grad()
def shift(embeds, length):
    """Unit embeddings (N, D) moved by a constant vector of this length: a modality gap."""
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
