"""What a machine can do, for lab/bench.py: matmuls, convolutions, reading memory; and the rows of
its table."""
import resource
import statistics
import sys
import time

import torch

from common.runtime import Runtime, cpu_has_bfloat16


def synchronize(runtime):
    if runtime.device.type == "cuda":
        torch.cuda.synchronize()


def rate_of(runtime, work, seconds):
    """Calls of `work` a second: the median of those that fit into `seconds`, or of four in up to
    ten times as long; one to warm up is left out."""
    work()
    synchronize(runtime)
    ends = [time.perf_counter()]
    while ends[-1] - ends[0] < seconds or len(ends) < 5 and ends[-1] - ends[0] < 10 * seconds:
        work()
        synchronize(runtime)
        ends.append(time.perf_counter())
    return 1 / statistics.median(b - a for a, b in zip(ends, ends[1:]))


def peak_memory(runtime, who=resource.RUSAGE_SELF):
    """The most that this process ever held, in GiB; or the largest of its finished children, with
    RUSAGE_CHILDREN."""
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(who).ru_maxrss * unit / 2 ** 30


def make_row(what, rate, unit, bound=None, of="", gib=None):
    """Print and return a row of the table: a rate, the bound that applies, the share of it that is
    reached, peak memory."""
    share = rate / bound if bound else None
    reached = f"{share:7.1%} of {bound:.4g}, {of}" if bound else ""
    memory = f"{gib:5.2f} GiB" if gib else ""
    print(f"{what:50s} {rate:9.4g} {unit:10s} {memory:9s} {reached}".rstrip(), flush=True)
    return {"what": what, "rate": rate, "unit": unit, "bound": bound, "of": of, "share": share,
            "GiB": gib}


@torch.no_grad()
def peak(kind, runtime, dtype):
    """FLOP/s of "matmuls", or of "convolutions": the best of three shapes."""
    device, is_cuda = runtime.device, runtime.device.type == "cuda"
    n, side = (8192, 64) if is_cuda else (2048, 32)
    if kind == "matmuls":
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return 2 * n ** 3 * rate_of(runtime, lambda: a @ b, 1)
    layout, best = torch.channels_last, 0
    for c, s in ((128, 2 * side), (256, side), (512, side // 2)):
        conv = torch.nn.Conv2d(c, c, 3, padding=1).to(device, dtype, memory_format=layout)
        x = torch.randn(8, c, s, s, device=device).to(dtype, memory_format=layout)
        best = max(best, 18 * c * x.numel() * rate_of(runtime, lambda: conv(x), 0.4))
    return best


def with_peak(kind, runtime, dtype, work):
    """What `work` returns, and the mean of the peak just before it and just after: a shared machine
    is not equally fast all the time."""
    before = peak(kind, runtime, dtype)
    result = work()
    return result, (before + peak(kind, runtime, dtype)) / 2


def sampling_dtype(cfg, runtime):
    """What sampling is measured in: bfloat16, but as asked for, or where a CPU has none of it."""
    has_bfloat16 = runtime.device.type != "cpu" or cpu_has_bfloat16()
    return torch.bfloat16 if cfg.dtype == "auto" and has_bfloat16 else runtime.dtype


def measure_limits(cfg):
    """The machine's limits (FLOP/s by dtype and kind, bytes/s), and their rows."""
    runtime, rows = Runtime(cfg.device, cfg.dtype), []
    is_cuda = runtime.device.type == "cuda"
    limits = {"device": runtime.device.type, "dtype": str(runtime.dtype)[6:]}
    threads = f"{torch.get_num_threads()} CPU threads"
    name = "limits, " + (torch.cuda.get_device_name() if is_cuda else threads)
    for dtype in {runtime.dtype, sampling_dtype(cfg, runtime)}:
        dtype_name = str(dtype)[6:]
        limits[dtype_name] = {}
        for kind in ("matmuls", "convolutions"):
            limits[dtype_name][kind] = rate = peak(kind, runtime, dtype)
            rows.append(make_row(f"{name}, {dtype_name}: {kind}", rate / 1e9, "GFLOP/s"))
    x = torch.ones(2 ** 28, device=runtime.device)
    limits["read"] = x.nbytes * rate_of(runtime, x.sum, 1)
    rows.append(make_row(f"{name}: reading memory", limits["read"] / 1e9, "GB/s"))
    return limits, rows


def compile_variants(cfg, limits):
    """Values of --compile to try, each with what the table adds for it."""
    if cfg.compile is None and limits["device"] == "cuda":
        return [(False, ""), (True, ", compiled")]
    return [(True, ", compiled")] if cfg.compile else [(False, "")]
