"""Checkpoints published by others -> this project's form. Imported only when one is met.

taming-transformers' VQGANs have our names. HFAiLab/clip-gen's VQGAN numbers its levels in one flat
list, has attention as nn.MultiheadAttention of one head, and brings its discriminator along; its
GPT is made of nn.TransformerEncoderLayer.
"""
import dataclasses
import math
import re

import torch

from common.files import hash_state
from model import GPTConfig, VQGANConfig

# their names -> ours
BLOCK = {"block.0": "norm1", "block.2": "conv1", "block.3": "norm2", "block.6": "conv2",
         "shortcut": "nin_shortcut"}
MID = {"mid.0": "mid.block_1", "mid.1": "mid.attn_1", "mid.2": "mid.block_2"}
ENDS = {"encoder.final.0": "encoder.norm_out", "encoder.final.2": "encoder.conv_out",
        "encoder.final.3": "quant_conv", "decoder.final.0": "decoder.norm_out",
        "decoder.final.2": "decoder.conv_out", "decoder.quant_conv_in": "post_quant_conv",
        "quantizer.embedding": "quantize.embedding"}
GPT_NAMES = {"encoder.norm1": "ln_1", "encoder.norm2": "ln_2", "norm": "ln_f",
             "encoder.self_attn.in_proj_": "qkv.", "encoder.self_attn.out_proj": "proj",
             "encoder.linear1": "fc", "encoder.linear2": "fc_out"}


def rename_key(name, table):
    """The name with the first entry of the table that starts it, or a dotted part, replaced."""
    for old, new in table.items():
        pattern = rf"(^|\.){re.escape(old)}(?=\.|$|weight|bias)"
        name, n = re.subn(pattern, rf"\g<1>{new}", name, count=1)
        if n:
            break
    return name


def number_levels(weights, half):
    """{their flat place: ours} for `encoder.down` or `decoder.up`, told by the modules' kinds."""
    kinds, places = {}, {}
    for name in weights:
        if name.startswith(half + "."):
            n, kind = name[len(half) + 1:].split(".")[:2]
            kinds.setdefault(int(n), set()).add(kind)
    up = half == "decoder.up"
    level = sum("conv" in k for k in kinds.values()) if up else 0
    j = -1
    for n in sorted(kinds):
        j += "block" in kinds[n]
        if "conv" in kinds[n]:
            places[f"{half}.{n}"] = f"{half}.{level}.{'upsample' if up else 'downsample'}"
            level, j = level + (-1 if up else 1), -1
        else:
            kind = "block" if "block" in kinds[n] else "attn"
            places[f"{half}.{n}"] = f"{half}.{level}.{kind}.{j}"
    return places


def from_hfai_vqgan(weights):
    """The state dict of HFAiLab/clip-gen's VQGAN under taming-transformers' names."""
    weights = {k: v for k, v in weights.items() if not k.startswith("discriminator.")}
    places = number_levels(weights, "encoder.down") | number_levels(weights, "decoder.up")
    place_of = re.compile(r"((?:encoder\.down|decoder\.up)\.\d+|(?:\w+\.)?mid\.\d|)\.?(.*)")
    out = {}
    for name, x in weights.items():
        theirs, rest = place_of.fullmatch(name).groups()
        place = places.get(theirs) or rename_key(theirs, MID)
        as_conv = x[..., None, None] if x.dim() == 2 else x
        if rest.startswith("attn.in_proj_"):
            for letter, y in zip("qkv", as_conv.chunk(3)):
                out[f"{place}.{letter}.{rest[13:]}"] = y
        elif rest.startswith("attn.out_proj."):
            out[f"{place}.proj_out.{rest[14:]}"] = as_conv
        elif place:
            out[f"{place}.{rename_key(rest, BLOCK)}"] = x
        else:
            out[rename_key(name, ENDS)] = x
    return out


def vqgan_config(weights, eps):
    """The VQGANConfig that taming-transformers' weights fit, read from their shapes. What no shape
    tells: they were all made for images that give 16 x 16 tokens."""
    levels = 1 + max(int(k.split(".")[2]) for k in weights if k.startswith("encoder.down."))
    ch, side = weights["encoder.conv_in.weight"].shape[0], 16 * 2 ** (levels - 1)
    blocks = re.compile(r"encoder\.down\.0\.block\.\d+\.conv1\.weight")
    widths = [weights[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    has_attn = [f"encoder.down.{i}.attn.0.norm.weight" in weights for i in range(levels)]
    codebook_size, code_dim = weights["quantize.embedding.weight"].shape
    return VQGANConfig(
        image_size=side, patch=1, ch=ch, ch_mult=tuple(width // ch for width in widths), groups=32,
        l2_norm=False, eps=eps,
        num_res_blocks=sum(bool(blocks.fullmatch(k)) for k in weights),
        attn_resolutions=tuple(side >> i for i in range(levels) if has_attn[i]),
        z_channels=weights["encoder.conv_out.weight"].shape[0],
        codebook_size=codebook_size, code_dim=code_dim)


def convert_checkpoint(checkpoint, n_head=None):
    """A published checkpoint -> the same in this project's form, or None if it is none of them. A
    GPT's heads, which no shape tells, have 64 numbers each unless n_head says otherwise."""
    weights, eps = checkpoint.get("state_dict"), 1e-6
    if weights is None and "epoch" in checkpoint:
        weights, eps = checkpoint.get("model", {}), 1e-5
    if not weights:
        return None
    if "encoder.conv_in.weight" in weights:
        if "quantizer.embedding.weight" in weights:
            weights = from_hfai_vqgan(weights)
        weights = {k: v for k, v in weights.items() if not k.startswith("loss.")}
        network = dataclasses.asdict(vqgan_config(weights, eps))
        return {"stage": "vqgan", "ema": weights, "network": network, "sha256": hash_state(weights)}
    if "pos_emb" in weights and "cond_proj.weight" in weights:
        weights = {rename_key(k, GPT_NAMES): v for k, v in weights.items()
                   if not k.endswith(".mask")}
        _, t, c = weights["pos_emb"].shape
        d = weights["cond_proj.weight"].shape[1]
        network = GPTConfig(
            codebook_size=weights["tok_emb.weight"].shape[0], grid=math.isqrt(t), cond_dim=d,
            n_layer=1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks.")),
            n_head=n_head or c // 64, n_embd=c, classic=True)
        weights |= {"pos_emb": weights["pos_emb"][0], "means": torch.zeros(2, d),
                    "spread": torch.zeros(d, d)}
        return {"stage": "gpt", "ema": weights, "network": dataclasses.asdict(network),
                "clip": "ViT-B/32"}
    return None
