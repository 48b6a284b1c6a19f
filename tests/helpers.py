"""What the tests share: tiny networks, random tensors, small inputs, stages run as a user would."""
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.checkpoints import write_checkpoint
from common.dumps import PROVENANCE, write_meta
from common.openai_clip import clip_package
from model import GPT, VQGAN, GPTConfig, VQGANConfig

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT.parent / "shared/data/photos"
FIXTURES = ROOT.parent / "shared/fixtures"
DUMP_FILES = ("train_tokens.bin", "train_clip.bin", "val_tokens.bin", "val_clip.bin")

slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes long: make test-slow")
needs_photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason="needs the folder shared/data/photos")
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(),
                                    reason="needs the folder shared/fixtures")

TOY_OPTIONS = ["--train_images=150", "--heldout_images=20", "--image_size=32", "--max_steps=6",
               "--batch_size=16", "--save_every=3"]
VQGAN_OPTIONS = ["--image_size=32", "--ch_mult=1,2", "--codebook_size=64", "--max_steps=8",
                 "--vq_start=2", "--disc_start=5", "--batch_size=8", "--eval_every=4",
                 "--val_percent=10", "--workers=1"]
PREPARE_OPTIONS = ["--val_percent=10", "--chunk=64", "--crops=3"]
GPT_OPTIONS = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--max_steps=6", "--batch_size=8",
               "--eval_every=3"]


# -------------------------------------------------------------------------------- tiny networks


def randn(*shape, seed=2):
    """The same normal numbers for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rand(*shape, seed=3):
    """The same numbers in [0, 1) for the same seed."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def fill_constants(model, seed=1):
    """Noise into every tensor that is all zero or all one, so that no equality holds by accident.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in model.state_dict().values():
            if x.is_floating_point() and (not x.any() or (x == 1).all()):
                x.add_(torch.randn(x.shape, generator=generator) * 0.1)
    return model


def tiny_gpt(classic=False, fill=True, **changes):
    """A GPT of 16 tokens, 48 codes and 24-d conditions, by default without constant tensors."""
    torch.manual_seed(0)
    shape = {"codebook_size": 48, "grid": 4, "cond_dim": 24, "n_layer": 3, "n_head": 4,
             "n_embd": 64, "classic": classic}
    model = GPT(GPTConfig(**shape | changes)).eval()
    return fill_constants(model) if fill else model


def tiny_vqgan(**changes):
    """A VQGAN of 16 px images, 4 x 4 tokens and 32 codes."""
    torch.manual_seed(0)
    shape = {"image_size": 16, "patch": 2, "ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1,
             "z_channels": 32, "attn_resolutions": (4,), "codebook_size": 32, "code_dim": 8,
             "l2_norm": True, "groups": 8}
    return VQGAN(VQGANConfig(**shape | changes))


def tiny_clip(kind, seed=0):
    """OpenAI's CLIP class, kind "vit" or "resnet": 64 px, 20 text tokens, 32-d embeddings."""
    torch.manual_seed(seed)
    CLIP = clip_package()[0].CLIP
    layers, width, patch = (2, 64, 16) if kind == "vit" else ((1, 1, 1, 1), 64, None)
    model = CLIP(32, 64, layers, width, patch, 20, 49408, 64, 1, 2).eval()
    for x in model.state_dict().values():  # batch norm's statistics, zero-initialised norms
        if x.is_floating_point() and x.dim() == 1:
            x.add_(torch.rand(x.shape) * 0.2)
    return model


def tokens_for(model, rows, seed=3):
    """Random tokens (rows, T) in a GPT's codes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.cfg.codebook_size, (rows, model.cfg.grid ** 2), generator=generator)


@torch.no_grad()
def plain_logits(gpt, cond, tokens, guidance=1.0):
    """The logits (B, T, K) of GPT.forward before these tokens, guided by null rows."""
    logits = gpt(cond, tokens[:, :-1])
    if guidance == 1:
        return logits
    null = gpt(cond, tokens[:, :-1], drop=torch.ones(len(cond), dtype=torch.bool))
    return null + guidance * (logits - null)


@torch.no_grad()
def cached_logits(gpt, cond, tokens, guidance=1.0):
    """The same by GPT.forward_embeddings and caches: the prefix, then one token at a time."""
    x = gpt.prefix(cond)                                                 # (B, P, C)
    if guidance != 1:
        x = torch.cat([x, gpt.null.expand_as(x)])                        # (2B, P, C)
    caches, pos, outputs = gpt.new_caches(len(x)), 0, []
    for i in range(tokens.shape[1]):
        outputs.append(gpt.forward_embeddings(x, caches, pos)[:, -1])    # (B or 2B, K)
        pos += x.shape[1]
        x = gpt.tok_emb(tokens[:, i])[:, None].repeat(len(x) // len(cond), 1, 1)
    logits = torch.stack(outputs, 1)                                     # (B or 2B, T, K)
    if guidance == 1:
        return logits
    with_cond, null = logits.chunk(2)
    return null + guidance * (with_cond - null)


# ---------------------------------------------------------------------------------- small files


def random_dump(folder, rows=50, grid=4, dim=24, codebook_size=48, seed=0):
    """Write a dump of random rows; returns the arrays by file name."""
    rng, arrays = np.random.default_rng(seed), {}
    Path(folder).mkdir(parents=True, exist_ok=True)
    for split, n in (("train", rows), ("val", 8)):
        tokens = rng.integers(codebook_size, size=(n, grid ** 2)).astype(np.uint16)
        arrays[f"{split}_tokens.bin"] = tokens
        arrays[f"{split}_clip.bin"] = rng.standard_normal((n, dim)).astype(np.float16)
    for name, array in arrays.items():
        array.tofile(Path(folder, name))
    made = dict.fromkeys(PROVENANCE, "")
    write_meta(folder, made, {"train": rows, "val": 8}, grid, codebook_size, dim)
    return arrays


def save_checkpoint(path, checkpoint, **changes):
    """Save a checkpoint with changed entries and the digest that belongs to them."""
    contents = {k: v for k, v in checkpoint.items() if k != "digest"} | changes
    write_checkpoint(path, contents)


def load_raw(path):
    """A checkpoint's contents as they are in the file."""
    return torch.load(path, weights_only=True)


