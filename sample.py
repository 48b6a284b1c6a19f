"""Stage 4: words in, pictures out.

CLIP's text encoder turns the words into an embedding, the GPT writes tokens behind it, the VQGAN's decoder paints them.
    python sample.py "a red bus" "a small blue fish" --n=4
With --candidates more pictures are drawn than kept, and CLIP keeps those that look most like the words. With
--image=FILE the embedding of a picture takes the words' place, for variations of it."""
import gc
import hashlib
import re
import time
from dataclasses import dataclass
from pathlib import Path

gc.disable()  # while torch is imported: there is nothing to collect, and looking for it is a tenth of the time
import numpy as np
import torch

from common import (AutoAmount, AutoCount, AutoShare, AutoWhole, Count, Device, Dtype, Machine, Whole, configure, crop,
                    fail, file_sha256, load_clip, load_gpt, load_vqgan, millions, open_picture, save_grid, to_image,
                    to_tensor, whole)
gc.enable()
gc.freeze()  # and later collections pass over what was imported


@dataclass
class Config:
    prompts: tuple = ()                 # what to draw, each in quotes
    gpt: str = ""                       # checkpoint of train_gpt.py; empty: the newest finished one under out/
    vqgan: str = ""                     # checkpoint of vqgan.py; empty: the one the GPT was trained with
    clip: str = ""                      # empty: the one the GPT was trained with
    trust_jit: bool = False             # run the code in a --clip file that is a TorchScript archive of unknown origin
    image: str = ""                     # a picture to draw variations of, instead of words
    out: str = "out/samples.png"        # the grid; each picture by itself goes into the folder of the same name
    n: AutoCount = None                 # pictures to keep of each prompt (auto: 4; classic 8)
    candidates: AutoCount = None        # pictures to draw of each, of which CLIP keeps the best n (auto: n; classic 64)
    cfg: AutoAmount = None              # classifier-free guidance, 1 is none (auto: 3; classic 1)
    temperature: AutoAmount = None      # 0 takes the likeliest token (auto: 0.7; classic 1)
    top_k: AutoWhole = None             # choose among this many likeliest codes, 0 is all (auto: 0; classic 500)
    top_p: AutoShare = None             # choose among the likeliest codes that hold this mass (auto: 1; classic 0.95)
    variety: AutoAmount = None          # how far conditions stray, in spreads of one meaning (auto: 0.5; classic 0)
    seed: Whole = 0                     # picture i of a prompt depends on (seed, prompt, i) alone
    batch_size: Count = 64              # pictures at a time
    device: Device = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "auto"               # auto (float32 on a CPU), float32, bfloat16, float16


MODERN = {"n": 4, "candidates": 0, "cfg": 3.0, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "variety": 0.5}
CLASSIC = {"n": 8, "candidates": 64, "cfg": 1.0, "temperature": 1.0, "top_k": 500, "top_p": 0.95,
           "variety": 0.0}  # as released in 2022


def starts(gpt, embedding, modality, seed, key, count, variety):
    """What pictures 0..count-1 of one embedding (1, D) start from, functions of (seed, key, i) alone: conditions
    (count, D) around that embedding and uniform random numbers (count, T), one a token."""
    rngs = [np.random.default_rng(list(hashlib.sha256(f"{seed} {i} {key}".encode(errors="replace")).digest()))
            for i in range(count)]
    uniform = torch.from_numpy(np.stack([r.random(gpt.cfg.grid ** 2, np.float32) for r in rngs]))      # (count, T)
    noise = None
    if variety:  # a product for each picture, so that none depends on its neighbours
        normal = torch.from_numpy(np.stack([r.standard_normal(len(gpt.spread), np.float32) for r in rngs]))
        noise = variety * torch.stack([e @ gpt.spread for e in normal.to(gpt.spread.device)])          # (count, D)
    return gpt.condition(embedding.expand(count, -1), modality, noise), uniform


def draw(gpt, vqgan, cond, uniform, options, machine, batch_size):
    """Conditions (N, D) and random numbers (N, T) -> (N pictures (3, S, S) in [-1, 1], seconds spent in the GPT)."""
    pictures, seconds = [], 0.0
    for c, u in zip(cond.split(batch_size), uniform.split(batch_size)):
        begun = time.time()
        tokens = gpt.generate(c.to(machine.device), u.to(machine.device), options["cfg"], options["temperature"],
                              options["top_k"], options["top_p"]).view(-1, gpt.cfg.grid, gpt.cfg.grid).cpu()
        seconds += time.time() - begun
        with torch.no_grad(), machine.autocast():
            # one at a time, so that the last bit of a pixel does not depend on its neighbours
            pictures += [vqgan.decode(t[None].to(machine.device))[0].float().cpu() for t in tokens]
    return pictures, seconds


@torch.no_grad()
def similarity(clip, pictures, embedding):
    """CLIP's cosine between Pillow pictures and one embedding (D,): a list, one number a picture."""
    return [(clip.image(to_tensor(crop(p, clip.size))[None].to(clip.device))[0] @ embedding).item() for p in pictures]


def settings(cfg, gpt, meta):
    """The sampling options as a dict, what was left to `auto` filled in for this kind of GPT."""
    dropped = not gpt.cfg.classic and meta.get("config", {}).get("drop", 1) > 0
    defaults = CLASSIC if gpt.cfg.classic else MODERN if dropped else MODERN | {"cfg": 1.0}
    options = {k: v if getattr(cfg, k, None) is None else getattr(cfg, k) for k, v in defaults.items()}
    if options["cfg"] != 1 and not dropped:
        fail(f"--cfg={options['cfg']} needs a GPT trained with dropped conditions, which this one is not; use --cfg=1")
    if options["variety"] and gpt.cfg.classic:
        fail(f"--variety={options['variety']} needs a GPT that is not classic; use --variety=0")
    return options


