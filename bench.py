"""How fast, and how far from what this machine can do.

First the machine's own limits (matrix products, convolutions, reading memory), then each part in processes of its own:
sampling by GPT.generate, training by the trainers' --dry_run, preparing by prepare.py, on made-up pictures and
untrained networks. Every share is a ratio of two rates of this one run; out/bench/bench.json holds the table too.
    python bench.py                          # all of it; on a GPU if there is one, there compiled and not
    python bench.py --parts=sample --n_layer=12"""
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types
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
from common import (AutoCount, Compile, Count, Device, Dtype, Machine, Pictures, clip_package, configure, digest, fail,
                    load_clip, load_vqgan, lock, write_json)
from model import FEW, GPT, VQGAN, Discriminator, GPTConfig, PackedLinear, VQGANConfig, cpu_has_bfloat16

CLIPS = {"vit": (512, 224, 12, 768, 32, 77, 49408, 64, 1, 1),  # ViT-B/32 (its text side cut short), one that costs
         "cheap": (512, 32, (1, 1, 1, 1), 8, None, 24, 49408, 64, 1, 1),      # nothing, and the toy's
         "toy": (64, 64, (1, 1, 1, 1), 16, None, 24, 49408, 64, 1, 2)}
ONE = types.SimpleNamespace(rank=0, world=1)  # this process by itself


@dataclass
class Config:
    parts: str = "sample,gpt,vqgan,prepare,batches"  # which, separated by commas
    out: str = "out/bench"              # bench.json; and bench_data/, which is made anew
    n_layer: Count = 24                 # the large GPT's blocks
    n_head: Count = 16                  # heads
    n_embd: Count = 1024                # width
    grid: Count = 16                    # side of the token grid: 16 is 256 tokens
    codes: Count = 16384                # size of the codebook
    batch: Count = 8                    # pictures sampled at a time, beside one at a time
    rows: AutoCount = None              # of the large GPT's step (auto: 2 on a CPU, 4 in bfloat16, 32 or 128 on a GPU)
    pixels: Count = 128                 # side of the large VQGAN's pictures
    pictures: AutoCount = None          # pictures of its training step (auto: 2 on a CPU, 8 in bfloat16, 32 on a GPU)
    steps: AutoCount = None             # large training steps, one or two to warm up (auto: 3, on a GPU 5 seconds)
    photos: str = ""                    # JPEGs to prepare, a folder or tar; empty: drawn, smooth noise of 320 x 240
    jpegs: AutoCount = None             # how many to draw (auto: 1024, on a GPU 16384)
    mib: Count = 512                    # size of the dump that is read cold, from the disk
    device: Device = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "auto"               # auto: trainers and prepare.py choose, sampling in bfloat16 if possible
    compile: Compile = "auto"           # torch.compile, in sampling kernels.py: True, False, auto (on CUDA both)

    @property
    def data(self):
        """The folder that is made anew, of a name that nothing else has, whatever --out is."""
        return Path(self.out, "bench_data")


def wait(machine):
    if machine.device.type == "cuda":
        torch.cuda.synchronize()


def rate_of(machine, work, seconds):
    """Runs a second: the median try of about that time, and of four in up to ten times as much, one to warm up left
    out."""
    work()
    wait(machine)
    ends = [time.perf_counter()]
    while ends[-1] - ends[0] < seconds or len(ends) < 5 and ends[-1] - ends[0] < 10 * seconds:
        work()
        wait(machine)
        ends.append(time.perf_counter())
    return 1 / statistics.median(b - a for a, b in zip(ends, ends[1:]))


def sampling_dtype(cfg, machine):
    """What sampling is measured in: bfloat16, if nothing else is asked for, but on a CPU that can't compute in it."""
    can = machine.device.type != "cpu" or cpu_has_bfloat16()
    return torch.bfloat16 if cfg.dtype == "auto" and can else machine.dtype


def memory(machine, who=resource.RUSAGE_SELF):
    """The most this process ever held, in GiB; or the largest of its finished children, RUSAGE_CHILDREN."""
    most = resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (torch.cuda.max_memory_allocated() if machine.device.type == "cuda" else most) / 2 ** 30


