"""The sampling rows of lab/bench.py: the tokens of `generate` timed one by one, on a network of
random weights. b images are sampled at a time; with guidance they are n = 2b rows."""
import copy
import time

import torch
from torch import nn

from common.options import fail
from common.runtime import Runtime
from fast import accelerate
from fast.cpu import MAX_FBGEMM_ROWS
from lab.limits import (
    compile_variants,
    make_row,
    peak_memory,
    sampling_dtype,
    synchronize,
    with_peak,
)
from model import GPT, GPTConfig

CANT_USE = "fast/gpu.py can't be used here, as is said above; --compile=False measures without it"


@torch.no_grad()
def measure_sampling(cfg, limits):
    """Rows: the plain loop without a cache; `generate` at the large size, accelerated, and on a CPU
    the bare matmuls of the same weights."""
    runtime, rows, t = Runtime(cfg.device, cfg.dtype), [], cfg.grid ** 2
    gpt = random_gpt(cfg, runtime)
    weights = sum(layer.weight.numel() for layer in linear_layers(gpt))
    uncached = {}                                         # seconds of all tokens, by batch size
    for b in (1, cfg.batch):
        uncached[b], peak = with_peak("matmuls", runtime, runtime.dtype,
                                      lambda: time_without_cache(gpt, b, runtime))
        rows.append(make_row(
            f"sampling, no cache, batch {b}, {limits['dtype']}", b * t / uncached[b], "tokens/s",
            peak / (weights * t),                         # 2 FLOPs a weight, t/2 tokens on average
            "the peak of matmuls", peak_memory(runtime)))
    dtype = sampling_dtype(cfg, runtime)
    is_cuda = limits["device"] == "cuda"
    for compiled, suffix in compile_variants(cfg, limits) if is_cuda else [(True, "")]:
        generator = accelerate(gpt, dtype) if compiled else plain_in(gpt, dtype)
        if compiled and is_cuda and generator is gpt:
            fail(CANT_USE)
        for b in (1, cfg.batch):
            rows += measure_batch(generator, b, suffix, weights, uncached[b], runtime, dtype,
                                  limits)
    return rows


def random_gpt(cfg, runtime):
    shape = GPTConfig(cfg.codebook_size, cfg.grid, 512, cfg.n_layer, cfg.n_head, cfg.n_embd)
    with torch.device("meta"):  # without the work of initialising it
        gpt = GPT(shape).requires_grad_(False).eval()
    gpt.to_empty(device=runtime.device)
    for p in gpt.parameters():
        p.normal_(std=0.02)
    return gpt


def linear_layers(gpt):
    """Those that run for every token."""
    return [m for m in gpt.modules() if isinstance(m, nn.Linear) and m is not gpt.cond_proj]


def plain_in(gpt, dtype):
    """The plain network, for autocast: matmuls and caches in `dtype`."""
    gpt = copy.deepcopy(gpt)
    for layer in [gpt.cond_proj, *linear_layers(gpt)]:
        layer.to(dtype)
    gpt.new_caches = lambda rows: GPT.new_caches(gpt, rows).to(dtype)
    return gpt


