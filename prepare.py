"""Stage 2: turn a folder of images into the files the GPT is trained on.

Each row is one crop of one image, encoded twice: by the VQGAN as tokens, by CLIP's image encoder as
an embedding. Both networks are frozen, so this is done once, and the trainer reads fixed-size rows
from memory-mapped files (their format: common/dumps.py).

Work goes in chunks of images, each a small file of its own until the end: a restart goes on with
the missing ones, and any number of processes can share them. Beside a GPU worker processes decode
and crop; on a CPU, under Linux, they run the networks as well, each with one thread, so that no
thread waits for another."""
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import common.chunks as chunking
from common.checkpoints import load_vqgan, newest, path_from
from common.dumps import SPLITS, finish_dump, token_dtype, write_dump
from common.files import lock_folder
from common.images import crop, random_crop, to_tensor
from common.openai_clip import CLIP_FILES, load_clip
from common.options import check_range, fail, format_command, parse_options
from common.process import run_main
from common.runtime import Runtime, format_size
from common.sources import ImageSource, split_names

__all__ = ["write_dump"]  # for rows that do not come from images: see docs/photos.md


@dataclass
class Config:
    data: str = "data/toy/train"        # a folder of images, at any depth, or .tar shards of them
    out: str = "data/toy_tokens"        # the dump: a folder of its own
    vqgan: str = ""                     # of vqgan.py, or published (empty: the newest under out/)
    clip: str = "out/toy/clip.pt"       # ViT-B/32 and so on, or a file
    trust_jit: bool = False             # run the code in a --clip file that is TorchScript
    seed: int = 0                       # of the crops
    image_size: int | None = None       # pixels a side (auto: what the VQGAN was made for)
    crops: int = 1                      # rows of each training image; the first is the centre crop
    min_zoom: float = 0.9               # the others show this share of the short side, or more
    flip: bool = True                   # mirror half of the others
    val_percent: float = 2.0            # of the images that are held out, chosen by name
    max_bad: float = 0.5                # stop if more of the images than this can't be read
    batch_size: int | None = None       # rows at a time (auto: 16 of 64 px in a worker, else 128)
    chunk: int = 256                    # images a chunk
    workers: int | None = None          # processes (auto: one a core, 8 beside a GPU)
    device: str = "auto"                # auto, cpu, cuda, cuda:1, mps
    dtype: str = "float32"              # of the networks: auto, float32, bfloat16, float16
    dry_run: bool = False               # a few chunks, then what all would take; nothing is written


