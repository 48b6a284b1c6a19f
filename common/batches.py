"""Batches as functions of the step, and read ahead: a run that goes on sees the very batches it
would have seen, and no loader has a state to save."""
import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from common.images import random_crop, to_tensor
from common.process import start_worker
from common.sources import BadImages


class ImageBatches(torch.utils.data.Dataset):
    """Batch number i is a pure function of (seed, i): which images, crops and mirrorings. Items are
    uint8 (B/world, S, S, 3) and {name: reason} of the images that could not be read, each replaced
    by another drawn at random."""

    def __init__(self, source, names, cfg, rank=0, world=1):
        self.source, self.names, self.cfg, self.rank, self.world = source, names, cfg, rank, world

    def __len__(self):
        return self.cfg.max_steps

    def __getitem__(self, i):
        cfg, rng = self.cfg, np.random.default_rng((self.cfg.seed, i))
        index = rng.integers(len(self.names), size=cfg.batch_size)
        crop_params = rng.random((cfg.batch_size, 4))
        share = cfg.batch_size // self.world
        crops, failed = [], {}
        for j in range(self.rank * share, (self.rank + 1) * share):
            _, image = read_any(self.source, self.names, index[j], (cfg.seed, i, j), failed,
                                cfg.image_size)
            if image is None:
                return None, failed
            crops.append(random_crop(image, cfg.image_size, crop_params[j], cfg.min_zoom, cfg.flip))
        return torch.from_numpy(np.stack(crops)), failed


def read_any(source, names, index, seed, failed, size=0):
    """(index, image): the one asked for, or others at random until one can be read, each that can't
    noted in `failed`; the image is None if none can. `size`: pixels a side that are wanted."""
    for attempt in range(1000):
        try:
            return index, source.open(names[index], size)
        except (OSError, ValueError) as e:
            failed[names[index]] = str(e)
        index = np.random.default_rng((*seed, attempt)).integers(len(names))
    return index, None


def image_batches(source, names, cfg, runtime, start):
    """Yield (step, pixels (B, 3, S, S) in [-1, 1]) from step `start` on, counting bad images."""
    workers = cfg.workers if cfg.workers is not None else 0 if runtime.device.type == "cpu" else 4
    loader = torch.utils.data.DataLoader(
        ImageBatches(source, names, cfg, runtime.rank, runtime.world), batch_size=None,
        sampler=range(start, cfg.max_steps), num_workers=workers, worker_init_fn=start_worker)
    bad = BadImages(cfg.max_bad, len(names), cfg.data)
    for step, (batch, failed) in zip(range(start, cfg.max_steps), loader):
        bad.add(failed, stop=batch is None)
        yield step, to_pixels(batch, runtime)


def to_pixels(batch, runtime):
    """uint8 (B, S, S, 3) -> float (B, 3, S, S) in [-1, 1] on the device."""
    x = to_tensor(batch.numpy(), runtime.device).contiguous(memory_format=torch.channels_last)
    return x * 2 - 1


class Prefetcher:
    """A function of the step, called in a thread for the next steps while this one computes."""

    def __init__(self, function, ahead=4):
        self.function, self.ahead = function, ahead
        self.executor, self.pending = ThreadPoolExecutor(1), {}

    def __call__(self, step):
        wanted = range(step, step + 1 + self.ahead)
        for other in [s for s in self.pending if s not in wanted]:
            self.pending.pop(other).cancel()
        for s in wanted:
            if s not in self.pending:
                self.pending[s] = self.executor.submit(self.function, s)
        return self.pending[step].result()


def release_pages(*arrays):
    """Hand back the pages read of memory-mapped arrays, so that resident memory stays flat."""
    for array in arrays:
        if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            array.base.madvise(mmap.MADV_DONTNEED)


def prefetch_rows(array, index):
    """Ask the system for rows of a memory-mapped array, all before the first is waited for."""
    if isinstance(array, np.memmap) and hasattr(os, "posix_fadvise"):
        with open(array.filename, "rb") as f:
            size = array.strides[0]
            for i in index.tolist():
                os.posix_fadvise(f.fileno(), i * size, size, os.POSIX_FADV_WILLNEED)
