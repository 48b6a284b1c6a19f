"""Stage 1: learn to write a picture as a few tokens and to read it back (VQGAN, Esser et al. 2021).

An encoder shrinks the picture to a small grid of vectors, each vector is replaced by the nearest code of a learned
codebook, a decoder paints the picture again. What is kept is what fits into the codes, so the losses decide what
matters: pixels (L1 + L2), what CLIP's image encoder sees at several depths (perceptual), and late in training a
discriminator that judges patches (--disc_start; off by default). Pictures alone are read, no captions."""
import copy
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch._functorch.config
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from common import (Amount, AutoWhole, Count, Device, Dtype, Machine, Muon, Pictures, Preset, Progress, Run,
                    Share, Whole, Zoom, centre_crops, configure, crop, digest, fail, learning_rate, load_clip, millions,
                    resized, save_grid, split_names, to_image, to_tensor)
from model import VQGAN, Discriminator, VQGANConfig, hinge_loss


@dataclass
class Config:
    preset: Preset = ""                 # paper, or 24gb for one card of that size; see PRESETS
    data: str = "data/toy/train"        # a folder of pictures, at any depth, or .tar shards of them
    out: str = "out/vqgan"              # the run: vqgan.pt, vqgan.jsonl, recon.png
    clip: str = "out/toy/clip.pt"       # whose image features the perceptual loss compares: ViT-B/32 ..., or a file
    trust_jit: bool = False             # run the code in a --clip file that is a TorchScript archive of unknown origin
    seed: Whole = 0                     # of the weights and of every batch
    # pictures
    image_size: Count = 64              # pixels a side
    val_percent: Amount = 2.0           # of the pictures that are never trained on, chosen by name
    min_zoom: Zoom = 1.0                # random crops show between this share of the picture's short side and all of it
    flip: bool = False                  # mirror half of the pictures
    max_bad: Share = 0.5                # stop if more of the pictures than this can't be read
    workers: AutoWhole = None           # decoding processes (auto: none on a CPU, whose cores are busy; 4 beside a GPU)
    # network
    patch: Count = 4                    # fold patch x patch pixels into channels first: 1 is taming's, 4 is 16x cheaper
    ch: Count = 48                      # width of the first level, a multiple of groups
    ch_mult: tuple = (1, 1, 2)          # widths of the levels, halving the grid between two
    num_res_blocks: Count = 1           # residual blocks a level
    attn_resolutions: tuple = ()        # grid sides that get attention, beside the one block in the middle
    groups: Count = 8                   # of GroupNorm; 32 from --ch=128 on
    z_channels: Count = 128             # channels before the codebook's space
    codes: Count = 1024                 # size of the codebook
    code_dim: Count = 8                 # length of a code
    l2_norm: bool = True                # compare unit-length codes
    # losses
    beta: Amount = 0.25                 # weight of the commitment loss
    perceptual: Amount = 0.5            # weight of the distance between CLIP features
    vq_start: Whole = 150               # steps without quantisation, after which k-means lays the codebook
    disc_start: Whole = 1000000         # step at which the discriminator starts to count; from max_steps on: never
    disc_weight: Amount = 0.8           # its weight, times the adaptive weight
    disc_cap: Amount = 10.0             # upper bound of the adaptive weight
    # training
    max_steps: Count = 600              # training steps
    batch_size: Count = 32              # pictures a step, over all processes
    muon: bool = True                   # the convolutions learn by Muon, the rest by AdamW; False: all by AdamW
    learning_rate: Amount = 4e-3        # peak; warm-up, then cosine
    warmup: Whole = 30                  # steps of linear warm-up
    ema: Share = 0.99                   # decay of the moving average of the weights, which is what later stages use
    eval_every: Count = 300             # steps between evaluations, each with a checkpoint and recon.png
    device: Device = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "auto"               # of autocast: auto, float32, bfloat16, float16
    compile: bool = False               # torch.compile
    dry_run: bool = False               # a few real steps, then memory, rate and the time the whole run would take


