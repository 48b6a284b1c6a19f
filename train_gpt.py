"""Stage 3: learn to write tokens behind a CLIP embedding.

The GPT sees [embedding] t0 t1 t2 ... and predicts each next token: next-word prediction, where the
words are codes of an image and the first "word" is what CLIP sees in that image. It trains on
images alone, and is handed the embedding of a text when sampling. So that it forgives the
difference, the embedding is centred and gets noise, part of it shaped like what a text leaves open;
in a tenth of the rows it is withheld, which is what classifier-free guidance needs; and a tenth of
the input tokens are wrong, so that the GPT trusts the embedding more than what it has just written.
The loss is GPT.loss in model.py; make_batches says what one step is given."""
import copy
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from common.batches import Prefetcher, prefetch_rows, release_pages
from common.checkpoints import TrainState, load_gpt, load_named, load_vqgan, path_from, start_config
from common.clip_loss import make_clip_loss
from common.dumps import open_dump
from common.files import file_sha256
from common.modality import gap_noise, neighbour_spread, shrinkage
from common.optim import Muon, optimizer_step, set_learning_rate, update_ema
from common.options import check_range, fail, format_command, parse_options
from common.previews import save_samples
from common.process import run_main
from common.prompts import example_prompt
from common.runs import Run, is_eval_step
from common.runtime import Runtime, check_batch_size, format_size
from model import GPT, GPTConfig


@dataclass
class Config:
    preset: str = ""                 # paper, or 24gb for one card of that size; see PRESETS
    data: str = "data/toy_tokens"    # a dump of prepare.py
    out: str = "out/gpt"             # the run: gpt.pt, gpt.jsonl, grid.png
    vqgan: str = ""                  # the dump's VQGAN, if it was moved (empty: as the dump says)
    trust_jit: bool = False          # as in prepare.py; for --clip_loss_weight
    init_from: str = ""              # start from this checkpoint's weights, shape and dropout
    fresh: bool = False              # replace the run that is in --out
    seed: int = 0                    # of the weights, the order of rows, the noise, the drops
    # network
    n_layer: int = 4                 # blocks
    n_head: int = 6                  # attention heads
    n_embd: int = 192                # width
    n_prefix: int = 1                # prefix tokens made of the embedding
    classic: bool = False            # the 2022 network (all of 2022: --preset=paper)
    zero_init: bool = True           # each block's last layers and the head start at zero
    dropout: float = 0.0             # of the embeddings and of each block's two outputs
    qk_norm: bool = False            # queries and keys of RMS 1; pays with 64 tokens and more
    # condition
    noise: float | None = None       # length of the noise on the condition (auto: fits the gap)
    spread: float = 0.75             # times what images of one meaning differ by: shaped noise
    neighbours: float = 0.01         # share of rows that are of one meaning; chosen on the toy
    center: bool = True              # subtract the mean embedding, of images or of texts
    cond_drop_prob: float = 0.1      # share of rows that lose their condition, for guidance
    token_corruption: float = 0.1    # share of the input tokens that are another image's
    clip_loss_weight: float = 0.0    # of the paper's embedding-reconstruction loss, on 1/8 of rows
    # training
    max_steps: int = 450             # training steps
    batch_size: int = 128            # rows a step, over all processes and accumulation steps
    grad_accum_steps: int = 1        # micro-batches that a process's share is cut into
    muon: bool = True                # blocks' matrices learn by Muon; False: AdamW, as in 2022
    learning_rate: float = 6e-3      # peak; warm-up, then cosine
    warmup: int = 50                 # steps of linear warm-up
    weight_decay: float = 0.1        # on matrices that AdamW moves
    grad_clip: float = 1.0           # largest gradient norm, 0 is none
    ema: float = 0.99                # decay of the weights' moving average, which sampling uses
    eval_every: int = 150            # steps between evaluations, each with a checkpoint
    eval_rows: int = 1024            # validation rows, always the same
    device: str = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"              # of autocast: auto, float32, bfloat16, float16
    compile: bool | None = None      # torch.compile (auto: on CUDA, from 2,000 steps on)
    dry_run: bool = False            # a few real steps, then memory, rate and the time of all


