"""How fast, and how far from what this machine can do.

First the machine's own limits (matmuls, convolutions, reading memory), then each part in a process
of its own: sampling by GPT.generate as sample.py runs it, training by the trainers' --dry_run,
preparing by prepare.py, on made-up images and untrained networks. Every share is a ratio of two
rates of this one run; out/bench/bench.json holds the table too.
    python -m lab.bench                      # all of it; on a GPU if there is one, compiled and not
    python -m lab.bench --parts=sample --n_layer=12"""
import json
import multiprocessing
import os
import re
import resource
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import prepare
import toy
import train_gpt
import vqgan
from common import chunks as chunking
from common.checkpoints import load_vqgan, start_config, write_checkpoint
from common.files import hash_state, lock_folder, write_json
from common.openai_clip import clip_package, load_clip
from common.options import check_range, fail, parse_options
from common.perceptual import perceptual_features
from common.process import run_main, start_worker
from common.runtime import Runtime
from common.sources import ImageSource
from lab.bench_sampling import measure_sampling
from lab.limits import compile_variants, make_row, measure_limits, peak_memory, rate_of, with_peak
from lab.stages import run_stage
from model import VQGAN, Discriminator, GPTConfig, VQGANConfig

CLIPS = {  # ViT-B/32, its text side cut short; one that costs nothing; the toy's
    "vit": (512, 224, 12, 768, 32, 77, 49408, 64, 1, 1),
    "cheap": (512, 32, (1, 1, 1, 1), 8, None, 24, 49408, 64, 1, 1),
    "toy": (64, 64, (1, 1, 1, 1), 16, None, 24, 49408, 64, 1, 2)}


@dataclass
class Config:
    parts: str = "sample,gpt,vqgan,prepare,batches"  # which, separated by commas
    out: str = "out/bench"           # bench.json; and bench_data/, which is made anew
    n_layer: int = 24                # the large GPT's blocks
    n_head: int = 16                 # heads
    n_embd: int = 1024               # width
    grid: int = 16                   # side of the token grid: 16 is 256 tokens
    codebook_size: int = 16384       # codes
    batch: int = 8                   # images sampled at a time, beside one at a time
    rows: int | None = None          # of the large GPT's step (auto: 2, bfloat16 4, GPU 32 or 128)
    pixels: int = 128                # side of the large VQGAN's images
    images: int | None = None        # of its step (auto: 2, in bfloat16 8, on a GPU 32)
    steps: int | None = None         # of large training, one or two to warm up (auto: 3, GPU 5 s)
    photos: str = ""                 # JPEGs to prepare, a folder or tar (empty: drawn, 320 x 240)
    jpegs: int | None = None         # how many to draw (auto: 1024, on a GPU 16384)
    mib: int = 512                   # size of the dump that is read cold, from the disk
    device: str = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"              # auto: as the stages choose, sampling in bfloat16 if possible
    compile: bool | None = None      # torch.compile, in sampling fast/gpu.py (auto: on CUDA both)

    @property
    def data(self):
        """The folder that is made anew."""
        return Path(self.out, "bench_data")


# ------------------------------------------------------------------------------------------- data


def make_data(cfg, limits):
    """Images and untrained networks for the real scripts to work on, in cfg.data."""
    data, marker = cfg.data, cfg.data / "made-by-bench"
    if data.exists() and not marker.exists():
        fail(f"{data} exists and was not made by this program; choose another --out")
    shutil.rmtree(data, ignore_errors=True)
    for folder in ("jpegs", "few", "train", "unseen"):
        (data / folder).mkdir(parents=True)
    marker.touch()
    draw_jpegs(data / "jpegs", cfg.jpegs or (16384 if limits["device"] == "cuda" else 1024))
    draw_jpegs(data / "few", 64)
    for i in range(500):
        toy.draw_one(data, 0, i, 64, "train")
    for name, shape in CLIPS.items():
        torch.save(clip_package()[0].CLIP(*shape).state_dict(), data / f"{name}.clip")
    cheap = VQGANConfig(image_size=16 * cfg.grid, patch=16, ch=32, ch_mult=(1,), num_res_blocks=0,
                        attn_resolutions=(), z_channels=32, codebook_size=cfg.codebook_size,
                        code_dim=8, l2_norm=True, groups=32)
    for name, shape in (("toy", start_config(None, VQGANConfig, vqgan.Config())), ("cheap", cheap)):
        weights = VQGAN(shape).state_dict()
        write_checkpoint(data / f"{name}.vqgan", {
            "stage": "vqgan", "ema": weights, "network": asdict(shape),
            "sha256": hash_state(weights)})


