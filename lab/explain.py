"""Draws every picture of docs/method.md from the models that `make demo` left, each by a function
of its own, and prints what it measures on the way.

    make demo && python -m lab.explain
    python -m lab.explain --curves=out/mine      # the loss curves of any run, and nothing else
A VQGAN that is watched in training and three GPTs that lack something are trained once and kept.
The functions of the first three chapters are in lab/explain_images.py."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import lab.explain_images as first
from common.files import atomic_write
from common.options import fail, parse_options
from common.process import run_main
from common.sampling import MODERN
from lab.demo import load_demo, paint, paint_alone, read_log, train_variants
from lab.painter import CONSTANT_GAP, make_painter, shift, shifted_text_mean, with_shifted_text_mean
from lab.pictures import bars, line_chart, save_sheet, text_grid, tile, to_palette, write_text
from sample import conditions_and_uniforms


@dataclass
class Config:
    data: str = "data/toy"           # the toy world
    dump: str = "data/toy_tokens"    # the demo's dump
    models: str = "out/toy"          # the demo's clip.pt, vqgan.pt, gpt.pt and logs
    out: str = "out/explain"         # the pictures, and what is trained for them
    curves: str = ""                 # a run's folder: draw curves.png there, and nothing else


PROMPTS = ("a red bus", "a blue fish", "a green tree", "a purple bus")  # the last is unseen


# --------------------------------------------------------------------------------------- 4. the GPT


def condition_of(demo, prompt, count=1, variety=0.0):
    """What sample.py starts from: conditions (count, D) and uniform numbers (count, T)."""
    embedding = demo.clip.encode_text([prompt])
    return conditions_and_uniforms(demo.gpt, embedding, "text", 0, prompt, count, variety)


@torch.no_grad()
def both_logits(demo, cond, tokens):
    """Logits (B, t+1, K) with the condition, and without it."""
    none = torch.ones(len(cond), dtype=torch.bool)
    return demo.gpt(cond, tokens), demo.gpt(cond, tokens, none)


def draw_first_token(demo, out, prompt="a red bus"):
    """The distribution of the first token without a condition, with it, with guidance."""
    cond, _ = condition_of(demo, prompt)
    with_cond, null = (x[0, 0] for x in both_logits(demo, cond, torch.zeros(1, 0).long()))
    rows = {"without a condition": null} | {
        f"guidance {g}": null + g * (with_cond - null) for g in (1, 3, 6)}
    codes = torch.stack([x.softmax(-1) for x in rows.values()]).sum(0).topk(9).indices
    panels, side = [], 3 * demo.vqgan.cfg.factor // 2   # the first cell and a little more
    pictures = [image.crop((0, 0, side, side)) for image in paint_alone(demo, codes, (0, 0))]
    for title, logits in rows.items():
        p = logits.softmax(-1)
        entropy = -(p * p.clamp(min=1e-12).log()).sum()
        title = f"{title}: entropy {entropy:.2f} nats"
        panels.append(bars(title, p[codes].tolist(), pictures, map(str, codes.tolist())))
        print(f"first token of '{prompt}', {title}; " + ", ".join(
            f"{code} {value:.2%}" for code, value in zip(codes.tolist()[:4], p[codes].tolist())))
    save_sheet(out / "first_token.png", [panels[:2], panels[2:]])


@torch.no_grad()
def draw_entropy(demo, out, prompt="a red bus"):
    """The entropy of each token, a mean over 64 images: a map without and one with a condition."""
    cond, uniform = condition_of(demo, prompt, 64, MODERN["variety"])
    tokens, tiles, g = demo.gpt.generate(cond, uniform), [], demo.gpt.cfg.grid
    for name, logits in zip(("with its condition", "without"),
                            both_logits(demo, cond, tokens[:, :-1])):
        logp = logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).sum(-1).mean(0)                           # (T,)
        texts = [[f"{x:.2f}" for x in row] for row in entropy.view(g, g).tolist()]
        shades = (entropy / np.log(demo.gpt.cfg.codebook_size)).view(g, g)
        tiles.append(tile(text_grid(texts, 200, 200, shades=shades), name, 200))
        print(f"entropy of '{prompt}', {name}: {entropy.sum():.1f} nats an image")
    save_sheet(out / "entropy.png", [tiles])


@torch.no_grad()
def draw_attention(demo, out, prompt="a red bus"):
    """How much the last position attends to the prefix and to each token: a row for each block."""
    cond, uniform = condition_of(demo, prompt, 64, MODERN["variety"])
    tokens, shares = demo.gpt.generate(cond, uniform), []
    x = torch.cat([demo.gpt.prefix(cond), demo.gpt.tok_emb(tokens[:, :-1])], 1)  # (B, t, C)
    x = x + demo.gpt.pos_emb
    for block in demo.gpt.blocks:
        qkv = block.qkv(block.ln_1(x)).unflatten(-1, (3, block.n_head, -1))      # (B, t, 3, H, c)
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)                                     # 3 x (B, H, t, c)
        weights = (q[:, :, -1:] @ k.mT / q.shape[-1] ** 0.5).softmax(-1)         # (B, H, 1, t)
        shares.append(weights.mean((0, 1, 2)))                                   # (t,)
        x = block(x)
    p, shares = demo.gpt.cfg.n_prefix, torch.stack(shares)
    texts = [["", *["prefix"] * p, *[f"t{i}" for i in range(shares.shape[1] - p)]]]
    texts += [[f"block {i}", *[f"{100 * v:.0f}%" for v in row]]
              for i, row in enumerate(shares.tolist(), 1)]
    shades = torch.nn.functional.pad(shares, (1, 0, 1, 0))   # the labels are white
    save_sheet(out / "attention.png", [[text_grid(texts, 850, 150, shades=shades)]])
    print(f"attention to the prefix, by block: {[f'{v:.0%}' for v in shares[:, 0].tolist()]}")


# -------------------------------------------------------------------------------------- 5. painting


def draw_painting(demo, out):
    """The tokens of four prompts as they are written, as a GIF and as a strip."""
    g, options, frames = demo.gpt.cfg.grid, MODERN, []
    starts = [condition_of(demo, prompt, 1, options["variety"]) for prompt in PROMPTS]
    cond, uniform = map(torch.cat, zip(*starts))                                 # (4, D), (4, T)
    tokens = demo.gpt.generate(cond, uniform, options["guidance"], options["temperature"])
    for count in range(g * g + 1):
        written = (torch.arange(g * g) < count).view(1, g, g).expand(len(tokens), -1, -1)
        frames.append(paint(demo, tokens.view(-1, g, g), written))
    strip = [0, 1, 3, 5, 6, 8, 12, 16]
    rows = [[tile(frames[min(i, g * g)][n], f"{i} tokens") for i in strip]
            for n in range(len(PROMPTS))]
    save_sheet(out / "painting.png", rows, PROMPTS)
    save_gif(out / "painting.gif", frames)


def save_gif(path, frames):
    """Frames, each an image of every prompt -> a GIF of them side by side."""
    sheets = []
    for images in frames:  # as small as they are, or the GIF would be large
        sheet = Image.new("RGB", (88 * len(PROMPTS), images[0].height + 24), "white")
        for i, (image, prompt) in enumerate(zip(images, PROMPTS)):
            sheet.paste(image, (88 * i + 44 - image.width // 2, 4))
            write_text(sheet, prompt, 88 * i + 44, image.height + 6)
        sheets.append(to_palette(sheet, 32))
    with atomic_write(path) as f:
        sheets[0].save(f, format="GIF", save_all=True, append_images=sheets[1:], loop=0,
                       duration=[400] * (len(sheets) - 1) + [2500])


# ------------------------------------------------------------------------------- 6. what goes wrong


def draw_wrong(demo, out):
    """The same prompts and seeds, each row with something missing or too much of it."""
    others, options = train_variants(demo, out), MODERN
    prompts = [*PROMPTS, "a yellow star", "a pink house", "a brown cup"]
    texts = demo.clip.encode_text(prompts)                                       # (7, D)
    mean = shifted_text_mean(demo.clip, CONSTANT_GAP, demo.images)
    painters = {name: make_painter(gpt, demo.vqgan, demo.runtime)
                for name, gpt in ({"demo": demo.gpt} | others).items()}
    far = {name: with_shifted_text_mean(painter, mean) for name, painter in painters.items()}
    moved = shift(texts, CONSTANT_GAP)
    rows = {"the demo: guidance 3, variety 0.5, temperature 0.7": (painters["demo"], texts, {}),
            "trained without noise and spread": (painters["no_noise"], texts, {}),
            f"texts moved by {CONSTANT_GAP}, centred": (far["demo"], moved, {}),
            f"texts moved by {CONSTANT_GAP}, not centred": (far["not_centred"], moved, {}),
            "guidance 1: none": (painters["demo"], texts, {"guidance": 1.0}),
            "guidance 15: too much": (painters["demo"], texts, {"guidance": 15.0}),
            "trained without conditions": (painters["unconditioned"], texts, {"guidance": 0.0})}
    tiles = [[tile(Image.fromarray(x), "" if i else p) for x, p in
              zip(painter(embeds, prompts, 1, options | changes), prompts)]
             for i, (painter, embeds, changes) in enumerate(rows.values())]
    save_sheet(out / "wrong.png", tiles, list(rows))


# ---------------------------------------------------------------------------------------- 7. curves


def draw_curves(folder, path):
    """The losses of all stages whose logs lie in a folder; the GPT's beside ln K."""
    panels = []
    for stage in ("toy", "vqgan", "gpt"):
        if Path(folder, f"{stage}.jsonl").is_file():
            log, lines = read_log(Path(folder, f"{stage}.jsonl")), {}
            for key in ("loss", "val_loss", "ln_K"):
                points = [(row["step"], row[key]) for row in log if key in row]
                lines |= {key: points} if points else {}
            panels.append(line_chart(f"{stage}.py".replace("gpt", "train_gpt"), lines, low=0))
    if not panels:
        fail(f"{folder} has no toy.jsonl, vqgan.jsonl or gpt.jsonl")
    save_sheet(path, [panels])


# -------------------------------------------------------------------------------------------- main


def main():
    cfg = parse_options(Config)
    if cfg.curves:
        draw_curves(cfg.curves, Path(cfg.curves, "curves.png"))
        return print(f"wrote {cfg.curves}/curves.png")
    torch.set_num_threads(1)  # networks this small are hardly faster on two
    demo, out = load_demo(cfg), Path(cfg.out)
    first.draw_steps(demo, out, cfg.models)
    first.draw_usage(demo, out, cfg.models)
    draw_curves(cfg.models, out / "curves.png")
    for draw in (first.draw_tokens, first.draw_exchange, first.draw_codes, first.draw_kept,
                 first.draw_straight_through, first.draw_gap, first.draw_nearest, first.draw_unseen,
                 draw_first_token, draw_entropy, draw_attention, draw_painting, draw_wrong):
        draw(demo, out)
    print(f"wrote the pictures of docs/method.md to {out}")


if __name__ == "__main__":
    run_main(main)