def snapshot(folder):
    """{file: time of its last change} of everything in a folder."""
    return {p: p.stat().st_mtime_ns for p in Path(folder).rglob("*")
            if p.is_file() and "__pycache__" not in p.parts}


# ---------------------------------------------------------------------------------- the stages


def stage_command(*args):
    """A command line as a list: "toy.py" is that file of this repository; -m and -c as they are."""
    words = [str(a) for a in args]
    if words[0].endswith(".py") and not Path(words[0]).is_absolute():
        words[0] = str(ROOT / words[0])
    return [sys.executable, *words]


def stage_environment(**changes):
    """One thread for every stage: networks this small are fastest so, and results comparable."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | changes


def run_stage(*args, cwd, code=0, timeout=240, **environment):
    """Run `python ARGS` in the folder cwd -> what subprocess.run returns, texts as str. `code` is
    the exit code that is asked for; `environment` is added to stage_environment's."""
    done = subprocess.run(stage_command(*args), cwd=cwd, capture_output=True, text=True,
                          timeout=timeout, env=stage_environment(**environment))
    assert done.returncode == code, f"{args}\n{done.stdout}\n{done.stderr}"
    return done


def run_stages(*jobs):
    """Independent commands (args, folder, exit code), two at a time -> their results, in order."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: run_stage(*job[0], cwd=job[1], code=job[2]), jobs))


def start_stage(*args, cwd, **options):
    """The same in the background: a subprocess.Popen, to be signalled or killed. It does not
    ignore SIGHUP, as under nohup."""
    return subprocess.Popen(stage_command(*args), cwd=cwd, env=stage_environment(), text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
                            **options)


def stage_error(*args, cwd, **options):
    """Run a command that must fail by exit code 2 and one line -> that line."""
    done = run_stage(*args, cwd=cwd, code=2, **options)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@contextlib.contextmanager
def one_line_error(capsys, *words):
    """What is called inside must end by fail(): exit code 2, one line that holds the words."""
    with pytest.raises(SystemExit) as e:
        yield
    line = capsys.readouterr().err
    assert e.value.code == 2 and line.count("\n") == 1, line
    assert all(word in line for word in words), line


def make_world(folder):
    """Every stage once, in miniature, through its command line -> (folder, {stage: its output}).

    captions.tsv is out of reach from stage 1 on. The images are joined by one that is broken and
    one, grey and of another size, in a folder of its own. Files: those of the stages' defaults and
    of make demo: data/toy, data/toy_tokens, out/toy/{clip,vqgan,gpt}.pt, out/samples.png.
    """
    d, output = Path(folder), {}
    output["toy"] = run_stage("toy.py", *TOY_OPTIONS, cwd=d).stdout
    (d / "data/toy/captions.tsv").rename(d / "captions.tsv")
    (d / "data/toy/train/broken.png").write_bytes(b"not an image")
    (d / "data/toy/train/deeper").mkdir()
    Image.new("L", (50, 40), 90).save(d / "data/toy/train/deeper/grey.jpg")
    output["vqgan"] = run_stage("vqgan.py", *VQGAN_OPTIONS, "--out=out/toy", cwd=d).stdout
    output["prepare"] = run_stage("prepare.py", *PREPARE_OPTIONS, cwd=d).stdout
    output["train_gpt"] = run_stage("train_gpt.py", *GPT_OPTIONS, "--out=out/toy", cwd=d).stdout
    output["sample"] = run_stage("sample.py", "a red bus", "a blue fish", "--n=2", "--candidates=4",
                                 cwd=d).stdout
    (d / "captions.tsv").rename(d / "data/toy/captions.tsv")
    return d, output


def read_log(path):
    """The lines of a run's .jsonl as dicts."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def is_finite(metrics):
    return all(math.isfinite(v) for v in metrics.values())