def draw_jpegs(folder, n):
    """Smooth noise of 320 x 240 pixels."""
    rng = np.random.default_rng(0)
    for i in range(n):
        file = folder / f"{i:05d}.jpg"
        if i < 256:
            noise = Image.fromarray(rng.integers(256, size=(15, 20, 3), dtype=np.uint8))
            noise.resize((320, 240), Image.Resampling.BICUBIC).save(file, quality=90)
        else:  # the same again, which costs a reader as much
            shutil.copyfile(folder / f"{i % 256:05d}.jpg", file)


# --------------------------------------------------------------------------------------- training


def run_and_read(script, cfg, pattern, **options):
    """Run a stage -> the numbers that a pattern last finds in what it prints."""
    output = run_stage(script, {"device": cfg.device, "dtype": cfg.dtype} | options)
    return [float(x) for x in list(re.finditer(pattern, output))[-1].groups()]


def measure_training(name, script, cfg, limits, kind, flops, count, unit, **options):
    """Rows of a trainer's real step, by --dry_run; `flops` are those of one of the `count` tokens
    or images in it."""
    runtime, rows = Runtime(cfg.device, limits["dtype"]), []
    for compiled, suffix in compile_variants(cfg, limits):
        (gib, rate), peak = with_peak(kind, runtime, runtime.dtype, lambda: run_and_read(
            script, cfg, r"run: (\S+) GiB at most, (\S+) steps/s", dry_run=True, compile=compiled,
            **options))
        row = make_row(f"{name}, {limits['dtype']}{suffix}", rate * count, unit, peak / flops,
                       f"the peak of {kind}", gib)
        rows.append(row | {"step": 1 / rate})
    return rows


def large_steps(cfg, limits):
    """How many steps a large trainer's dry run may take; on a GPU it ends after five seconds."""
    return cfg.steps or (1000 if limits["device"] == "cuda" else 3)


def large_rows(cfg, limits):
    """Rows of the large GPT's training step."""
    if cfg.rows or limits["device"] != "cuda":
        return cfg.rows or (4 if limits["dtype"] == "bfloat16" else 2)
    device = Runtime(cfg.device, cfg.dtype).device
    is_large = torch.cuda.get_device_properties(device).total_memory > 6e10
    return 128 if is_large else 32  # 128 rows take 39 GiB


def measure_gpts(cfg, limits):
    """train_gpt.py at the large size, by AdamW as in the presets, and the demo's. FLOPs of a token:
    6 a weight, and causal attention's."""
    data, rows, steps = cfg.data, [], large_steps(cfg, limits)
    large = GPTConfig(cfg.codebook_size, cfg.grid, 512, cfg.n_layer, cfg.n_head, cfg.n_embd)
    demo = GPTConfig(1024, 4, 64, 4, 6, 192)
    for name, shape, b, options in (
            ("cheap", large, large_rows(cfg, limits), {"muon": False, "max_steps": steps}),
            ("toy", demo, 128, {"muon": True, "max_steps": max(24, steps)})):
        run_and_read("prepare.py", cfg, r"wrote (\d+) training", data=data / "few",
                     out=data / f"{name}_rows", vqgan=data / f"{name}.vqgan",
                     clip=data / f"{name}.clip", image_size=shape.grid * 16)
        n, c, t = shape.n_layer, shape.n_embd, shape.grid ** 2
        flops = 6 * (n * c * (12 * c + t) + shape.codebook_size * c + shape.cond_dim * c / t)
        rows += measure_training(
            f"GPT step, {n} x {c}, {b} x {t} tokens", "train_gpt.py", cfg, limits, "matmuls", flops,
            b * t, "tokens/s", data=data / f"{name}_rows", batch_size=b, n_layer=n,
            n_head=shape.n_head, n_embd=c, eval_rows=1, **options)
    return rows


