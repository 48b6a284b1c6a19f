"""Stage 2: turn a folder of pictures into the files the GPT is trained on.

Each row is one crop of one picture, seen twice: by the VQGAN as tokens, by CLIP's image encoder as an embedding. Both
networks are frozen, so this is done once, and the trainer reads fixed-size rows from memory-mapped files:

    train_tokens.bin, val_tokens.bin   uint16 (uint32 above 65,536 codes) [rows, T]
    train_clip.bin, val_clip.bin       float16 [rows, D], unit length
    meta.json                          shapes, what made the rows, the embeddings' means, what was skipped and why

Work goes in chunks of pictures, each a small file of its own until the end: a restart goes on with the missing ones,
and any number of processes can share them. Beside a GPU worker processes decode and crop; on a CPU, under Linux, they
run the networks as well, each with one thread, so that no thread waits for another."""
import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from common import (HOW, Amount, AutoCount, AutoWhole, Count, Device, Dtype, Machine, Pictures, Progress, Share, Whole,
                    Zoom, configure, crop, digest, fail, file_sha256, load_clip, load_vqgan, lock, millions, show,
                    split_names, to_tensor, whole, write_json)


@dataclass
class Config:
    data: str = "data/toy/train"        # a folder of pictures, at any depth, or .tar shards of them
    out: str = "data/toy_tokens"        # the dump: a folder of its own
    vqgan: str = "out/toy/vqgan.pt"     # checkpoint of vqgan.py
    clip: str = "out/toy/clip.pt"       # ViT-B/32 and so on, or a file
    trust_jit: bool = False             # run the code in a --clip file that is a TorchScript archive of unknown origin
    seed: Whole = 0                     # of the crops
    image_size: AutoCount = None        # pixels a side, a multiple of the VQGAN's factor (auto: what it was made for)
    crops: Count = 1                    # rows of each training picture; the first is the plain centre crop
    min_zoom: Zoom = 0.9                # the others show between this share of the picture's short side and all of it
    flip: bool = True                   # mirror half of the others
    val_percent: Amount = 2.0           # of the pictures that are held out, chosen by name
    max_bad: Share = 0.5                # stop if more of the pictures than this can't be read
    batch_size: AutoCount = None        # rows at a time through the networks (auto: 16 of 64 px in a worker, else 128)
    chunk: Count = 256                  # pictures a chunk
    workers: AutoWhole = None           # processes that decode, on a CPU also compute (auto: one a core, 8 by a GPU)
    device: Device = "auto"             # auto, cpu, cuda, cuda:1, mps
    dtype: Dtype = "float32"            # of the networks: auto, float32, bfloat16, float16


# Everyday phrases: tied to no picture, none of them a prompt of the evaluation or a caption of the toy world.
GENERIC = [f"the {noun}" for noun in (
    "person man woman child face hand dog cat bird horse cow fish insect butterfly snake bear sheep elephant tree "
    "flower leaf mushroom fruit vegetable cake pizza plate cup bottle table chair bed lamp room kitchen window door "
    "house building church tower bridge street road car bus truck train bicycle boat ship plane mountain hill beach "
    "river lake forest field garden cloud sunset star moon heart ball toy clock book phone computer sign letter shoe "
    "hat shirt bag ring painting drawing photo map crowd team game market shop fire").split()]
GENERIC += [f"a {colour} thing" for colour in "red blue green yellow pink brown purple black white".split()]
GENERIC += [f"a {colour} background" for colour in "grey white sky sand".split()]


def text_mean(phrases, pictures, scale):
    """Where CLIP keeps the texts that suit such pictures, which is what centring subtracts from a text: the mean of
    phrases' embeddings (P, D), each weighed by how often CLIP names it when it is asked what a picture (N, D) shows. No
    picture has a caption for that; a plain mean lies off, for most phrases suit no picture at hand. `scale` is CLIP's
    exp(logit_scale). Returns (D,)."""
    return (scale * pictures @ phrases.T).softmax(1).mean(0) @ phrases


