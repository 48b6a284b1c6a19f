"""What more than one stage needs and is no network: the config line, the machine, files written whole, run folders,
progress, loading CLIP, reading pictures, drawing grids."""
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import glob
import hashlib
import importlib.util
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import sys
import tarfile
import time
import types
import typing
import urllib.request
import weakref
import zipfile
from pathlib import Path

try:
    import fcntl
    import resource
except ImportError:  # Windows, which has neither such locks nor such counts
    fcntl = resource = None

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

from model import GPT, GPTConfig, VQGAN, VQGANConfig, cpu_has_bfloat16

# ------------------------------------------------------------------------------------------------- the config line

Count = typing.Annotated[int, 1, 2 ** 63 - 1]     # the ranges an option's value must lie in, both ends included
Whole = typing.Annotated[int, 0, 2 ** 63 - 1]
Amount = typing.Annotated[float, 0, math.inf]
Share = typing.Annotated[float, 0, 1]
Zoom = typing.Annotated[float, 0.1, 1]
AutoCount, AutoWhole = typing.Optional[Count], typing.Optional[Whole]      # None is written auto
AutoAmount = typing.Optional[typing.Annotated[float, 0, 1e6]]  # of sampling, where more would overflow
AutoShare, AutoBool = typing.Optional[Share], typing.Optional[bool]
Device = str
Dtype = typing.Literal["auto", "float32", "bfloat16", "float16"]
Compile = typing.Literal["auto", "True", "False"]
Preset = typing.Literal["", "paper", "24gb"]
HOW = ("out", "device", "compile", "workers", "trust_jit", "max_bad", "dry_run")  # may differ when a run goes on


def fail(message):
    """A mistake of the user's: one line to stderr, exit code 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    sys.exit(2)


def leave(*_):
    """What Ctrl-C and a polite kill do where no training step has to be saved first."""
    print("stopped; what is finished is kept", file=sys.stderr, flush=True)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(130)


def worker_signals():
    """In a forked worker process: Ctrl-C is the parent's business, a polite kill ends it."""
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=worker_signals)


def parse(text, hint):
    """The text of an option -> a value of the field's type. Raises ValueError saying what was expected."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Union:
        return None if text == "auto" else parse(text, args[0])
    if typing.get_origin(hint) is typing.Literal:
        if text not in args:
            raise ValueError("one of " + ", ".join(args))
        return text
    if hint is bool:
        return parse(text.capitalize(), typing.Literal["True", "False"]) == "True"
    if hint is tuple:
        return tuple(parse(part, Count) for part in text.split(",") if part)
    if hint is str:
        return os.path.expanduser(text)
    hint, low, high = args
    kind = "a whole number" if hint is int else "a number"
    try:
        value = hint(text)
    except ValueError:
        raise ValueError(kind) from None
    if not low <= value <= high or value == math.inf:
        raise ValueError(f"{kind} of {low} or more" if high > 2 ** 60 else f"{kind} from {low:g} to {high:g}")
    return value


def configure(Config, argv=None, presets={}):
    """The command line -> an instance of the dataclass `Config`, whose fields are the options: --name=value.

    Words without dashes go to the field `prompts`, where there is one. --preset=NAME sets the options of presets[NAME],
    which any option given beside it overrides. --help prints every field with its default and the comment beside it.
    Unknown names and bad values end in one line and exit code 2.
    """
    argv, values, words = sys.argv[1:] if argv is None else argv, {}, []
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that is no UTF-8 must not end a run
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    fields = {f.name: f for f in dataclasses.fields(Config) if f.name != "prompts"}
    takes_words = "prompts" in Config.__dataclass_fields__
    hints = typing.get_type_hints(Config, include_extras=True)
    if "--help" in argv or "-h" in argv:
        comments = dict(re.findall(r"^ +(\w+):[^#\n]*# (.*)$", inspect.getsource(Config), re.M))
        print(inspect.getmodule(Config).__doc__.strip(), "\n\noptions, as --name=value:")
        for f in fields.values():
            print(f"  --{f.name + '=' + show(f.default):30s}  {comments.get(f.name, '')}")
        for name, options in presets.items():
            print(f"\n--preset={name} stands for " + " ".join(f"--{k}={show(v)}" for k, v in options.items()))
        sys.exit(0)
    for arg, after in zip(argv, [*argv[1:], "--"]):
        if not arg.startswith("--"):
            words.append(arg)
            continue
        name, equals, text = arg[2:].partition("=")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1, 0)
            fail(f"there is no option --{name[:60]}; the nearest is --{near[0]}, and --help lists them all")
        if not equals:
            wanted = show(fields[name].default) if after.startswith("--") else after[:60]
            fail(f"--{name} needs a value, written --{name}={wanted}")
        try:
            values[name] = parse(text, hints[name])
        except ValueError as e:
            fail(f"--{name}={text[:60]} makes no sense: it takes {e}")
    if words and not takes_words:
        fail(f"'{words[0][:60]}' is no option; options are written --name=value, and --help lists them")
    values = presets.get(values.get("preset"), {}) | values
    return Config(**values, **({"prompts": tuple(words)} if words else {}))


def show(value):
    return "auto" if value is None else ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


# ----------------------------------------------------------------------------------------------------- the machine


class Machine:
    """Where a stage runs: device, dtype of autocast, this process's rank among `world` under torchrun."""

    def __init__(self, device, dtype, training=True):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if device == "auto":
            mps = torch.backends.mps.is_available()
            device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
        try:
            self.device = torch.device(device)
            if self.device.type not in ("cpu", "cuda", "mps"):
                raise RuntimeError("it takes auto, cpu, cuda or mps")
            if self.device.type == "cuda" and self.world > 1:
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError, NotImplementedError) as e:
            fail(f"--device={device} can't be used here ({str(e).splitlines()[0]}); try --device=cpu")
        kind = self.device.type
        if self.world > 1:
            day = datetime.timedelta(days=1)  # ranks of prepare.py meet at the end only
            torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=day)
        if kind == "cpu":
            keep_memory()
        if dtype == "auto":  # half precision where the hardware has it; on a CPU only training is worth the loss
            if kind == "cuda":
                dtype = "bfloat16" if torch.cuda.get_device_capability(self.device)[0] >= 8 else "float16"
            else:
                fast = torch.tensor(float(kind == "cpu" and training and self.rank == 0 and bfloat16_pays()))
                dtype = "bfloat16" if self.sum(fast) else "float32"
        if dtype == "float16" and kind != "cuda":
            fail(f"--dtype=float16 needs an NVIDIA GPU; on {kind} use --dtype=bfloat16 or float32")
        self.dtype = getattr(torch, dtype)
        self.fused = kind in ("cpu", "cuda")  # whether AdamW has a fused kernel here
        if kind == "cuda":
            torch.cuda.set_device(self.device.index or 0)
            torch.set_float32_matmul_precision("high" if training else "highest")
            torch.backends.cudnn.allow_tf32 = training

    def __str__(self):
        ranks = f" x {self.world} processes" if self.world > 1 else ""
        return f"{self.device}{ranks}, {str(self.dtype).removeprefix('torch.')}"

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def say(self, *words):
        """Print, once for all ranks."""
        if self.rank == 0:
            print(*words, flush=True)

    def sum(self, tensor):
        """Sum over ranks, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, tensor):
        """The ranks' tensors (n, ...) under each other (world*n, ...)."""
        if self.world == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        torch.distributed.all_gather(parts, tensor)
        return torch.cat(parts)

    def share(self, tensor):
        """Rank 0's numbers for all ranks, in place."""
        if self.world > 1:
            torch.distributed.broadcast(tensor, 0)

    def average_gradients(self, parameters):
        """Data parallelism in full: one all-reduce of all gradients a step."""
        if self.world == 1:
            return
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = self.sum(torch.cat([g.flatten() for g in grads])) / self.world
        for g, part in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(part.view_as(g))

    def compile(self, function, wanted, example):
        """torch.compile `function` if wanted, tried on the arguments `example`; where that fails, the plain function
        and a line that says so."""
        if not wanted:
            return function
        try:
            compiled = torch.compile(function)
            with self.autocast():
                compiled(*example)
            return compiled
        except Exception as e:
            self.say(f"torch.compile failed ({type(e).__name__}), going on without it")
            return function