def row(what, rate, unit, bound=None, of="", gib=None):
    """A line of the table: a rate, the bound that applies and the share of it reached, peak memory."""
    share = rate / bound if bound else None
    reached = f"{share:7.1%} of {bound:.4g}, {of}" if bound else ""
    print(f"{what:50s} {rate:9.4g} {unit:10s} {f'{gib:5.2f} GiB' if gib else '':9s} {reached}".rstrip(), flush=True)
    return {"what": what, "rate": rate, "unit": unit, "bound": bound, "of": of, "share": share, "GiB": gib}


@torch.no_grad()
def peak(kind, machine, dtype):
    """FLOP/s of "products", or of "convolutions": the best of three shapes."""
    n, side = (8192, 64) if machine.device.type == "cuda" else (2048, 32)
    if kind == "products":
        a, b = (torch.randn(n, n, device=machine.device).to(dtype) for _ in range(2))
        return 2 * n ** 3 * rate_of(machine, lambda: a @ b, 1)
    best = 0
    for c, s in ((128, 2 * side), (256, side), (512, side // 2)):
        conv = torch.nn.Conv2d(c, c, 3, padding=1).to(machine.device, dtype, memory_format=torch.channels_last)
        x = torch.randn(8, c, s, s, device=machine.device).to(dtype, memory_format=torch.channels_last)
        best = max(best, 18 * c * x.numel() * rate_of(machine, lambda: conv(x), 0.4))
    return best


def beside(kind, machine, dtype, work):
    """What `work` returns, and the mean of the peak just before it and just after: a shared machine is not equally fast
    all the time."""
    before = peak(kind, machine, dtype)
    done = work()
    return done, (before + peak(kind, machine, dtype)) / 2


def limits(cfg):
    """What the machine can do: products and convolutions (FLOP/s, by dtype), reading memory (bytes/s)."""
    machine, rows = Machine(cfg.device, cfg.dtype), []
    cuda, out = machine.device.type == "cuda", {"device": machine.device.type, "dtype": str(machine.dtype)[6:]}
    name = "limits, " + (torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads")
    for dtype in {machine.dtype, sampling_dtype(cfg, machine)}:
        of = str(dtype)[6:]
        out[of] = {kind: peak(kind, machine, dtype) for kind in ("products", "convolutions")}
        rows += [row(f"{name}, {of}: {k}", v / 1e9, "GFLOP/s") for k, v in out[of].items()]
    x = torch.ones(2 ** 28, device=machine.device)
    out["read"] = x.nbytes * rate_of(machine, x.sum, 1)
    return out, [*rows, row(f"{name}: reading memory", out["read"] / 1e9, "GB/s")]


def kinds(cfg, limit):
    """Values of --compile to try, each with what the table adds for it."""
    both = cfg.compile == "auto" and limit["device"] == "cuda"
    return [(k, ", compiled" * k) for k in ((False, True) if both else (cfg.compile == "True",))]


@torch.no_grad()
def sample(cfg, limit):
    """GPT.generate at the large size, the plain loop without a cache, and on a CPU the same weights' bare products."""
    machine, t, rows, plain = Machine(cfg.device, cfg.dtype), cfg.grid ** 2, [], {}
    with torch.device("meta"):  # without the work of initialising it
        gpt = GPT(GPTConfig(cfg.codes, cfg.grid, 512, cfg.n_layer, cfg.n_head, cfg.n_embd)).requires_grad_(False).eval()
    gpt.to_empty(device=machine.device)
    for p in gpt.parameters():
        p.normal_(std=0.02)
    numbers = sum(m.weight.numel() for m in gpt.modules() if isinstance(m, torch.nn.Linear) and m is not gpt.cond_proj)

    def uncached():  # seconds of all positions: 8 lengths (of odd grids 9 or so), each for its share of them
        cond, seconds = torch.randn(b, 512, device=machine.device), 0
        lengths = range(t // 16, t, t // 8)
        for length in lengths:
            tokens = torch.zeros(b, length, dtype=torch.long, device=machine.device)
            for _ in range(2 if machine.device.type == "cuda" else 1):  # there the first call of a kind loads kernels
                begun = time.perf_counter()
                with machine.autocast():
                    gpt(cond, tokens)[:, -1].argmax(-1)
                wait(machine)
            seconds += (time.perf_counter() - begun) * t / len(lengths)
        return seconds
    for b in (1, cfg.batch):
        plain[b], most = beside("products", machine, machine.dtype, uncached)
        rows.append(row(f"sampling, no cache, batch {b}, {limit['dtype']}", b * t / plain[b], "tokens/s",
                        most / (numbers * t),  # 2 FLOPs a weight, t/2 tokens on average
                        "the peak of products", memory(machine)))
    dtype = sampling_dtype(cfg, machine)
    layers = [m for k, m in gpt.pack(dtype).named_modules() if isinstance(m, PackedLinear) and k != "cond_proj"]
    half = str(dtype)[6:]
    cuda, capture = limit["device"] == "cuda", gpt.capture
    for compiled, name in kinds(cfg, limit) if capture else [(False, "")]:
        gpt.capture = capture if compiled else None  # kernels.py, or call by call
        for b, guidance, every in ((1, 1.0, 3), (1, 2.0, 4), (cfg.batch, 1.0, 8), (cfg.batch, 2.0, 8)):
            n = b if guidance == 1 else 2 * b
            cond, uniform = torch.randn(b, 512, device=machine.device), torch.rand(b, t, device=machine.device)
            if cuda:  # where memory is the bound, in the next row
                steps, bound = timed_on_gpu(gpt, cond, uniform, guidance), ()
            else:
                taken = torch.float32 if limit["device"] == "cpu" and n <= FEW else dtype
                inputs = [torch.randn(n, 1, m.weight.shape[1], device=machine.device, dtype=taken) for m in layers]
                steps, bare = timed(gpt, cond, uniform, guidance, list(zip(layers, inputs)), every)
                bound = b / bare, "the bare products"
            ends = max(1, len(steps) // 8)
            step, cache = sum(steps) / len(steps), cfg.n_layer * n * cfg.n_embd * t  # keys and values, half full
            size = (numbers + cache) * dtype.itemsize
            least = max(size / limit["read"], 2 * numbers * n / limit[half]["products"])
            rows += [row(f"sampling, batch {b}{', guidance' if n > b else ''}, {half}{name}", b / step, "tokens/s",
                         *bound, gib=memory(machine)),
                     row("    weights and cache", size / step / 1e9, "GB/s", limit["read"] / 1e9, "reading memory"),
                     row("    time of the last eighth of the tokens / the first",
                         sum(steps[-ends:]) / sum(steps[:ends]), "x")]
            if n > b:
                rows.append(row("    time / without guidance", step / alone, "x"))
            else:
                alone = step
                rows.append(row("    rate / no cache", plain[b] / t / step, "x", plain[b] / t / least, "bytes, FLOPs"))
    return rows


def timed_on_gpu(gpt, cond, uniform, guidance):
    """The seconds of each token of GPT.generate by the GPU's clock, once all is compiled."""
    record = gpt.capture

    def mark():
        starts.append(torch.cuda.Event(enable_timing=True))
        starts[-1].record()

    def watched(gpt, step, *others):
        inner = record(gpt, step, *others) if record else step

        def timed_step(i):
            mark()
            inner(i)
        return timed_step
    gpt.capture = watched
    for _ in range(2):
        starts = []
        gpt.generate(cond, uniform, guidance)
        mark()
    gpt.capture = record
    if len(starts) == 1:
        fail("kernels.py can't be used here, as was said above; --compile=False measures without it")
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in zip(starts, starts[1:])]


def timed(gpt, cond, uniform, guidance, products, every):
    """On a CPU, the seconds of every so manieth token of GPT.generate, the others left out, and of the bare products,
    run before every second of those."""
    seconds, bare, calls, run = [], [], 0, gpt.run
    gelus, begun, logits = [layer for layer, _ in products if layer.gelu], None, None
    for layer, x in products:  # lays the weights out for so many rows
        layer(x)

    def ended():
        nonlocal begun
        if begun:
            seconds.append(time.perf_counter() - begun)
        begun = None

    def watched(*args):
        nonlocal calls, begun, logits
        ended()
        calls += 1
        if (calls - 1) % every:
            return logits
        if len(seconds) % 2 == 0:
            for layer in gelus:
                layer.gelu = False
            start = time.perf_counter()
            for layer, x in products:
                layer(x)
            bare.append(time.perf_counter() - start)
            for layer in gelus:
                layer.gelu = True
        begun = time.perf_counter()
        logits = run(*args)
        return logits
    gpt.run = watched
    gpt.generate(cond, uniform, guidance)
    ended()
    gpt.run = run
    return seconds, sum(bare) / len(bare)


def make_data(cfg, limit):
    """Pictures and untrained networks for the real scripts to work on, in cfg.data."""
    data, rng = cfg.data, np.random.default_rng(0)
    shutil.rmtree(data, ignore_errors=True)
    for folder, n in (("jpegs", cfg.jpegs or (16384 if limit["device"] == "cuda" else 1024)), ("few", 64)):
        (data / folder).mkdir(parents=True)
        for i in range(n):
            file = data / folder / f"{i:05d}.jpg"
            if i < 256:
                noise = Image.fromarray(rng.integers(256, size=(15, 20, 3), dtype=np.uint8))
                noise.resize((320, 240), Image.Resampling.BICUBIC).save(file, quality=90)
            else:  # the same again, which costs a reader as much
                shutil.copyfile(data / folder / f"{i % 256:05d}.jpg", file)
    for folder in ("train", "unseen"):
        (data / folder).mkdir()
    for i in range(500):
        toy.draw_one(data, 0, i, 64, "train")
    for name, shape in CLIPS.items():
        torch.save(clip_package()[0].CLIP(*shape).state_dict(), data / f"{name}.clip")
    cheap = VQGANConfig(16 * cfg.grid, 16, 32, (1,), 0, (), 32, cfg.codes, 8, True)
    for name, shape in (("toy", vqgan.check(vqgan.Config(), ONE)), ("cheap", cheap)):
        weights = VQGAN(shape).state_dict()
        contents = {"stage": "vqgan", "ema": weights, "network": asdict(shape), "sha256": digest(weights)}
        torch.save(contents | {"digest": digest(contents)}, data / f"{name}.vqgan")


def call(script, cfg, pattern, **options):
    """Run a script of the project -> the numbers that a pattern last finds in what it prints."""
    options = {"device": cfg.device, "dtype": cfg.dtype} | options
    texts = [f"--{k}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in options.items()]
    done = subprocess.run([sys.executable, Path(__file__).with_name(script), *texts], capture_output=True, text=True)
    if done.returncode:
        fail(f"{script} ended with: {(done.stderr.splitlines() or ['nothing'])[-1]}")
    return [float(x) for x in list(re.finditer(pattern, done.stdout))[-1].groups()]


def train(what, script, cfg, limit, kind, flops, count, unit, **options):
    """Rows of a trainer's real step, by --dry_run; `flops` are those of one of the `count` tokens or pictures in it."""
    machine, dtype, rows = Machine(cfg.device, limit["dtype"]), getattr(torch, limit["dtype"]), []
    for compiled, name in kinds(cfg, limit):
        (gib, rate), most = beside(kind, machine, dtype, lambda: call(
            script, cfg, r"run: (\S+) GiB at most, (\S+) steps/s", dry_run=True, compile=compiled, **options))
        rows.append(row(f"{what}, {limit['dtype']}{name}", rate * count, unit, most / flops, f"the peak of {kind}", gib)
                    | {"step": 1 / rate})
    return rows


def large_steps(cfg, limit):
    """How many steps a large trainer's dry run may take; on a GPU it ends by itself after five seconds of them."""
    return cfg.steps or (1000 if limit["device"] == "cuda" else 3)


def gpts(cfg, limit):
    """train_gpt.py at the large size and the demo's. FLOPs of a token: 6 a weight, and causal attention's."""
    data, rows, steps, n = cfg.data, [], large_steps(cfg, limit), 4 if limit["dtype"] == "bfloat16" else 2
    if limit["device"] == "cuda":  # 128 rows take 39 GiB
        device = Machine(cfg.device, cfg.dtype).device
        n = 128 if torch.cuda.get_device_properties(device).total_memory > 6e10 else 32
    n = cfg.rows or n
    large = GPTConfig(cfg.codes, cfg.grid, 512, cfg.n_layer, cfg.n_head, cfg.n_embd)
    for name, b, most, muon, shape in (("cheap", n, steps, False, large),  # by AdamW, as the presets
                                       ("toy", 128, max(24, steps), True, GPTConfig(1024, 4, 64, 4, 6, 192))):
        call("prepare.py", cfg, r"wrote (\d+) training", data=data / "few", out=data / f"{name}_rows",
             vqgan=data / f"{name}.vqgan", clip=data / f"{name}.clip", image_size=shape.grid * 16)
        c, t = shape.n_embd, shape.grid ** 2
        flops = 6 * (shape.n_layer * c * (12 * c + t) + shape.codes * c + shape.cond_dim * c / t)
        rows += train(f"GPT step, {shape.n_layer} x {c}, {b} x {t} tokens", "train_gpt.py", cfg, limit, "products",
                      flops, b * t, "tokens/s", data=data / f"{name}_rows", batch_size=b, n_layer=shape.n_layer,
                      n_head=shape.n_head, n_embd=c, max_steps=most, muon=muon, eval_rows=1)
    return rows


def vqgans(cfg, limit):
    """vqgan.py at f=16 with its discriminator, and the demo's without. FLOPs of a picture: the VQGAN's forward pass 3
    times, CLIP's 3 (two forward, one back to the pixels), the discriminator's 7 (two forward, one back, twice two)."""
    data, rows, steps = cfg.data, [], large_steps(cfg, limit)
    n = cfg.pictures or (32 if limit["device"] == "cuda" else 8 if limit["dtype"] == "bfloat16" else 2)
    large = vqgan.F16 | {"image_size": cfg.pixels, "disc_start": 0, "batch_size": n, "max_steps": steps}
    for name, pictures, options in (("vit", "jpegs", large), ("toy", "train", {"max_steps": max(20, steps)})):
        options |= {"vq_start": 0, "clip": data / f"{name}.clip", "data": data / pictures}
        c, flops = vqgan.Config(**options), 0
        shape = vqgan.check(c, ONE)
        with torch.device("meta"):  # shapes alone, nothing is computed
            net = VQGAN(shape)
            clip = vqgan.perceptual_features(clip_package()[0].CLIP(*CLIPS[name]).visual.eval())
            for times, run, size in ((3, lambda x: net(x, quantized=False), c.image_size), (3, clip, CLIPS[name][1]),
                                     (7 if "disc_start" in options else 0, Discriminator(), c.image_size)):
                with FlopCounterMode(display=False) as counter:
                    run(torch.zeros(1, 3, size, size))
                flops += times * counter.get_total_flops()
        rows += train(f"VQGAN step, f={shape.factor}, {c.batch_size} x {c.image_size} px", "vqgan.py", cfg, limit,
                      "convolutions", flops, c.batch_size, "pictures/s", **options)
    return rows


class Again(torch.utils.data.Dataset):
    """prepare.py's networks without its pictures: the crops of one chunk as every item."""

    def __init__(self, networks, crops):
        self.networks, self.crops = networks, crops

    def __getitem__(self, i):
        return len(self.networks(*self.crops)[0])


def prepares(cfg, limit):
    """prepare.py with the demo's networks, beside its decoding alone and its networks alone, each as it does them."""
    data, machine = cfg.data, Machine(cfg.device, cfg.dtype, training=False)
    source, workers = Pictures(cfg.photos or str(data / "jpegs")), prepare.workers_for(machine)
    c = prepare.Config(data=str(source.data), val_percent=0.0, chunk=max(1, len(source.names) // (8 * workers)))
    (net, _, vcfg), clip = load_vqgan(data / "toy.vqgan", machine.device), load_clip(data / "toy.clip", machine.device)
    apart = prepare.computes_apart(machine)

    def chunks(networks):
        return prepare.Chunks(source, source.names, c, vcfg.image_size, clip.size, c.crops, networks)
    decoding = chunks((lambda *crops: (0, 0)) if apart else None)  # pixels leave a worker beside a GPU only

    def seconds(items, n):
        begun = time.time()
        for _ in prepare.loader(items, range(n), workers):
            pass
        return time.time() - begun
    decoded, rates = [], []
    for i in range(3):  # in turns, of which the median counts: each is over in a few seconds
        decoded.append(len(source.names) / seconds(decoding, len(decoding)))
        rates += call("prepare.py", cfg, r"picture \d+/\d+  (\S+)/s", data=c.data, out=data / f"prepared_{i}",
                      val_percent=0, chunk=c.chunk, vqgan=data / "toy.vqgan", clip=data / "toy.clip")
    decoded, rate = statistics.median(decoded), statistics.median(rates)
    largest = memory(machine, resource.RUSAGE_CHILDREN) if machine.device.type == "cpu" else None
    crops = next(crops for _, *crops, _ in map(chunks(None).__getitem__, range(len(decoding))) if len(crops[0]))
    again = Again(lambda *x: prepare.rows_of(*x, net, clip, machine), crops)
    if apart:
        torch.set_num_threads(1)
        networks = len(crops[0]) / c.crops * 8 * workers / seconds(again, 8 * workers)
    else:
        networks = len(crops[0]) / c.crops * rate_of(machine, lambda: again[0], 3)
    bound = 1 / (1 / decoded + 1 / networks) if apart else min(decoded, networks)
    return [row(f"prepare, decoding alone, {workers} workers", decoded, "pictures/s"),
            row("prepare, networks alone", networks, "pictures/s", None, "", memory(machine)),
            row("prepare, prepare.py", rate, "pictures/s", bound, "the sum of both" if apart else "the slower one",
                largest)]


def batches(cfg, limit, step):
    """make_batches on rows that are dropped from the page cache first; asleep for as long as a training step between
    two, while the disk fetches the next ones. `step`: seconds of the demo's GPT step."""
    data, rng, arrays = cfg.data, np.random.default_rng(0), []
    n, b = cfg.mib * 2 ** 20 // 1536, 128
    for name, width, dtype in (("cold_tokens", 256, np.uint16), ("cold_clip", 512, np.float16)):
        with open(data / name, "wb") as f:
            for first in range(0, n, 1 << 14):
                f.write(rng.integers(1024, size=(min(n - first, 1 << 14), width), dtype=np.uint16).astype(dtype))
            f.flush()
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        arrays.append(np.memmap(data / name, dtype, "r", shape=(n, width)))

    def mean_time(pause):
        idle, seconds = limit["device"] == "cuda", []
        batch = train_gpt.make_batches(*arrays, train_gpt.Config(batch_size=b), idle=idle)
        for i in range(17):
            begun = time.perf_counter()
            batch(i)
            seconds.append(time.perf_counter() - begun)
            time.sleep(pause)
        return statistics.mean(seconds[5:])
    cold, warm = mean_time(step), mean_time(min(step, 0.05))  # the second time the same rows lie in memory
    return [row(f"batches of {b} cold rows of a {cfg.mib} MiB dump", b / cold, "rows/s", b / warm, "the same rows warm",
                memory(Machine("cpu", "float32"))),
            row("    their time / the demo's GPT step and them", cold / (cold + step), "x")]


def main():
    cfg = configure(Config)
    begun, unknown = time.time(), set(cfg.parts.split(",")) - {"sample", "gpt", "vqgan", "prepare", "batches"}
    if unknown:
        fail(f"--parts={cfg.parts}: there is no part {sorted(unknown)[0]}; there are {Config.parts}")
    if cfg.n_embd % cfg.n_head or cfg.grid < 4:
        fail("--n_embd must be a multiple of --n_head, and --grid 4 or more")
    if cfg.pixels % 16 or cfg.pixels < 32:
        fail("--pixels must be a multiple of 16, and 32 or more")

    kept = lock(cfg.out, ONE)  # for as long as it is named: another bench.py would make the same data anew
    how = "fork" if sys.platform == "linux" else "spawn"  # nothing has been computed here that a fork could carry over

    def apart(part, *args):  # in a new process, whose memory is its own
        interruptible = signal.signal, (signal.SIGINT, signal.default_int_handler)  # which a fork here is not otherwise
        with ProcessPoolExecutor(1, multiprocessing.get_context(how), *interruptible) as pool:
            return pool.submit(part, cfg, *args).result()
    limit, rows = apart(limits)
    apart(make_data, limit)
    step = 0.1
    for part, work in (("sample", sample), ("gpt", gpts), ("vqgan", vqgans), ("prepare", prepares)):
        if part in cfg.parts.split(","):
            rows += apart(work, limit)
            step = rows[-1]["step"] if part == "gpt" else step
    if "batches" in cfg.parts.split(","):
        rows += apart(batches, limit, step)
    write_json(Path(cfg.out, "bench.json"), {"config": asdict(cfg), "rows": rows})
    print(json.dumps(rows))
    print(f"{time.time() - begun:.0f} s; wrote {cfg.out}/bench.json")


if __name__ == "__main__":
    main()
