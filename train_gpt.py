"""Stage 3: learn to write tokens behind a CLIP embedding.

The GPT sees [embedding] t0 t1 t2 ... and predicts each next token: next-word prediction, where the words are codes of a
picture and the first "word" is what CLIP sees in that picture. Trained on pictures alone, it is handed the embedding of
a text when sampling. So that it forgives the difference, the embedding is centred and gets noise, part of it shaped
like what a text leaves open; in a tenth of the rows it is withheld, which is what classifier-free guidance needs; and a
tenth of the tokens read are wrong ones, so that the GPT trusts the embedding more than what it has just written. The
loss itself is GPT.loss in model.py; make_batches says what one step is given."""
import copy
import json
import math
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common import (Amount, Compile, Count, Device, Dtype, Machine, Muon, Preset, Progress, Run, Share, Whole,
                    configure, digest, fail, file_sha256, learning_rate, load_clip, load_vqgan, millions, resized,
                    save_grid, to_image)
from model import GPT, GPTConfig


@dataclass
class Config:
    preset: Preset = ""                 # paper, or 24gb for one card of that size; see PRESETS
    data: str = "data/toy_tokens"       # a dump of prepare.py
    out: str = "out/gpt"                # the run: gpt.pt, gpt.jsonl, grid.png
    vqgan: str = ""                     # whose decoder draws grid.png; empty: the one that made the dump
    trust_jit: bool = False             # as in prepare.py; only --recon needs the CLIP again
    seed: Whole = 0                     # of the weights, the order of rows, the noise and the drops
    # network
    n_layer: Count = 4                  # blocks
    n_head: Count = 6                   # attention heads
    n_embd: Count = 192                 # width
    classic: bool = False               # the 2022 network; never centres or drops the condition or adds noise to it
    zero_init: bool = True              # each block's last layers and the head start at zero
    # condition
    noise: Amount = 0.5                 # length s of the noise in c = norm(c + s e/|e| + spread)
    spread: Amount = 0.75               # times what pictures of one meaning differ by: more noise, of that shape
    center: bool = True                 # subtract the mean embedding, of pictures or of texts
    drop: Share = 0.1                   # of the rows lose their condition, for guidance
    corrupt: Share = 0.1                # of the tokens it reads are another picture's
    recon: Amount = 0.0                 # weight of the paper's embedding-reconstruction loss, on an eighth of the rows
    # training
    max_steps: Count = 450              # training steps
    batch_size: Count = 128             # rows a step, over all processes and accumulated parts
    accumulate: Count = 1               # parts that a process's share of the batch is cut into
    muon: bool = True                   # the blocks' matrices learn by Muon; False: all by AdamW, as in 2022
    learning_rate: Amount = 6e-3        # peak, warm-up then cosine
    warmup: Whole = 50                  # steps of linear warm-up
    weight_decay: Amount = 0.1          # on matrices that AdamW moves
    grad_clip: Amount = 1.0             # largest gradient norm, 0 is none
    ema: Share = 0.99                   # decay of the moving average of the weights, which is what sampling uses
    eval_every: Count = 150             # steps between evaluations, each with a checkpoint and grid.png
    eval_rows: Count = 1024             # validation rows, always the same
    device: Device = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "auto"               # of autocast: auto, float32, bfloat16, float16
    compile: Compile = "auto"           # torch.compile: auto (on CUDA, from 2,000 steps on), True, False
    dry_run: bool = False               # a few real steps, then memory, rate and the time the whole run would take


PRESETS = {  # for --preset
    "paper": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "classic": True, "batch_size": 256, "max_steps": 300000,
              "muon": False, "corrupt": 0.0, "learning_rate": 3e-4, "warmup": 2000, "ema": 0.9999,
              "eval_every": 5000},
    "24gb": {"n_layer": 16, "n_head": 16, "n_embd": 1024, "batch_size": 256, "accumulate": 8, "max_steps": 200000,
             "muon": False, "learning_rate": 6e-4, "warmup": 2000, "ema": 0.9999, "eval_every": 5000},
}