def millions(model):
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"


def bfloat16_pays(n=512):
    """Whether this CPU multiplies bfloat16 matrices at least 1.3 times as fast as float32 ones: the best of a few tries
    each, in turn. Some do, 2-3 times; others have the instructions and are slower with them."""
    if not cpu_has_bfloat16():
        return False
    pairs = [[torch.ones(n, n, dtype=dtype) for _ in range(2)] for dtype in (torch.float32, torch.bfloat16)]
    best = [math.inf, math.inf]
    for _ in range(9):
        for i, (a, b) in enumerate(pairs):
            begun = time.perf_counter()
            a @ b
            best[i] = min(best[i], time.perf_counter() - begun)
    return best[0] > 1.3 * best[1]


def keep_memory():
    """Have glibc keep freed memory for the next step, which takes tensors of the same sizes again. Handing it back and
    faulting it in anew made CPU training 2-3x slower."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)             # M_MMAP_MAX: no block gets a mapping of its own
        libc.mallopt(-1, 2 ** 31 - 1)   # M_TRIM_THRESHOLD: the heap does not shrink


class Muon(torch.optim.Optimizer):
    """Momentum whose step for each matrix is brought to orthogonality (Jordan et al. 2024): all directions move alike.
    Convolutions count as matrices (out, kh*kw*in). The step's size is AdamW's, so learning rates carry over."""

    def __init__(self, params, lr=0.0, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}  # matrices of one shape lie in one stack
            for p in (p for p in group["params"] if p.grad is not None):
                alike.setdefault((p.shape[0], p[0].numel()), []).append(p)
            stacks = [torch.empty(len(some), *shape, device=some[0].device) for shape, some in alike.items()]
            for some, stack in zip(alike.values(), stacks):
                for p, x in zip(some, stack):
                    g = p.grad.movedim(1, -1).flatten(1)                                 # no copy if channels-last
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(g)
                    momentum = self.state[p]["momentum"].lerp_(g, 1 - group["momentum"])
                    torch.lerp(g, momentum, group["momentum"], out=x)                    # Nesterov's
            for (shape, some), stack in zip(alike.items(), orthogonal(stacks)):
                for p, x in zip(some, stack):
                    x = x.view(p.shape[0], *p.shape[2:], p.shape[1]).movedim(-1, 1)
                    p.add_(x, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonal(stacks, steps=3):
    """Stacks of matrices, each (n, rows, columns) -> about the nearest orthogonal, by Newton-Schulz: x <- p(x xT) x
    with a polynomial p that pushes all singular values towards 1. The polynomials commute with x xT, so they are
    multiplied up on that small square side, those of all matrices with one such side together, and the long one is
    passed over twice in all. The start is x / |x xT|^1/2, whose largest singular value is nearer to 1 than that of
    Muon's x / |x|: three steps do what five did."""
    stacks = [x.float() for x in stacks]
    wide = [x.mT if x.shape[1] > x.shape[2] else x for x in stacks]
    done = [None] * len(wide)
    for side in {x.shape[1] for x in wide}:
        some = [i for i, x in enumerate(wide) if x.shape[1] == side]
        a, eye = torch.cat([wide[i] @ wide[i].mT for i in some]), torch.eye(side, device=wide[0].device)  # (n, s, s)
        scale = 1 / (torch.linalg.matrix_norm(a, keepdim=True).sqrt() + 1e-7)            # (n, 1, 1)
        a = a * scale ** 2
        for i in range(steps):
            p = torch.baddbmm(3.4445 * eye - 4.7750 * a, a, a, alpha=2.0315)
            product = p @ product if i else p * scale
            if i < steps - 1:
                a = p @ a @ p
        for i, p in zip(some, product.split([len(wide[i]) for i in some])):
            done[i] = p @ wide[i] if wide[i] is stacks[i] else stacks[i] @ p
    return done


