"""Stage 1: learn to write an image as a few tokens and to read it back (VQGAN, Esser et al. 2021).

An encoder shrinks the image to a small grid of vectors, each vector is replaced by the nearest code
of a learned codebook, and a decoder paints the image again. Only what fits into the codes is kept,
so the losses decide what matters: pixels (L1 + L2), the features of CLIP's image encoder at several
depths (perceptual), and late in training a discriminator that judges patches (--disc_start; off by
default). No captions are read."""
import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.batches import ImageBatches, image_batches, to_pixels
from common.checkpoints import TrainState, load_vqgan, start_config
from common.images import resize
from common.optim import Muon, optimizer_step, set_learning_rate, update_ema
from common.options import check_range, fail, format_command, parse_options
from common.perceptual import load_features, perceptual_distance, random_shift
from common.previews import save_reconstructions
from common.process import run_main
from common.runs import Run, is_eval_step
from common.runtime import Runtime, check_batch_size, format_size
from common.sources import ImageSource, split_names, validation_images
from model import VQGAN, Discriminator, VQGANConfig, hinge_loss


@dataclass
class Config:
    preset: str = ""                 # paper, or 24gb for one card of that size; see PRESETS
    data: str = "data/toy/train"     # a folder of images, at any depth, or .tar shards of them
    out: str = "out/vqgan"           # the run: vqgan.pt, vqgan.jsonl, recon.png
    clip: str = "out/toy/clip.pt"    # whose image features the perceptual loss compares
    trust_jit: bool = False          # run the code in a --clip file that is a TorchScript archive
    init_from: str = ""              # start from the weights of this checkpoint, and its shape
    fresh: bool = False              # replace the run that is in --out
    seed: int = 0                    # of the weights and of every batch
    # images
    image_size: int = 64             # pixels a side
    val_percent: float = 2.0         # of the images that are held out, chosen by name
    min_zoom: float = 1.0            # random crops show this share of the short side, or more
    flip: bool = False               # mirror half of the images
    max_bad: float = 0.5             # stop if more of the images than this can't be read
    workers: int | None = None       # decoding processes (auto: 0 on a CPU, 4 beside a GPU)
    # network
    patch: int = 4                   # fold patch x patch pixels into channels; 1 is taming's
    ch: int = 48                     # width of the first level, a multiple of groups
    ch_mult: tuple = (1, 1, 2)       # widths of the levels / ch, halving the grid between two
    num_res_blocks: int = 1          # residual blocks a level
    attn_resolutions: tuple = ()     # grid sides with attention, beside the one in the middle
    groups: int = 8                  # of GroupNorm; 32 from --ch=128 on
    z_channels: int = 128            # channels before the codebook's space
    codebook_size: int = 1024        # codes
    code_dim: int = 8                # length of a code
    l2_norm: bool = True             # compare unit-length codes
    # losses
    beta: float = 0.25               # weight of the commitment loss
    mse: float = 1.0                 # weight of the L2 loss beside the L1 loss
    perceptual: float = 0.5          # weight of the distance between CLIP features
    perceptual_shift: int = 0        # CLIP sees both images shifted at random by up to this, pixels
    vq_start: int = 150              # unquantised steps, then k-means; 0: codes random or loaded
    disc_start: int = 1000000        # first step of the discriminator; from max_steps on: never
    disc_weight: float = 0.8         # its weight, times the adaptive weight
    disc_cap: float = 10.0           # upper bound of the adaptive weight
    # training
    max_steps: int = 600             # training steps
    batch_size: int = 32             # images a step, over all processes and accumulation steps
    grad_accum_steps: int = 1        # micro-batches that a process's share is cut into
    muon: bool = True                # convolutions learn by Muon, the rest by AdamW; False: AdamW
    learning_rate: float = 4e-3      # peak; warm-up, then cosine
    beta1: float = 0.9               # of AdamW; the discriminator's are 0.5 and 0.9
    beta2: float = 0.99              # of AdamW
    grad_clip: float = 0.0           # largest gradient norm, 0 is none
    warmup: int = 30                 # steps of linear warm-up
    ema: float = 0.99                # decay of the weights' moving average, which later stages use
    eval_every: int = 300            # steps between evaluations, each with a checkpoint
    device: str = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"              # of autocast: auto, float32, bfloat16, float16
    compile: bool = False            # torch.compile
    dry_run: bool = False            # a few real steps, then memory, rate and the time of all


