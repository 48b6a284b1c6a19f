"""The paper's second loss, on what the GPT would paint (train_gpt.py --clip_loss_weight)."""
import torch.nn.functional as F

from common.checkpoints import load_named
from common.images import resize
from common.openai_clip import load_clip


def embedding_loss(model, vqgan, clip, cond, targets, embeds):
    """The paper's second loss: paint the tokens that the GPT holds likeliest, and ask that CLIP see
    in the image what the condition says: 1 - cosine to the embedding (b, D). Straight-through: the
    likeliest codes forward, the probabilities backward."""
    p = model(cond, targets[:, :-1]).float().softmax(-1)                         # (b, T, K)
    one_hot = F.one_hot(p.argmax(-1), p.shape[-1]) + p - p.detach()              # (b, T, K)
    codebook = vqgan.quantize.to_unit(vqgan.quantize.embedding.weight)           # (K, d)
    codes = (one_hot @ codebook).mT                                              # (b, d, T)
    z = codes.unflatten(2, (model.cfg.grid, model.cfg.grid))                     # (b, d, h, w)
    pixels = (vqgan.decoder(vqgan.post_quant_conv(z)).float() + 1) / 2           # (b, 3, S, S)
    predicted = clip.encode_image(resize(pixels, clip.size))                     # (b, D)
    return 1 - (predicted * F.normalize(embeds, dim=-1)).sum(-1).mean()


def make_clip_loss(meta, vqgan, cfg, runtime):
    """embedding_loss on an eighth of the rows, if it has a weight."""
    if not cfg.clip_loss_weight:
        return None

    def load(name):
        return load_clip(name, runtime.device, cfg.trust_jit)
    clip = load_named(load, cfg.data, meta["clip"], meta["clip_sha256"], cfg.data)

    def clip_loss(model, cond, targets, embeds):
        rows = slice(-(-len(cond) // 8))
        return embedding_loss(model, vqgan, clip, cond[rows], targets[rows], embeds[rows])
    return clip_loss