def measure_vqgans(cfg, limits):
    """vqgan.py at f=16 with its discriminator, and the demo's without."""
    rows, steps, n = [], large_steps(cfg, limits), cfg.images
    if n is None:
        n = 32 if limits["device"] == "cuda" else 8 if limits["dtype"] == "bfloat16" else 2
    large = vqgan.F16 | {"image_size": cfg.pixels, "disc_start": 0, "batch_size": n,
                         "max_steps": steps}
    for name, folder, options in (("vit", "jpegs", large),
                                  ("toy", "train", {"max_steps": max(20, steps)})):
        options |= {"vq_start": 0, "clip": cfg.data / f"{name}.clip", "data": cfg.data / folder}
        c = vqgan.Config(**options)
        factor = start_config(None, VQGANConfig, c).factor
        rows += measure_training(
            f"VQGAN step, f={factor}, {c.batch_size} x {c.image_size} px", "vqgan.py", cfg, limits,
            "convolutions", count_flops(c, CLIPS[name]), c.batch_size, "images/s", **options)
    return rows


def count_flops(cfg, clip_shape):
    """FLOPs of one image in a step of vqgan.py: the VQGAN's forward pass 3 times, CLIP's 3 (two
    forward, one back to the pixels), the discriminator's 7 (two forward, one back, twice two)."""
    total = 0
    with torch.device("meta"):  # shapes alone, nothing is computed
        net = VQGAN(start_config(None, VQGANConfig, cfg))
        features = perceptual_features(clip_package()[0].CLIP(*clip_shape).visual.eval())
        disc_times = 7 if cfg.disc_start < cfg.max_steps else 0
        for times, network, size in ((3, lambda x: net(x, quantized=False), cfg.image_size),
                                     (3, features, clip_shape[1]),
                                     (disc_times, Discriminator(), cfg.image_size)):
            with FlopCounterMode(display=False) as counter:
                network(torch.zeros(1, 3, size, size))
            total += times * counter.get_total_flops()
    return total


# ------------------------------------------------------------------------------ preparing, reading


class SameCrops(torch.utils.data.Dataset):
    """prepare.py's networks without its images: the crops of one chunk as every item."""

    def __init__(self, encode, crops):
        self.encode, self.crops = encode, crops

    def __getitem__(self, i):
        return len(self.encode(*self.crops)[0])


