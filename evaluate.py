"""Stage 5: do the pictures match the words, how good are they, and what would captions have bought?

On the toy world that can be known: a small classifier, trained on true drawings and their attributes and on nothing
else, says what a picture shows. It judges true held-out drawings and their reconstructions too, which is as well as any
generator behind this VQGAN could do. On other data a CLIP judges, better another one than the GPT was trained with
(--judge). On the toy world the same GPT is also trained twice more, on the captions' embeddings and on nothing, and the
paper's opponent draws too: a search for latents whose picture CLIP likes. For the demo's GPT all of it takes minutes;
--controls=False --optimise=0 --plots=False leaves the samples' own rows."""
import copy
import itertools
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import sample
from common import (AutoAmount, AutoBool, AutoShare, AutoWhole, Amount, Count, Device, Dtype, Machine, Pictures,
                    Progress, Share, Whole, centre_crops, configure, crop, digest, fail, file_sha256, learning_rate,
                    load_clip, load_gpt, save_grid, split_names, to_image, to_tensor, whole, write_json)
from prepare import GENERIC, text_mean
from toy import BACKGROUNDS, COLOURS, OBJECTS, SIZES, UNSEEN, read_world
from train_gpt import open_dump


@dataclass
class Config:
    data: str = "data/toy"              # the toy world, or any folder or .tar of pictures
    texts: str = ""                     # for other data than the toy world: a file of prompts, one a line
    out: str = "out/toy"                # match.json, match.md, match.png, compare.png, the plots, judge.pt
    gpt: str = ""                       # as in sample.py
    vqgan: str = ""                     # as in sample.py
    clip: str = ""                      # as in sample.py
    judge: str = ""                     # another CLIP for similarity and retrieval (empty: the GPT's own, it flatters)
    trust_jit: bool = False             # as in sample.py
    n: Count = 8                        # pictures a prompt; best-of-n chooses among them
    cfg: AutoAmount = None              # as in sample.py
    temperature: AutoAmount = None      # as in sample.py
    top_k: AutoWhole = None             # as in sample.py
    top_p: AutoShare = None             # as in sample.py
    variety: AutoAmount = None          # as in sample.py
    seed: Whole = 0                     # of the samples
    gap: Amount = 0.8                   # length of the constant vector added to all texts' embeddings for the row "gap"
    plots: AutoBool = None              # match against guidance and variety, two PNGs of those names (auto: toy world)
    controls: AutoBool = None           # train the GPT on captions' embeddings and on nothing too (auto: toy world)
    optimise: AutoWhole = None          # prompts that optimisation against CLIP draws too (auto: toy world, 96)
    judge_steps: Count = 300            # training steps of the judge
    min_match: Share = 0.0              # exit with code 1 if fewer samples than this show the right object and colour
    batch_size: Count = 96              # pictures at a time
    device: Device = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "auto"               # as in sample.py


ATTRIBUTES = {"object": OBJECTS, "colour": tuple(COLOURS), "background": tuple(BACKGROUNDS)}


class Judge(nn.Module):
    """A small convolutional classifier, pictures (B, 3, S, S) in [0, 1], seen at 32 x 32 -> a row of logits for each
    attribute."""

    def __init__(self):
        super().__init__()
        body, c = [], 3
        for width in (32, 64, 128):
            body += [nn.Conv2d(c, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                     nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            c = width
        self.body = nn.Sequential(*body, nn.Flatten(), nn.Linear(c * 16, 256), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(options)) for name, options in ATTRIBUTES.items()})

    def features(self, x):
        return self.body(shrunk(x, 32))                                                # (B, 256)

    def forward(self, x):
        h = self.features(x)
        return {name: head(h) for name, head in self.heads.items()}


def shrunk(pixels, side):
    """Pictures (B, 3, S, S) -> (B, 3, side, side)."""
    return F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)