def learning_rate(step, peak, warmup, max_steps):
    """Linear warm-up over `warmup` steps, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, max_steps - warmup)))


# ------------------------------------------------------------------------------------------------- files and runs


@contextlib.contextmanager
def whole(path):
    """Write a file whole or not at all: yields a temporary path, which is flushed to disk and renamed at the end."""
    path = Path(path)
    temporary = path.with_name(f"{path.stem}.tmp{os.environ.get('RANK', '')}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # and the folder's entry
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(e, (OSError, RuntimeError)):  # torch.save wraps what the disk says into a RuntimeError
            fail(f"could not write {path}: {getattr(e, 'strerror', None) or e}; what was there before is untouched")
        raise


def lock(folder, machine):
    """Refuse to work in a folder that another run is working in. The lock ends with the process, however that ends: its
    worker processes, which can live on for seconds after a kill, let go of it at birth."""
    if machine.rank > 0 or fcntl is None:
        return None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder, ".lock"), "a")
    except OSError as e:
        fail(f"could not write in {folder}: {e.strerror}")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        fail(f"another run is working in {folder}; wait for it, or choose another folder with --out")
    mine = weakref.ref(file)
    os.register_at_fork(after_in_child=lambda: mine() and mine().close())
    return file


def write_json(path, value):
    with whole(path) as f:
        f.write_text(json.dumps(value, indent=1) + "\n")


def load_checkpoint(path, stage):
    """Read a checkpoint of `stage` ("toy", "vqgan" or "gpt"), memory-mapped; nothing in it is run."""
    if not Path(path).is_file():
        fail(f"there is no {stage} checkpoint {path}; train one first or name another")
    class Inert:
        """Stands where Lightning's checkpoints name a class of its own; keeps nothing and does nothing."""
    lightning = [(Inert, f"pytorch_lightning.callbacks.{x}") for x in ("model_checkpoint.ModelCheckpoint",
                                                                     "early_stopping.EarlyStopping")]
    try:
        with torch.serialization.safe_globals(lightning):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=torch_zip(path))
        adopted = adopt(checkpoint)
        checkpoint = adopted or checkpoint
    except Exception as e:
        fail(f"{path} is no checkpoint that can be read without running code in it "
             f"({type(e).__name__}: {(str(e).splitlines() or [''])[0][:100]})")
    found = checkpoint.get("stage", "another program")
    if found != stage:
        fail(f"{path} is a checkpoint of {found}, a {stage} checkpoint is needed")
    missing = [k for k in ("ema", "network") if k not in checkpoint and stage != "toy"]
    if missing:
        fail(f"{path} lacks its {' and '.join(missing)}; put an intact copy there, or train again")
    if not adopted and checkpoint.get("digest") != digest({k: v for k, v in checkpoint.items() if k != "digest"}):
        fail(f"{path} is damaged: its contents are not what was written; put an intact copy there, or train again")
    return checkpoint