def time_without_cache(gpt, b, runtime):
    """Seconds of all tokens, every position computed again for each: of eight lengths (of odd grids
    nine or so), each for its share of them."""
    cond, seconds, t = torch.randn(b, 512, device=runtime.device), 0, gpt.cfg.grid ** 2
    lengths = range(t // 16, t, t // 8)
    for length in lengths:
        tokens = torch.zeros(b, length, dtype=torch.long, device=runtime.device)
        # the first call of a kind loads kernels on a GPU
        for _ in range(2 if runtime.device.type == "cuda" else 1):
            start = time.perf_counter()
            with runtime.autocast():
                gpt(cond, tokens)[:, -1].argmax(-1)
            synchronize(runtime)
        seconds += (time.perf_counter() - start) * t / len(lengths)
    return seconds


def measure_batch(generator, b, suffix, weights, uncached, runtime, dtype, limits):
    """The rows of b images, without guidance and with it."""
    rows, cfg, dtype_name, without_guidance = [], generator.cfg, str(dtype)[6:], None
    t = cfg.grid ** 2
    for guidance in (1.0, 2.0):
        n = b if guidance == 1 else 2 * b
        cond = torch.randn(b, cfg.cond_dim, device=runtime.device)
        uniform = torch.rand(b, t, device=runtime.device)
        bound = ()                                        # on a GPU memory is, in the next row
        if limits["device"] == "cuda":
            steps = time_on_gpu(generator, cond, uniform, guidance, dtype)
        else:
            every = 8 if b > 1 else 3 if guidance == 1 else 4
            steps, bare = time_on_cpu(generator, cond, uniform, guidance, every)
            bound = b / bare, "the bare matmuls"
        step, eighth = sum(steps) / len(steps), max(1, len(steps) // 8)
        cache = cfg.n_layer * n * cfg.n_embd * t          # keys and values, half full
        size = (weights + cache) * dtype.itemsize
        name = f"sampling, batch {b}{', guidance' if n > b else ''}, {dtype_name}{suffix}"
        rows += [make_row(name, b / step, "tokens/s", *bound, gib=peak_memory(runtime)),
                 make_row("    weights and cache", size / step / 1e9, "GB/s", limits["read"] / 1e9,
                          "reading memory"),
                 make_row("    time of the last eighth of the tokens / the first",
                          sum(steps[-eighth:]) / sum(steps[:eighth]), "x")]
        if n > b:
            rows.append(make_row("    time / without guidance", step / without_guidance, "x"))
        else:
            without_guidance = step
            least = max(size / limits["read"], 2 * weights * n / limits[dtype_name]["matmuls"])
            rows.append(make_row("    rate / no cache", uncached / t / step, "x",
                                 uncached / t / least, "bytes, FLOPs"))
    return rows


def time_on_gpu(generator, cond, uniform, guidance, dtype):
    """Seconds of each token of `generate` by the GPU's clock, once all is compiled."""
    events, is_plain = [], isinstance(generator, GPT)

    def mark():
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()

    def watch(function):
        def watched(*args):
            mark()
            return function(*args)
        return watched

    name = "forward_embeddings" if is_plain else "capture"
    watched = original = getattr(generator, name)
    if is_plain:
        watched = watch(original)
    else:  # what capture returns is called for each token
        def watched(*args):
            return watch(original(*args))
    setattr(generator, name, watched)
    for _ in range(2):
        events.clear()
        with torch.autocast("cuda", dtype, enabled=is_plain and dtype != torch.float32):
            generator.generate(cond, uniform, guidance)
        mark()
    setattr(generator, name, original)
    if len(events) == 1:
        fail(CANT_USE)
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in zip(events, events[1:])]


def time_on_cpu(generator, cond, uniform, guidance, every):
    """Seconds of every so manieth token of `generate`, the others left out, and of the bare
    matmuls."""
    layers = getattr(generator, "layers", None) or linear_layers(generator)  # of a plain network
    activations = [(layer, layer.activation) for layer in layers
                   if getattr(layer, "activation", None)]
    n = len(cond) if guidance == 1 else 2 * len(cond)
    inputs = []
    for layer in layers:
        dtype = getattr(layer, "dtype", torch.float32) if n > MAX_FBGEMM_ROWS else torch.float32
        inputs.append(torch.randn(n, 1, layer.weight.shape[1], device=cond.device, dtype=dtype))

    def run_matmuls():
        for layer, x in zip(layers, inputs):
            layer(x)

    def time_matmuls():
        for layer, _ in activations:
            layer.activation = None
        start = time.perf_counter()
        run_matmuls()
        seconds = time.perf_counter() - start
        for layer, activation in activations:
            layer.activation = activation
        return seconds

    run_matmuls()  # lays the weights out for so many rows
    original = generator.forward_embeddings
    timer = TokenTimer(original, time_matmuls, every)
    generator.forward_embeddings = timer
    generator.generate(cond, uniform, guidance)
    timer.end_token()
    generator.forward_embeddings = original
    return timer.seconds, sum(timer.bare) / len(timer.bare)


class TokenTimer:
    """Stands in for a generator's forward_embeddings. Times every so manieth token until the next
    begins, leaves the others out, and runs the bare matmuls before every second timed one."""

    def __init__(self, forward_embeddings, time_matmuls, every):
        self.forward_embeddings, self.time_matmuls = forward_embeddings, time_matmuls
        self.every, self.calls, self.start, self.logits = every, 0, None, None
        self.seconds, self.bare = [], []

    def __call__(self, *args):
        self.end_token()
        self.calls += 1
        if (self.calls - 1) % self.every:
            return self.logits
        if len(self.seconds) % 2 == 0:
            self.bare.append(self.time_matmuls())
        self.start = time.perf_counter()
        self.logits = self.forward_embeddings(*args)
        return self.logits

    def end_token(self):
        if self.start:
            self.seconds.append(time.perf_counter() - self.start)
        self.start = None
