"""Where a script runs: device, dtype of autocast, ranks under torchrun."""
import contextlib
import ctypes
import datetime
import math
import os
import sys
import time

import torch
from tqdm import tqdm

from common.options import fail

DTYPES = ("auto", "float32", "bfloat16", "float16")


class Runtime:
    """Device, dtype of autocast, and this process's rank among `world` under torchrun.

    Processes are joined only if `shares_work`; the other scripts refuse to be started by torchrun.
    """

    def __init__(self, device, dtype, training=True, shares_work=False):
        self.rank, self.world = ranks(shares_work)
        self.device = choose_device(device, self.world)
        kind = self.device.type
        if self.world > 1:
            minutes = datetime.timedelta(minutes=10)
            try:
                torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo",
                                                     timeout=minutes)
            except (RuntimeError, ValueError) as e:
                fail(f"the {self.world} processes that WORLD_SIZE promises did not meet "
                     f"({str(e).splitlines()[0][:100]}): start with torchrun, or unset it")
        if kind == "cpu":
            keep_freed_memory()
        self.dtype = self.choose_dtype(dtype, training)
        self.fused = kind in ("cpu", "cuda")  # whether AdamW has a fused kernel here
        if kind == "cuda":
            torch.cuda.set_device(self.device.index or 0)
            torch.set_float32_matmul_precision("high" if training else "highest")
            torch.backends.cudnn.allow_tf32 = training

    def __str__(self):
        processes = f" x {self.world} processes" if self.world > 1 else ""
        return f"{self.device}{processes}, {str(self.dtype).removeprefix('torch.')}"

    def choose_dtype(self, dtype, training):
        """auto is half precision where the hardware has it; on a CPU only for training."""
        kind = self.device.type
        if dtype not in DTYPES:
            fail(f"--dtype={dtype} makes no sense: it takes one of {', '.join(DTYPES)}")
        if dtype == "float16" and kind != "cuda":
            fail(f"--dtype=float16 needs an NVIDIA GPU; on {kind} use bfloat16 or float32")
        if dtype == "auto" and kind == "cuda":
            ampere = torch.cuda.get_device_capability(self.device)[0] >= 8
            dtype = "bfloat16" if ampere else "float16"
        elif dtype == "auto":
            pays = kind == "cpu" and training and self.rank == 0 and bfloat16_pays()
            dtype = "bfloat16" if self.any_rank(pays) else "float32"
        return getattr(torch, dtype)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def to_device(self, x):
        return x.to(self.device, non_blocking=True)

    def zeros(self, *shape):
        return torch.zeros(shape, device=self.device)

    def print0(self, *words):
        """Print, once for all ranks. That nobody can read it ends no training."""
        if self.rank == 0 and any(words):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                tqdm.write(" ".join(map(str, words)))  # clears a progress bar first
                sys.stdout.flush()

    def all_reduce(self, tensor):
        """Sum over ranks, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def any_rank(self, condition):
        """Whether a condition holds on any rank: all get the same answer."""
        if self.world == 1:
            return bool(condition)
        return self.all_reduce(torch.tensor(float(condition), device=self.device)).item() > 0

    def all_gather(self, tensor):
        """The ranks' tensors (n, ...) one after another (world*n, ...)."""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        torch.distributed.all_gather(parts, tensor)
        return torch.cat(parts)

    def broadcast(self, tensor):
        """Rank 0's numbers to all ranks, in place."""
        if self.world > 1:
            torch.distributed.broadcast(tensor, 0)

    def wait_for_all(self):
        """Wait for every rank, for up to a day: one may have far more to do than the others."""
        if self.world > 1:
            day = torch.distributed.new_group(timeout=datetime.timedelta(days=1))
            torch.distributed.barrier(day)

    def average_gradients(self, parameters):
        """Data parallelism in full: one all-reduce of all gradients a step."""
        if self.world == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = self.all_reduce(torch.cat([g.flatten() for g in grads])) / self.world
        for g, average in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(average.view_as(g))

    def compile(self, function, wanted, example):
        """torch.compile a function if wanted, tried on `example`; where that fails, a line says so
        and the plain function is returned."""
        if not wanted:
            return function
        try:
            compiled = torch.compile(function)
            with self.autocast():
                compiled(*example)
            return compiled
        except Exception as e:
            self.print0(f"torch.compile failed ({type(e).__name__}), going on without it")
            return function


def ranks(shares_work):
    """This process's (rank, number of processes) under torchrun; (0, 1) without it."""
    if not shares_work:  # what a batch system left in the environment doesn't matter here
        if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE") != "1":
            fail("this script runs alone: start it with python, without torchrun")
        return 0, 1
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    present = [name for name in names if name in os.environ]
    if not {"RANK", "WORLD_SIZE"} & set(present):
        return 0, 1
    if len(present) < len(names):
        missing = ", ".join(name for name in names if name not in present)
        fail(f"{', '.join(present)} are set in the environment but not {missing}: start with "
             f"torchrun, or unset them")
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        fail("RANK and WORLD_SIZE must be whole numbers: start with torchrun, or unset them")


def choose_device(name, world=1):
    """auto, cpu, cuda, cuda:1 or mps -> a torch.device that works here."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError("it takes auto, cpu, cuda or mps")
        if device.type == "cuda" and world > 1:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        fail(f"--device={name} can't be used here ({str(e).splitlines()[0]}); try --device=cpu")


def cpu_has_bfloat16():
    """Whether oneDNN computes in bfloat16 on this CPU; elsewhere torch is 100x slower."""
    mkldnn = torch.ops.mkldnn
    return hasattr(mkldnn, "_is_mkldnn_bf16_supported") and mkldnn._is_mkldnn_bf16_supported()


def bfloat16_pays(n=512):
    """Whether this CPU multiplies bfloat16 matrices 1.3 times as fast as float32 ones: some have
    the instructions and are slower with them. The best of nine tries each, in turn."""
    if not cpu_has_bfloat16():
        return False
    dtypes = (torch.float32, torch.bfloat16)
    pairs = [[torch.ones(n, n, dtype=dtype) for _ in range(2)] for dtype in dtypes]
    best = [math.inf, math.inf]
    for _ in range(9):
        for i, (a, b) in enumerate(pairs):
            start = time.perf_counter()
            a @ b
            best[i] = min(best[i], time.perf_counter() - start)
    return best[0] > 1.3 * best[1]


def keep_freed_memory():
    """Have glibc keep freed memory for the next step: returning it made training 2-3x slower."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)             # M_MMAP_MAX: no block gets a mapping of its own
        libc.mallopt(-1, 2 ** 31 - 1)   # M_TRIM_THRESHOLD: the heap does not shrink


def format_size(model):
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"


def check_batch_size(cfg, runtime):
    """Refuse a batch that does not divide over processes and accumulation steps."""
    if cfg.batch_size % (runtime.world * cfg.grad_accum_steps):
        fail(f"--batch_size={cfg.batch_size} does not divide by {runtime.world} processes x "
             f"--grad_accum_steps={cfg.grad_accum_steps}")
