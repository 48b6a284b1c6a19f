"""Stage 4: words in, images out.

CLIP's text encoder turns the words into an embedding, the GPT writes tokens behind it, the VQGAN's
decoder paints them.
    python sample.py "a red bus" "a small blue fish" --n=4
With --candidates more images are drawn than kept, and CLIP keeps those that look most like the
words. With --image=FILE the embedding of an image takes the words' place, for variations of it."""
import gc

if __name__ == "__main__":  # nothing to collect while torch is imported: a tenth of the start
    gc.disable()
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from common.checkpoints import load_gpt, load_named, load_vqgan, newest
from common.files import file_sha256
from common.images import crop, save_each, save_grid, to_image, to_tensor
from common.openai_clip import load_clip
from common.options import check_range, fail, parse_options
from common.process import run_main
from common.prompts import file_name, grid_labels, read_image, read_prompts
from common.runtime import Runtime, format_size
from common.sampling import format_options, sampling_options

try:
    from fast import accelerate
except ImportError:  # fast/ may be deleted: the plain network samples then
    def accelerate(gpt, dtype):
        return gpt


@dataclass
class Config:
    prompts: tuple = ()              # what to draw, each in quotes
    texts: str = ""                  # a file of more prompts, one a line
    gpt: str = ""                    # checkpoint of train_gpt.py (empty: the newest under out/)
    vqgan: str = ""                  # checkpoint of vqgan.py (empty: the one of the GPT)
    clip: str = ""                   # (empty: the one of the GPT)
    trust_jit: bool = False          # run the code in a --clip file that is TorchScript
    image: str = ""                  # an image to draw variations of, instead of words
    mix: float | None = None         # words beside --image: 0 is the image, 1 the words
    negative: str = ""               # words to be guided away from, instead of from nothing
    out: str = "out/samples.png"     # the grid; the images go into the folder of the same name
    n: int | None = None             # images to keep of each prompt (auto: 4; classic 8)
    candidates: int | None = None    # to draw of each, CLIP keeps the best n (auto: n; classic 64)
    guidance: float | None = None    # 1 is none (auto: 3; 64 tokens or more 2; classic 1)
    temperature: float | None = None  # 0: likeliest (auto: 0.7; 64 tokens or more 1; classic 1)
    top_k: int | None = None         # among this many likeliest codes (auto: 0, all; classic 500)
    top_p: float | None = None       # among those that hold this mass (auto: 1; classic 0.95)
    variety: float | None = None     # noise, in spreads (auto: 0.5; 64 tokens or more 1; classic 0)
    seed: int = 0                    # image i of a prompt depends on (seed, prompt, i) alone
    batch_size: int = 64             # images at a time
    device: str = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"              # auto (float32 on a CPU), float32, bfloat16, float16


def conditions_and_uniforms(gpt, embedding, modality, seed, key, count, variety):
    """What images 0..count-1 of one embedding (1, D) start from, functions of (seed, key, i) alone:
    conditions (count, D) and uniform numbers (count, T), one a token."""
    def rng(i):
        digest = hashlib.sha256(f"{seed} {i} {key}".encode(errors="replace")).digest()
        return np.random.default_rng(list(digest))
    rngs, noise = [rng(i) for i in range(count)], None
    uniform = np.stack([r.random(gpt.cfg.grid ** 2, np.float32) for r in rngs])  # (count, T)
    if variety:  # a matmul for each image, so that none depends on the others
        normal = np.stack([r.standard_normal(len(gpt.spread), np.float32) for r in rngs])
        normal = torch.from_numpy(normal).to(gpt.spread.device)                  # (count, D)
        noise = variety * torch.stack([e @ gpt.spread for e in normal])
    if not embedding.isfinite().all():
        fail("CLIP's embedding is not finite; is its file intact?")
    cond = gpt.condition(embedding.expand(count, -1), modality, noise)
    return cond, torch.from_numpy(uniform)


def draw(generator, vqgan, cond, uniform, options, runtime, batch_size, negative=None):
    """Conditions (N, D) and uniform numbers (N, T) -> (N images (3, S, S) in [-1, 1], seconds spent
    in the GPT). `generator` is a GPT, or what fast.accelerate makes of it; `negative` (1, D)."""
    images, seconds, grid = [], 0.0, round(uniform.shape[1] ** 0.5)
    for c, u in zip(cond.split(batch_size), uniform.split(batch_size)):
        start = time.time()
        tokens = generator.generate(
            c.to(runtime.device), u.to(runtime.device), options["guidance"],
            options["temperature"], options["top_k"], options["top_p"],
            None if negative is None else negative.expand_as(c)).cpu()           # (b, T)
        seconds += time.time() - start
        with torch.no_grad(), runtime.autocast():
            # one at a time, so that the last bit of a pixel does not depend on the others
            for t in tokens.view(-1, 1, grid, grid):
                images.append(vqgan.decode(t.to(runtime.device))[0].float().cpu())
    return images, seconds


@torch.no_grad()
def similarity(clip, images, embedding):
    """CLIP's cosine between Pillow images and one embedding (D,): a list, one number an image."""
    return [(embed_image(image, clip)[0] @ embedding).item() for image in images]