F16 = {"image_size": 256, "min_zoom": 0.8, "flip": True, "patch": 1, "ch": 128, "ch_mult": (1, 1, 2, 2, 4),
       "num_res_blocks": 2, "attn_resolutions": (16,), "groups": 32, "z_channels": 256, "clip": "ViT-B/32",
       "muon": False, "vq_start": 2000, "warmup": 1000, "eval_every": 5000, "ema": 0.9999}
PRESETS = {  # for --preset
    "paper": F16 | {"codes": 16384, "code_dim": 256, "l2_norm": False, "batch_size": 64, "max_steps": 300000,
                    "learning_rate": 3e-4, "disc_start": 50000},
    "24gb": F16 | {"codes": 16384, "batch_size": 8, "max_steps": 300000, "learning_rate": 3e-4, "disc_start": 100000},
}


class Batches(torch.utils.data.Dataset):
    """Batch number i is a pure function of (seed, i): which pictures, which crops, which are mirrored. Items are uint8
    (B, S, S, 3) and the set of files that failed, each replaced by the next one that did not."""

    def __init__(self, source, names, cfg, rank=0, world=1):
        self.source, self.names, self.cfg, self.rank, self.world = source, names, cfg, rank, world

    def __len__(self):
        return self.cfg.max_steps

    def __getitem__(self, i):
        rng, size = np.random.default_rng((self.cfg.seed, i)), self.cfg.image_size
        index = rng.integers(len(self.names), size=self.cfg.batch_size)
        how = rng.random((self.cfg.batch_size, 4))                                     # zoom, x, y, flip
        part = self.cfg.batch_size // self.world
        pictures, bad = [], set()
        for j in range(self.rank * part, (self.rank + 1) * part):
            for attempt in range(100):
                name = self.names[(index[j] + attempt) % len(self.names)]
                try:
                    picture = self.source.open(name, size)
                    break
                except (OSError, ValueError) as e:
                    bad.add(f"{name} ({e})")
            else:
                return None, bad
            zoom, x, y, flip = how[j]
            zoom = 1 / (1 - zoom * (1 - self.cfg.min_zoom))
            pictures.append(crop(picture, size, zoom, x, y, self.cfg.flip and flip < 0.5))
        return torch.from_numpy(np.stack(pictures)), bad


def perceptual_features(visual, depths=(0.25, 0.5, 0.75, 1.0)):
    """A function from CLIP's input (B, 3, C, C) to a list of feature maps: the four stages of a ResNet (channels in
    dimension 1), or a ViT's tokens after these shares of its depth (channels last). A ResNet's batch norms, which are
    frozen, are folded into its convolutions: the same function in fewer passes over memory."""
    resnet = hasattr(visual, "layer1")
    if resnet:
        for m in visual.modules():
            for conv, bn in (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"), ("0", "1")):  # 0, 1: a downsample
                if isinstance(getattr(m, bn, None), nn.BatchNorm2d):
                    setattr(m, conv, fuse_conv_bn_eval(getattr(m, conv), getattr(m, bn)))
                    setattr(m, bn, nn.Identity())
        layers = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
        visual.attnpool = nn.Identity()  # what comes after the last of them is not looked at
    else:
        blocks = visual.transformer.resblocks
        layers = [blocks[round(d * len(blocks)) - 1] for d in depths]
    visual.to(memory_format=torch.channels_last)
    taken = []
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: taken.append(output))

    def features(x):
        taken.clear()
        visual(x)
        return list(taken)
    return features


def perceptual_distance(real, fake):
    """Mean squared distance between feature maps at unit length along their channels, averaged over the maps (LPIPS,
    Zhang et al. 2018, with CLIP in place of VGG). Between unit vectors that is 2 - 2 cosine."""
    total = 0
    for a, b in zip(real, fake):  # F.cosine_similarity takes half as long again, there and back
        dim, a, b = 1 if a.dim() == 4 else -1, a.float(), b.float()
        cosine = (F.normalize(a, dim=dim) * b).sum(dim) / b.square().sum(dim).clamp(min=1e-16).sqrt()
        total = total + 2 - 2 * cosine.mean()
    return total / len(real)