# Learning rates are 4.5e-6 x batch, as taming's. Muon takes 7x as long for such widths on a CPU; it
# is not measured on a GPU, so AdamW. RN50 sees every pixel; ViT-B/32 projects patches of 3,072
# numbers to 768: errors in three quarters of the directions are invisible to it.
F16 = {"image_size": 256, "min_zoom": 0.8, "flip": True, "patch": 1, "ch": 128,
       "ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2, "attn_resolutions": (16,), "groups": 32,
       "z_channels": 256, "codebook_size": 16384, "clip": "RN50", "perceptual_shift": 16,
       "muon": False, "batch_size": 64, "learning_rate": 2.9e-4, "beta1": 0.5, "beta2": 0.9,
       "vq_start": 2000, "warmup": 1000, "max_steps": 300000, "eval_every": 5000, "ema": 0.9999}
PRESETS = {  # for --preset
    "paper": F16 | {"code_dim": 256, "l2_norm": False, "mse": 0.0, "perceptual": 1.0,
                    "disc_start": 50000},
    "24gb": F16 | {"grad_accum_steps": 8, "grad_clip": 1.0, "disc_start": 100000},
}


# ---------------------------------------------------------------------------------------- losses


def reconstruction_losses(net, x, clip, features, cfg, quantized, step=None):
    """Images x -> (reconstruction, {name: loss ()}, tokens, encoder outputs). In training `step`
    decides by how much CLIP sees both images shifted."""
    recon, vq_loss, tokens, z = net(x, cfg.beta, quantized)
    recon = recon.float()
    losses = {"pixel": F.l1_loss(recon, x) + cfg.mse * F.mse_loss(recon, x),
              "perceptual": torch.zeros((), device=x.device), "vq": vq_loss}
    if cfg.perceptual:
        real, fake = (x + 1) / 2, (recon + 1) / 2
        if step is not None:
            real, fake = random_shift((real, fake), cfg.perceptual_shift, (cfg.seed, 2, step))
        with torch.no_grad():
            real = features(clip.normalize(resize(real, clip.size)))
        fake = features(clip.normalize(resize(fake, clip.size)))
        losses["perceptual"] = perceptual_distance(real, fake)
    return recon, losses, tokens, z


def total_loss(losses, cfg):
    """The weighted sum, but for the adversarial loss, whose weight is adaptive."""
    return losses["pixel"] + cfg.perceptual * losses["perceptual"] + losses["vq"]


# ----------------------------------------------------------------------------------------- steps


def train_step(state, net, x, compute_losses, step, cfg, runtime):
    """One step on images x (B, 3, S, S): encoder, codebook and decoder by the reconstruction,
    perceptual and codebook losses, and from disc_start on the adversarial one, whose opponent takes
    its step too. The batch is worked on in micro-batches. Returns (metrics, is_finite)."""
    quantized = step >= cfg.vq_start or cfg.dry_run  # a dry run measures the run at its heaviest
    adversarial = step >= cfg.disc_start or cfg.dry_run and cfg.disc_start < cfg.max_steps
    n, totals, outputs = cfg.grad_accum_steps, {}, []
    state.model.zero_grad()
    state.disc.zero_grad()
    for micro_batch in x.chunk(n):
        with runtime.autocast():
            recon, losses, tokens, z = compute_losses(net, micro_batch, quantized, step)
            loss = total_loss(losses, cfg)
        if adversarial:
            loss = adversarial_backward(state, micro_batch, recon, loss, losses, quantized, cfg,
                                        runtime)
        else:
            state.scaler.scale(loss / n).backward()
        for name, value in {"loss": loss, **losses}.items():
            totals[name] = totals.get(name, 0.0) + value.detach() / n
        outputs.append((tokens, z))
    if adversarial:
        totals["adaptive_weight"] = state.adaptive_weight.clone()
        update_adaptive_weight(state, cfg, runtime)

    mean_loss = runtime.all_reduce(totals["loss"].clone()).item() / runtime.world
    optimizers = [opt for opt in state.optimizers() if opt is not state.disc_adam]
    norm, is_finite = optimizer_step(optimizers, list(state.model.parameters()), mean_loss,
                                     state.scaler, runtime, cfg.grad_clip)
    if adversarial:
        optimizer_step([state.disc_adam] if is_finite else [], list(state.disc.parameters()),
                       mean_loss, state.scaler, runtime, cfg.grad_clip)
    metrics = {k: v.item() for k, v in totals.items()} | {"grad_norm": norm}
    if quantized and is_finite:
        tokens, z = (torch.cat(parts) for parts in zip(*outputs))
        metrics |= update_codebook(state, tokens, z, step < 0.75 * cfg.max_steps, runtime)
    return metrics, is_finite