def get_judge(cfg, machine):
    """The judge for this world, trained on its training drawings, or read from out/judge.pt if that was so."""
    path, world = Path(cfg.out, "judge.pt"), Path(cfg.data, "world.json").read_text()
    judge = Judge().to(machine.device)
    if path.is_file():
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            if saved["world"] == world and saved["steps"] == cfg.judge_steps:
                judge.load_state_dict(saved["judge"])
                return judge.eval()
        except Exception as e:
            machine.say(f"{path} can't be read ({type(e).__name__})")
    machine.say(f"training the judge on the true drawings of {cfg.data}, {cfg.judge_steps} steps")
    pictures, rows = read_world(cfg.data, "train", "unseen")
    torch.manual_seed(0)
    judge = Judge().to(machine.device)
    opt = torch.optim.AdamW(judge.parameters(), lr=0.0, weight_decay=0.05)
    labels = {name: torch.tensor([options.index(r[name]) for r in rows]) for name, options in ATTRIBUTES.items()}
    bar = Progress(cfg.judge_steps)
    for step in range(cfg.judge_steps):
        index = np.random.default_rng((0, step)).integers(len(rows), size=128)
        opt.param_groups[0]["lr"] = learning_rate(step, 2e-3, 20, cfg.judge_steps)
        logits = judge(to_tensor(pictures[index]).to(machine.device))
        loss = sum(F.cross_entropy(logits[k], labels[k][index].to(machine.device)) for k in labels)
        opt.zero_grad()
        loss.backward()
        opt.step()
        bar(loss=loss.item())
    with whole(path) as f:
        torch.save({"judge": judge.state_dict(), "world": world, "steps": cfg.judge_steps}, f)
    return judge.eval()


def judge_features(judge, pictures, machine):
    """uint8 (N, S, S, 3) -> what the judge's heads look at (N, 256), as numpy."""
    return in_parts(lambda x: judge.features(x.to(machine.device)), pictures).cpu().double().numpy()


@torch.no_grad()
def match(judge, pictures, wanted, machine):
    """Shares of pictures, uint8 (N, S, S, 3), in which the judge sees what is wanted, a dict of attributes for each:
    each attribute over the pictures that ask for it, "both", object and colour, and "unseen", that for the pairs that
    neither VQGAN nor GPT ever saw."""
    right = {}
    seen = in_parts(lambda x: torch.stack([row.argmax(1) for row in judge(x.to(machine.device)).values()], 1), pictures)
    for (name, options), column in zip(ATTRIBUTES.items(), seen.T.tolist()):                   # seen (N, attributes)
        right[name] = [options[i] == w[name] if name in w else None for i, w in zip(column, wanted)]
    right["both"] = [o and c for o, c in zip(right["object"], right["colour"])]
    right["unseen"] = [b for b, w in zip(right["both"], wanted) if (w["colour"], w["object"]) in UNSEEN]
    return {name: share([r for r in hits if r is not None]) for name, hits in right.items()}


def share(hits):
    """Share of hits with Wilson's 95% interval: {"share", "low", "high", "n"}, or None if there is nothing to count."""
    if not hits:
        return None
    n, p, z = len(hits), sum(hits) / len(hits), 1.96
    mid = (p + z * z / 2 / n) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + (z / 2 / n) ** 2) / (1 + z * z / n)
    return {"share": p, "low": mid - half, "high": mid + half, "n": n}


def draw(nets, embeddings, keys, n, options, machine, cfg, modality="text"):
    """n pictures of each embedding (P, D), uint8 (P*n, S, S, 3); their random numbers depend on (seed, key, i)."""
    gpt, vqgan = nets
    variety = options["variety"] if modality == "text" else 0.0
    cond, uniform = map(torch.cat, zip(*(sample.starts(gpt, e[None], modality, cfg.seed, key, n, variety)
                                         for e, key in zip(embeddings, keys))))        # (P*n, D), (P*n, T)
    return as_pixels(torch.stack(sample.draw(gpt, vqgan, cond, uniform, options, machine, cfg.batch_size)[0]))


def as_pixels(x):
    """(N, 3, S, S) in [-1, 1] -> uint8 (N, S, S, 3), rounded as a saved picture is."""
    return np.stack([np.asarray(to_image(p)) for p in x])