def measure_prepare(cfg, limits):
    """prepare.py with the demo's networks, beside its decoding alone and its networks alone, each
    as it does them."""
    data, runtime = cfg.data, Runtime(cfg.device, cfg.dtype, training=False)
    source = ImageSource(cfg.photos or str(data / "jpegs"))
    workers, in_workers = chunking.worker_count(None, runtime), chunking.encode_in_workers(runtime)
    options = prepare.Config(data=str(source.data), val_percent=0.0,
                             chunk=max(1, len(source.names) // (8 * workers)))
    net = load_vqgan(data / "toy.vqgan", runtime.device)
    clip = load_clip(data / "toy.clip", runtime.device)

    def make_chunks(encode):
        return prepare.Chunks(source, source.names, options, net.cfg.image_size, clip.size,
                              options.crops, encode)

    def encode(*crops):
        return prepare.encode_batch(*crops, net, clip, runtime)

    # crops leave a worker beside a GPU only
    decoding = make_chunks((lambda *crops: (0, 0)) if in_workers else None)
    decoded, rates = [], []
    for i in range(3):  # in turns, of which the median counts: each is over in a few seconds
        decoded.append(len(source.names) / time_of(decoding, len(decoding), workers))
        rates += run_and_read("prepare.py", cfg, r"image \d+/\d+  (\S+)/s", data=options.data,
                              out=data / f"prepared_{i}", val_percent=0, chunk=options.chunk,
                              vqgan=data / "toy.vqgan", clip=data / "toy.clip")
    decoded, rate = statistics.median(decoded), statistics.median(rates)
    is_cpu = runtime.device.type == "cpu"
    largest = peak_memory(runtime, resource.RUSAGE_CHILDREN) if is_cpu else None
    networks = rate_of_networks(encode, make_chunks(None), workers, runtime)
    bound, of = min(decoded, networks), "the slower one"
    if in_workers:
        bound, of = 1 / (1 / decoded + 1 / networks), "the sum of both"
    return [make_row(f"prepare, decoding alone, {workers} workers", decoded, "images/s"),
            make_row("prepare, networks alone", networks, "images/s", gib=peak_memory(runtime)),
            make_row("prepare, prepare.py", rate, "images/s", bound, of, largest)]


def time_of(chunks, n, workers):
    """Seconds that prepare.py's workers take for the first n items."""
    start = time.time()
    for _ in chunking.loader(chunks, range(n), workers):
        pass
    return time.time() - start


def rate_of_networks(encode, chunks, workers, runtime):
    """Images a second of the networks alone, on the crops of the first chunk that has any."""
    crops = next(crops for _, *crops, _ in map(chunks.__getitem__, range(len(chunks)))
                 if len(crops[0]))
    again, images = SameCrops(encode, crops), len(crops[0]) / chunks.crops
    if not chunking.encode_in_workers(runtime):
        return images * rate_of(runtime, lambda: again[0], 3)
    torch.set_num_threads(1)
    return images * 8 * workers / time_of(again, 8 * workers, workers)


def write_cold(path, rows, width, dtype):
    """A file of random rows that is not in the page cache, memory-mapped."""
    rng = np.random.default_rng(0)
    with open(path, "wb") as f:
        for first in range(0, rows, 1 << 14):
            size = min(rows - first, 1 << 14), width
            f.write(rng.integers(1024, size=size, dtype=np.uint16).astype(dtype))
        f.flush()
        os.fsync(f.fileno())
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return np.memmap(path, dtype, "r", shape=(rows, width))


def measure_batches(cfg, limits, step_seconds):
    """make_batches on rows that are not in memory; asleep between two for as long as the demo's
    GPT step takes, while the disk fetches the next ones."""
    n, b = cfg.mib * 2 ** 20 // 1536, 128
    arrays = (write_cold(cfg.data / "cold_tokens", n, 256, np.uint16),
              write_cold(cfg.data / "cold_clip", n, 512, np.float16))

    def mean_time(pause):
        batch = train_gpt.make_batches(*arrays, train_gpt.Config(batch_size=b, noise=0.5),
                                       in_thread=limits["device"] == "cuda")
        seconds = []
        for i in range(17):
            start = time.perf_counter()
            batch(i)
            seconds.append(time.perf_counter() - start)
            time.sleep(pause)
        return statistics.mean(seconds[5:])

    cold = mean_time(step_seconds)
    warm = mean_time(min(step_seconds, 0.05))  # the second time the same rows lie in memory
    return [make_row(f"batches of {b} cold rows of a {cfg.mib} MiB dump", b / cold, "rows/s",
                     b / warm, "the same rows warm", peak_memory(Runtime("cpu", "float32"))),
            make_row("    their time / the demo's GPT step and them", cold / (cold + step_seconds),
                     "x")]


# ------------------------------------------------------------------------------------------- main


def in_new_process(part, *args):
    """part(*args) in a process whose peak memory is its own."""
    # nothing has been computed here that a fork could carry over
    method = "fork" if sys.platform == "linux" else "spawn"
    with ProcessPoolExecutor(1, multiprocessing.get_context(method), start_worker) as pool:
        return pool.submit(part, *args).result()


def check(cfg):
    """Refuse options that make no sense."""
    unknown = set(cfg.parts.split(",")) - set(Config.parts.split(","))
    if unknown:
        fail(f"--parts={cfg.parts}: there is no part {sorted(unknown)[0]}; there are "
             f"{Config.parts}")
    check_range(cfg, 1, 2 ** 62, "n_layer", "n_head", "n_embd", "codebook_size", "batch", "rows",
                "images", "steps", "jpegs", "mib")
    if cfg.n_embd % cfg.n_head or cfg.grid < 4:
        fail("--n_embd must be a multiple of --n_head, and --grid 4 or more")
    if cfg.pixels % 16 or cfg.pixels < 32:
        fail("--pixels must be a multiple of 16, and 32 or more")


def main():
    cfg = parse_options(Config)
    check(cfg)
    start_time, parts = time.time(), cfg.parts.split(",")
    _lock = lock_folder(cfg.out)  # another bench would make the same data anew
    limits, rows = in_new_process(measure_limits, cfg)
    in_new_process(make_data, cfg, limits)
    step_seconds = 0.1
    for part, measure in (("sample", measure_sampling), ("gpt", measure_gpts),
                          ("vqgan", measure_vqgans), ("prepare", measure_prepare)):
        if part in parts:
            rows += in_new_process(measure, cfg, limits)
            step_seconds = rows[-1]["step"] if part == "gpt" else step_seconds
    if "batches" in parts:
        rows += in_new_process(measure_batches, cfg, limits, step_seconds)
    write_json(Path(cfg.out, "bench.json"), {"config": asdict(cfg), "rows": rows})
    print(json.dumps(rows))
    print(f"{time.time() - start_time:.0f} s; wrote {cfg.out}/bench.json")
    return 0


if __name__ == "__main__":
    run_main(main)
