"""The files between stages 2 and 3: fixed-size rows of tokens and embeddings, memory-mapped.

    {train,val}_tokens.bin   uint16 (uint32 above 65,536 codes), C order [rows, T]
    {train,val}_clip.bin     float16, C order [rows, D], unit length
    meta.json                shapes, dtypes, hashes, what made the rows, the modality gap
"""
import json
from pathlib import Path

import numpy as np
import torch

from common.checkpoints import load_vqgan, path_from
from common.files import atomic_write, file_sha256, hash_state, write_json
from common.modality import measure_gap
from common.openai_clip import load_clip
from common.options import fail

SPLITS = ("train", "val")
PROVENANCE = ("vqgan", "vqgan_sha256", "clip", "clip_sha256", "image_mean", "text_mean")


def token_dtype(codebook_size):
    return np.uint16 if codebook_size <= 65536 else np.uint32


def write_meta(folder, meta, row_counts, grid, codebook_size, dim):
    """Write meta.json beside the four .bin files, as the sign that they are whole: `meta` says what
    made the rows, at least PROVENANCE."""
    names = [f"{split}_{kind}.bin" for split in SPLITS for kind in ("tokens", "clip")]
    meta = {**meta, "train_rows": row_counts["train"], "val_rows": row_counts["val"],
            "tokens": grid ** 2, "grid": grid, "codebook_size": codebook_size,
            "tokens_dtype": np.dtype(token_dtype(codebook_size)).name, "clip_dim": dim,
            "clip_dtype": "float16", "files": {n: file_sha256(Path(folder, n)) for n in names}}
    meta = json.loads(json.dumps(meta))  # as it will be read back
    write_json(Path(folder, "meta.json"), meta | {"digest": hash_state(meta)})
    return meta


def open_dump(folder):
    """A dump -> (meta, {"train": (tokens [rows, T], embeddings [rows, D]), "val": ...}), checked
    and memory-mapped."""
    path = Path(folder, "meta.json")
    if not path.is_file():
        fail(f"there is no dump in {folder} (no meta.json); make one: prepare.py --out={folder}")
    try:
        meta = json.loads(path.read_text())
        if meta.pop("digest") != hash_state(meta):
            fail(f"{path} is not what prepare.py wrote; prepare again into another folder")
        missing = [name for name in PROVENANCE if name not in meta]
        if missing:
            raise KeyError(", ".join(missing))
        arrays = {split: tuple(open_rows(folder, split, kind, meta) for kind in ("tokens", "clip"))
                  for split in SPLITS}
        tokens = arrays["train"][0]
        grid, codebook_size = meta["grid"], meta["codebook_size"]
        if grid ** 2 != meta["tokens"] or not len(tokens) or tokens.max() >= codebook_size:
            fail(f"the tokens in {folder} do not fit a {grid} x {grid} grid of {codebook_size} "
                 f"codes; prepare again into another folder")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        fail(f"{path} is damaged ({type(e).__name__}: {e}); prepare again into another folder")
    return meta, arrays


def open_rows(folder, split, kind, meta):
    """One .bin file, memory-mapped, after checking its size and hash."""
    rows, file = meta[f"{split}_rows"], Path(folder, f"{split}_{kind}.bin")
    width, dtype = meta["tokens" if kind == "tokens" else "clip_dim"], meta[f"{kind}_dtype"]
    if not file.is_file() or file.stat().st_size != rows * width * np.dtype(dtype).itemsize:
        fail(f"{file} is missing or not {rows} rows long; prepare again into another folder")
    if file_sha256(file) != meta["files"][file.name]:
        fail(f"{file} is not the file prepare.py wrote (its hash differs); prepare again into "
             f"another folder")
    if not rows:
        return np.zeros((0, width), dtype)
    try:
        return np.memmap(file, dtype, "r", shape=(rows, width))
    except OSError as e:
        print(f"warning: {file} can't be memory-mapped ({e.strerror}), so it is read as a whole",
              flush=True)
        return np.fromfile(file, dtype).reshape(rows, width)


def sample_rows(path, rows, dim, count=10000):
    """About `count` embeddings spread over a file of float16 [rows, dim], as float32 (n, D)."""
    step = -(-rows // count)
    out = np.zeros((-(-rows // step), dim), np.float16)
    with open(path, "rb") as f:  # not mapped: a mapped file's pages count as resident memory
        for i, row in enumerate(out):
            f.seek(i * step * row.nbytes)
            f.readinto(row)
    return torch.from_numpy(out.astype(np.float32))


def finish_dump(out, provenance, counts, image_mean, grid, codebook_size, clip):
    """Write meta.json, with what is measured of the modality gap. Returns a line on it."""
    if not np.isfinite(image_mean).all():
        fail(f"the embeddings by {clip.name} are not all finite; is that file intact?")
    images = sample_rows(Path(out, "train_clip.bin"), counts["train"], clip.dim)   # (n, D)
    text, cosine, line = measure_gap(clip, images, torch.from_numpy(image_mean).float())
    measured = {"image_mean": image_mean.tolist(), "text_mean": text.tolist(), "gap_cosine": cosine}
    write_meta(out, provenance | measured, counts, grid, codebook_size, clip.dim)
    return line


def write_dump(folder, tokens, embeddings, vqgan, clip, val_tokens=None, val_embeddings=None):
    """Write a dump from arrays, for data that does not come from a folder of images.

    tokens (N, T) of the VQGAN in the file `vqgan`, embeddings (N, D) of the CLIP `clip`, a name or
    file, row by row of the same crops; T is a square, and validation rows are optional."""
    folder, network, clip = Path(folder), load_vqgan(vqgan, "cpu"), load_clip(clip)
    tokens, embeddings = np.asarray(tokens), np.asarray(embeddings, np.float32)
    if val_tokens is None:
        val_tokens, val_embeddings = tokens[:0], embeddings[:0]
    rows = {"train": (tokens, embeddings), "val": (np.asarray(val_tokens), val_embeddings)}
    grid, size = round(tokens.shape[1] ** 0.5), network.cfg.codebook_size
    for split, (t, e) in rows.items():
        e = np.asarray(e, np.float32)
        if t.shape != (len(t), grid ** 2) or len(t) and not 0 <= t.min() <= t.max() < size:
            fail(f"tokens must be [rows, side * side], each from 0 to {size - 1}")
        if e.shape != (len(t), clip.dim) or not np.isfinite(e).all():
            fail(f"embeddings must be {len(t)} x {clip.dim} finite numbers")
        e = (e / np.linalg.norm(e, axis=1, keepdims=True)).astype(np.float16)
        for kind, x in (("tokens", t.astype(token_dtype(size))), ("clip", e)):
            with atomic_write(folder / f"{split}_{kind}.bin") as f:
                f.write_bytes(x.tobytes())
        if split == "train":
            image_mean = e.astype(np.float64).mean(0)
    provenance = {"vqgan": path_from(folder, vqgan), "vqgan_sha256": network.sha256,
                  "clip": path_from(folder, clip.name), "clip_sha256": clip.sha256,
                  "sources": len(tokens), "skipped": []}
    counts = {split: len(t) for split, (t, _) in rows.items()}
    return finish_dump(folder, provenance, counts, image_mean, grid, size, clip)
