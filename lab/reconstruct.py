"""What a VQGAN makes of images of your own: each beside its reconstruction.

    python -m lab.reconstruct photo.jpg drawing.png --vqgan=vqgan_f16_16384.ckpt
A GPT can paint no better than that: what is lost here is lost in every sample. Beside the error in
pixels (PSNR) it says how much fine detail is left, which a discriminator is there to bring back."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.checkpoints import load_vqgan, newest
from common.images import crop, save_grid, to_image, to_tensor
from common.options import check_range, fail, parse_options
from common.process import run_main
from common.prompts import read_image
from common.runtime import Runtime, format_size


@dataclass
class Config:
    prompts: tuple = ()                     # the images' files
    vqgan: str = ""                         # of vqgan.py, or published (empty: newest under out/)
    out: str = "out/reconstructions.png"    # each image, and its reconstruction to the right
    image_size: int | None = None           # pixels a side (auto: what the VQGAN was made for)
    device: str = "auto"                    # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"                     # auto (float32 on a CPU), float32, bfloat16, float16


@torch.no_grad()
def reconstruct(vqgan, image, size, runtime):
    """The centre crop of a Pillow image -> (it, its reconstruction, tokens, PSNR in dB)."""
    pixels = crop(image, size)                                               # (S, S, 3)
    x = to_tensor(pixels, runtime.device)[None] * 2 - 1                      # (1, 3, S, S)
    with runtime.autocast():
        tokens = vqgan.encode(x)                                             # (1, h, w)
        recon = vqgan.decode(tokens).float()
    mse = (recon.clamp(-1, 1) - x).square().mean().clamp(min=1e-10)
    return Image.fromarray(pixels), to_image(recon[0]), tokens[0], (10 * (4 / mse).log10()).item()


def fine_energy(image):
    """Energy in the upper half of an image's spectrum: the part of the mean square of its grey
    levels in [0, 1] that has frequencies above a quarter cycle a pixel, across or down."""
    grey = np.asarray(image.convert("L"), np.float64) / 255                  # (S, S)
    power = np.abs(np.fft.fft2(grey, norm="forward")) ** 2
    frequency = np.abs(np.fft.fftfreq(len(grey)))                            # cycles a pixel
    return power[np.maximum(frequency[:, None], frequency) > 0.25].sum()


def main():
    cfg = parse_options(Config)
    check_range(cfg, 1, 2 ** 62, "image_size")
    if not cfg.prompts:
        fail("give an image or several: python -m lab.reconstruct photo.jpg")
    if Path(cfg.out).suffix.lower() != ".png":
        fail(f"--out={cfg.out} must end in .png")
    images = [read_image(path) for path in cfg.prompts]
    runtime = Runtime(cfg.device, cfg.dtype, training=False)
    vqgan = load_vqgan(cfg.vqgan or newest("vqgan"), runtime.device)
    size = cfg.image_size or vqgan.cfg.image_size
    if size % vqgan.cfg.factor:
        fail(f"--image_size={size} does not divide by {vqgan.cfg.factor}, the factor of "
             f"{vqgan.path}")
    runtime.print0(f"VQGAN {vqgan.path} ({format_size(vqgan)}) on {runtime}")
    rows, labels, psnrs = [], [], []
    for path, image in zip(cfg.prompts, images):
        original, recon, tokens, psnr = reconstruct(vqgan, image, size, runtime)
        rows.append([original, recon])
        labels.append(f"{psnr:.1f} dB: {Path(path).name}")
        psnrs.append(psnr)
        runtime.print0(f"{path}: {tokens.numel()} tokens, {len(tokens.unique())} codes, PSNR "
                       f"{psnr:.1f} dB")
    true, kept = (np.mean([fine_energy(row[i]) for row in rows]) for i in (0, 1))
    runtime.print0(f"all {len(rows)}: mean PSNR {np.mean(psnrs):.2f} dB; energy in the upper half "
                   f"of the spectrum {kept / max(true, 1e-12):.0%} of the images'")
    save_grid(cfg.out, rows, labels, across=4)
    runtime.print0(f"wrote {cfg.out}: each image, and its reconstruction to the right")


if __name__ == "__main__":
    run_main(main)
