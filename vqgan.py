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
from common.checkpoints import TrainState, load_vqgan
from common.images import resize, save_grid, to_image
from common.openai_clip import load_clip
from common.optim import Muon, optimizer_step, set_learning_rate, update_ema
from common.options import check_range, fail, format_value, parse_options, shared_fields
from common.perceptual import perceptual_distance, perceptual_features
from common.process import run_main
from common.runs import Run, is_eval_step
from common.runtime import Runtime, format_size
from common.sources import ImageSource, center_crops, split_names
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
    perceptual: float = 0.5          # weight of the distance between CLIP features
    vq_start: int = 150              # steps without quantisation; then k-means sets the codebook
    disc_start: int = 1000000        # first step of the discriminator; from max_steps on: never
    disc_weight: float = 0.8         # its weight, times the adaptive weight
    disc_cap: float = 10.0           # upper bound of the adaptive weight
    # training
    max_steps: int = 600             # training steps
    batch_size: int = 32             # images a step, over all processes
    muon: bool = True                # convolutions learn by Muon, the rest by AdamW; False: AdamW
    learning_rate: float = 4e-3      # peak; warm-up, then cosine
    warmup: int = 30                 # steps of linear warm-up
    ema: float = 0.99                # decay of the weights' moving average, which later stages use
    eval_every: int = 300            # steps between evaluations, each with a checkpoint
    device: str = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"              # of autocast: auto, float32, bfloat16, float16
    compile: bool = False            # torch.compile
    dry_run: bool = False            # a few real steps, then memory, rate and the time of all


F16 = {"image_size": 256, "min_zoom": 0.8, "flip": True, "patch": 1, "ch": 128,
       "ch_mult": (1, 1, 2, 2, 4), "num_res_blocks": 2, "attn_resolutions": (16,), "groups": 32,
       "z_channels": 256, "codebook_size": 16384, "clip": "ViT-B/32", "muon": False,
       "learning_rate": 3e-4, "vq_start": 2000, "warmup": 1000, "max_steps": 300000,
       "eval_every": 5000, "ema": 0.9999}
PRESETS = {  # for --preset
    "paper": F16 | {"code_dim": 256, "l2_norm": False, "batch_size": 64, "disc_start": 50000},
    "24gb": F16 | {"batch_size": 8, "disc_start": 100000},
}


# ---------------------------------------------------------------------------------------- losses


def reconstruction_losses(net, x, clip, features, cfg, quantized):
    """Images x -> (reconstruction, {name: loss ()}, tokens, encoder outputs)."""
    recon, vq_loss, tokens, z = net(x, cfg.beta, quantized)
    recon = recon.float()
    losses = {"pixel": F.l1_loss(recon, x) + F.mse_loss(recon, x),
              "perceptual": torch.zeros((), device=x.device), "vq": vq_loss}
    if cfg.perceptual:
        def see(images):
            return features(clip.normalize(resize((images + 1) / 2, clip.size)))
        with torch.no_grad():
            real = see(x)
        losses["perceptual"] = perceptual_distance(real, see(recon))
    return recon, losses, tokens, z


def total_loss(losses, cfg):
    """The weighted sum, but for the adversarial loss, whose weight is adaptive."""
    return losses["pixel"] + cfg.perceptual * losses["perceptual"] + losses["vq"]


# ----------------------------------------------------------------------------------------- steps