def adversarial_backward(state, x, recon, loss, losses, quantized, cfg, runtime):
    """Backward of one micro-batch with the adversarial loss, and of the discriminator's own loss,
    each into its own network's parameters. Gradients with respect to the reconstruction come first,
    so that CLIP backpropagates once. The first step has weight 0, and only measures the next one's.
    Adds "gan" and "disc" to losses; returns the whole loss ()."""
    scale, n, weight = state.scaler.scale, cfg.grad_accum_steps, state.adaptive_weight
    with runtime.autocast():
        fake_logits = state.disc(recon)
        losses["gan"] = -fake_logits.mean()
        losses["disc"] = hinge_loss(state.disc(x), fake_logits)
    grad_rec, grad_gan = (torch.autograd.grad(scale(value / n), recon, retain_graph=True)[0]
                          for value in (loss, losses["gan"]))                # 2 x (b, 3, S, S)
    last_layer = state.model.decoder.conv_out.weight
    for i, grad in enumerate((grad_rec, grad_gan)):
        state.last_layer_grads[i] += torch.autograd.grad(recon, last_layer, grad,
                                                         retain_graph=True)[0]
    roots, grads = [recon], [grad_rec + weight * grad_gan]
    if quantized:  # the codebook's loss does not pass through the reconstruction
        roots.append(losses["vq"])
        grads.append(scale(torch.ones_like(losses["vq"]) / n))
    scale(losses["disc"] / n).backward(inputs=list(state.disc.parameters()), retain_graph=True)
    torch.autograd.backward(roots, grads)
    return (loss + weight * losses["gan"]).detach()


def update_adaptive_weight(state, cfg, runtime):
    """The adversarial loss's weight in the next step, by the whole batch of this one: disc_weight
    times what makes both losses pull equally at the decoder's last layer (Esser et al. eq. 7)."""
    rec_norm, gan_norm = (runtime.all_reduce(grad).norm() / state.scaler.get_scale()
                          for grad in state.last_layer_grads)
    weight = cfg.disc_weight * (rec_norm / (gan_norm + 1e-6)).clamp(max=cfg.disc_cap)
    if weight.isfinite():
        state.adaptive_weight.copy_(weight)
    state.last_layer_grads.zero_()


def update_codebook(state, tokens, z, may_restart, runtime):
    """Count this step's codes, restart dead ones. Returns metrics: perplexity (codes in use,
    effectively), share of codes used, number restarted."""
    quantize, average = state.model.quantize, state.ema.quantize.embedding.weight
    counts = runtime.all_reduce(torch.bincount(tokens.flatten(), minlength=len(average)))
    p = counts / counts.sum()                                                # (K,)
    entropy = -(p * p.clamp(min=1e-9).log()).sum()
    dead = quantize.count_hits(counts)
    if may_restart:  # not in the last quarter, when no time is left to learn a new code
        quantize.restart(dead, runtime.all_gather(z), state.generator)
        average[dead] = quantize.embedding.weight[dead].detach()
    return {"perplexity": entropy.exp().item(), "used": (counts > 0).float().mean().item(),
            "restarted": len(dead) if may_restart else 0}


@torch.no_grad()
def init_codebook(state, source, names, step, cfg, runtime):
    """End the warm-up: k-means over encoder outputs of the next batches, the same on every rank."""
    batches, z = ImageBatches(source, names, cfg), []
    for i in range(1 if cfg.dry_run else 16):
        images = to_pixels(batches[step + i][0], runtime)                    # (B, 3, S, S)
        with runtime.autocast():
            z += [state.model(micro_batch, quantized=False)[3]
                  for micro_batch in images.chunk(runtime.world * cfg.grad_accum_steps)]
    state.model.quantize.kmeans(torch.cat(z), state.generator)
    # GPU reductions are not deterministic: broadcast rank 0's
    runtime.broadcast(state.model.quantize.embedding.weight.detach())