# "paper" is the setting of 2022 as its authors released it (a table is in docs/photos.md). Muon
# takes 7x as long for 24 x 1024 on a CPU and is not measured on a GPU, so presets learn by AdamW.
PRESETS = {  # for --preset
    "paper": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "classic": True, "zero_init": False,
              "dropout": 0.1, "token_corruption": 0.0, "batch_size": 256, "max_steps": 300000,
              "muon": False, "learning_rate": 5e-4, "weight_decay": 0.01, "warmup": 2000,
              "ema": 0.9999, "eval_every": 5000},
    "24gb": {"n_layer": 16, "n_head": 16, "n_embd": 1024, "dropout": 0.1, "qk_norm": True,
             "batch_size": 256, "grad_accum_steps": 8, "max_steps": 200000, "muon": False,
             "learning_rate": 6e-4, "warmup": 2000, "ema": 0.9999, "eval_every": 5000},
}


def make_batches(tokens, clip_embeds, cfg, spread=None, in_thread=False):
    """A function from step to that step's global batch, a pure function of (seed, step): targets
    (B, T), inputs (B, T), embeddings (B, D), noise (B, D), drop (B,). Every epoch goes through all
    rows in a new order. `spread` is of neighbour_spread. A thread reads ahead; beside a GPU
    (in_thread) it makes the noise as well."""
    orders = {}

    def row_order(epoch):
        if epoch not in orders:
            orders.clear()
            orders[epoch] = np.random.default_rng((cfg.seed, 0, epoch)).permutation(len(tokens))
        return orders[epoch]

    def read(step):
        rows = np.arange(step * cfg.batch_size, (step + 1) * cfg.batch_size)
        index = np.array([row_order(r // len(tokens))[r % len(tokens)] for r in rows.tolist()])
        prefetch_rows(tokens, index)
        prefetch_rows(clip_embeds, index)
        batch = tokens[index].astype(np.int64), clip_embeds[index].astype(np.float32)
        release_pages(tokens, clip_embeds)
        return batch                                                             # (B, T), (B, D)

    if in_thread:
        return Prefetcher(lambda step: corrupt(step, *read(step), spread, cfg))
    prefetched = Prefetcher(read)
    return lambda step: corrupt(step, *prefetched(step), spread, cfg)


def corrupt(step, targets, embeds, spread, cfg):
    """What makes training harder than the data: noise on the embeddings, part of it of the shape
    `spread`, rows that lose their condition, wrong input tokens. A function of (seed, step)."""
    rng = np.random.default_rng((cfg.seed, 1, step))
    noise = rng.standard_normal(embeds.shape, np.float32)                        # (B, D)
    noise *= cfg.noise / np.linalg.norm(noise, axis=1, keepdims=True)
    drop = rng.random(cfg.batch_size) < cfg.cond_drop_prob                       # (B,)
    if spread is not None:
        normal = torch.from_numpy(rng.standard_normal(embeds.shape, np.float32))
        noise += cfg.spread * (normal @ spread).numpy()  # numpy's threads would disturb torch's
    is_wrong = rng.random(targets.shape) < cfg.token_corruption
    inputs = np.where(is_wrong, np.roll(targets, 1, 0), targets)                 # (B, T)
    return [torch.from_numpy(x) for x in (targets, inputs, embeds, noise, drop)]


def make_state(gpt_config, meta, clip_embeds, cfg, runtime, is_new):
    """Network, its moving average, optimisers: what training changes."""
    torch.manual_seed(cfg.seed)
    model = GPT(gpt_config).to(runtime.device)
    if cfg.init_from:
        model.load_state_dict(load_gpt(cfg.init_from, runtime.device)[0].state_dict())
    if not cfg.classic:
        model.means.copy_(torch.tensor([meta["image_mean"], meta["text_mean"]]) * cfg.center)
    if is_new and not cfg.classic:
        model.spread.copy_(neighbour_spread(model, clip_embeds, cfg.seed, cfg.neighbours))
        model.shrink.copy_(shrinkage(model, clip_embeds))
    params = list(model.parameters())
    muon_params = {p for p in model.blocks.parameters() if p.dim() == 2 and cfg.muon}
    embeddings = {model.tok_emb.weight, model.pos_emb} if cfg.classic else set()  # as released
    decayed = [p for p in params if p not in muon_params and p.dim() >= 2 and p not in embeddings]
    not_decayed = [p for p in params if p.dim() < 2 or p in embeddings]
    adam = torch.optim.AdamW([{"params": decayed, "weight_decay": cfg.weight_decay},
                              {"params": not_decayed, "weight_decay": 0.0}],
                             0.0, (0.9, 0.95), fused=runtime.fused)
    muon = {"muon": Muon([p for p in params if p in muon_params])} if cfg.muon else {}
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    return TrainState(model=model, ema=copy.deepcopy(model).requires_grad_(False).eval(),
                      adam=adam, **muon, scaler=scaler)


def train_step(state, batch, loss_fn, clip_loss, step, cfg, runtime):
    """Forward and backward of one global batch, micro-batch by micro-batch, and the optimisers'
    step. Returns (loss, gradient norm, is_finite)."""
    micro_batch_size = cfg.batch_size // runtime.world // cfg.grad_accum_steps
    total = runtime.zeros()
    if state.model.cfg.dropout:  # a function of the step, for exact resumption
        torch.manual_seed(hash((cfg.seed, step, runtime.rank)))
    for i in range(cfg.grad_accum_steps):
        first = (runtime.rank * cfg.grad_accum_steps + i) * micro_batch_size
        rows = slice(first, first + micro_batch_size)
        targets, inputs, embeds, noise, drop = (runtime.to_device(x[rows]) for x in batch)
        cond = state.model.condition(embeds, noise=None if cfg.classic else noise)   # (b, D)
        with runtime.autocast():
            loss = loss_fn(cond, targets, None if cfg.classic else drop, inputs)
            loss = loss / cfg.grad_accum_steps
            total += loss.detach()  # the cross-entropy alone
            if cfg.clip_loss_weight:
                extra = clip_loss(state.model, cond, targets, embeds)
                loss = loss + cfg.clip_loss_weight * extra / cfg.grad_accum_steps
        state.scaler.scale(loss).backward()
    loss = runtime.all_reduce(total).item() / runtime.world
    norm, is_finite = optimizer_step(state.optimizers(), list(state.model.parameters()), loss,
                                     state.scaler, runtime, cfg.grad_clip)
    state.scaler.update()
    state.model.zero_grad()
    return loss, norm, is_finite


@torch.no_grad()
def validation_loss(model, tokens, clip_embeds, runtime, batch_size=128):
    """Mean cross-entropy of the rows, by conditions without noise."""
    total = 0.0
    for t, c in zip(tokens.split(batch_size), clip_embeds.split(batch_size)):
        cond = model.condition(c.to(runtime.device))
        with runtime.autocast():
            total += model.loss(cond, t.to(runtime.device)).item() * len(t)
    return total / len(tokens)


def compile_loss(state, batch, cfg, runtime):
    """GPT.loss as it trains: compiled, if that is wanted and works."""
    is_long = runtime.device.type == "cuda" and cfg.max_steps >= 2000  # worth compiling
    rows = cfg.batch_size // runtime.world // cfg.grad_accum_steps
    targets, inputs, embeds, _, drop = (runtime.to_device(x[:rows]) for x in batch)
    example = state.model.condition(embeds), targets, None if cfg.classic else drop, inputs
    wanted = is_long if cfg.compile is None else cfg.compile
    return runtime.compile(state.model.loss, wanted, example)


def check(cfg):
    """Refuse options that make no sense, by themselves or together."""
    check_range(cfg, 1, 2 ** 62, "n_layer", "n_head", "n_embd", "n_prefix", "max_steps",
                "batch_size", "grad_accum_steps", "eval_every", "eval_rows")
    check_range(cfg, 0, 1, "dropout", "neighbours", "cond_drop_prob", "token_corruption", "ema")
    if cfg.n_embd % cfg.n_head:
        fail(f"--n_embd={cfg.n_embd} does not divide by --n_head={cfg.n_head}")


def main():
    cfg = parse_options(Config, PRESETS)
    check(cfg)
    runtime = Runtime(cfg.device, cfg.dtype, shares_work=True)
    check_batch_size(cfg, runtime)
    meta, rows = open_dump(cfg.data)
    cfg.noise = gap_noise(meta.get("gap_cosine")) if cfg.noise is None else cfg.noise
    vqgan = load_named(lambda path: load_vqgan(path, runtime.device), cfg.data,
                       meta["vqgan"], meta["vqgan_sha256"], cfg.data, "--vqgan", cfg.vqgan)
    gpt_config = start_config(lambda path, device: load_gpt(path, device)[0], GPTConfig, cfg,
                              codebook_size=meta["codebook_size"], grid=meta["grid"],
                              cond_dim=meta["clip_dim"])
    cfg.classic = gpt_config.classic  # with --init_from the checkpoint says
    about = {"network": asdict(gpt_config), "vqgan": path_from(cfg.out, vqgan.path),
             "vqgan_sha256": vqgan.sha256, "clip": path_from(cfg.out, meta["clip"], cfg.data),
             "clip_sha256": meta["clip_sha256"]}
    run = Run("gpt", cfg, runtime, {"dump": file_sha256(Path(cfg.data, "meta.json"))}, about,
              code=__file__)
    if run.finished:
        return 0
    state = make_state(gpt_config, meta, rows["train"][1], cfg, runtime, is_new=not run.resume)
    if run.resume:
        state.load(run.resume, run.path)
    batches = make_batches(*rows["train"], cfg,
                           state.model.spread.cpu() if cfg.spread and not cfg.classic else None,
                           in_thread=runtime.device.type == "cuda")
    val_tokens, val_clip = (
        torch.from_numpy(np.array(a[:cfg.eval_rows]).astype(dtype)) for a, dtype in
        zip(rows["val"] if meta["val_rows"] else rows["train"], (np.int64, np.float32)))
    clip_loss = make_clip_loss(meta, vqgan, cfg, runtime)
    loss_fn = compile_loss(state, batches(run.step), cfg, runtime)
    uniform_loss = math.log(gpt_config.codebook_size)
    runtime.print0(f"gpt: {format_size(state.model)}; {meta['train_rows']} rows of "
                   f"{meta['tokens']} tokens in {cfg.data}, {len(val_tokens)} to validate on; "
                   f"{cfg.max_steps} steps of {cfg.batch_size} on {runtime}; writes {run.final}")
    runtime.print0(f"the loss of a model that knows nothing is ln {gpt_config.codebook_size} = "
                   f"{uniform_loss:.3f}")
    run.warn_if_few(meta["train_rows"], "rows")
    run.catch_signals()

    def draw_samples():
        save_samples(Path(cfg.out, "grid.png"), state.ema, vqgan, val_tokens[:8], val_clip[:8],
                     runtime)

    run.show(draw_samples)  # before step 1, to see that it can be done
    start_time = time.time()
    for step in range(run.step, cfg.max_steps):
        lr = set_learning_rate(state.optimizers(), step, cfg)
        loss, norm, is_finite = train_step(state, batches(step), loss_fn, clip_loss, step, cfg,
                                           runtime)
        # in float16 an overflow is expected: GradScaler lowers its scale
        run.check_finite(step + 1, is_finite or state.scaler.get_scale() > 1)
        if is_finite:
            update_ema(state.ema, state.model, cfg.ema, step)
        written = (step + 1 - run.step) * cfg.batch_size * meta["tokens"]
        run.end_step(step + 1, {"loss": loss, "ln_K": uniform_loss, "grad_norm": norm, "lr": lr,
                                "tokens_per_s": written / (time.time() - start_time)})

        if is_eval_step(step, cfg):
            val_loss = validation_loss(state.ema, val_tokens, val_clip, runtime)
            run.validated(step + 1, {"val_loss": val_loss}, state.ema, ceiling=uniform_loss)
            run.save(step + 1, state.state_dict())
            run.show(draw_samples)
        elif run.stop_requested:
            run.save(step + 1, state.state_dict())
        if run.should_stop:
            return run.finish()
    prompt = example_prompt(meta["config"]["data"] if "config" in meta else "")
    following = format_command("sample.py", prompt, gpt=run.final)
    return run.finish(f"and {cfg.out}/grid.png; next: {following}")


if __name__ == "__main__":
    run_main(main)