def generator_step(state, net, x, lossy, step, cfg, runtime):
    """One step of encoder, codebook and decoder: reconstruction + perceptual + codebook losses,
    and from disc_start on the adversarial one. Returns (metrics, fake logits, is_finite)."""
    quantized = step >= cfg.vq_start or cfg.dry_run  # a dry run measures the run at its heaviest
    with runtime.autocast():
        recon, losses, tokens, z = lossy(net, x, quantized)
        loss, fake_logits = total_loss(losses, cfg), None
        if is_adversarial(step, cfg):
            fake_logits = state.disc(recon)
            losses["gan"] = -fake_logits.mean()
    state.model.zero_grad()
    if fake_logits is None:
        state.scaler.scale(loss).backward()
    else:
        weight = adversarial_backward(state, recon, loss, losses, quantized, cfg, runtime)
        loss = (loss + weight * losses["gan"]).detach()
        losses["adaptive_weight"] = weight
    all_losses = runtime.all_reduce(loss.detach().clone()).item()
    optimizers = [opt for opt in state.optimizers() if opt is not state.disc_adam]
    norm, is_finite = optimizer_step(optimizers, list(state.model.parameters()), all_losses,
                                     state.scaler, runtime)
    metrics = {"loss": loss.item(), **{k: v.item() for k, v in losses.items()}, "grad_norm": norm}
    if quantized and is_finite:
        metrics |= update_codebook(state, tokens, z, runtime)
    return metrics, fake_logits, is_finite


def adversarial_backward(state, recon, loss, losses, quantized, cfg, runtime):
    """Backward with the adaptive weight: both losses pull equally at the decoder's last layer
    (Esser et al. eq. 7), capped. Gradients with respect to the reconstruction come first, so that
    CLIP and the discriminator backpropagate once. Returns the weight ()."""
    def grad_of(value):
        return torch.autograd.grad(state.scaler.scale(value), recon, retain_graph=True)[0]

    def norm_at_last_layer(grad):
        last_layer = state.model.decoder.conv_out.weight
        grad = torch.autograd.grad(recon, last_layer, grad, retain_graph=True)[0]
        return runtime.all_reduce(grad).norm() / state.scaler.get_scale()
    grad_rec, grad_gan = grad_of(loss), grad_of(losses["gan"])
    rec_norm, gan_norm = norm_at_last_layer(grad_rec), norm_at_last_layer(grad_gan)
    weight = cfg.disc_weight * (rec_norm / (gan_norm + 1e-6)).clamp(max=cfg.disc_cap)
    roots, grads = [recon], [grad_rec + weight * grad_gan]
    if quantized:  # the codebook's loss does not pass through the reconstruction
        roots.append(losses["vq"])
        grads.append(state.scaler.scale(torch.ones_like(losses["vq"])))
    torch.autograd.backward(roots, grads)
    return weight


def discriminator_step(state, x, fake_logits, is_finite, runtime):
    """One step of the discriminator on real images x and the logits of their reconstructions."""
    with runtime.autocast():
        loss = hinge_loss(state.disc(x), fake_logits)
    parameters = list(state.disc.parameters())
    state.disc.zero_grad()
    state.scaler.scale(loss).backward(inputs=parameters)
    runtime.average_gradients(parameters)
    if is_finite:
        state.scaler.step(state.disc_adam)
    return loss.item()


def update_codebook(state, tokens, z, runtime):
    """Count the codes of this step and restart dead ones. Returns metrics: perplexity (codes in
    use, effectively), share of codes used, number restarted."""
    size = state.model.cfg.codebook_size
    counts = runtime.all_reduce(torch.bincount(tokens.flatten(), minlength=size))
    p = counts / counts.sum()                                             # (K,)
    entropy = -(p * p.clamp(min=1e-9).log()).sum()
    dead = state.model.quantize.restart(counts, runtime.all_gather(z), state.generator)
    return {"perplexity": entropy.exp().item(), "used": (counts > 0).float().mean().item(),
            "restarted": len(dead)}


@torch.no_grad()
def init_codebook(state, source, names, step, cfg, runtime):
    """End the warm-up: k-means over encoder outputs of the next batches, the same on every rank."""
    batches = ImageBatches(source, names, cfg)
    with runtime.autocast():
        z = [state.model(to_pixels(batches[step + i][0], runtime), quantized=False)[3]
             for i in range(16)]
    state.model.quantize.kmeans(torch.cat(z), state.generator)
    # GPU reductions are not deterministic: broadcast rank 0's
    runtime.broadcast(state.model.quantize.embedding.weight.detach())


def update_average(state, step, cfg):
    """The moving average of the weights; the codebook's begins where it is first used."""
    if step == cfg.vq_start:
        state.ema.quantize.load_state_dict(state.model.quantize.state_dict())
    update_ema(state.ema, state.model, cfg.ema, step)


