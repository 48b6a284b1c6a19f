"""What lab/explain.py takes apart: the demo's networks and data; tokens painted, also one by one;
and the trainings that the demo does not have, made once and kept."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import vqgan
from common.batches import image_batches, to_pixels
from common.checkpoints import load_checkpoint, load_gpt, load_vqgan
from common.dumps import open_dump
from common.files import atomic_write
from common.images import to_image, to_tensor
from common.openai_clip import load_clip
from common.optim import set_learning_rate
from common.options import fail
from common.perceptual import load_features
from common.progress import Progress
from common.runtime import Runtime
from common.sources import ImageSource, split_names
from lab.stages import run_stage
from model import VQGANConfig
from toy import read_world


@torch.no_grad()
def load_demo(cfg):
    """The demo's networks; held-out images, uint8 (N, S, S, 3), and their `facts`; training `rows`
    (tokens, embeddings); `counts` (K,) of each code in them; `average`, the mean code (d,)."""
    gpt, meta = load_gpt(f"{cfg.models}/gpt.pt", "cpu")
    network, clip = load_vqgan(f"{cfg.models}/vqgan.pt", "cpu"), load_clip(f"{cfg.models}/clip.pt")
    images, facts = read_world(cfg.data, "heldout")
    dump, rows = open_dump(cfg.dump)
    counts = np.bincount(np.ravel(rows["train"][0]), minlength=network.cfg.codebook_size)
    codes = network.quantize.to_unit(network.quantize.embedding.weight)                  # (K, d)
    average = torch.from_numpy(counts / counts.sum()).float() @ codes                    # (d,)
    return SimpleNamespace(gpt=gpt, options=meta["config"], vqgan=network, clip=clip, dump=dump,
                           images=images, facts=facts, rows=rows["train"], counts=counts,
                           average=average, runtime=Runtime("cpu", "float32", training=False))


def find(demo, words):
    """The number of the first held-out drawing of a "red bus"; 0 if there is none."""
    names = [f"{f['colour']} {f['object']}" for f in demo.facts]
    return names.index(words) if words in names else 0


def most_used(demo, count):
    """The codes (count,) that the dump holds most often."""
    return torch.from_numpy(np.argsort(-demo.counts, kind="stable")[:count].copy())


@torch.no_grad()
def encode(demo, *numbers):
    """Tokens (n, h, w) of held-out images."""
    return demo.vqgan.encode(to_tensor(demo.images[list(numbers)]) * 2 - 1)


@torch.no_grad()
def paint(demo, tokens, written=None):
    """Tokens (n, h, w) -> Pillow images; where not `written` (n, h, w), by the average code."""
    codes = demo.vqgan.quantize.lookup(tokens)                                   # (n, d, h, w)
    if written is not None:
        codes = torch.where(written[:, None], codes, demo.average[:, None, None])
    return [to_image(x) for x in demo.vqgan.decoder(demo.vqgan.post_quant_conv(codes))]


def paint_alone(demo, codes, place):
    """Each of the codes (n,) at one place (row, column), all around it the average code."""
    tokens = torch.zeros(len(codes), demo.gpt.cfg.grid, demo.gpt.cfg.grid, dtype=torch.long)
    written = tokens.bool()
    tokens[:, place[0], place[1]], written[:, place[0], place[1]] = codes, True
    return paint(demo, tokens, written)


def read_log(path):
    if not Path(path).is_file():
        fail(f"there is no log {path}; run make demo first")
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def watch_training(models, images, path):
    """Train the VQGAN of the folder `models` once more and keep what it makes of images, uint8
    (n, S, S, 3): {steps: reconstructions (n, 3, S, S)}, saved in `path`. The moments: before the
    first step, at the end of the warm-up, one step after k-means, half-way, at the end."""
    if not Path(path).is_file():
        checkpoint = load_checkpoint(f"{models}/vqgan.pt", "vqgan")
        cfg = vqgan.Config(**checkpoint["config"])
        runtime, source = Runtime("cpu", cfg.dtype), ImageSource(cfg.data)
        names = split_names(source, cfg.val_percent)[0]
        clip, features = load_features(cfg, runtime)
        state = vqgan.make_state(VQGANConfig(**checkpoint["network"]), cfg, runtime)
        shown, kept = to_pixels(torch.from_numpy(images), runtime), {}
        moments = (0, cfg.vq_start, cfg.vq_start + 1, cfg.max_steps // 2, cfg.max_steps)
        progress = Progress(cfg.max_steps)

        def compute_losses(network, x, quantized, step):
            return vqgan.reconstruction_losses(network, x, clip, features, cfg, quantized, step)

        def keep(steps):
            with torch.no_grad(), runtime.autocast():
                quantized = steps > cfg.vq_start  # as in training
                kept[steps] = state.ema(shown, quantized=quantized)[0].float()
        for step, x in image_batches(source, names, cfg, runtime, 0):
            if step in moments:
                keep(step)
            if step == cfg.vq_start:
                vqgan.init_codebook(state, source, names, step, cfg, runtime)
            set_learning_rate(state.optimizers(), step, cfg)
            metrics, is_finite = vqgan.train_step(state, state.model, x, compute_losses, step, cfg,
                                                  runtime)
            vqgan.update_average(state, step, is_finite, cfg)
            progress(loss=metrics["loss"])
        keep(cfg.max_steps)
        with atomic_write(path) as f:
            torch.save(kept, f)
    return torch.load(path, weights_only=True)


VARIANTS = {  # name: options of train_gpt.py
    "no_noise": {"noise": 0.0, "spread": 0.0},
    "not_centred": {"center": False},
    "unconditioned": {"cond_drop_prob": 1.0},
}


def train_variants(demo, out):
    """The demo's GPT trained otherwise: {name: GPT}."""
    for name, changes in VARIANTS.items():
        if not Path(out, name, "gpt.pt").is_file():
            options = demo.options | changes | {"out": Path(out, name), "fresh": False}
            # validation has conditions and must not choose the weights: the last ones count
            options |= {"eval_every": options["max_steps"]}
            del options["preset"]  # whose options are among the others
            run_stage("train_gpt.py", options, capture=False)
    return {name: load_gpt(f"{out}/{name}/gpt.pt", "cpu")[0] for name in VARIANTS}