def digest(tree, h=None):
    """Hash of everything in a checkpoint: nested dicts and lists of tensors and plain values."""
    top, h = h is None, h or hashlib.sha256()
    if isinstance(tree, dict):
        for k, v in sorted(tree.items(), key=lambda item: str(item[0])):
            h.update(f"{k}:".encode(errors="surrogateescape"))
            digest(v, h)
    elif isinstance(tree, (list, tuple)):
        for v in tree:
            digest(v, h)
    elif isinstance(tree, torch.Tensor):
        h.update(f"{tree.dtype}{tuple(tree.shape)}".encode())
        h.update(tree.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    else:
        h.update(repr(tree).encode(errors="surrogateescape"))
    return h.hexdigest() if top else None


def torch_zip(path):
    """Whether a file has torch's zip form, the one that can be memory-mapped (older files have not)."""
    with open(path, "rb") as f:
        return f.read(4) == b"PK\x03\x04"


# Weights published by others: the names they have there -> the names they have here.
HFAI_BLOCK = {"block.0": "norm1", "block.2": "conv1", "block.3": "norm2", "block.6": "conv2",
              "shortcut": "nin_shortcut"}
HFAI_MID = {"mid.0": "mid.block_1", "mid.1": "mid.attn_1", "mid.2": "mid.block_2"}
HFAI_ENDS = {"encoder.final.0": "encoder.norm_out", "encoder.final.2": "encoder.conv_out",
             "encoder.final.3": "quant_conv", "decoder.final.0": "decoder.norm_out",
             "decoder.final.2": "decoder.conv_out", "decoder.quant_conv_in": "post_quant_conv",
             "quantizer.embedding": "quantize.embedding"}
HFAI_GPT = {"encoder.norm1": "ln_1", "encoder.norm2": "ln_2", "encoder.self_attn.in_proj_": "qkv.", "norm": "ln_f",
            "encoder.self_attn.out_proj": "proj", "encoder.linear1": "fc", "encoder.linear2": "fc_out"}


def renamed(name, table):
    """The name with the first entry of the table that starts it, or one of its dotted parts, replaced."""
    for old, new in table.items():
        name, n = re.subn(rf"(^|\.){re.escape(old)}(?=\.|$|weight|bias)", rf"\g<1>{new}", name, count=1)
        if n:
            break
    return name


def from_hfai_vqgan(weights):
    """HFAiLab/clip-gen's VQGAN -> taming-transformers' names. Its levels lie in one flat list, attention is a
    nn.MultiheadAttention of one head, and the discriminator comes along."""
    weights, places = {k: v for k, v in weights.items() if not k.startswith("discriminator.")}, {}
    for half in ("encoder.down", "decoder.up"):
        kinds = {}
        for name in weights:
            if name.startswith(half + "."):
                n, kind = name[len(half) + 1:].split(".")[:2]
                kinds.setdefault(int(n), set()).add(kind)
        up = half == "decoder.up"
        depth, j = sum("conv" in k for k in kinds.values()) if up else 0, -1
        for n in sorted(kinds):
            j += "block" in kinds[n]
            if "conv" in kinds[n]:
                places[f"{half}.{n}"] = f"{half}.{depth}.{'upsample' if up else 'downsample'}"
                depth, j = depth + (-1 if up else 1), -1
            else:
                places[f"{half}.{n}"] = f"{half}.{depth}.{'block' if 'block' in kinds[n] else 'attn'}.{j}"
    out = {}
    for name, x in weights.items():
        head, tail = re.fullmatch(r"((?:encoder\.down|decoder\.up)\.\d+|(?:\w+\.)?mid\.\d|)\.?(.*)", name).groups()
        where = places.get(head) or renamed(head, HFAI_MID)
        if tail.startswith("attn.in_proj_"):
            for part, y in zip("qkv", x.chunk(3)):
                out[f"{where}.{part}.{tail[13:]}"] = y[..., None, None] if y.dim() == 2 else y
        elif tail.startswith("attn.out_proj."):
            out[f"{where}.proj_out.{tail[14:]}"] = x[..., None, None] if x.dim() == 2 else x
        else:
            out[f"{where}.{renamed(tail, HFAI_BLOCK)}" if where else renamed(name, HFAI_ENDS)] = x
    return out


def vqgan_shape(weights, eps):
    """The VQGANConfig that taming-transformers' weights fit, read from their shapes. They were all made for pictures
    that give 16 x 16 tokens, which is what no shape tells."""
    levels = 1 + max(int(k.split(".")[2]) for k in weights if k.startswith("encoder.down."))
    ch, side = weights["encoder.conv_in.weight"].shape[0], 16 * 2 ** (levels - 1)
    return VQGANConfig(
        image_size=side, ch=ch, eps=eps, z_channels=weights["encoder.conv_out.weight"].shape[0],
        ch_mult=tuple(weights[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // ch for i in range(levels)),
        num_res_blocks=sum(bool(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", k)) for k in weights),
        attn_resolutions=tuple(side >> i for i in range(levels) if f"encoder.down.{i}.attn.0.norm.weight" in weights),
        codes=weights["quantize.embedding.weight"].shape[0], code_dim=weights["quantize.embedding.weight"].shape[1])


def adopt(checkpoint, n_head=None):
    """A checkpoint of taming-transformers or of HFAiLab/clip-gen -> the same in this project's form; else None. The
    heads of a GPT, which no shape tells, are of 64 numbers each, as published, unless n_head says otherwise."""
    weights, eps = checkpoint.get("state_dict"), 1e-6
    if weights is None and "epoch" in checkpoint:
        weights, eps = checkpoint.get("model", {}), 1e-5
    if not weights:
        return None
    if "encoder.conv_in.weight" in weights:
        if "quantizer.embedding.weight" in weights:
            weights = from_hfai_vqgan(weights)
        weights = {k: v for k, v in weights.items() if not k.startswith("loss.")}
        return {"stage": "vqgan", "ema": weights, "network": dataclasses.asdict(vqgan_shape(weights, eps)),
                "sha256": digest(weights)}
    if "pos_emb" in weights and "cond_proj.weight" in weights:
        weights = {renamed(k, HFAI_GPT): v for k, v in weights.items() if not k.endswith(".mask")}
        _, t, c = weights["pos_emb"].shape
        layers = 1 + max(int(k.split(".")[1]) for k in weights if k.startswith("blocks."))
        network = GPTConfig(weights["tok_emb.weight"].shape[0], math.isqrt(t), weights["cond_proj.weight"].shape[1],
                            layers, n_head or c // 64, c, classic=True)
        d = network.cond_dim
        weights |= {"pos_emb": weights["pos_emb"][0], "means": torch.zeros(2, d), "spread": torch.zeros(d, d)}
        return {"stage": "gpt", "ema": weights, "network": dataclasses.asdict(network), "clip": "ViT-B/32"}
    return None


def load_vqgan(path, device):
    """A finished (or half-trained) VQGAN -> (its averaged network, the hash of those weights, its VQGANConfig)."""
    checkpoint = load_checkpoint(path, "vqgan")
    model = build(VQGAN, VQGANConfig, checkpoint, path).to(device, memory_format=torch.channels_last)
    return model, checkpoint["sha256"], model.cfg


def build(Network, NetworkConfig, checkpoint, path):
    """The network that a checkpoint describes, with its averaged weights, frozen."""
    try:
        model = Network(NetworkConfig(**checkpoint["network"]))
        model.load_state_dict(checkpoint["ema"])
    except (RuntimeError, TypeError) as e:  # TypeError: an older version's network had other options
        fail(f"the weights in {path} do not fit the network it describes ({' '.join(str(e).split())[:160]})")
    return model.requires_grad_(False).eval()


def load_gpt(path, device):
    """A GPT's checkpoint -> (its averaged network, the checkpoint's other entries)."""
    checkpoint = load_checkpoint(path, "gpt")
    return build(GPT, GPTConfig, checkpoint, path).to(device), checkpoint


class Run:
    """A run folder: `out/stage.ckpt` while a stage trains, renamed `stage.pt` when finished; `stage.jsonl` is its log.

    `resume` holds the checkpoint to go on from, if there is one. A finished run ends the program with a line that says
    so; a run of another config, or whose inputs (`depends`, a dict of hashes) have changed, is refused.
    """

    def __init__(self, stage, cfg, machine, depends):
        self.stage, self.cfg, self.machine, self.depends = stage, dataclasses.asdict(cfg), machine, depends
        self.final, self.path = Path(cfg.out) / f"{stage}.pt", Path(cfg.out) / f"{stage}.ckpt"
        self.resume, self.dry = None, getattr(cfg, "dry_run", False)
        path = self.final if self.final.exists() else self.path
        self.lock = None if self.dry else lock(cfg.out, machine)
        if path.exists() and not self.dry:
            self.resume = load_checkpoint(path, stage)
            # an option that the run was made without had its default
            old = {f.name: f.default for f in dataclasses.fields(cfg)} | self.resume.get("config", {})
            differ = [k for k in self.cfg if k not in HOW and old.get(k) != self.cfg[k]]
            if differ:
                fail(f"{path} was made with another config ({', '.join(f'{k}={show(old.get(k))}' for k in differ)}); "
                     f"repeat that, or choose another folder with --out")
            for what, wanted in depends.items():
                if self.resume.get("depends", {}).get(what) != wanted:
                    fail(f"{path} was started from another {what}; put that back, or choose another folder with --out")
            if path == self.final:
                machine.say(f"{path} is finished (step {self.resume['step']}); to train again, choose another --out")
                sys.exit(0)
            machine.say(f"going on from {path}, step {self.resume['step']}")
            device, dtype = self.resume.get("computed", ("", ""))
            if self.cfg["dtype"] == "auto" and device == machine.device.type:  # as it was begun, to the last bit
                machine.dtype = getattr(torch, dtype)
        self.step = self.resume["step"] if self.resume else 0
        self.log_file, self.pid = None, os.getpid()
        self.told, self.stopping = False, False  # this process, by a signal; all ranks, by asked_to_stop
        self.bad_row, self.bad_total = 0, 0
        self.ends = [time.perf_counter()]  # of a dry run's steps
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)

    def stop(self, *_):
        """Ctrl-C or a polite kill: the step under way is finished and saved first; a second time stops at once."""
        if os.getpid() != self.pid:  # a worker process, which ends with its parent
            return
        if self.told:
            sys.exit(130)
        self.told = True
        self.machine.say("stopping after this step")

    def asked_to_stop(self):
        """Whether any rank has been told to stop: all get the same answer."""
        self.stopping = self.told
        if self.machine.world > 1:
            self.stopping = self.machine.sum(torch.tensor(float(self.told), device=self.machine.device)).item() > 0
        return self.stopping

    def log(self, **facts):
        """Add a line to the log. The first call of a run that goes on drops the lines after its checkpoint, so that
        every step stands there once."""
        if self.dry:
            self.ends.append(time.perf_counter())
            if len(self.ends) > 3:  # three steps that took a minute, or seven and five seconds
                enough = self.ends[-1] - self.ends[0] > 60 or len(self.ends) > 7 and self.ends[-1] - self.ends[2] > 5
                if self.machine.sum(torch.tensor(float(enough), device=self.machine.device)):  # so by any rank's clock
                    self.report()
        if self.machine.rank > 0 or self.dry:
            return
        if not self.log_file:
            path = self.path.with_suffix(".jsonl")
            lines = path.read_text().splitlines() if self.step and path.exists() else []
            with whole(path) as f:
                f.write_text("".join(x + "\n" for x in lines if x.endswith("}") and json.loads(x)["step"] <= self.step))
            self.log_file = open(path, "a", buffering=1)
        facts = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in facts.items()}
        try:
            self.log_file.write(json.dumps(facts) + "\n")
        except OSError as e:
            fail(f"could not write {self.log_file.name}: {e.strerror}; {self.path} is intact")

    def skip(self, step, good):
        """Count a step whose loss or gradient is not finite, `good` being False; many in a row end the run."""
        self.bad_row = 0 if good else self.bad_row + 1
        if not good:
            self.bad_total += 1
            self.machine.say(f"step {step + 1}: loss or gradient not finite, step skipped ({self.bad_total} so far)")
        if self.bad_row == 20:
            kept = f"{self.path} holds the last good step" if self.path.exists() else "no checkpoint was written yet"
            fail(f"20 steps in a row were not finite; {kept}. Try a smaller --learning_rate or --dtype=float32")

    def report(self):
        """The end of a dry run: the median of its steps, two to warm up, or one of two or three, left out."""
        steps, ends = self.cfg["max_steps"], self.ends[min(2, (len(self.ends) - 1) // 2):]
        seconds = statistics.median(b - a for a, b in zip(ends, ends[1:]))
        if self.machine.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            memory = resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.machine.say(f"dry run: {(memory or 0) / 2 ** 30:.2f} GiB at most, {1 / seconds:.3g} steps/s, "
                         f"{self.cfg['batch_size'] / seconds:.3g} rows/s; all {steps} steps would take "
                         f"{seconds * steps / 3600:.2f} hours, evaluations apart; nothing was written")
        sys.exit(0)

    def save(self, step, **state):
        """Write the checkpoint of `step`: config, hashes of the inputs and `state`."""
        if self.machine.rank == 0 and not self.dry:
            computed = [self.machine.device.type, str(self.machine.dtype).removeprefix("torch.")]
            contents = {"stage": self.stage, "config": self.cfg, "depends": self.depends, "step": step,
                        "computed": computed, **state}
            with whole(self.path) as f:
                torch.save(contents | {"digest": digest(contents)}, f)
        if self.stopping:
            self.machine.say("nothing was written" if self.dry else
                             f"saved {self.path} at step {step}; the same command goes on from there")
            sys.exit(130)

    def finish(self):
        if self.dry:
            self.report()
        if self.machine.rank == 0:
            os.replace(self.path, self.final)


class Progress:
    """A progress bar on a terminal, elsewhere a plain line every five seconds."""

    def __init__(self, total, initial=0, unit="step"):
        self.done, self.total, self.unit = initial, total, unit
        self.last, self.begun = time.time(), (initial, time.time())
        self.quiet = int(os.environ.get("RANK", 0)) > 0
        show_bar = sys.stderr.isatty() and not self.quiet
        self.bar = tqdm(total=total, initial=initial, unit=unit, dynamic_ncols=True) if show_bar else None

    def __call__(self, n=1, **facts):
        self.done += n
        text = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items())
        if self.bar:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(n)
        elif not self.quiet and (time.time() - self.last > 5 or self.done == self.total):
            self.last = time.time()
            rate = (self.done - self.begun[0]) / (self.last - self.begun[1])
            print(f"{self.unit} {self.done}/{self.total}  {rate:.3g}/s  {text}", flush=True)
        if self.bar and self.done == self.total:
            self.bar.close()


# ------------------------------------------------------------------------------------------------------------- CLIP

CLIP_FILES = {  # OpenAI's published models: SHA-256 of the file
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
CLIP_URL = "https://openaipublic.azureedge.net/clip/models"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's input pixels


def clip_package():
    """OpenAI's `clip.model` and `clip.simple_tokenizer`, without running clip/__init__.py, which wants torchvision and
    pkg_resources for things not used here."""
    if "clip" not in sys.modules:
        spec = importlib.util.find_spec("clip")
        if spec is None:
            fail("the package clip is not installed; see requirements.txt, or run make")
        bare = types.ModuleType("clip")
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules["clip"] = bare
    return importlib.import_module("clip.model"), importlib.import_module("clip.simple_tokenizer")


def file_sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def clip_file(name):
    """A published model's name -> its file in clip's usual cache, downloaded and checked if need be."""
    path = Path.home() / ".cache/clip" / (name.replace("/", "-").replace("@", "-") + ".pt")
    if not path.exists():
        url = f"{CLIP_URL}/{CLIP_FILES[name]}/{path.name}"
        try:
            source = urllib.request.urlopen(url, timeout=15)
        except OSError as e:
            fail(f"could not download {url} ({e}); fetch it by other means and give the file: --clip=FILE")
        with source, whole(path) as f, open(f, "wb") as target:
            bar = Progress(int(source.headers["Content-Length"] or 0), unit=f"downloading {name}, byte")
            while block := received(source, url):
                target.write(block)
                bar(len(block))
            target.flush()
            if file_sha256(f) != CLIP_FILES[name]:
                fail(f"the download of {url} came through damaged (its checksum differs); run this again")
    elif file_sha256(path) != CLIP_FILES[name]:
        fail(f"{path} is not OpenAI's {name} (its checksum differs); delete it and run this again")
    return path


def received(source, url):
    try:
        return source.read(1 << 20)
    except OSError as e:
        fail(f"the download of {url} broke off ({e}); run this again")


def build_clip(weights):
    """The state dict of any CLIP of OpenAI's form -> its network in float32, its weights exactly those."""
    weights = {k: v for k, v in weights.items() if k not in ("input_resolution", "context_length", "vocab_size")}
    model = clip_package()[0].build_model(dict(weights)).float()  # rounds to half precision ...
    model.load_state_dict(weights)                                # ... so the exact weights once more
    return model.requires_grad_(False).eval()


def load_clip(name, device="cpu", trust_jit=False):
    """A frozen CLIP in float32. `name` is one of OpenAI's published models, or a file: one of those, or a state dict of
    the same form. Other TorchScript archives, which are programs, are read only with trust_jit."""
    path = clip_file(name) if name in CLIP_FILES else Path(name)
    if not path.is_file():
        fail(f"there is no CLIP {name}; give a file or one of {', '.join(CLIP_FILES)}")
    try:
        if is_jit(path):
            if not trust_jit and file_sha256(path) not in CLIP_FILES.values():
                fail(f"{path} is a TorchScript archive and none of OpenAI's nine: to load it is to run code in it; "
                     f"if you trust whoever made it, add --trust_jit=True")
            weights = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        model = build_clip(weights)
    except Exception as e:  # damaged files raise many kinds
        fail(f"{path} is not a CLIP that can be read without running code in it ({' '.join(str(e).split())[:100]})")
    return Clip(model.to(device), name, device, digest(model.state_dict()))


def is_jit(path):
    """Whether a file is a TorchScript archive: a zip with a folder of code in it."""
    if not torch_zip(path):
        return False
    with zipfile.ZipFile(path) as z:
        return any("/code/" in n or n.endswith("constants.pkl") for n in z.namelist())


class Clip:
    """A CLIP network and what it is: `name`, `sha256` of its weights, `size` of its input in pixels, `dim` of its
    embeddings, `context` in tokens."""

    def __init__(self, model, name, device, sha256=""):
        self.model, self.name, self.device, self.sha256 = model, str(name), device, sha256
        self.size, self.dim = model.visual.input_resolution, model.text_projection.shape[1]
        self.context, self.bpe = model.context_length, None

    def tokenize(self, texts):
        """Texts -> (tokens (N, context), list of the texts that had to be cut)."""
        self.bpe = self.bpe or clip_package()[1].SimpleTokenizer()
        start, end = self.bpe.encoder["<|startoftext|>"], self.bpe.encoder["<|endoftext|>"]
        rows, cut = torch.zeros(len(texts), self.context, dtype=torch.long), []
        for row, text in zip(rows, texts):
            ids = [start, *self.bpe.encode(text[:self.context * 16]), end]  # enough for any text that fits
            if len(ids) > self.context or len(text) > self.context * 16:
                cut.append(text)
                ids = ids[:-1][:self.context - 1] + [end]
            row[:len(ids)] = torch.tensor(ids)
        return rows, cut

    @torch.no_grad()
    def text(self, texts):
        """Texts -> unit embeddings (N, D), one at a time, so that none depends on its neighbours."""
        rows = self.tokenize(texts)[0].to(self.device)
        return torch.cat([torch.nn.functional.normalize(self.model.encode_text(r[None]).float(), dim=-1) for r in rows])

    def normalize(self, pixels):
        """Pictures (B, 3, C, C) in [0, 1] -> what the network expects."""
        # laid out as one picture, for in channels-last (3, 1, 1) would be taken three numbers at a time
        mean, std = (torch.zeros_like(pixels[:1]) + torch.tensor(x, device=pixels.device).view(3, 1, 1)
                     for x in (MEAN, STD))
        return (pixels - mean) / std

    def image(self, pixels):
        """Pictures (B, 3, size, size) in [0, 1] -> unit embeddings (B, D)."""
        return torch.nn.functional.normalize(self.model.encode_image(self.normalize(pixels)).float(), dim=-1)


# ------------------------------------------------------------------------------------------------------------- pictures

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".tga",
            ".jp2", ".avif"}


class Pictures:
    """The pictures of a folder, at any depth, or of .tar shards (one, a folder of them, or a pattern such as
    shards/*.tar): sorted `names`, and `open(name)`. Members of a tar are read in place; nothing is ever unpacked."""

    def __init__(self, data):
        self.data, self.where = Path(data), {}  # where: name -> (tar, offset, bytes), for members of a tar
        if self.data.is_dir():
            files = [Path(root, f) for root, _, names in os.walk(data) for f in names]
            shards = sorted(f for f in files if f.suffix.lower() == ".tar")
            self.names = [f.relative_to(data).as_posix() for f in files if f.suffix.lower() in SUFFIXES]
        else:
            shards, self.names = [self.data] if self.data.is_file() else sorted(map(Path, glob.glob(str(data)))), []
            if not shards:
                fail(f"there is no folder or .tar {data}; --data takes a folder of pictures, or tar shards of them")
        root = os.path.commonpath([s.parent for s in shards]) if shards else ""
        loose = bool(self.names)  # beside which a tar may have been unpacked: then its members keep the .tar in front
        for shard in shards:
            name = shard.relative_to(root) if loose else shard.relative_to(root).with_suffix("")
            self.index(shard, f"{name.as_posix()}/" if loose or len(shards) > 1 else "")
        self.names = sorted([*self.names, *self.where])
        self.sha256 = hashlib.sha256("\n".join(self.names).encode(errors="surrogateescape")).hexdigest()  # of the names
        if not self.names:
            fail(f"no pictures in {data} (looked for {' '.join(sorted(SUFFIXES))} and .tar)")

    def index(self, shard, prefix):
        try:
            with tarfile.open(shard, "r:") as tar:
                for m in tar:  # plain files only: no links, no devices
                    if m.isreg() and not m.issparse() and Path(m.name).suffix.lower() in SUFFIXES:
                        self.where[prefix + m.name.removeprefix("./")] = str(shard), m.offset_data, m.size
        except (tarfile.TarError, OSError, ValueError) as e:
            fail(f"{shard} is no tar that can be read ({e}); compressed ones must be unpacked first")

    def open(self, name, size=0):
        """A picture as RGB, whose short side is at least a quarter of `size`. Raises OSError or ValueError."""
        if name in self.where:
            shard, offset, length = self.where[name]
            with open(shard, "rb") as f:
                f.seek(offset)
                picture = open_picture(io.BytesIO(f.read(min(length, 1 << 30))))
        else:
            picture = open_picture(self.data / name)
        if min(picture.size) * 4 < size:
            raise ValueError(f"{picture.width} x {picture.height} pixels are too few for {size}")
        return picture


def centre_crops(source, names, size, most):
    """Centre crops of the first readable pictures, at most `most`: uint8 (N, size, size, 3)."""
    pictures = []
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            pictures.append(crop(source.open(name, size), size))
        if len(pictures) == most:
            break
    return np.array(pictures)


def split_names(names, percent):
    """Names -> (those to train on, those held out for validation), in their order."""
    out = [held_out(name, percent) for name in names]
    return [n for n, o in zip(names, out) if not o], [n for n, o in zip(names, out) if o]


def held_out(name, percent):
    """Whether a picture belongs to the validation split: decided by its name alone."""
    return int(hashlib.md5(name.encode(errors="surrogateescape")).hexdigest(), 16) % 1000 < percent * 10


def open_picture(path):
    """A picture of any mode -> RGB, turned as its EXIF says, transparency over white. Raises OSError or ValueError."""
    try:
        with Image.open(path) as im:
            if im.width * im.height > 100_000_000:
                raise ValueError(f"{im.width} x {im.height} pixels are too many")
            if max(im.size) > 100 * min(im.size):
                raise ValueError(f"{im.width} x {im.height} pixels are too thin")
            ImageOps.exif_transpose(im, in_place=True)
            if im.mode.startswith("I;16") or im.mode == "I":
                im = Image.fromarray((np.asarray(im).astype(np.float32) / 257).clip(0, 255).astype(np.uint8))
            if im.mode in ("LA", "PA", "La", "RGBa") or "transparency" in im.info:
                im = im.convert("RGBA")
            if im.mode == "RGBA":
                im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
            return im.convert("RGB")
    except (OSError, ValueError):
        raise
    except Exception as e:  # Pillow's readers raise many kinds on damaged files
        raise ValueError(f"{type(e).__name__}: {e}") from e


def crop(picture, size, zoom=1.0, x=0.5, y=0.5, flip=False):
    """A size x size crop, uint8 (size, size, 3): the picture's short side is resized to zoom * size (bicubic), the crop
    taken at x, y in [0, 1] of the room there is. The defaults are CLIP's own preprocessing."""
    w, h = picture.size
    short = round(size * zoom)
    w, h = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    left, top = round((w - size) * x), round((h - size) * y)
    small = picture if picture.size == (w, h) else picture.resize((w, h), Image.Resampling.BICUBIC)
    pixels = np.asarray(small.crop((left, top, left + size, top + size)))
    return pixels[:, ::-1] if flip else pixels


def to_tensor(pixels, device="cpu"):
    """uint8 (..., H, W, 3) -> float (..., 3, H, W) in [0, 1], sent to the device as the bytes they are."""
    return torch.from_numpy(np.array(pixels)).to(device).movedim(-1, -3).float() / 255


def resized(pixels, size):
    """Pictures (B, 3, S, S) -> (B, 3, size, size), bicubic; those that have that size already as they are."""
    if pixels.shape[-1] == size:
        return pixels
    return torch.nn.functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True)


def to_image(x):
    """A picture (3, H, W) in [-1, 1] -> Pillow."""
    return Image.fromarray(((x.float().clamp(-1, 1) + 1) * 127.5).round().byte().movedim(0, -1).cpu().numpy())


def save_grid(path, pictures, columns, labels=(), each=1):
    """Pillow pictures of one size -> one PNG, row by row; with labels, each is written above its `each` pictures."""
    w, h = pictures[0].size
    head, gap, rows = 18 if labels else 0, 4, math.ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * (w + gap) + gap, rows * (h + head + gap) + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        left, top = gap + i % columns * (w + gap), gap + i // columns * (h + head + gap)
        sheet.paste(picture, (left, top + head))
        if labels and i % each == 0:
            pen.text((left, top), labels[i // each][:each * w // 6], fill="black", font=ImageFont.load_default(13))
    with whole(path) as f:
        sheet.save(f)