def open_dump(folder):
    """A dump of prepare.py -> (meta, {"train": (tokens, embeddings), "val": ...}), checked and memory-mapped."""
    path = Path(folder, "meta.json")
    if not path.is_file():
        fail(f"there is no dump in {folder} (no meta.json); make one with prepare.py --out={folder}")
    try:
        meta = json.loads(path.read_text())
        if meta.pop("digest") != digest(meta):
            fail(f"{path} is not what prepare.py wrote; prepare again into another folder")
        shapes = {f"{s}_{kind}.bin": (meta[f"{s}_rows"], meta[width], meta[f"{kind}_dtype"])
                  for s in ("train", "val") for kind, width in (("tokens", "tokens"), ("clip", "clip_dim"))}
        arrays = {}
        for name, (rows, width, dtype) in shapes.items():
            file = Path(folder, name)
            if not file.is_file() or file.stat().st_size != rows * width * np.dtype(dtype).itemsize:
                fail(f"{file} is missing or not {rows} rows long; prepare again into another folder")
            if file_sha256(file) != meta["files"][name]:
                fail(f"{file} is not the file prepare.py wrote (its hash differs); prepare again into another folder")
            arrays[name] = np.memmap(file, dtype, "r", shape=(rows, width)) if rows else np.zeros((0, width), dtype)
        tokens = arrays["train_tokens.bin"]
        if meta["grid"] ** 2 != meta["tokens"] or not len(tokens) or tokens.max() >= meta["codes"]:
            fail(f"the tokens in {folder} do not fit a {meta['grid']} x {meta['grid']} grid of {meta['codes']} codes; "
                 f"prepare again into another folder")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        fail(f"{path} is damaged ({type(e).__name__}: {e}); prepare again into another folder")
    return meta, {s: (arrays[f"{s}_tokens.bin"], arrays[f"{s}_clip.bin"]) for s in ("train", "val")}


def let_go(*arrays):
    """Hand back the pages that were read of memory-mapped arrays, which count as this process's memory and would come
    to whole files. The system keeps them for as long as it has room."""
    for array in arrays:
        if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            array.base.madvise(mmap.MADV_DONTNEED)