def described(options):
    """The sampling options in words."""
    return ", ".join(f"{k} {options[k]:g}" for k in ("cfg", "temperature", "top_k", "top_p", "variety"))


def newest_gpt():
    """The newest finished GPT under out/."""
    others = {"captioned", "unconditioned", "ablations"}  # trained by evaluate.py and ablate.py, for comparison
    found = [p for p in Path("out").glob("**/gpt.pt") if not others & set(p.parts)]
    if not found:
        fail("there is no finished GPT under out/; run make demo, or train_gpt.py")
    return str(max(found, key=lambda p: p.stat().st_mtime))


def load(cfg, machine):
    """The three networks and the sampling options (gpt, vqgan, clip, options), which are checked to go together."""
    path = cfg.gpt or newest_gpt()
    gpt, meta = load_gpt(path, machine.device)
    vqgan_path, clip_name = cfg.vqgan or meta.get("vqgan"), cfg.clip or meta["clip"]
    if not vqgan_path:
        fail(f"{path} does not say which VQGAN it goes with; name it with --vqgan=FILE")
    vqgan, sha, vcfg = load_vqgan(vqgan_path, machine.device)
    if sha != meta.get("vqgan_sha256", sha) or vcfg.codes != gpt.cfg.codes:
        fail(f"{path} was trained on tokens of another VQGAN than {vqgan_path}; name that one with --vqgan")
    clip = load_clip(clip_name, machine.device, cfg.trust_jit)
    if clip.sha256 != meta.get("clip_sha256", clip.sha256) or clip.dim != gpt.cfg.cond_dim:
        fail(f"{path} was trained on embeddings of another CLIP than {clip_name}; name that one with --clip")
    machine.say(f"sample: GPT {path} ({millions(gpt)}), VQGAN {vqgan_path}, CLIP {clip_name}, on {machine}")
    return gpt.pack(machine.dtype), vqgan, clip, settings(cfg, gpt, meta)


def main():
    cfg = configure(Config)
    if bool(cfg.prompts) == bool(cfg.image):
        fail('give either words, as in python sample.py "a red bus", or a picture, --image=FILE')
    if Path(cfg.out).suffix.lower() != ".png":
        fail(f"--out={cfg.out} must end in .png")
    try:
        "".join(cfg.prompts).encode()
    except UnicodeEncodeError:
        fail("a prompt is not UTF-8; type it on a terminal that is")
    machine = Machine(cfg.device, cfg.dtype, training=False)
    if cfg.image:
        try:
            picture = open_picture(cfg.image)
        except (OSError, ValueError) as e:
            fail(f"{cfg.image} is no picture that can be read ({e})")
    gpt, vqgan, clip, options = load(cfg, machine)
    n, count = options["n"], max(options["n"], options["candidates"])
    if cfg.image and cfg.variety is None:
        options["variety"] = 0.0  # a picture leaves nothing open that its copies could differ in
    kept = f", the best {n} of each" if count > n else ""
    machine.say(f"{len(cfg.prompts) or 1} x {count} pictures of {gpt.cfg.grid ** 2} tokens{kept} to {cfg.out}; "
                + described(options))

    pictures, labels, begun, seconds = [], [], time.time(), 0.0
    for prompt in cfg.prompts or (cfg.image,):
        if cfg.image:
            with torch.no_grad():
                embedding = clip.image(to_tensor(crop(picture, clip.size))[None].to(machine.device))    # (1, D)
            key = file_sha256(cfg.image)
        else:
            embedding, key = clip.text([prompt]), prompt
            if clip.tokenize([prompt])[1]:
                machine.say(f"warning: this CLIP reads {clip.context} tokens, the rest of '{prompt[:60]}' is cut off")
        cond, uniform = starts(gpt, embedding, "image" if cfg.image else "text", cfg.seed, key, count,
                               options["variety"])
        made, spent = draw(gpt, vqgan, cond, uniform, options, machine, cfg.batch_size)
        made, seconds = [to_image(x) for x in made], seconds + spent
        if count > n:
            scores = similarity(clip, made, embedding[0])
            best = sorted(range(count), key=lambda i: -scores[i])[:n]
            ranked = ", ".join(f"{i} ({scores[i]:.3f})" for i in best)
            machine.say(f"{prompt[:60]}: best {n} of {count} by CLIP: {ranked}")
            made = [made[i] for i in best]
        pictures += made
        labels.append(prompt)
    tokens = len(labels) * count * gpt.cfg.grid ** 2
    machine.say(f"{len(labels) * count} pictures in {time.time() - begun:.1f} s; "
                f"the GPT wrote {tokens / seconds:.0f} tokens/s")
    for i, p in enumerate(pictures):
        name = re.sub(r"\W+", "-", labels[i // n]).encode()[:60].decode(errors="ignore").strip("-")
        with whole(Path(cfg.out).with_suffix("") / f"{i // n:02d}-{name}-{i % n}.png") as f:
            p.save(f)
    across = max(1, min(round(len(labels) ** 0.5), 1100 // (n * (pictures[0].width + 4))))  # prompts side by side
    save_grid(cfg.out, pictures, n * across, labels, n)
    machine.say(f"wrote {cfg.out}, and each picture by itself to {Path(cfg.out).with_suffix('')}/")


if __name__ == "__main__":
    main()
