"""The perceptual loss of vqgan.py: what CLIP's image encoder sees at several depths."""
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common.openai_clip import load_clip


def perceptual_features(visual, depths=(0.25, 0.5, 0.75, 1.0)):
    """A function from CLIP's input (B, 3, C, C) to a list of feature maps: a ResNet's four stages
    (channels in dimension 1), or a ViT's tokens after these shares of its depth (channels last)."""
    if hasattr(visual, "layer1"):
        fold_batch_norms(visual)
        layers = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
        visual.attnpool = nn.Identity()  # nothing after the last of them is looked at
    else:
        blocks = visual.transformer.resblocks
        layers = [blocks[round(d * len(blocks)) - 1] for d in depths]
    visual.to(memory_format=torch.channels_last)
    outputs = []
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))

    def features(x):
        outputs.clear()
        visual(x)
        return list(outputs)
    return features


def fold_batch_norms(resnet):
    """Fold frozen batch norms into their convolutions: the same function in fewer passes."""
    for m in resnet.modules():
        for conv, bn in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")):
            if isinstance(getattr(m, bn, None), nn.BatchNorm2d):  # "0", "1": a downsample
                setattr(m, conv, fuse_conv_bn_eval(getattr(m, conv), getattr(m, bn)))
                setattr(m, bn, nn.Identity())


def perceptual_distance(real, fake):
    """Mean squared distance of feature maps at unit length along channels, averaged over the maps
    (LPIPS, Zhang et al. 2018, with CLIP for VGG). Between unit vectors it is 2 - 2 cosine."""
    total = 0
    for a, b in zip(real, fake):
        dim, a, b = 1 if a.dim() == 4 else -1, a.float(), b.float()
        length = b.square().sum(dim).clamp(min=1e-16).sqrt()
        # F.cosine_similarity is 1.5x slower, forward and backward
        cosine = (F.normalize(a, dim=dim) * b).sum(dim) / length
        total = total + 2 - 2 * cosine.mean()
    return total / len(real)


def random_shift(images, largest, seed):
    """Images (B, 3, S, S) several times, all shifted alike by up to `largest` pixels each way, the
    borders repeated: so that a ViT's patches are cut differently in each step. The shift is a
    function of `seed` alone."""
    if not largest:
        return images
    side = images[0].shape[-1]
    x, y = np.random.default_rng(seed).integers(2 * largest + 1, size=2)
    padded = [F.pad(image, 4 * (largest,), mode="replicate") for image in images]
    return [image[..., y:y + side, x:x + side] for image in padded]


def blindness(visual):
    """A warning if a ViT's first layer can't see all of a patch: it projects the 3 p p numbers of a
    patch to its width, and errors in the other directions are invisible for any weights."""
    if hasattr(visual, "layer1"):
        return ""
    width, channels, p, _ = visual.conv1.weight.shape
    numbers = channels * p * p
    if width >= numbers:
        return ""
    return (f"warning: this CLIP projects patches of {numbers} numbers to {width}: the perceptual "
            f"loss is blind to {1 - width / numbers:.0%} of the directions an error can have; "
            f"--clip=RN50 sees them all")


def load_features(cfg, runtime):
    """The CLIP of the perceptual loss, and its features at several depths; None without one."""
    if not cfg.perceptual:
        return None, None
    clip = load_clip(cfg.clip, runtime.device, cfg.trust_jit)
    runtime.print0(blindness(clip.model.visual))
    return clip, perceptual_features(clip.model.visual)