@torch.no_grad()
def neighbour_spread(model, clip, seed, share=0.01, anchors=256, most=50000):
    """A matrix R (D, D) such that e R, e standard normal, varies as pictures of one meaning do: as the embeddings
    (N, D) nearest to an embedding, that share of all, vary around their mean; the average over some embeddings.

    A text is one point where the pictures it fits are a cloud: "a red bus" says nothing of the background. With noise
    of this shape in training the GPT learns what a text does not settle; sample.py moves each picture's condition about
    by it, so that pictures of one text are as various as pictures of one meaning."""
    rows = np.sort(np.random.default_rng((seed, 2)).permutation(len(clip))[:most])
    c = model.condition(torch.from_numpy(clip[rows].astype(np.float32)).to(model.means.device))    # (N, D)
    k, covariance = max(2, round(len(c) * share)), torch.zeros_like(c[0].outer(c[0]))
    some = range(0, len(c), -(-len(c) // anchors))
    for i in some:
        near = c[(c @ c[i]).topk(min(k, len(c))).indices]                                          # (k, D)
        near = near - near.mean(0)
        covariance += near.T @ near / max(1, len(near) - 1) / len(some)
    values, vectors = np.linalg.eigh(covariance.cpu().double().numpy())
    return torch.from_numpy((np.sqrt(np.maximum(values, 0))[:, None] * vectors.T).astype(np.float32))


def make_batches(tokens, clip, cfg, spread=None, idle=False):
    """A function from step to that step's global batch, a pure function of (seed, step): tokens to write (B, T) and to
    read (B, T), embeddings (B, D), noise (B, D), drop (B,). Every epoch goes through all rows in a new order. A thread
    reads the next four steps' rows while a step computes, so that neither a dump larger than memory nor a disk that is
    slow for a moment keeps it waiting; where cores are `idle` meanwhile, beside a GPU, it makes the noise as well.
    `spread` is what neighbour_spread gives."""
    orders, ahead, beside = {}, {}, ThreadPoolExecutor(1)
    files = [(a, open(a.filename, "rb")) for a in (tokens, clip)
             if isinstance(a, np.memmap) and hasattr(os, "posix_fadvise")]

    def fetch(step):
        rows = np.arange(step * cfg.batch_size, (step + 1) * cfg.batch_size)
        index = np.empty(cfg.batch_size, np.int64)
        for epoch in np.unique(rows // len(tokens)):
            if epoch not in orders:
                orders.clear()
                orders[epoch] = np.random.default_rng((cfg.seed, 0, epoch)).permutation(len(tokens))
            here = rows // len(tokens) == epoch
            index[here] = orders[epoch][rows[here] % len(tokens)]
        for array, file in files:  # all asked for before the first is waited for
            for i in index.tolist():
                os.posix_fadvise(file.fileno(), i * array.strides[0], array.strides[0], os.POSIX_FADV_WILLNEED)
        write, seen = tokens[index].astype(np.int64), clip[index].astype(np.float32)               # (B, T), (B, D)
        let_go(tokens, clip)
        return write, seen

    def with_noise(step, write, seen):
        rng = np.random.default_rng((cfg.seed, 1, step))
        noise = rng.standard_normal((cfg.batch_size, clip.shape[1]), np.float32)
        noise *= cfg.noise / np.linalg.norm(noise, axis=1, keepdims=True)
        drop = rng.random(cfg.batch_size) < cfg.drop
        if spread is not None:  # by torch: the threads of numpy's product would spin on beside those of the step
            shaped = torch.from_numpy(rng.standard_normal((cfg.batch_size, clip.shape[1]), np.float32)) @ spread
            noise += cfg.spread * shaped.numpy()
        read = np.where(rng.random(write.shape) < cfg.corrupt, np.roll(write, 1, 0), write)
        return [torch.from_numpy(x) for x in (write, read, seen, noise, drop)]

    def work(step):
        return with_noise(step, *fetch(step)) if idle else fetch(step)

    def batch(step):
        near = range(step, step + 5)
        for other in [s for s in ahead if s not in near]:
            ahead.pop(other).cancel()
        for s in near:
            if s not in ahead:
                ahead[s] = beside.submit(work, s)
        made = ahead[step].result()
        return made if idle else with_noise(step, *made)
    return batch


def main():
    cfg = configure(Config, presets=PRESETS)
    machine = Machine(cfg.device, cfg.dtype)
    meta, arrays = open_dump(cfg.data)
    vqgan, vqgan_sha, vcfg = load_vqgan(cfg.vqgan or meta["vqgan"], machine.device)
    check(cfg, meta, vqgan_sha, machine)
    run = Run("gpt", cfg, machine, {"dump": file_sha256(Path(cfg.data, "meta.json"))})

    torch.manual_seed(cfg.seed)
    gcfg = GPTConfig(meta["codes"], meta["grid"], meta["clip_dim"], cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.classic,
                     cfg.zero_init)
    model = GPT(gcfg).to(machine.device)
    if cfg.center and not cfg.classic:
        model.means.copy_(torch.tensor([meta["image_mean"], meta["text_mean"]]))
    if not cfg.classic and not run.resume:
        model.spread.copy_(neighbour_spread(model, arrays["train"][1], cfg.seed))
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    params = list(model.parameters())
    inner = {p for p in model.blocks.parameters() if p.dim() == 2} if cfg.muon else set()
    decay, free = ([p for p in params if p not in inner and (p.dim() >= 2) == large] for large in (True, False))
    opts = {"adam": torch.optim.AdamW([{"params": decay, "weight_decay": cfg.weight_decay},
                                       {"params": free, "weight_decay": 0.0}], 0.0, (0.9, 0.95), fused=machine.fused)}
    if inner:
        opts["muon"] = Muon([p for p in params if p in inner])
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    if run.resume:
        for part, state in ((model, "model"), (ema, "ema"), (scaler, "scaler")):
            part.load_state_dict(run.resume[state] or part.state_dict())  # a scaler that was not used has none
        for name, opt in opts.items():
            opt.load_state_dict(run.resume["optimizers"][name])
    noisy = bool(cfg.noise or cfg.spread) and not cfg.classic
    batch = make_batches(*arrays["train"], cfg, model.spread.cpu() if cfg.spread and noisy else None,
                         idle=machine.device.type == "cuda")
    val_tokens, val_clip = (torch.from_numpy(np.array(a[:cfg.eval_rows]).astype(t)) for a, t in
                            zip(arrays["val"] if meta["val_rows"] else arrays["train"], (np.int64, np.float32)))
    know_nothing = math.log(meta["codes"])
    machine.say(f"gpt: {millions(model)}; {meta['train_rows']} rows of {meta['tokens']} tokens in {cfg.data}, "
                f"{len(val_tokens)} to validate on; VQGAN {cfg.vqgan or meta['vqgan']}; "
                f"{cfg.max_steps} steps of {cfg.batch_size} on {machine}; writes {run.final}")
    machine.say(f"the loss of a model that knows nothing is ln {meta['codes']} = {know_nothing:.3f}")

    def put(x):
        return x.to(machine.device, non_blocking=True)

    part = cfg.batch_size // machine.world // cfg.accumulate
    clip = load_clip(meta["clip"], machine.device, cfg.trust_jit) if cfg.recon else None
    if clip and clip.sha256 != meta["clip_sha256"]:
        fail(f"{cfg.data} was made with another CLIP than the {meta['clip']} found now; put that one back")
    example = [put(x[:part]) for x in batch(run.step)]
    example = model.condition(example[2]), example[0], None if cfg.classic else example[4], example[1]
    long = machine.device.type == "cuda" and cfg.max_steps >= 2000  # compiling takes as long as hundreds of steps
    loss_of = machine.compile(model.loss, cfg.compile == "True" or cfg.compile == "auto" and long, example)
    bar, begun = Progress(cfg.max_steps, run.step), time.time()
    for step in range(run.step, cfg.max_steps):
        for group in (g for opt in opts.values() for g in opt.param_groups):
            group["lr"] = learning_rate(step, cfg.learning_rate, cfg.warmup, cfg.max_steps)
        rows = batch(step)
        total = torch.zeros((), device=machine.device)
        for i in range(cfg.accumulate):  # this process's rows of the global batch, part by part
            first = (machine.rank * cfg.accumulate + i) * part
            tokens, read, embedding, noise, drop = (put(x[first:first + part]) for x in rows)
            cond = model.condition(embedding, noise=noise if noisy else None)                  # (b, D)
            with machine.autocast():
                loss = loss_of(cond, tokens, None if cfg.classic else drop, read) / cfg.accumulate
                if cfg.recon:
                    few = slice(-(-part // 8))
                    again = embedding_loss(model, vqgan, clip, cond[few], tokens[few], embedding[few])
                    loss = loss + cfg.recon * again / cfg.accumulate
            scaler.scale(loss).backward()
            total += loss.detach()
        machine.average_gradients(params)
        for opt in opts.values():
            scaler.unscale_(opt)
        norm = torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip or math.inf)
        loss = machine.sum(total).item() / machine.world
        good = math.isfinite(loss + norm.item())
        run.skip(step, good or scaler.get_scale() > 1)  # to a scaler such a step says that its scale is too high
        if good:
            for opt in opts.values():
                scaler.step(opt)
        scaler.update()
        model.zero_grad()
        if good:
            with torch.no_grad():
                torch._foreach_lerp_(list(ema.parameters()), params, 1 - min(cfg.ema, (step + 1) / (step + 10)))
        speed = (step + 1 - run.step) * cfg.batch_size * meta["tokens"] / (time.time() - begun)
        run.log(step=step + 1, loss=loss, grad_norm=norm.item(), lr=group["lr"], tokens_per_s=speed)
        bar(loss=loss, ln_K=know_nothing, tokens_per_s=speed)

        due = ((step + 1) % cfg.eval_every == 0 or step + 1 == cfg.max_steps) and not cfg.dry_run
        if due:
            val_loss = evaluate(ema, val_tokens, val_clip, machine)
            machine.say(f"step {step + 1}: validation loss {val_loss:.4f} (ln K {know_nothing:.3f})")
            run.log(step=step + 1, val_loss=val_loss)
            if machine.rank == 0:
                grid(Path(cfg.out, "grid.png"), ema, vqgan, val_tokens[:8], val_clip[:8], machine)
        if run.asked_to_stop() or due:
            run.save(step + 1, model=model.state_dict(), ema=ema.state_dict(), scaler=scaler.state_dict(),
                     optimizers={k: o.state_dict() for k, o in opts.items()}, rng=torch.get_rng_state(),
                     network=asdict(gcfg),
                     **{k: meta[k] for k in ("vqgan_sha256", "clip", "clip_sha256")}, vqgan=cfg.vqgan or meta["vqgan"])
    run.finish()
    machine.say(f"wrote {run.final} and {cfg.out}/grid.png; next: python sample.py \"a red bus\" --gpt={run.final}")


def embedding_loss(model, vqgan, clip, cond, tokens, embedding):
    """The paper's second loss: paint the tokens that the GPT holds likeliest, and ask that CLIP see in the picture what
    the condition says: 1 - cosine to the embedding (b, D). Straight-through: the likeliest codes go forward, the
    gradient goes back through the probabilities."""
    p = model(cond, tokens[:, :-1]).float().softmax(-1)                                            # (b, T, K)
    hard = F.one_hot(p.argmax(-1), p.shape[-1]) + p - p.detach()                                   # (b, T, K)
    codes = (hard @ vqgan.quantize.unit(vqgan.quantize.embedding.weight)).mT                       # (b, d, T)
    z = codes.unflatten(2, (model.cfg.grid, model.cfg.grid))                                       # (b, d, h, w)
    pixels = (vqgan.decoder(vqgan.post_quant_conv(z)).float() + 1) / 2                             # (b, 3, S, S)
    seen = clip.image(resized(pixels, clip.size))
    return 1 - (seen * F.normalize(embedding, dim=-1)).sum(-1).mean()


@torch.no_grad()
def evaluate(model, tokens, clip, machine, size=128):
    """Mean loss of the rows, conditions without noise."""
    losses = []
    for t, c in zip(tokens.split(size), clip.split(size)):
        with machine.autocast():
            losses.append(model.loss(model.condition(c.to(machine.device)), t.to(machine.device)).item() * len(t))
    return sum(losses) / len(tokens)


def grid(path, model, vqgan, tokens, clip, machine):
    """grid.png: pictures as the VQGAN keeps them, and under each what the GPT makes of its embedding."""
    uniform = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)).to(machine.device)
    with machine.autocast(), torch.no_grad():
        made = model.generate(model.condition(clip.to(machine.device)), uniform)
        both = torch.cat([tokens.to(machine.device), made]).view(-1, model.cfg.grid, model.cfg.grid)
        save_grid(path, [to_image(x) for x in vqgan.decode(both)], len(tokens))


def check(cfg, meta, vqgan_sha, machine):
    """Refuse what does not fit together."""
    if vqgan_sha != meta["vqgan_sha256"]:
        fail(f"{cfg.data} was made with another VQGAN than {cfg.vqgan or meta['vqgan']} (the hashes differ); name that "
             f"one with --vqgan, or prepare again")
    if cfg.n_embd % cfg.n_head:
        fail(f"--n_embd={cfg.n_embd} does not divide by --n_head={cfg.n_head}")
    if cfg.batch_size % (machine.world * cfg.accumulate):
        fail(f"--batch_size={cfg.batch_size} does not divide by {machine.world} processes x "
             f"--accumulate={cfg.accumulate}")


if __name__ == "__main__":
    main()