class Chunks(torch.utils.data.Dataset):
    """Item c: the crops of pictures c*chunk .. , for the VQGAN (n, S, S, 3) and for CLIP (n, C, C, 3), both uint8
    and of the same part of the picture, and the pictures that failed, each with the reason. With `networks`, a function
    of those two, what it makes of them stands in their place."""

    def __init__(self, source, names, cfg, size, clip_size, crops, networks=None):
        self.source, self.names, self.cfg, self.networks = source, names, cfg, networks
        self.size, self.clip_size, self.crops = size, clip_size, crops

    def __len__(self):
        return -(-len(self.names) // self.cfg.chunk)

    def part(self, c):
        """The names of chunk c."""
        return self.names[c * self.cfg.chunk:(c + 1) * self.cfg.chunk]

    def __getitem__(self, c):
        rows, clip_rows, skipped = [], [], []
        for i, name in enumerate(self.part(c), c * self.cfg.chunk):
            try:
                picture = self.source.open(name, self.size)
            except (OSError, ValueError) as e:
                skipped.append([name, " ".join(str(e).replace(str(self.source.data / name), name).split())[:200]])
                continue
            for j in range(self.crops):
                zoom, x, y, flip = np.random.default_rng((self.cfg.seed, i, j)).random(4)
                how = (1 / (1 - zoom * (1 - self.cfg.min_zoom)), x, y, self.cfg.flip and flip < 0.5) if j else ()
                rows.append(crop(picture, self.size, *how))
                clip_rows.append(crop(picture, self.clip_size, *how))
        stack = [np.stack(r) if r else np.zeros((0, s, s, 3), np.uint8) for r, s in
                 ((rows, self.size), (clip_rows, self.clip_size))]
        return c, *(self.networks(*stack) if self.networks else stack), skipped


def main():
    cfg = configure(Config)
    machine = Machine(cfg.device, cfg.dtype, training=False)
    source = Pictures(cfg.data)
    names = source.names
    vqgan, vqgan_sha, vcfg = load_vqgan(cfg.vqgan, machine.device)
    if (cfg.image_size or 0) % vcfg.factor:
        fail(f"--image_size={cfg.image_size} does not divide by {vcfg.factor}, the factor of {cfg.vqgan}")
    clip = load_clip(cfg.clip, machine.device, cfg.trust_jit)
    out, parts = Path(cfg.out), Path(cfg.out, "parts")
    machine.lock = lock(out, machine)  # held for as long as this process lives
    made = {"config": asdict(cfg), "vqgan": str(cfg.vqgan), "vqgan_sha256": vqgan_sha, "clip": clip.name,
            "clip_sha256": clip.sha256, "sources": len(names), "sources_sha256": source.sha256}
    finished = out / "meta.json"
    for path in (finished, parts / "made.json"):
        if path.exists():
            refuse_other(path, made)
    if finished.exists():
        machine.say(f"{finished} is finished; to prepare again, choose another --out")
        shutil.rmtree(parts, ignore_errors=True)
        return
    splits = dict(zip(("train", "val"), split_names(names, cfg.val_percent)))
    if not splits["train"]:
        fail(f"all of {cfg.data} is held out, none left")
    if machine.rank == 0:
        write_json(parts / "made.json", made)
    size = cfg.image_size or vcfg.image_size
    side = size // vcfg.factor
    dtype = np.uint16 if vcfg.codes <= 65536 else np.uint32
    machine.say(f"prepare: {len(splits['train'])} pictures x {cfg.crops} crops and {len(splits['val'])} held out, from "
                f"{cfg.data}; {side} x {side} tokens by {cfg.vqgan} ({millions(vqgan)}), {clip.dim}-d embeddings by "
                f"{clip.name} ({millions(clip.model)}); on {machine}; writes {out}")

    apart = computes_apart(machine)
    workers = workers_for(machine) if cfg.workers is None else cfg.workers
    if apart:
        torch.set_num_threads(1)  # with --workers=0 as well: the last bit of a sum depends on it

    def networks(pixels, clip_pixels):
        return rows_of(pixels, clip_pixels, vqgan, clip, machine, cfg.batch_size)

    chunks = {split: Chunks(source, mine, cfg, size, clip.size, cfg.crops if split == "train" else 1,
                            networks if apart else None) for split, mine in splits.items()}
    # by number, so that ranks agree on who does what
    todo = {split: [c for c in range(machine.rank, len(chunks[split]), machine.world)
                    if not (parts / f"{split}{c:06d}.npz").exists()] for split in splits}
    left, total = sum(len(chunks[s].part(c)) for s in todo for c in todo[s]), sum(map(len, splits.values()))
    bar, bad = Progress(total, total - left, unit="picture"), 0
    for split in splits:
        for c, first, second, skipped in loader(chunks[split], todo[split], workers):
            tokens, embedding = (first, second) if apart else networks(first, second)
            with whole(parts / f"{split}{c:06d}.npz") as f:
                np.savez(f, tokens=np.asarray(tokens, dtype), clip=embedding, skipped=json.dumps(skipped))
            bar(len(chunks[split].part(c)))
            bad += len(skipped)
            stop_if_too_many(bad, cfg, names, skipped)
    if machine.world > 1:
        torch.distributed.barrier()
    if machine.rank == 0:
        join(out, parts, splits, cfg, made, side, vcfg.codes, clip, dtype, machine)


def computes_apart(machine):
    """Whether the worker processes run the networks: on a CPU, where a process can be forked with them in it. Threads
    of one network wait for each other at every layer, the longer the more decoding keeps one of them from its core."""
    return machine.device.type == "cpu" and sys.platform == "linux"


def workers_for(machine):
    """How many worker processes this process starts by default: its share of this computer's cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    mine = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return mine if computes_apart(machine) else min(mine, 2 if machine.device.type == "cpu" else 8)


def loader(chunks, todo, workers):
    """The items `todo` of `chunks`, in order, made by worker processes."""
    computing = bool(workers and chunks.networks)
    ahead = 1 if computing else 2  # a worker beside a GPU goes on while its chunk waits for the others'
    return torch.utils.data.DataLoader(chunks, None, sampler=todo, num_workers=workers,
                                       prefetch_factor=ahead if workers else None,
                                       multiprocessing_context="fork" if computing else None,
                                       worker_init_fn=end_with_parent if computing else None)


def end_with_parent(worker):
    """Have Linux end this process when its parent ends, however that ends: a chunk can take minutes to compute."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != multiprocessing.parent_process().pid:  # it has ended already
        os._exit(1)


@torch.no_grad()
def rows_of(pixels, clip_pixels, vqgan, clip, machine, batch_size=None):
    """uint8 crops (n, S, S, 3), (n, C, C, 3) -> tokens (n, T), unit embeddings (n, D), so many at a time."""
    side = pixels.shape[1] // vqgan.cfg.factor
    batch_size = batch_size or (max(2, 2 ** 16 // pixels.shape[1] ** 2) if computes_apart(machine) else 128)
    tokens, embedding = np.zeros((len(pixels), side ** 2), np.int64), np.zeros((len(pixels), clip.dim), np.float16)
    for i in range(0, len(pixels), batch_size):
        part = slice(i, i + batch_size)
        with machine.autocast():
            x = to_tensor(pixels[part], machine.device).contiguous(memory_format=torch.channels_last)
            tokens[part] = vqgan.encode(x * 2 - 1).flatten(1).cpu().numpy()
            embedding[part] = clip.image(to_tensor(clip_pixels[part], machine.device)).cpu().numpy()
    return tokens, embedding


def stop_if_too_many(bad, cfg, names, skipped):
    if bad > cfg.max_bad * len(names):
        fail(f"{bad} of {len(names)} pictures of {cfg.data} can't be read, more than --max_bad={cfg.max_bad}; "
             f"the last: {': '.join(skipped[-1])}")


def refuse_other(path, made):
    try:
        old = json.loads(path.read_text())
        differ = [k for k in made["config"] if k not in HOW and old["config"].get(k) != made["config"][k]]
        differ += [k for k in ("vqgan_sha256", "clip_sha256", "sources_sha256") if old.get(k) != made[k]]
        was = ", ".join(f"{k}={show(old['config'].get(k, old.get(k)))}" for k in differ)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        fail(f"{path} can't be read; move it away, or choose another folder with --out")
    if differ:
        fail(f"{path.parent} was made otherwise ({was}); repeat that, or choose another folder with --out")


def join(out, parts, splits, cfg, made, side, codes, clip, dtype, machine):
    """All chunks, in order, into the four .bin files; meta.json last, as the sign that they are whole."""
    rows, skipped, total, names = {}, [], np.zeros(clip.dim), sum(splits.values(), [])
    for split, mine in splits.items():
        rows[split] = 0
        with whole(out / f"{split}_tokens.bin") as f, whole(out / f"{split}_clip.bin") as g:
            with open(f, "wb") as tokens_file, open(g, "wb") as clip_file:
                for c in range(-(-len(mine) // cfg.chunk)):
                    with np.load(parts / f"{split}{c:06d}.npz") as part:
                        tokens_file.write(part["tokens"].tobytes())
                        clip_file.write(part["clip"].tobytes())
                        rows[split] += len(part["tokens"])
                        skipped += json.loads(str(part["skipped"]))
                        if split == "train":
                            total += part["clip"].astype(np.float64).sum(0)
    stop_if_too_many(len(skipped), cfg, names, skipped)
    if not rows["train"]:
        for split in splits:
            for kind in ("tokens", "clip"):
                (out / f"{split}_{kind}.bin").unlink()
        fail(f"none of the {len(splits['train'])} training pictures of {cfg.data} could be read, the first: "
             f"{', '.join(skipped[0])}")
    files = {f"{s}_{kind}.bin": file_sha256(out / f"{s}_{kind}.bin") for s in splits for kind in ("tokens", "clip")}
    phrases, step = clip.text(GENERIC).cpu(), -(-rows["train"] // 10000)
    some = np.zeros((-(-rows["train"] // step), clip.dim), np.float16)                 # (at most 10000, D)
    with open(out / "train_clip.bin", "rb") as f:  # not mapped: a mapped file's pages count as this process's memory
        for i, row in enumerate(some):
            f.seek(i * step * row.nbytes)
            f.readinto(row)
    some = torch.from_numpy(some.astype(np.float32))
    texts = text_mean(phrases, some, clip.model.logit_scale.exp().item())
    meta = {
        **made, "train_rows": rows["train"], "val_rows": rows["val"], "tokens": side ** 2,
        "grid": side, "codes": codes, "tokens_dtype": np.dtype(dtype).name,
        "clip_dim": clip.dim, "clip_dtype": "float16", "files": files, "image_mean": (total / rows["train"]).tolist(),
        "text_mean": texts.tolist(), "skipped_count": len(skipped), "skipped": skipped}
    meta = json.loads(json.dumps(meta))  # as it will be read back
    write_json(out / "meta.json", meta | {"digest": digest(meta)})
    shutil.rmtree(parts)
    gap, nearest = (torch.tensor(meta["image_mean"]) - texts).norm(), (some @ phrases.T).max(1).values.mean()
    machine.say(f"modality gap: {gap:.3f} between the mean embeddings of pictures and of {len(GENERIC)} generic "
                f"phrases, each counted as often as it suits one; cosine of a picture to the nearest {nearest:.3f}")
    first = f", the first: {': '.join(skipped[0])}" if skipped else ""
    machine.say(f"wrote {rows['train']} training and {rows['val']} validation rows to {out}; {len(skipped)} pictures "
                f"skipped{first}; next: python train_gpt.py --data={out}")


if __name__ == "__main__":
    main()