def main():
    cfg = configure(Config, presets=PRESETS)
    machine = Machine(cfg.device, cfg.dtype)
    vcfg = check(cfg, machine)
    source = Pictures(cfg.data)
    names = source.names
    train, val = split_names(names, cfg.val_percent)
    if not train:
        fail(f"all of {cfg.data} is held out, none left")
    clip = load_clip(cfg.clip, machine.device, cfg.trust_jit) if cfg.perceptual else None
    run = Run("vqgan", cfg, machine, {"CLIP": clip and clip.sha256, "list of pictures": source.sha256})

    torch.manual_seed(cfg.seed)
    model = VQGAN(vcfg).to(machine.device, memory_format=torch.channels_last)
    disc = Discriminator().to(machine.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False).eval()

    def adam(parameters):
        return torch.optim.AdamW(parameters, 0.0, (0.9, 0.99), weight_decay=0.0, fused=machine.fused)
    params, averages = list(model.parameters()), list(ema.parameters())
    convolutions = {p for p in params if p.dim() == 4} if cfg.muon else set()
    own = {"adam": adam([p for p in params if p not in convolutions])}  # the VQGAN's own optimizers
    if cfg.muon:
        own["muon"] = Muon([p for p in params if p in convolutions])
    opts = own | {"disc": adam(disc.parameters())}
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    generator = torch.Generator().manual_seed(cfg.seed)
    if run.resume:
        for part, state in ((model, "model"), (ema, "ema"), (disc, "disc"), (scaler, "scaler")):
            part.load_state_dict(run.resume[state] or part.state_dict())  # a scaler that was not used has none
        for name, opt in opts.items():
            opt.load_state_dict(run.resume["optimizers"][name])
        model.quantize.usage.copy_(run.resume["usage"])
        generator.set_state(run.resume["rng"])
    features = perceptual_features(clip.model.visual) if clip else None
    side = cfg.image_size // vcfg.factor
    machine.say(f"vqgan: {millions(model)}, {cfg.image_size} px -> {side} x {side} tokens of {cfg.codes} codes; "
                f"{len(train)} pictures of {cfg.data} to train on, {len(val)} held out; CLIP {clip and cfg.clip}; "
                f"{cfg.max_steps} steps of {cfg.batch_size} on {machine}; writes {run.final}")

    def clip_input(x):
        return clip.normalize(resized((x + 1) / 2, clip.size))

    def losses(model, x, quantized):
        """Reconstruction of x, its loss without the discriminator, and the parts of that."""
        recon, vq_loss, tokens, z = model(x, cfg.beta, quantized)
        recon = recon.float()
        pixel = F.l1_loss(recon, x) + F.mse_loss(recon, x)
        percept = torch.zeros((), device=x.device)
        if cfg.perceptual:
            with torch.no_grad():
                real = features(clip_input(x))
            fake = features(clip_input(recon))
            percept = perceptual_distance(real, fake)
        parts = {"pixel": pixel, "perceptual": percept, "vq": vq_loss}
        return recon, pixel + cfg.perceptual * percept + vq_loss, parts, tokens, z

    def to_device(batch, failed=()):
        if batch is None:
            fail(f"a hundred pictures of {cfg.data} in a row can't be read, the last: {sorted(failed)[-1]}")
        x = to_tensor(batch.numpy(), machine.device).contiguous(memory_format=torch.channels_last)
        return x * 2 - 1                                                               # (B, 3, S, S) in [-1, 1]

    blank = torch.zeros(cfg.batch_size // machine.world, cfg.image_size, cfg.image_size, 3, dtype=torch.uint8)
    quantized = cfg.dry_run or run.step >= cfg.vq_start
    torch._functorch.config.donated_buffer = False  # a compiled step is gone back through more than once
    net = machine.compile(model, cfg.compile, (to_device(blank), cfg.beta, quantized))
    batches = Batches(source, train, cfg, machine.rank, machine.world)
    fixed = centre_crops(source, val, cfg.image_size, 256)  # (V, S, S, 3)
    if not len(fixed):  # a handful of pictures, none of them held out
        fixed = centre_crops(source, train[:1000], cfg.image_size, 256)
    if not len(fixed):
        fail(f"none of the first {len(train[:1000])} pictures of {cfg.data} can be read")
    bar, bad = Progress(cfg.max_steps, run.step), set()
    workers = cfg.workers if cfg.workers is not None else 0 if machine.device.type == "cpu" else 4
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(run.step, cfg.max_steps),
                                         num_workers=workers)
    for step, (batch, failed) in zip(range(run.step, cfg.max_steps), loader):
        x = to_device(batch, failed)
        for name in sorted(failed - bad):
            print(f"skipped {name}", flush=True)
        bad |= failed
        if len(bad) > cfg.max_bad * len(names):
            fail(f"{len(bad)} of {len(names)} pictures of {cfg.data} can't be read, more than --max_bad={cfg.max_bad}")
        quantized = step >= cfg.vq_start or cfg.dry_run  # a dry run measures the run at its heaviest
        adversarial = step >= cfg.disc_start or cfg.dry_run and cfg.disc_start < cfg.max_steps
        if step == cfg.vq_start and cfg.vq_start > 0 and not cfg.dry_run:
            with torch.no_grad(), machine.autocast():  # encoder outputs of the next batches, on every rank the same
                some = Batches(source, train, cfg)
                z = torch.cat([model(to_device(*some[step + i]), quantized=False)[3] for i in range(16)])
            model.quantize.kmeans(z, generator)
            machine.share(model.quantize.embedding.weight.detach())  # on GPUs no two sum alike
        for opt in opts.values():
            for group in opt.param_groups:
                group["lr"] = learning_rate(step, cfg.learning_rate, cfg.warmup, cfg.max_steps)

        with machine.autocast():
            recon, loss, parts, tokens, z = losses(net, x, quantized)
            if adversarial:
                judged = disc(recon)  # once, for both sides
                parts["gan"] = gan = -judged.mean()
        model.zero_grad()
        if adversarial:
            # what each loss asks of the reconstruction, so that CLIP and the discriminator are gone back through once
            pull, push = (torch.autograd.grad(scaler.scale(part), recon, retain_graph=True)[0] for part in (loss, gan))
            # the adaptive weight: both losses pull equally at the decoder's last layer (Esser et al. eq. 7), capped
            last, scale = model.decoder.conv_out.weight, scaler.get_scale()
            a, b = (machine.sum(torch.autograd.grad(recon, last, g, retain_graph=True)[0]).norm() / scale
                    for g in (pull, push))
            weight = cfg.disc_weight * (a / (b + 1e-6)).clamp(max=cfg.disc_cap)
            vq = [(parts["vq"], scaler.scale(torch.ones_like(parts["vq"])))] if quantized else []
            torch.autograd.backward(*zip((recon, pull + weight * push), *vq))
            loss = (loss + weight * gan).detach()
        else:
            scaler.scale(loss).backward()
        machine.average_gradients(params)
        for opt in own.values():
            scaler.unscale_(opt)
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        good = math.isfinite(machine.sum(loss.detach().clone()).item() + norm.item())
        run.skip(step, good or scaler.get_scale() > 1)  # to a scaler such a step says that its scale is too high
        for opt in own.values() if good else ():
            scaler.step(opt)
        if adversarial:
            with machine.autocast():
                parts["disc"] = disc_loss = hinge_loss(disc(x), judged)
            disc.zero_grad()
            scaler.scale(disc_loss).backward(inputs=list(disc.parameters()))
            machine.average_gradients(disc.parameters())
            if good:
                scaler.step(opts["disc"])
        scaler.update()

        facts = {}
        if quantized and good:
            counts = machine.sum(torch.bincount(tokens.flatten(), minlength=cfg.codes))
            p = counts / counts.sum()
            facts = {"perplexity": torch.exp(-(p * p.clamp(min=1e-9).log()).sum()).item(),
                     "used": (counts > 0).float().mean().item(),
                     "restarted": model.quantize.restart(counts, machine.gather(z), generator)}
        with torch.no_grad():
            decay = min(cfg.ema, (step + 1) / (step + 10))
            if step == cfg.vq_start:
                ema.quantize.load_state_dict(model.quantize.state_dict())
            if good:
                torch._foreach_lerp_(averages, params, 1 - decay)
        facts = {k: v.item() for k, v in parts.items()} | facts
        run.log(step=step + 1, loss=loss.item(), lr=group["lr"], **facts)
        bar(loss=loss.item(), **facts)

        due = ((step + 1) % cfg.eval_every == 0 or step + 1 == cfg.max_steps) and not cfg.dry_run
        if due:
            total, shown, used = 0.0, [], set()
            with torch.no_grad(), machine.autocast():
                for part in np.array_split(fixed, -(-len(fixed) // 64)):
                    x = to_device(torch.from_numpy(part))
                    recon, loss, _, tokens, _ = losses(ema, x, quantized)
                    total += loss.item() * len(part) / len(fixed)
                    used |= set() if tokens is None else set(tokens.flatten().tolist())
                    shown = shown or [to_image(p) for p in (*x[:12], *recon[:12])]
            machine.say(f"step {step + 1}: validation loss {total:.4f}, {len(used)} of {cfg.codes} codes seen in "
                        f"{len(fixed)} pictures")
            run.log(step=step + 1, val_loss=total, val_codes=len(used))
            if machine.rank == 0:
                save_grid(Path(cfg.out, "recon.png"), shown, len(shown) // 2)
        if run.asked_to_stop() or due:
            run.save(step + 1, model=model.state_dict(), ema=ema.state_dict(), disc=disc.state_dict(),
                     optimizers={k: o.state_dict() for k, o in opts.items()}, scaler=scaler.state_dict(),
                     usage=model.quantize.usage, rng=generator.get_state(),
                     network=asdict(vcfg), sha256=digest(ema.state_dict()))
    run.finish()
    machine.say(f"wrote {run.final} and {cfg.out}/recon.png; "
                f"next: python prepare.py --vqgan={run.final} --data={cfg.data} --clip={cfg.clip} --out=...")


def check(cfg, machine):
    """The network's shape, after refusing what does not fit."""
    if not cfg.ch_mult or max(cfg.ch_mult) > 64:
        fail(f"--ch_mult={','.join(map(str, cfg.ch_mult))} makes no sense: one small number for each level")
    vcfg = VQGANConfig(**{f.name: getattr(cfg, f.name) for f in fields(VQGANConfig) if hasattr(cfg, f.name)})
    if cfg.image_size % vcfg.factor:
        fail(f"--image_size={cfg.image_size} does not divide by {vcfg.factor}, the factor of --patch and --ch_mult")
    if cfg.ch % cfg.groups:
        fail(f"--ch={cfg.ch} does not divide by --groups={cfg.groups}")
    if cfg.vq_start >= cfg.max_steps:
        fail(f"--vq_start={cfg.vq_start} leaves none of --max_steps={cfg.max_steps} to learn the codebook in")
    if cfg.disc_start < cfg.max_steps and cfg.image_size < 32:
        fail(f"--image_size={cfg.image_size} is too small for the discriminator; 32 is enough, or raise --disc_start")
    if cfg.batch_size % machine.world:
        fail(f"--batch_size={cfg.batch_size} does not divide over {machine.world} processes")
    return vcfg


if __name__ == "__main__":
    main()
