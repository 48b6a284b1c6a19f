"""What a trainer shows of its progress: recon.png and grid.png."""
import torch

from common.batches import to_pixels
from common.images import save_grid, to_image


@torch.no_grad()
def save_reconstructions(path, model, images, step, cfg, runtime):
    """recon.png: held-out images, uint8 (n, S, S, 3), and below what the network makes of them."""
    x = to_pixels(torch.from_numpy(images), runtime)
    with runtime.autocast():
        recon = model(x, quantized=step >= cfg.vq_start)[0]
    rows = [[to_image(image) for image in row] for row in (x, recon)]
    save_grid(path, rows, ["held-out images", "by the VQGAN"])


@torch.no_grad()
def save_samples(path, model, vqgan, tokens, clip_embeds, runtime):
    """grid.png: images as the VQGAN keeps them, and below what the GPT makes of their embeddings.
    """
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(tokens.shape, generator=generator).to(runtime.device)
    with runtime.autocast():
        sampled = model.generate(model.condition(clip_embeds.to(runtime.device)), uniform)
        both = torch.stack([tokens.to(runtime.device), sampled])                 # (2, n, T)
        grids = both.unflatten(2, (model.cfg.grid, model.cfg.grid))              # (2, n, h, w)
        rows = [[to_image(x) for x in vqgan.decode(tokens)] for tokens in grids]
    save_grid(path, rows, ["by the VQGAN", "by the GPT, from its embedding"])