def update_average(state, step, is_finite, cfg):
    """The moving average of the weights; the codebook's begins where it is first used."""
    if step == cfg.vq_start:
        state.ema.quantize.load_state_dict(state.model.quantize.state_dict())
    if is_finite:
        update_ema(state.ema, state.model, cfg.ema, step)


@torch.no_grad()
def validate(state, images, compute_losses, step, cfg, runtime):
    """Mean loss, PSNR in dB and codes used on held-out images, uint8 (V, S, S, 3), by the averaged
    network."""
    quantized, totals, used = step >= cfg.vq_start, {"val_loss": 0.0, "psnr": 0.0}, set()
    for batch in np.array_split(images, -(-len(images) // 64)):
        x = to_pixels(torch.from_numpy(batch), runtime)
        with runtime.autocast():
            recon, losses, tokens, _ = compute_losses(state.ema, x, quantized)
        mse = F.mse_loss(recon.clamp(-1, 1), x, reduction="none").mean((1, 2, 3))      # (b,)
        share = len(batch) / len(images)
        totals["val_loss"] += total_loss(losses, cfg).item() * share
        totals["psnr"] += (10 * (4 / mse).log10()).mean().item() * share
        used |= set(tokens.flatten().tolist()) if quantized else set()
    return totals | ({"val_codes": len(used)} if quantized else {})


# ------------------------------------------------------------------------------------------ main


def is_candidate(step, cfg):
    """Whether all losses are at work, so that the weights may be the run's result."""
    return step >= cfg.vq_start and (step >= cfg.disc_start or cfg.disc_start >= cfg.max_steps)


def make_state(vqgan_config, cfg, runtime):
    """Networks, their moving average, optimisers: what training changes."""
    torch.manual_seed(cfg.seed)
    model = VQGAN(vqgan_config).to(runtime.device, memory_format=torch.channels_last)
    disc = Discriminator().to(runtime.device, memory_format=torch.channels_last)
    if cfg.init_from:
        model.load_state_dict(load_vqgan(cfg.init_from, runtime.device).state_dict())

    def adam(parameters, *betas):
        return torch.optim.AdamW(parameters, 0.0, betas, weight_decay=0.0, fused=runtime.fused)
    convolutions = [p for p in model.parameters() if p.dim() == 4 and cfg.muon]
    others = [p for p in model.parameters() if p.dim() != 4 or not cfg.muon]
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    muon = {"muon": Muon(convolutions)} if cfg.muon else {}
    return TrainState(model=model, ema=copy.deepcopy(model).requires_grad_(False).eval(),
                      disc=disc, adam=adam(others, cfg.beta1, cfg.beta2), **muon,
                      disc_adam=adam(disc.parameters(), 0.5, 0.9), scaler=scaler,
                      generator=torch.Generator().manual_seed(cfg.seed),
                      usage=model.quantize.usage, adaptive_weight=runtime.zeros(),
                      last_layer_grads=runtime.zeros(2, *model.decoder.conv_out.weight.shape))


def check(cfg):
    """Refuse options that make no sense, by themselves or together."""
    check_range(cfg, 1, 2 ** 62, "image_size", "patch", "ch", "num_res_blocks", "groups",
                "z_channels", "codebook_size", "code_dim", "max_steps", "batch_size",
                "grad_accum_steps", "eval_every")
    check_range(cfg, 0, 1, "max_bad", "ema")
    check_range(cfg, 0, 0.9999, "beta1", "beta2")
    check_range(cfg, 0.1, 1, "min_zoom")
    if not cfg.ch_mult or not 0 < min(cfg.ch_mult) <= max(cfg.ch_mult) <= 64:
        fail(f"--ch_mult={cfg.ch_mult} makes no sense: one small number a level")
    if cfg.ch % cfg.groups:
        fail(f"--ch={cfg.ch} does not divide by --groups={cfg.groups}")
    if cfg.vq_start >= cfg.max_steps:
        fail(f"--vq_start={cfg.vq_start} leaves none of --max_steps={cfg.max_steps} to learn the "
             f"codebook in")
    if cfg.disc_start < cfg.max_steps and cfg.image_size < 32:
        fail(f"--image_size={cfg.image_size} is too small for the discriminator: 32 is enough, or "
             f"raise --disc_start")


def compile_network(state, cfg, runtime):
    """The network as it trains: compiled, if that is wanted and works."""
    torch._functorch.config.donated_buffer = False  # a step goes back through it 3 times
    rows = cfg.batch_size // runtime.world // cfg.grad_accum_steps
    shape = (rows, cfg.image_size, cfg.image_size, 3)
    blank = to_pixels(torch.zeros(shape, dtype=torch.uint8), runtime)
    return runtime.compile(state.model, cfg.compile, (blank, cfg.beta, True))


def main():
    cfg = parse_options(Config, PRESETS)
    check(cfg)
    runtime = Runtime(cfg.device, cfg.dtype, shares_work=True)
    check_batch_size(cfg, runtime)
    vqgan_config = start_config(load_vqgan, VQGANConfig, cfg)
    if cfg.image_size % vqgan_config.factor:
        fail(f"--image_size={cfg.image_size} does not divide by {vqgan_config.factor}, the factor "
             f"of --patch and --ch_mult")
    source = ImageSource(cfg.data)
    runtime.print0(source.account())
    train_names, val_names = split_names(source, cfg.val_percent)
    clip, features = load_features(cfg, runtime)
    run = Run("vqgan", cfg, runtime, {"CLIP": clip and clip.sha256, "images": source.sha256},
              about={"network": asdict(vqgan_config)}, code=__file__)
    if run.finished:
        return 0
    state = make_state(vqgan_config, cfg, runtime)
    if run.resume:
        state.load(run.resume, run.path)
    val_images = validation_images(source, val_names, train_names, cfg.image_size)
    net = compile_network(state, cfg, runtime)
    side = cfg.image_size // vqgan_config.factor
    runtime.print0(f"vqgan: {format_size(state.model)}, {cfg.image_size} px -> {side} x {side} "
                   f"tokens of {vqgan_config.codebook_size} codes; {len(train_names)} images of "
                   f"{cfg.data} to train on, {len(val_names)} held out; CLIP {clip and cfg.clip}; "
                   f"{cfg.max_steps} steps of {cfg.batch_size} on {runtime}; writes {run.final}")
    runtime.print0("vq: codebook and commitment loss; perplexity: codes in use, effectively; used: "
                   "share of codes in this batch; restarted: dead codes moved")
    run.warn_if_few(len(train_names), "images")
    run.catch_signals()

    def compute_losses(network, x, quantized, step=None):
        return reconstruction_losses(network, x, clip, features, cfg, quantized, step)

    def draw(step):
        save_reconstructions(Path(cfg.out, "recon.png"), state.ema, val_images[:12], step, cfg,
                             runtime)

    run.show(draw, run.step)  # before step 1, to see that it can be done
    for step, x in image_batches(source, train_names, cfg, runtime, run.step):
        if step == (0 if cfg.dry_run else cfg.vq_start or None):
            init_codebook(state, source, train_names, step, cfg, runtime)
        lr = set_learning_rate(state.optimizers(), step, cfg)
        metrics, is_finite = train_step(state, net, x, compute_losses, step, cfg, runtime)
        # in float16 an overflow is expected: GradScaler lowers its scale
        run.check_finite(step + 1, is_finite or state.scaler.get_scale() > 1)
        state.scaler.update()
        update_average(state, step, is_finite, cfg)
        run.end_step(step + 1, metrics | {"lr": lr})

        if is_eval_step(step, cfg):
            val_metrics = validate(state, val_images, compute_losses, step, cfg, runtime)
            run.validated(step + 1, val_metrics, state.ema, is_candidate=is_candidate(step, cfg))
            run.save(step + 1, state.state_dict())
            run.show(draw, step)
        elif run.stop_requested:
            run.save(step + 1, state.state_dict())
        if run.should_stop:
            return run.finish()
    following = format_command("prepare.py", vqgan=run.final, data=cfg.data,
                               clip="ViT-B/32" if cfg.preset else cfg.clip,
                               out=f"data/{Path(cfg.out).resolve().name}_tokens")
    return run.finish(f"and {cfg.out}/recon.png; next: {following}")


if __name__ == "__main__":
    run_main(main)