@torch.no_grad()
def in_parts(function, pictures, size=0):
    """function(float (n, 3, S, S) in [0, 1]) of all pictures, uint8 (N, S, S, 3), 64 at a time, under each other; with
    `size`, of their centre crops of that side."""
    if size:
        pictures = np.stack([crop(Image.fromarray(p), size) for p in pictures])
    return torch.cat([function(to_tensor(part)) for part in np.array_split(pictures, 1 + len(pictures) // 64)])


def reconstructions(vqgan, pictures, machine):
    """uint8 (N, S, S, 3) -> what the VQGAN makes of them, uint8 (N, S, S, 3)."""
    def again(x):
        tokens = vqgan.encode(x.to(machine.device) * 2 - 1)
        with machine.autocast():  # as samples are decoded
            return vqgan.decode(tokens).float().cpu()
    return as_pixels(in_parts(again, pictures, vqgan.cfg.image_size))


def clip_embeddings(clip, pictures):
    """uint8 (N, S, S, 3) -> unit embeddings (N, D)."""
    return in_parts(lambda x: clip.image(x.to(clip.device)), pictures, clip.size)


@torch.no_grad()
def shifted(embeddings, length):
    """Unit embeddings (N, D) moved by a constant vector of this length: OpenAI's modality gap, put on another CLIP."""
    way = F.normalize(torch.randn(embeddings.shape[1], generator=torch.Generator().manual_seed(0)), dim=0)
    return F.normalize(embeddings + length * way.to(embeddings.device), dim=-1)


def toy_prompts():
    """Every colour with every object: [{"colour", "object"}, ...] and "a {colour} {object}" of each."""
    wanted = [{"colour": c, "object": o} for c in COLOURS for o in OBJECTS]
    return wanted, ["a {colour} {object}".format(**w) for w in wanted]


@torch.no_grad()
def shifted_mean(clip, length, pictures):
    """The mean (D,) that prepare.py would have found for texts where `shifted` moves them to, given some training
    pictures, uint8 (N, S, S, 3)."""
    return text_mean(shifted(clip.text(GENERIC), length), clip_embeddings(clip, pictures), clip.model.logit_scale.exp())


def with_gap(gpt, moved_mean):
    """A copy of a GPT that expects texts around another mean (D,), if it centres them at all."""
    gpt = copy.copy(gpt)  # the weights are shared, the means are not
    gpt._buffers = {k: v.clone() for k, v in gpt._buffers.items()}
    if gpt.means[1].any():
        gpt.means[1] = moved_mean
    return gpt


def frechet(a, b):
    """Frechet distance of two sets of features (N, F), (M, F) seen as Gaussians (Heusel et al. 2017)."""
    (ma, a), (mb, b) = ((x.mean(0), (x - x.mean(0)) / math.sqrt(len(x) - 1)) for x in (a, b))  # covariances a'a, b'b
    values, vectors = np.linalg.eigh(b.T @ b)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T                        # (F, F), of b's covariance
    cross = np.linalg.svd(a @ root, compute_uv=False).sum()                            # trace of sqrt(cov_a cov_b)
    return float(((ma - mb) ** 2).sum() + (a ** 2).sum() + (b ** 2).sum() - 2 * cross)


def quality(features, pictures, groups, reference, train, n, seed=0):
    """Figures that need no labels, of pictures uint8 (N, S, S, 3): the Frechet distance of n of them to the reference's
    features, with 1.96 standard deviations of it over 10 resamplings; the mean distance between features within a group
    (pictures of one prompt); the distance to the nearest training picture, RMS over pixels at 16 x 16."""
    rng, f = np.random.default_rng(seed), features(pictures)
    index = rng.permutation(len(f))[:n]
    again = [frechet(f[rng.choice(index, len(index))], reference) for _ in range(10)]
    apart = [np.linalg.norm(f[mine][:, None] - f[mine][None], axis=-1).sum() / (len(mine) * (len(mine) - 1))
             for mine in (np.flatnonzero(np.asarray(groups) == g)[:20] for g in sorted(set(groups))) if len(mine) > 1]
    small = tiny(pictures[index])
    square = (small ** 2).sum(1)[:, None] - 2 * small @ train.T + (train ** 2).sum(1)  # (n, train)
    near = np.sqrt(np.maximum(square.min(1), 0) / train.shape[1])
    return {"frechet": {"mean": frechet(f[index], reference), "half": float(1.96 * np.std(again)), "n": len(index)},
            "diversity": mean(apart) if apart else None, "nearest": mean(near)}


def mean(x):
    """{"mean", "half", "n"}: 1.96 standard errors either way."""
    half = float(1.96 * np.std(x, ddof=1) / len(x) ** 0.5) if len(x) > 1 else None
    return {"mean": float(np.mean(x)), "half": half, "n": len(x)}


def ratio(a, b):
    """The ratio of two shares, as `share` gives them, with an interval from the ends of theirs: on the safe side."""
    small = 1e-9
    return {"ratio": a["share"] / max(small, b["share"]), "low": a["low"] / b["high"],
            "high": a["high"] / max(small, b["low"])}


def nearer(a, b, reference, rounds=40):
    """The share of resamplings in which the features a (N, F) have a smaller Frechet distance to the reference than b
    (N, F) have, the same prompts taken of both."""
    picks = [np.random.default_rng((0, i)).integers(len(a), size=len(a)) for i in range(rounds)]
    return float(np.mean([frechet(a[i], reference) < frechet(b[i], reference) for i in picks]))


def tiny(pictures):
    """uint8 (N, S, S, 3) -> (N, 768), the pixels in [0, 1] at 16 x 16."""
    return in_parts(lambda x: shrunk(x, 16).flatten(1), pictures).numpy()


def retrieval(clip, pictures, texts, own):
    """CLIP's mean cosine of pictures to their own prompt, number own[i] of texts (P, D), and the share of pictures that
    are nearer to it than to any other."""
    cosines = clip_embeddings(clip, pictures) @ texts.T                                # (N, P)
    own = torch.as_tensor(own, device=cosines.device)
    mine = cosines.gather(1, own[:, None])[:, 0]
    return {"similarity": mean(mine.cpu().numpy()), "retrieval": share((cosines.argmax(1) == own).tolist())}


def optimise(vqgan, clip, texts, marks, side, seed, machine):
    """The opponent: latents whose picture CLIP finds like the text, by gradient (VQGAN-CLIP, Crowson et al. 2022): Adam
    through codebook (straight-through), decoder and CLIP, on 16 random crops of each picture, flips and noise.

    texts (P, D) are worked on together; marks are seconds a picture, side that of the token grid. Returns uint8
    (P, S, S, 3) for each mark."""
    rng, count, crops, out = torch.Generator().manual_seed(seed), len(texts), 16, []
    cuda = machine.device.type == "cuda"
    noise = torch.Generator(machine.device).manual_seed(seed) if cuda else rng  # not to be waited for by a GPU
    start = torch.randint(vqgan.cfg.codes, (count, side, side), generator=rng).to(texts.device)
    z = vqgan.quantize.lookup(start).clone().requires_grad_()                          # (P, d, h, w)
    optimizer, begun = torch.optim.Adam([z], 0.1), time.time()
    while True:
        with machine.autocast():
            x = vqgan.decoder(vqgan.post_quant_conv(vqgan.quantize(z)[0])).float()     # (P, 3, S, S)
        if cuda:
            torch.cuda.synchronize()
        while len(out) < len(marks) and time.time() - begun >= marks[len(out)] * count:
            out.append(as_pixels(x.detach()))
        if len(out) == len(marks):
            return out
        scale = 0.7 + 0.3 * torch.rand(count * crops, generator=rng)
        shift = (torch.rand(count * crops, 2, generator=rng) * 2 - 1) * (1 - scale[:, None])
        theta = torch.zeros(count * crops, 2, 3)
        theta[:, 0, 0] = scale * (torch.rand(count * crops, generator=rng) < 0.5).float().mul(2).sub(1)
        theta[:, 1, 1], theta[:, :, 2] = scale, shift
        where = F.affine_grid(theta.to(x.device), (count * crops, 3, clip.size, clip.size), align_corners=False)
        seen = F.grid_sample((x.repeat_interleave(crops, 0) + 1) / 2, where, padding_mode="border", align_corners=False)
        seen = seen + 0.02 * torch.randn(seen.shape, generator=noise, device=x.device)
        with machine.autocast():
            seen = clip.image(seen)                                                    # (P * crops, D)
        loss = (1 - seen @ texts.T.repeat_interleave(crops, 1)).diagonal().sum() / crops
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def caption_dump(cfg, meta, arrays, clip, out):
    """A dump, as open_dump gives it, with the embeddings of the pictures' captions in place of the pictures' (of an
    empty text for pictures that are not the world's)."""
    captions = {Path(r["path"]).name: r["caption"] for r in read_world(cfg.data, "train")[1]}
    different = sorted({"", *captions.values()})
    texts = dict(zip(different, clip.text(different).cpu().numpy().astype(np.float16)))
    skipped = {name for name, _ in meta["skipped"]}
    for split, names in zip(("train", "val"), split_names(Pictures(f"{cfg.data}/train").names,
                                                          meta["config"]["val_percent"])):
        crops = meta["config"]["crops"] if split == "train" else 1
        rows = [texts[captions.get(n, "")] for n in names if n not in skipped]
        rows = np.array(rows, np.float16).reshape(-1, clip.dim).repeat(crops, 0)                   # (rows, D)
        for kind, array in (("tokens", arrays[split][0]), ("clip", rows)):
            with whole(Path(out, f"{split}_{kind}.bin")) as f:
                f.write_bytes(np.ascontiguousarray(array).tobytes())
        if split == "train":
            mean = rows.astype(np.float64).mean(0).tolist()
    files = {name: file_sha256(Path(out, name)) for name in meta["files"]}
    meta |= {"files": files, "image_mean": mean, "text_mean": mean}  # one modality, so one mean
    write_json(Path(out, "meta.json"), meta | {"digest": digest(meta)})


def train_controls(cfg, clip, machine, asked):
    """Train the GPT once more on the captions' embeddings, and once on nothing -> {what: (network, changes to the
    sampling options)}, in a folder for each GPT. Where its dump is not of this world, nothing, or an error if asked."""
    checkpoint = load_gpt(cfg.gpt, machine.device)[1]
    source, folder = checkpoint["config"]["data"], Path(cfg.out, "controls-" + file_sha256(cfg.gpt)[:8])
    meta, arrays = open_dump(source)
    if meta["sources_sha256"] != Pictures(f"{cfg.data}/train").sha256:
        why = f"{source} is no dump of {cfg.data}/train, so its rows can't be given their captions"
        if asked:
            fail(f"{why}; use --controls=False")
        machine.say(f"no controls: {why}")
        return {}
    caption_dump(cfg, meta, arrays, clip, folder / "caption_tokens")
    found = {}
    for name, what, changes, drawn in (  # captions leave open what they do, so no spread and no variety
            ("captioned", "captions", {"data": folder / "caption_tokens", "spread": 0.0}, {"variety": 0.0}),
            ("unconditioned", "nothing", {"drop": 1.0}, {"cfg": 0.0})):
        options = checkpoint["config"] | changes | {"out": folder / name, "device": cfg.device}
        words = [f"--{k}={v}" for k, v in options.items() if k != "preset"]
        if subprocess.run([sys.executable, Path(__file__).with_name("train_gpt.py"), *words]).returncode:
            fail(f"the control {name} was not trained; what train_gpt.py says above tells why")
        found[what] = load_gpt(folder / name / "gpt.pt", machine.device)[0].pack(machine.dtype), drawn
    return found


def plot(path, title, xlabel, lines):
    """A line chart, PNG: lines is {name: [(x, y, low, high), ...]}, y a share in [0, 1] with its interval."""
    w, h, left, top, colours = 680, 400, 60, 40, ("#1f5fbf", "#d0442e", "#2e8b4a", "#8a5aa8", "#c58a1b")
    sheet = Image.new("RGB", (w, h), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    xs = [p[0] for points in lines.values() for p in points]
    low = math.floor(10 * min(p[2] for points in lines.values() for p in points)) / 10

    def at(x, y):
        return (left + (w - left - 190) * (x - min(xs)) / (max(xs) - min(xs) or 1),
                top + (h - top - 50) * (1 - (y - low) / (1 - low or 1)))
    pen.text((left, 10), title, fill="black", font=font)
    pen.text((left, h - 22), xlabel, fill="black", font=font)
    for i in range(6):
        y = low + (1 - low) * i / 5
        pen.line([at(min(xs), y), at(max(xs), y)], fill="#dddddd")
        pen.text((8, at(0, y)[1] - 8), f"{y:.0%}", fill="black", font=font)
    for x in sorted(set(xs)):
        pen.text((at(x, low)[0] - 8, h - 45), f"{x:g}", fill="black", font=font)
    for i, ((name, points), colour) in enumerate(zip(lines.items(), colours)):
        pen.line([at(x, y) for x, y, _, _ in points], fill=colour, width=2)
        for x, y, a, b in points:
            pen.line([at(x, a), at(x, b)], fill=colour)
            pen.ellipse([at(x, y)[0] - 3, at(x, y)[1] - 3, at(x, y)[0] + 3, at(x, y)[1] + 3], fill=colour)
        pen.text((w - 170, top + 18 * i), name, fill=colour, font=font)
    with whole(path) as f:
        sheet.save(f)


def main():
    cfg = configure(Config)
    machine = Machine(cfg.device, cfg.dtype, training=False)
    toy = Path(cfg.data, "world.json").is_file() and Path(cfg.data, "captions.tsv").is_file()
    if not toy and not cfg.texts:
        fail(f"{cfg.data} is no toy world (no captions.tsv); draw one with toy.py, or give prompts, --texts=FILE")
    if toy and cfg.texts:
        fail("--texts is for other pictures than the toy world, whose prompts are its own; name them with --data")
    if cfg.controls and not toy:
        fail("--controls=True needs the toy world, which has captions")
    if cfg.optimise == 1:
        fail("--optimise=1 is too few to compare; it takes 0 or from 2 prompts on")
    cfg.gpt = cfg.gpt or sample.newest_gpt()
    gpt, vqgan, clip, options = sample.load(cfg, machine)
    if cfg.plots and options["cfg"] == 1:
        fail("--plots=True needs a GPT trained with dropped conditions, and another --cfg than 1")
    cfg.plots = toy and options["cfg"] != 1 if cfg.plots is None else cfg.plots
    cfg.optimise = 96 * toy if cfg.optimise is None else cfg.optimise
    asked, cfg.controls = cfg.controls, toy and not gpt.cfg.classic if cfg.controls is None else cfg.controls
    if cfg.controls and gpt.cfg.classic:
        fail("--controls=True needs a GPT that is not classic, one that can do without its condition")
    referee = load_clip(cfg.judge, machine.device, cfg.trust_jit) if cfg.judge else clip
    if toy:
        judge = get_judge(cfg, machine)
        (held, rows), (train, train_rows) = (read_world(cfg.data, *s) for s in (["heldout"], ["train", "unseen"]))
        groups = [f"{r['colour']} {r['object']}" for r in rows]
        wanted, prompts = toy_prompts()
    else:
        try:
            lines = [line.strip() for line in Path(cfg.texts).read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as e:
            fail(f"{cfg.texts} can't be read ({e}); --texts takes a text file, one prompt a line")
        prompts = list(dict.fromkeys(line for line in lines if line))  # twice the same would be one rival too many
        if len(prompts) < 2:
            fail(f"{cfg.texts} holds {len(prompts)} prompts; two or more are needed, one a line")
        source = Pictures(cfg.data)
        train, held = (centre_crops(source, names, vqgan.cfg.image_size, 2000)
                       for names in split_names(source.names, 10.0))
        judge, wanted, groups, rows, train_rows = None, None, range(len(held)), None, None

    if min(len(train), len(held)) < 4:
        fail(f"{cfg.data} has {len(train)} + {len(held)} pictures that can be read, too few to compare with")
    others = train_controls(cfg, clip, machine, asked) if cfg.controls else ()

    def features(pictures):
        if toy:
            return judge_features(judge, pictures, machine)
        return clip_embeddings(referee, pictures).cpu().double().numpy()
    texts, own = clip.text(prompts), np.arange(len(prompts)).repeat(cfg.n)
    theirs = texts if referee is clip else referee.text(prompts)
    enough = min(len(held) // 2, len(prompts) * cfg.n)  # as many pictures in every Frechet distance
    reference, near = features(held), tiny(train)
    table, sheet, findings, say = {}, {}, {}, []
    if toy:
        captions = clip.text([r["caption"] for r in rows[:500]])
        cosine = (clip_embeddings(clip, held[:500]) * captions).sum(1).mean().item()
        machine.say(f"cosine of {len(captions)} held-out drawings to their own captions: {cosine:.3f}")

    def judge_row(name, pictures, wanted, groups, own=None, n=None):
        """One row of the table: all that can be said of these pictures."""
        table[name] = (match(judge, pictures, wanted, machine) if toy else {}) | (
            retrieval(referee, pictures, theirs, own) if own is not None else {}) | quality(
            features, pictures, groups, reference, near, n or enough)
        right = f"right object and colour {table[name]['both']['share']:.1%}, " if toy else ""
        machine.say(f"{name}: {right}Frechet distance {table[name]['frechet']['mean']:.2f}")

    def text_row(name, nets, texts, options, shown=True):
        made = draw(nets, texts, prompts, cfg.n, options, machine, cfg)
        judge_row(name, made, wanted and [w for w in wanted for _ in range(cfg.n)], [prompts[i] for i in own], own)
        if shown:
            sheet[name] = made[::cfg.n]
        return made

    judge_row("true training pictures", train[:4000], train_rows, [0])  # their Frechet distance is the floor
    judge_row("true held-out pictures", held, rows, groups)
    judge_row("their reconstructions", reconstructions(vqgan, held, machine), rows, groups)
    ours = "samples of the prompts, N=1"
    made = text_row(ours, (gpt, vqgan), texts, options)
    score = (clip_embeddings(clip, made) * texts.repeat_interleave(cfg.n, 0)).sum(1).view(-1, cfg.n)
    best = made[np.arange(len(prompts)) * cfg.n + score.argmax(1).cpu().numpy()]
    judge_row(f"the same, best of {cfg.n} by CLIP", best, wanted, prompts, range(len(prompts)))
    if options["variety"]:
        text_row("samples at variety 0", (gpt, vqgan), texts, options | {"variety": 0.0})
    if toy:
        pairs = [i for i, w in enumerate(wanted) if (w["colour"], w["object"]) in UNSEEN]
        made_unseen = draw((gpt, vqgan), texts[pairs], [prompts[i] for i in pairs], 4 * cfg.n, options, machine, cfg)
        repeated = np.repeat(pairs, 4 * cfg.n)
        judge_row("samples of the unseen pairs alone, N=1", made_unseen, [wanted[i] for i in repeated],
                  [prompts[i] for i in repeated], repeated)
        long = [w | {"background": list(BACKGROUNDS)[i % 4], "size": list(SIZES)[i % 3]} for i, w in enumerate(wanted)]
        words = ["a {size} {colour} {object} on a {background} background".format(**w).replace("medium ", "")
                 for w in long]
        pictures = draw((gpt, vqgan), clip.text(words), words, cfg.n, options, machine, cfg)
        judge_row("samples of prompts with size and background, N=1", pictures, [w for w in long for _ in range(cfg.n)],
                  [words[i] for i in own])
    some = held[:len(prompts) * cfg.n]
    pictures = draw((gpt, vqgan), clip_embeddings(clip, some), map(str, range(len(some))), 1, options, machine, cfg,
                    "image")
    judge_row("drawn from held-out pictures' embeddings", pictures, rows, list(groups)[:len(some)])
    gaps = {0.0: (gpt, ours)}  # length of the gap: the GPT that expects it, its row
    if cfg.gap and not gpt.cfg.classic:
        name = f"samples, the texts' embeddings moved by {cfg.gap:g}"
        seen = train[[r["split"] == "train" for r in train_rows]] if toy else train  # what the dump was made of
        gaps[cfg.gap] = with_gap(gpt, shifted_mean(clip, cfg.gap, seen[:2000])), name
        text_row(name, (gaps[cfg.gap][0], vqgan), shifted(texts, cfg.gap), options)
    for option, title, values in (("cfg", "guidance", (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)),
                                  ("variety", "variety", (0.0, 0.25, 0.5, 0.75, 1.0, 1.5))) if cfg.plots else ():
        key, lines = "both" if toy else "retrieval", {}
        for gap, value in itertools.product(gaps, values):  # twice: as it is, and with the gap
            moved, name = gaps[gap]
            suffix = f", gap {gap:g}" if gap else ""
            if value != options[option]:
                name = f"samples at {title} {value:g}{suffix}"
            if name not in table:
                text_row(name, (moved, vqgan), shifted(texts, gap), options | {option: value}, shown=False)
            for line in (key, "unseen") if toy else (key,):
                point = table[name][line]
                lines.setdefault(f"{line}{suffix}, n={point['n']}", []).append(
                    (value, *(point[k] for k in ("share", "low", "high"))))
        plot(Path(cfg.out, f"{title}.png"), f"match against {title}, seed {cfg.seed}, 95% intervals",
             "classifier-free guidance" if option == "cfg" else "noise of the conditions when sampling, in spreads",
             lines)
    for what, (other, changes) in dict(others).items():
        text_row(f"control: the same GPT trained on {what}", (other, vqgan), texts, options | changes)
    if others:
        bought = ratio(table[ours]["both"], table["control: the same GPT trained on captions"]["both"])
        findings["language-free / captioned"] = bought
        say.append("Right object and colour, language-free / captioned: "
                   "{ratio:.3f} ({low:.3f}–{high:.3f}).".format(**bought))
    if cfg.optimise:
        chosen = np.random.default_rng(0).permutation(len(prompts))[:cfg.optimise]
        draw((gpt, vqgan), texts[:1], ["warm"], 1, options, machine, cfg)
        begun = time.time()
        for i in range(10):
            draw((gpt, vqgan), texts[:1], [str(i)], 1, options, machine, cfg)
        one, parts = (time.time() - begun) / 10, []
        machine.say(f"optimisation takes {100 * one * len(chosen) / 60:.1f} minutes")
        if machine.device.type == "cuda":  # loads kernels before the clock counts
            optimise(vqgan, clip, texts[chosen[:8]], (0.1,), gpt.cfg.grid, cfg.seed, machine)
        bar = Progress(len(chosen), unit="prompt optimised")
        for some in np.array_split(chosen, -(-len(chosen) // 8)):
            parts.append(optimise(vqgan, clip, texts[some], (10 * one, 100 * one), gpt.cfg.grid, cfg.seed,
                                  machine))
            bar(len(some))
        what = wanted and [wanted[i] for i in chosen]
        first = made[chosen * cfg.n]
        mine = features(first)
        judge_row(f"our first pictures of {len(chosen)} prompts, {one * 1e3:.0f} ms each", first, what, list(chosen),
                  chosen)
        for factor, pictures in zip((10, 100), map(np.concatenate, zip(*parts))):
            name = f"those by optimisation against CLIP, {factor} times our time"
            judge_row(name, pictures, what, list(chosen), chosen)
            sheet[name] = np.zeros_like(made[::cfg.n])
            sheet[name][chosen] = pictures
            findings[name] = {"ours is nearer": nearer(mine, features(pictures), reference)}
            say.append(f"Our Fréchet distance is smaller than that of {name} in "
                       f"{findings[name]['ours is nearer']:.0%} of 40 resamplings of the {len(chosen)} prompts.")
    say.append(f"GPT {cfg.gpt}, seed {cfg.seed}; {sample.described(options)}. Shares with Wilson's 95% intervals, "
               "means ± 1.96 standard errors, Fréchet distances ± 1.96 standard deviations over resamplings; "
               "n counts pictures, for diversity prompts.")
    print(markdown := "\n".join([report(table, toy), *say]), flush=True)
    with whole(Path(cfg.out, "match.md")) as f:
        f.write_text(markdown + "\n")
    write_json(Path(cfg.out, "match.json"), {"config": asdict(cfg), "options": options, "judge": referee.name,
                                             "seed": cfg.seed, "table": table, "findings": findings})
    save_grid(Path(cfg.out, "match.png"), [Image.fromarray(p) for p in made], 2 * cfg.n, prompts, cfg.n)
    shown = np.sort(chosen[:12]) if cfg.optimise else np.arange(0, len(prompts), max(1, len(prompts) // 12))
    save_grid(Path(cfg.out, "compare.png"), [Image.fromarray(p[i]) for p in sheet.values() for i in shown], len(shown),
              list(sheet), len(shown))
    machine.say(f"wrote {cfg.out}/match.json, match.md, match.png (all prompts) and compare.png (a row for each kind)")
    if toy and table[ours]["both"]["share"] < cfg.min_match:
        raise SystemExit(1)


def report(table, toy):
    """The rows as Markdown, every figure with its interval and the number of samples."""
    def cell(x):
        if x is None:
            return ""
        if "share" in x:
            return f"{x['share']:.1%} ({x['low']:.1%}–{x['high']:.1%}), n={x['n']}"
        return f"{x['mean']:.3f}" + (f" ± {x['half']:.3f}" if x["half"] is not None else "") + f", n={x['n']}"
    names = (["object", "colour", "both", "unseen", "background"] if toy else []) + ["similarity", "retrieval"]
    lines = []
    for columns in (names, ["frechet", "diversity", "nearest"]):
        lines += ["| pictures | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
        lines += [f"| {what} | " + " | ".join(cell(row.get(k)) for k in columns) + " |" for what, row in table.items()]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