@torch.no_grad()
def validate(state, images, lossy, step, cfg, runtime):
    """Mean loss, PSNR in dB and codes used on held-out images, uint8 (V, S, S, 3), by the averaged
    network."""
    quantized, totals, used = step >= cfg.vq_start, {"val_loss": 0.0, "psnr": 0.0}, set()
    for batch in np.array_split(images, -(-len(images) // 64)):
        x = to_pixels(torch.from_numpy(batch), runtime)
        with runtime.autocast():
            recon, losses, tokens, _ = lossy(state.ema, x, quantized)
        mse = F.mse_loss(recon.clamp(-1, 1), x, reduction="none").mean((1, 2, 3))      # (b,)
        share = len(batch) / len(images)
        totals["val_loss"] += total_loss(losses, cfg).item() * share
        totals["psnr"] += (10 * (4 / mse).log10()).mean().item() * share
        used |= set(tokens.flatten().tolist()) if quantized else set()
    return totals | ({"val_codes": len(used)} if quantized else {})


@torch.no_grad()
def save_reconstructions(path, model, images, step, cfg, runtime):
    """recon.png: held-out images, uint8 (n, S, S, 3), and below what the network makes of them."""
    x = to_pixels(torch.from_numpy(images), runtime)
    with runtime.autocast():
        recon = model(x, quantized=step >= cfg.vq_start)[0]
    rows = [[to_image(image) for image in row] for row in (x, recon)]
    save_grid(path, rows, ["held-out images", "by the VQGAN"])


# ------------------------------------------------------------------------------------------ main


def is_adversarial(step, cfg):
    return step >= cfg.disc_start or cfg.dry_run and cfg.disc_start < cfg.max_steps


def make_state(vqgan_config, cfg, runtime):
    """Networks, their moving average, optimisers: what training changes."""
    torch.manual_seed(cfg.seed)
    model = VQGAN(vqgan_config).to(runtime.device, memory_format=torch.channels_last)
    disc = Discriminator().to(runtime.device, memory_format=torch.channels_last)
    if cfg.init_from:
        model.load_state_dict(load_vqgan(cfg.init_from, runtime.device).state_dict())

    def adam(parameters):
        return torch.optim.AdamW(parameters, 0.0, (0.9, 0.99), weight_decay=0.0,
                                 fused=runtime.fused)
    convolutions = [p for p in model.parameters() if p.dim() == 4 and cfg.muon]
    others = [p for p in model.parameters() if p.dim() != 4 or not cfg.muon]
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    muon = {"muon": Muon(convolutions)} if cfg.muon else {}
    return TrainState(model=model, ema=copy.deepcopy(model).requires_grad_(False).eval(),
                      disc=disc, adam=adam(others), **muon, disc_adam=adam(disc.parameters()),
                      scaler=scaler, generator=torch.Generator().manual_seed(cfg.seed),
                      usage=model.quantize.usage)


def make_config(cfg):
    """The network's shape by the options, or that of the checkpoint to start from."""
    if cfg.init_from:
        return load_vqgan(cfg.init_from, "cpu").cfg
    return shared_fields(VQGANConfig, cfg)


def check(cfg):
    """Refuse options that make no sense, by themselves or together."""
    check_range(cfg, 1, 2 ** 62, "image_size", "patch", "ch", "num_res_blocks", "groups",
                "z_channels", "codebook_size", "code_dim", "max_steps", "batch_size", "eval_every")
    check_range(cfg, 0, 1, "max_bad", "ema")
    check_range(cfg, 0.1, 1, "min_zoom")
    if not cfg.ch_mult or not 0 < min(cfg.ch_mult) <= max(cfg.ch_mult) <= 64:
        fail(f"--ch_mult={format_value(cfg.ch_mult)} makes no sense: one small number a level")
    if cfg.ch % cfg.groups:
        fail(f"--ch={cfg.ch} does not divide by --groups={cfg.groups}")
    if cfg.vq_start >= cfg.max_steps:
        fail(f"--vq_start={cfg.vq_start} leaves none of --max_steps={cfg.max_steps} to learn the "
             f"codebook in")
    if cfg.disc_start < cfg.max_steps and cfg.image_size < 32:
        fail(f"--image_size={cfg.image_size} is too small for the discriminator: 32 is enough, or "
             f"raise --disc_start")


def check_fit(cfg, vqgan_config, runtime):
    if cfg.image_size % vqgan_config.factor:
        fail(f"--image_size={cfg.image_size} does not divide by {vqgan_config.factor}, the factor "
             f"of --patch and --ch_mult")
    if cfg.batch_size % runtime.world:
        fail(f"--batch_size={cfg.batch_size} does not divide over {runtime.world} processes")


def load_features(cfg, runtime):
    """The CLIP of the perceptual loss, and its features at several depths; None without one."""
    if not cfg.perceptual:
        return None, None
    clip = load_clip(cfg.clip, runtime.device, cfg.trust_jit)
    return clip, perceptual_features(clip.model.visual)


def read_val_images(source, names, cfg):
    """Centre crops of up to 256 held-out images, uint8 (V, S, S, 3)."""
    images = center_crops(source, names, cfg.image_size, 256)
    if not len(images):
        fail(f"none of the {len(names)} images of {cfg.data} to validate on can be read")
    return images


def compile_network(state, cfg, runtime):
    """The network as it trains: compiled, if that is wanted and works."""
    torch._functorch.config.donated_buffer = False  # backward runs twice on this graph
    shape = (cfg.batch_size // runtime.world, cfg.image_size, cfg.image_size, 3)
    blank = to_pixels(torch.zeros(shape, dtype=torch.uint8), runtime)
    return runtime.compile(state.model, cfg.compile, (blank, cfg.beta, True))


def main():
    cfg = parse_options(Config, PRESETS)
    check(cfg)
    runtime = Runtime(cfg.device, cfg.dtype, shares_work=True)
    vqgan_config = make_config(cfg)
    check_fit(cfg, vqgan_config, runtime)
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
    val_images = read_val_images(source, val_names or train_names[:1000], cfg)
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

    def lossy(network, x, quantized):
        return reconstruction_losses(network, x, clip, features, cfg, quantized)

    def draw(step):
        save_reconstructions(Path(cfg.out, "recon.png"), state.ema, val_images[:12], step, cfg,
                             runtime)

    run.show(draw, run.step)  # before step 1, to see that it can be done
    for step, x in image_batches(source, train_names, cfg, runtime, run.step):
        if step == cfg.vq_start > 0 and not cfg.dry_run:
            init_codebook(state, source, train_names, step, cfg, runtime)
        lr = set_learning_rate(state.optimizers(), step, cfg)
        metrics, fake_logits, is_finite = generator_step(state, net, x, lossy, step, cfg, runtime)
        if fake_logits is not None:
            metrics["disc"] = discriminator_step(state, x, fake_logits, is_finite, runtime)
        # in float16 an overflow is expected: GradScaler lowers its scale
        run.check_finite(step + 1, is_finite or state.scaler.get_scale() > 1)
        state.scaler.update()
        if is_finite:
            update_average(state, step, cfg)
        run.end_step(step + 1, metrics | {"lr": lr})

        if is_eval_step(step, cfg):
            val_metrics = validate(state, val_images, lossy, step, cfg, runtime)
            run.validated(step + 1, val_metrics, state.ema)
            run.save(step + 1, state.state_dict())
            run.show(draw, step)
        elif run.stop_requested:
            run.save(step + 1, state.state_dict())
        if run.should_stop:
            return run.finish()
    code = run.finish()
    runtime.print0(f"wrote {run.final} (step {run.best['step']}) and {cfg.out}/recon.png; next: "
                   f"python prepare.py --vqgan={run.final} --data={cfg.data} --clip={cfg.clip} "
                   f"--out=data/{Path(cfg.out).name}_tokens")
    return code


if __name__ == "__main__":
    run_main(main)
