"""The mechanics of prepare.py: chunks of images are encoded by worker processes into files of their
own, from which a restart goes on, and which are merged at the end."""
import json
import os
import sys
import time

import numpy as np
import torch

from common.dumps import SPLITS
from common.files import atomic_write, remove_stale, write_json
from common.options import fail, format_value, same
from common.process import note_saved, start_worker
from common.progress import Progress
from common.sources import BadImages

MAY_CHANGE = ("out", "device", "workers", "batch_size", "trust_jit", "max_bad", "dry_run",
              "vqgan", "clip")  # which are compared by hash
MARKER = "made.json"  # in the folder of chunks: that this program made it, and from what


def encode_in_workers(runtime):
    """Whether worker processes run the networks: on a CPU, where a process can be forked with them
    in it. Threads of one network would wait for each other at every layer."""
    return runtime.device.type == "cpu" and sys.platform == "linux"


def worker_count(workers, runtime):
    """How many worker processes this process starts: by default its share of the cores."""
    if workers is not None:
        return workers
    affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count()
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if encode_in_workers(runtime):
        return share
    return min(share, 2 if runtime.device.type == "cpu" else 8)


def loader(chunks, numbers, workers):
    """The items `numbers` of chunks, in order, made by worker processes."""
    computing = bool(workers and chunks.encode)
    ahead = 1 if computing else 2  # a worker beside a GPU goes on while its chunk waits
    return torch.utils.data.DataLoader(
        chunks, None, sampler=numbers, num_workers=workers, worker_init_fn=start_worker,
        prefetch_factor=ahead if workers else None,
        multiprocessing_context="fork" if computing else None)


def check_same(path, provenance):
    """Refuse to go on with a dump that was made by other options or from other inputs."""
    try:
        old = json.loads(path.read_text())
        config, was = provenance["config"], old["config"]
        differ = [k for k in config if k not in MAY_CHANGE and not same(was.get(k), config[k])]
        differ += [k for k in ("vqgan_sha256", "clip_sha256", "sources_sha256")
                   if old.get(k) != provenance[k]]
        found = ", ".join(f"{k}={format_value(was.get(k, old.get(k)))}" for k in differ)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        fail(f"{path} can't be read; move it away, or choose another folder with --out")
    if differ:
        fail(f"{path.parent} was made otherwise ({found}); repeat that, or choose another folder "
             f"with --out")


def merge_chunks(out, folder, splits, chunk):
    """All chunks, in order, into the four .bin files. Returns the row counts, the skipped images
    and the sum of the training embeddings (D,)."""
    counts, skipped, total = dict.fromkeys(splits, 0), [], 0.0
    for split, names in splits.items():
        tokens_path, clip_path = out / f"{split}_tokens.bin", out / f"{split}_clip.bin"
        with atomic_write(tokens_path) as f, atomic_write(clip_path) as g:
            with open(f, "wb") as tokens_file, open(g, "wb") as clip_file:
                for c in range(-(-len(names) // chunk)):
                    with np.load(folder / f"{split}{c:06d}.npz") as rows:
                        tokens_file.write(rows["tokens"].tobytes())
                        clip_file.write(rows["clip"].tobytes())
                        counts[split] += len(rows["tokens"])
                        skipped += json.loads(str(rows["skipped"]))
                        if split == "train":
                            total = total + rows["clip"].astype(np.float64).sum(0)
    return counts, skipped, total


def open_chunk_folder(folder, provenance, runtime):
    """The folder of finished chunks, which carries this program's marker; a user's is refused."""
    if runtime.rank == 0:
        if (folder / MARKER).exists():
            check_same(folder / MARKER, provenance)
            remove_stale(folder)
        elif folder.exists() and any(folder.iterdir()):
            fail(f"{folder} exists and was not made by this program; choose another --out")
        write_json(folder / MARKER, provenance)
    runtime.wait_for_all()  # before another rank writes there


def remove_chunks(folder):
    """Remove what this program wrote there, and the folder if nothing else is in it."""
    if (folder / MARKER).exists():
        for path in [*folder.glob("train??????.npz"), *folder.glob("val??????.npz")]:
            path.unlink()
        (folder / MARKER).unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def measure(chunks, todo, encode, workers, total, runtime):
    """The dry run: a few chunks, and what all of them would take."""
    start, images = time.time(), 0
    for c, first, second, _ in loader(chunks, todo[:4 * max(1, workers)], workers):
        tokens, embeds = (first, second) if chunks.encode else encode(first, second)
        images += len(chunks.names_of(c))
    seconds = (time.time() - start) / images
    row_bytes = tokens.shape[1] * tokens.itemsize + embeds.shape[1] * embeds.itemsize
    runtime.print0(f"dry run: {1 / seconds:.3g} images/s; all {total} images would take "
                   f"{seconds * total / 3600:.2f} hours; nothing was written. Stage 3 will read "
                   f"{total * chunks.crops} rows, {total * chunks.crops * row_bytes / 1e6:.1f} MB")


def encode_chunks(chunks, folder, encode, workers, source, cfg, runtime):
    """Encode this rank's share of the chunks that are not there yet, each into a file. Returns the
    images that could not be read."""
    # by number, so that ranks agree on who does what
    todo = {split: [c for c in range(runtime.rank, len(chunks[split]), runtime.world)
                    if not (folder / f"{split}{c:06d}.npz").exists()] for split in SPLITS}
    left = sum(len(chunks[split].names_of(c)) for split in SPLITS for c in todo[split])
    progress = Progress(len(source.names), len(source.names) - left, unit="image")
    bad = BadImages(cfg.max_bad, len(source.names), cfg.data)
    for split in SPLITS:
        for c, first, second, skipped in loader(chunks[split], todo[split], workers):
            tokens, embeds = (first, second) if chunks[split].encode else encode(first, second)
            if not np.isfinite(embeds).all():
                fail(f"embeddings by {cfg.clip} are not finite; is that file intact?")
            with atomic_write(folder / f"{split}{c:06d}.npz") as f:
                np.savez(f, tokens=tokens, clip=embeds, skipped=json.dumps(skipped))
            note_saved(folder)
            progress(len(chunks[split].names_of(c)))
            bad.add(dict(skipped))
    return bad