class Chunks(torch.utils.data.Dataset):
    """Item c: (c, tokens, embeddings, skipped) of images c*chunk.., `skipped` being [[name,
    reason]]; without `encode`, uint8 crops for VQGAN and CLIP in place of tokens and embeddings."""

    def __init__(self, source, names, cfg, size, clip_size, crops, encode=None):
        self.source, self.names, self.cfg, self.encode = source, names, cfg, encode
        self.size, self.clip_size, self.crops = size, clip_size, crops

    def __len__(self):
        return -(-len(self.names) // self.cfg.chunk)

    def names_of(self, c):
        return self.names[c * self.cfg.chunk:(c + 1) * self.cfg.chunk]

    def __getitem__(self, c):
        cfg, rows, clip_rows, skipped = self.cfg, [], [], []
        for i, name in enumerate(self.names_of(c), c * cfg.chunk):
            try:
                image = self.source.open(name, self.size)
            except (OSError, ValueError) as e:
                skipped.append([name, " ".join(str(e).split())[:200]])
                continue
            for j in range(self.crops):
                uniform = np.random.default_rng((cfg.seed, i, j)).random(4)
                for side, crops in ((self.size, rows), (self.clip_size, clip_rows)):
                    crops.append(random_crop(image, side, uniform, cfg.min_zoom, cfg.flip)
                                 if j else crop(image, side))
        pixels, clip_pixels = stack(rows, self.size), stack(clip_rows, self.clip_size)
        if self.encode:
            return c, *self.encode(pixels, clip_pixels), skipped
        return c, pixels, clip_pixels, skipped


def stack(crops, side):
    return np.stack(crops) if crops else np.zeros((0, side, side, 3), np.uint8)


@torch.no_grad()
def encode_batch(pixels, clip_pixels, vqgan, clip, runtime, batch_size=None):
    """uint8 crops (n, S, S, 3), for CLIP (n, C, C, 3) -> tokens (n, T), unit embeddings (n, D)."""
    side = pixels.shape[1] // vqgan.cfg.factor
    small = max(2, 2 ** 16 // pixels.shape[1] ** 2)  # what a worker's caches hold
    batch_size = batch_size or (small if chunking.encode_in_workers(runtime) else 128)
    tokens = np.zeros((len(pixels), side ** 2), token_dtype(vqgan.cfg.codebook_size))
    embeds = np.zeros((len(pixels), clip.dim), np.float16)
    for i in range(0, len(pixels), batch_size):
        rows = slice(i, i + batch_size)
        with runtime.autocast():
            x = to_tensor(pixels[rows], runtime.device) * 2 - 1              # (b, 3, S, S)
            x = x.contiguous(memory_format=torch.channels_last)
            tokens[rows] = vqgan.encode(x).flatten(1).cpu().numpy()
            seen = to_tensor(clip_pixels[rows], runtime.device)              # (b, 3, C, C)
            embeds[rows] = clip.encode_image(seen).cpu().numpy()
    return tokens, embeds


def check(cfg):
    """Refuse options that make no sense."""
    check_range(cfg, 1, 2 ** 62, "image_size", "crops", "batch_size", "chunk")
    check_range(cfg, 0, 1, "max_bad")
    check_range(cfg, 0.1, 1, "min_zoom")


def main():
    cfg = parse_options(Config)
    check(cfg)
    runtime = Runtime(cfg.device, cfg.dtype, training=False, shares_work=True)
    source = ImageSource(cfg.data)
    runtime.print0(source.account())
    vqgan = load_vqgan(cfg.vqgan or newest("vqgan"), runtime.device)
    if (cfg.image_size or 0) % vqgan.cfg.factor:
        fail(f"--image_size={cfg.image_size} does not divide by {vqgan.cfg.factor}, the factor of "
             f"{vqgan.path}")
    clip = load_clip(cfg.clip, runtime.device, cfg.trust_jit)
    size = cfg.image_size or vqgan.cfg.image_size
    side, codebook_size = size // vqgan.cfg.factor, vqgan.cfg.codebook_size
    splits = dict(zip(SPLITS, split_names(source, cfg.val_percent)))
    out, folder = Path(cfg.out), Path(cfg.out, "chunks")
    provenance = {"config": asdict(cfg), "vqgan": path_from(out, vqgan.path),
                  "vqgan_sha256": vqgan.sha256, "clip": path_from(out, clip.name),
                  "clip_sha256": clip.sha256, "sources": len(source.names),
                  "sources_sha256": source.sha256}
    form = "" if clip.name in CLIP_FILES else ", taken as OpenAI's: heads of 64, QuickGELU"
    runtime.print0(f"prepare: {len(splits['train'])} images x {cfg.crops} crops and "
                   f"{len(splits['val'])} held out, from {cfg.data}; {side} x {side} tokens by "
                   f"{vqgan.path} ({format_size(vqgan)}), {clip.dim}-d embeddings by {clip.name} "
                   f"({format_size(clip.model)}{form}); on {runtime}; writes {out}")
    workers = chunking.worker_count(cfg.workers, runtime)
    in_workers = chunking.encode_in_workers(runtime)
    if in_workers:
        torch.set_num_threads(1)  # with --workers=0 as well: the last bit of a sum depends on it

    def encode(pixels, clip_pixels):
        return encode_batch(pixels, clip_pixels, vqgan, clip, runtime, cfg.batch_size)

    chunks = {split: Chunks(source, names, cfg, size, clip.size,
                            cfg.crops if split == "train" else 1, encode if in_workers else None)
              for split, names in splits.items()}
    if cfg.dry_run:
        todo = range(len(chunks["train"]))
        return chunking.measure(chunks["train"], todo, encode, workers, len(source.names), runtime)
    _lock = lock_folder(out, runtime.rank)  # held until main returns
    if (out / "meta.json").exists():
        chunking.check_same(out / "meta.json", provenance)
        chunking.remove_chunks(folder)
        runtime.print0(f"{out / 'meta.json'} is finished; to prepare again, choose another --out")
        return 0
    chunking.open_chunk_folder(folder, provenance, runtime)
    bad = chunking.encode_chunks(chunks, folder, encode, workers, source, cfg, runtime)
    runtime.wait_for_all()
    if runtime.rank > 0:
        return 0
    counts, skipped, total = chunking.merge_chunks(out, folder, splits, cfg.chunk)
    bad.add(dict(skipped), stop=not counts["train"])
    provenance |= {"skipped_count": len(skipped), "skipped": skipped}
    runtime.print0(finish_dump(out, provenance, counts, total / counts["train"], side,
                               codebook_size, clip))
    chunking.remove_chunks(folder)
    following = format_command("train_gpt.py", data=out,
                               out=f"out/{out.resolve().name.removesuffix('_tokens')}")
    runtime.print0(f"wrote {counts['train']} training and {counts['val']} validation rows to "
                   f"{out}; {len(skipped)} images skipped; next: {following}")
    return 0


if __name__ == "__main__":
    run_main(main)