def load(cfg, runtime):
    """The three networks and the sampling options (gpt, vqgan, clip, options), which are checked to
    go together."""
    path = cfg.gpt or newest("gpt")
    gpt, meta = load_gpt(path, runtime.device)
    folder = Path(path).parent
    for kind in ("vqgan", "clip"):
        if not getattr(cfg, kind) and not meta.get(kind):
            fail(f"{path} does not say which {kind.upper()} it goes with; name it: --{kind}=FILE")
    vqgan = load_named(lambda p: load_vqgan(p, runtime.device), folder, meta.get("vqgan"),
                       meta.get("vqgan_sha256"), path, "--vqgan", cfg.vqgan)
    clip = load_named(lambda p: load_clip(p, runtime.device, cfg.trust_jit), folder,
                      meta.get("clip"), meta.get("clip_sha256"), path, "--clip", cfg.clip)
    if vqgan.cfg.codebook_size != gpt.cfg.codebook_size:
        fail(f"{path} was trained on tokens of another VQGAN than {vqgan.path}: name that one")
    if clip.dim != gpt.cfg.cond_dim:
        fail(f"{path} was trained on embeddings of another CLIP than {clip.name}: name that one")
    runtime.print0(f"sample: GPT {path} ({format_size(gpt)}), VQGAN {vqgan.path}, CLIP "
                   f"{clip.name}, on {runtime}")
    return gpt, vqgan, clip, sampling_options(cfg, gpt, meta)


def embed_text(prompt, clip, runtime):
    """A prompt -> its embedding (1, D)."""
    embedding = clip.encode_text([prompt])
    if clip.tokenize([prompt])[1]:
        runtime.print0(f"warning: this CLIP reads {clip.context} tokens, the rest of "
                       f"'{prompt[:60]}' is cut off")
    return embedding


@torch.no_grad()
def embed_image(image, clip):
    """A Pillow image -> its embedding (1, D)."""
    pixels = to_tensor(crop(image, clip.size))[None].to(clip.device)             # (1, 3, C, C)
    return clip.encode_image(pixels)


def check(cfg):
    """Refuse options that make no sense."""
    check_range(cfg, 1, 2 ** 62, "n", "candidates", "batch_size")
    check_range(cfg, 0, 1, "top_p", "mix")
    check_range(cfg, 0, 1e6, "guidance", "temperature", "variety")
    if Path(cfg.out).suffix.lower() != ".png":
        fail(f"--out={cfg.out} must end in .png")


def main():
    gc.enable()
    gc.freeze()  # later collections pass over what was imported
    cfg = parse_options(Config)
    check(cfg)
    prompts = read_prompts(cfg)
    image, has_words = read_image(cfg.image) if cfg.image else None, bool(cfg.prompts or cfg.texts)
    runtime = Runtime(cfg.device, cfg.dtype, training=False)
    gpt, vqgan, clip, options = load(cfg, runtime)
    n, count = options["n"], max(options["n"], options["candidates"])
    if image and not has_words and cfg.variety is None:
        options["variety"] = 0.0  # image conditions get no added noise
    kept = f", the best {n} of each" if count > n else ""
    runtime.print0(f"{len(prompts)} x {count} images of {gpt.cfg.grid ** 2} tokens{kept} to "
                   f"{cfg.out}; {format_options(options)}")

    generator, negative = accelerate(gpt, runtime.dtype), None
    image_embedding = embed_image(image, clip) if image else None
    if cfg.negative:
        negative = gpt.condition(embed_text(cfg.negative, clip, runtime), "text")
    images, names, start, seconds = [], [], time.time(), 0.0
    for number, prompt in enumerate(prompts):
        embedding = embed_text(prompt, clip, runtime) if has_words else image_embedding
        key = prompt if has_words else file_sha256(cfg.image)
        cond, uniform = conditions_and_uniforms(gpt, embedding, "text" if has_words else "image",
                                                cfg.seed, key, count, options["variety"])
        if has_words and image:  # between the two, in centred space
            cond = F.normalize(torch.lerp(gpt.condition(image_embedding), cond, cfg.mix), dim=-1)
        drawn, spent = draw(generator, vqgan, cond, uniform, options, runtime, cfg.batch_size,
                            negative)
        drawn, seconds = [to_image(x) for x in drawn], seconds + spent
        best = range(count)
        if count > n:
            scores = similarity(clip, drawn, embedding[0])
            best = sorted(range(count), key=lambda i: -scores[i])[:n]
            ranked = ", ".join(f"{i} ({scores[i]:.3f})" for i in best)
            runtime.print0(f"{prompt[:60]}: best {n} of {count} by CLIP: {ranked}")
        images += [drawn[i] for i in best]
        names += [file_name(number, len(prompts), prompt, i, count) for i in best]
    written = len(prompts) * count * gpt.cfg.grid ** 2
    runtime.print0(f"{len(prompts) * count} images in {time.time() - start:.1f} s; the GPT wrote "
                   f"{written / seconds:.0f} tokens/s")
    folder = Path(cfg.out).with_suffix("")
    save_each(folder, names, images)
    rows = [images[i:i + n] for i in range(0, len(images), n)]
    if image:  # the source comes first, cropped as CLIP is shown it
        rows[0].insert(0, Image.fromarray(crop(image, images[0].width)))
    save_grid(cfg.out, rows, grid_labels(prompts, not has_words), round(len(prompts) ** 0.5))
    runtime.print0(f"wrote {cfg.out}, and each image by itself to {folder}/")


if __name__ == "__main__":
    run_main(main)
