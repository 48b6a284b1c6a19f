"""Stage 5: do the pictures match the words? On the toy world that can be known: a small classifier, trained on true
drawings and their attributes and on nothing else, says what a picture shows. It judges true held-out drawings and their
reconstructions too, which is as well as any generator behind this VQGAN could do."""
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import sample
from common import (AutoAmount, AutoShare, AutoWhole, Count, Device, Dtype, Machine, Progress, Share, Whole, configure,
                    crop, fail, learning_rate, save_grid, to_image, to_tensor, whole, write_json)
from toy import BACKGROUNDS, COLOURS, OBJECTS, read_world


@dataclass
class Config:
    data: str = "data/toy"              # the toy world: drawings and captions.tsv
    out: str = "out/toy"                # match.json, judge.pt, match.png
    gpt: str = ""                       # as in sample.py
    vqgan: str = ""                     # as in sample.py
    clip: str = ""                      # as in sample.py
    trust_jit: bool = False             # as in sample.py
    n: Count = 4                        # pictures a prompt
    cfg: AutoAmount = None              # as in sample.py
    temperature: AutoAmount = None      # as in sample.py
    top_k: AutoWhole = None             # as in sample.py
    top_p: AutoShare = None             # as in sample.py
    seed: Whole = 0                     # of the samples
    judge_steps: Count = 300            # training steps of the judge
    min_match: Share = 0.0              # exit with code 1 if fewer samples than this show the right object and colour
    batch_size: Count = 96              # pictures at a time
    device: Device = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "auto"               # as in sample.py


ATTRIBUTES = {"object": OBJECTS, "colour": tuple(COLOURS), "background": tuple(BACKGROUNDS)}


class Judge(nn.Module):
    """A small convolutional classifier, pictures (B, 3, 32, 32) in [0, 1] -> a row of logits for each attribute."""

    def __init__(self):
        super().__init__()
        body, c = [], 3
        for width in (32, 64, 128):
            body += [nn.Conv2d(c, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                     nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            c = width
        self.body = nn.Sequential(*body, nn.Flatten(), nn.Linear(c * 16, 256), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(options)) for name, options in ATTRIBUTES.items()})

    def forward(self, x):
        h = self.body(x)
        return {name: head(h) for name, head in self.heads.items()}


def judged(pictures):
    """uint8 (N, S, S, 3) -> the judge's input (N, 3, 32, 32)."""
    return F.interpolate(to_tensor(pictures), size=(32, 32), mode="bilinear", antialias=True)


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
    pictures, rows = read_world(cfg.data, "train")
    torch.manual_seed(0)
    judge = Judge().to(machine.device)
    opt = torch.optim.AdamW(judge.parameters(), lr=0.0, weight_decay=0.05)
    labels = {name: torch.tensor([options.index(r[name]) for r in rows]) for name, options in ATTRIBUTES.items()}
    bar = Progress(cfg.judge_steps)
    for step in range(cfg.judge_steps):
        index = np.random.default_rng((0, step)).integers(len(rows), size=128)
        opt.param_groups[0]["lr"] = learning_rate(step, 2e-3, 20, cfg.judge_steps)
        logits = judge(judged(pictures[index]).to(machine.device))
        loss = sum(F.cross_entropy(logits[k], labels[k][index].to(machine.device)) for k in labels)
        opt.zero_grad()
        loss.backward()
        opt.step()
        bar(loss=loss.item())
    with whole(path) as f:
        torch.save({"judge": judge.state_dict(), "world": world, "steps": cfg.judge_steps}, f)
    return judge.eval()


@torch.no_grad()
def match(judge, pictures, wanted, machine):
    """Shares of pictures, uint8 (N, S, S, 3), in which the judge sees what is wanted, a dict of attributes for each:
    each attribute over the pictures that ask for it, and "both", object and colour."""
    right = {name: [] for name in ATTRIBUTES}
    for first in range(0, len(pictures), 256):
        logits = judge(judged(pictures[first:first + 256]).to(machine.device))
        for name, options in ATTRIBUTES.items():
            right[name] += [options[i] == w[name] if name in w else None for i, w in
                            zip(logits[name].argmax(1).tolist(), wanted[first:first + 256])]
    right["both"] = [o and c for o, c in zip(right["object"], right["colour"])]
    return {name: share([r for r in hits if r is not None]) for name, hits in right.items()}


def share(hits):
    """Share of hits with Wilson's 95% interval: {"share", "low", "high", "n"}, or None if there is nothing to count."""
    if not hits:
        return None
    n, p, z = len(hits), sum(hits) / len(hits), 1.96
    mid = (p + z * z / 2 / n) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + (z / 2 / n) ** 2) / (1 + z * z / n)
    return {"share": p, "low": mid - half, "high": mid + half, "n": n}


def main():
    cfg = configure(Config)
    machine = Machine(cfg.device, cfg.dtype, training=False)
    for name in ("captions.tsv", "world.json"):
        if not Path(cfg.data, name).is_file():
            fail(f"{cfg.data} is no toy world (no {name}); draw one with toy.py")
    gpt, vqgan, clip, options = sample.load(cfg, machine)
    judge = get_judge(cfg, machine)

    drawings, rows = read_world(cfg.data, "heldout")
    table = {"true held-out drawings": match(judge, drawings, rows, machine)}
    with torch.no_grad():
        fitting = np.stack([crop(Image.fromarray(p), vqgan.cfg.image_size) for p in drawings])
        recon = [vqgan.decode(vqgan.encode(to_tensor(part).to(machine.device) * 2 - 1))
                 for part in np.array_split(fitting, 1 + len(drawings) // 64)]
    table["their reconstructions"] = match(judge, as_pixels(torch.cat(recon)), rows, machine)

    wanted = [{"colour": c, "object": o} for c in COLOURS for o in OBJECTS]
    made, per = [], []
    bar = Progress(len(wanted), unit="prompt")
    for w in wanted:
        prompt = f"a {w['colour']} {w['object']}"
        cond = gpt.condition(clip.text([prompt]), "text").expand(cfg.n, -1)
        uniform = sample.uniforms(cfg.seed, prompt, cfg.n, gpt.cfg.grid ** 2)
        made += sample.draw(gpt, vqgan, cond, uniform, options, machine, cfg.batch_size)[0]
        per += [w] * cfg.n
        bar()
    found = match(judge, as_pixels(torch.stack(made)), per, machine)
    table['samples of "a {colour} {object}", N=1'] = found

    names = ["object", "colour", "both", "background"]
    lines = ["| pictures | " + " | ".join(names) + " | n |", "| --- |" + " --- |" * (len(names) + 1)]
    for what, row in table.items():
        cells = [f"{row[k]['share']:.1%} ({row[k]['low']:.1%}–{row[k]['high']:.1%})" if row[k] else "" for k in names]
        lines.append(f"| {what} | " + " | ".join(cells) + f" | {row['object']['n']} |")
    print("\n".join(lines), flush=True)
    write_json(Path(cfg.out, "match.json"), {"config": asdict(cfg), "options": options, "table": table})
    save_grid(Path(cfg.out, "match.png"), [to_image(x) for x in made[::cfg.n]], len(OBJECTS))
    machine.say(f"right object and colour: {found['both']['share']:.1%}; wrote {cfg.out}/match.json and match.png")
    if found["both"]["share"] < cfg.min_match:
        raise SystemExit(1)


def as_pixels(x):
    """(N, 3, S, S) in [-1, 1] -> uint8 (N, S, S, 3), rounded as a saved picture is."""
    return np.stack([np.asarray(to_image(p)) for p in x])


if __name__ == "__main__":
    main()
