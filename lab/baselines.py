"""What samples are compared with: the same GPT trained on captions and on nothing, and images
optimised against CLIP."""
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.checkpoints import load_gpt, path_from
from common.dumps import SPLITS, open_dump, write_meta
from common.files import atomic_write, file_sha256
from common.options import fail
from common.sources import ImageSource, split_names
from lab.metrics import to_uint8
from lab.stages import run_stage
from toy import read_world

# --------------------------------------------------------------------------------- other training


def find_dump(cfg, config, required, runtime):
    """The dump (meta, arrays) that a GPT of this `config` was trained on, for the controls. If it
    is not of the world cfg.data: an error if the controls are `required`, else None."""
    if not Path(config["data"], "meta.json").is_file():
        fail(f"there is no dump in {config['data']}, which the controls need; put it back, or use "
             f"--controls=False")
    dump = open_dump(config["data"])
    if dump[0].get("sources_sha256") == ImageSource(f"{cfg.data}/train").sha256:
        return dump
    reason = (f"{config['data']} is no dump of {cfg.data}/train, so its rows can't be given their "
              f"captions")
    if required:
        fail(f"{reason}; use --controls=False")
    runtime.print0(f"no controls: {reason}")
    return None


def write_text_dump(out, meta, arrays, rows, vqgan, clip):
    """Write a dump with the tokens of another, its meta and arrays, and other embeddings, of texts:
    rows {split: (N, D) float16}. Returns the number of rows of each split."""
    for split, embeds in rows.items():
        for kind, array in (("tokens", arrays[split][0]), ("clip", embeds)):
            with atomic_write(out / f"{split}_{kind}.bin") as f:
                f.write_bytes(np.ascontiguousarray(array).tobytes())
    mean = rows["train"].astype(np.float64).mean(0).tolist()
    meta = meta | {"image_mean": mean, "text_mean": mean,  # one modality, so one mean
                   "vqgan": path_from(out, vqgan.path), "clip": path_from(out, clip.name)}
    counts = {split: len(embeds) for split, embeds in rows.items()}
    write_meta(out, meta, counts, meta["grid"], meta["codebook_size"], clip.dim)
    return counts


def write_caption_dump(out, cfg, dump, vqgan, clip):
    """Write a dump with the embeddings of the images' captions in place of the images' own, those
    of an empty text for images that are not the world's."""
    meta, arrays = dump
    captions = {Path(r["path"]).name: r["caption"] for r in read_world(cfg.data, "train")[1]}
    texts = sorted({"", *captions.values()})
    embeds = dict(zip(texts, clip.encode_text(texts).cpu().numpy().astype(np.float16)))
    skipped, rows = {name for name, _ in meta["skipped"]}, {}
    source = ImageSource(f"{cfg.data}/train")
    for split, names in zip(SPLITS, split_names(source, meta["config"]["val_percent"])):
        of_split = [embeds[captions.get(name, "")] for name in names if name not in skipped]
        rows[split] = np.array(of_split, np.float16).reshape(-1, clip.dim)         # (rows, D)
    rows["train"] = rows["train"].repeat(meta["config"]["crops"], 0)
    write_text_dump(out, meta, arrays, rows, vqgan, clip)


def train_controls(cfg, config, dump, vqgan, clip, runtime):
    """Train a GPT by the options `config` once more on captions' embeddings, and once on nothing.
    Returns {"captions" or "nothing": GPT}."""
    folder = Path(cfg.out, f"controls-{file_sha256(cfg.gpt)[:8]}")
    write_caption_dump(folder / "caption_tokens", cfg, dump, vqgan, clip)
    controls = {}
    for name, what, changes in (
            # a caption leaves open what a prompt does: no spread
            ("captioned", "captions", {"data": folder / "caption_tokens", "spread": 0.0}),
            # validation, which has conditions, must not choose the weights: the last ones count
            ("unconditioned", "nothing", {"cond_drop_prob": 1.0,
                                          "eval_every": config["max_steps"]})):
        options = config | changes | {"out": folder / name, "device": cfg.device, "fresh": False}
        del options["preset"]  # whose options are among the others
        run_stage("train_gpt.py", options, capture=False)
        controls[what] = load_gpt(folder / name / "gpt.pt", runtime.device)[0]
    return controls


# ----------------------------------------------------------------------------------- optimisation


def vqgan_clip_baseline(vqgan, clip, texts, seconds, grid, seed, runtime, crops,
                        learning_rate):
    """Latents whose image CLIP finds like the text, by gradient (VQGAN-CLIP, Crowson et al. 2022):
    Adam through codebook (straight-through), decoder and CLIP, on random crops of each image.

    Embeddings texts (P, D) are worked on together. Returns uint8 (P, S, S, 3) for each of
    `seconds`, rising times an image."""
    rng, is_cuda = torch.Generator().manual_seed(seed), runtime.device.type == "cuda"
    # noise made on the GPU is not waited for
    noise_rng = torch.Generator(runtime.device).manual_seed(seed) if is_cuda else rng
    start = torch.randint(vqgan.cfg.codebook_size, (len(texts), grid, grid), generator=rng)
    z = vqgan.quantize.lookup(start.to(texts.device)).clone().requires_grad_()     # (P, d, h, w)
    adam, start_time, results = torch.optim.Adam([z], learning_rate), time.time(), []
    while True:
        with runtime.autocast():
            x = vqgan.decoder(vqgan.post_quant_conv(vqgan.quantize(z)[0])).float()  # (P, 3, S, S)
        if is_cuda:
            torch.cuda.synchronize()
        elapsed = (time.time() - start_time) / len(texts)
        while len(results) < len(seconds) and elapsed >= seconds[len(results)]:
            results.append(to_uint8(x.detach()))
        if len(results) == len(seconds):
            return results
        pixels = augment((x + 1) / 2, crops, clip.size, rng)                       # (P*crops, ...)
        noise = torch.randn(pixels.shape, generator=noise_rng, device=x.device)
        with runtime.autocast():
            embeds = clip.encode_image(pixels + 0.02 * noise)                      # (P*crops, D)
        cosines = (embeds @ texts.T.repeat_interleave(crops, 1)).diagonal()        # (P*crops,)
        loss = (1 - cosines).sum() / crops
        adam.zero_grad()
        loss.backward()
        adam.step()


def augment(pixels, crops, size, rng):
    """Random crops of images (P, 3, S, S), half of them mirrored -> (P*crops, 3, size, size)."""
    n = len(pixels) * crops
    scale = 0.7 + 0.3 * torch.rand(n, generator=rng)
    shift = (torch.rand(n, 2, generator=rng) * 2 - 1) * (1 - scale[:, None])
    flip = (torch.rand(n, generator=rng) < 0.5).float() * 2 - 1                    # -1 or 1
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale * flip, scale, shift
    where = F.affine_grid(theta.to(pixels.device), (n, 3, size, size), align_corners=False)
    return F.grid_sample(pixels.repeat_interleave(crops, 0), where, padding_mode="border",
                         align_corners=False)
