"""The dump of the captioned control: that of prepare.py, with the embeddings of captions in place
of the images' own.

    python -m lab.caption_dump --dump=data/photos_tokens --out=data/photos_caption_tokens
    python train_gpt.py --data=data/photos_caption_tokens --out=out/photos/captioned --spread=0
Each row gets one of its image's captions. What the control can do more than the language-free GPT
is what captions would have bought."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.checkpoints import load_named, load_vqgan
from common.dumps import SPLITS, open_dump
from common.openai_clip import load_clip
from common.options import fail, parse_options
from common.process import run_main
from common.sources import ImageSource, split_names
from lab.baselines import write_text_dump
from lab.small_clip import read_captions


@dataclass
class Config:
    data: str = "data/cifar10-50k.tar"           # the images that the dump was made of
    captions: str = "data/cifar10-captions.tsv"  # path and caption, several lines an image allowed
    dump: str = "data/photos_tokens"             # of prepare.py
    out: str = "data/photos_caption_tokens"      # to write
    seed: int = 0                                # which of its captions a row gets


def main():
    cfg = parse_options(Config)
    (meta, arrays), source, out = open_dump(cfg.dump), ImageSource(cfg.data), Path(cfg.out)
    if meta.get("sources_sha256") != source.sha256:
        fail(f"{cfg.dump} is no dump of {cfg.data}, so its rows can't be given their captions")
    if Path(out, "meta.json").is_file():
        fail(f"{out} holds a dump already; choose another --out")
    texts, captions = read_captions(cfg.captions, source.names)
    clip, vqgan = (load_named(load, cfg.dump, meta[kind], meta[f"{kind}_sha256"], cfg.dump)
                   for kind, load in (("clip", load_clip),
                                      ("vqgan", lambda file: load_vqgan(file, "cpu"))))
    embeds = clip.encode_text(texts).numpy().astype(np.float16)                    # (texts, D)
    skipped, rows = {name for name, _ in meta["skipped"]}, {}
    for split, names in zip(SPLITS, split_names(source, meta["config"]["val_percent"])):
        names = [name for name in names if name not in skipped]
        missing = [name for name in names if name not in captions]
        if missing:
            fail(f"{cfg.captions} has no caption of {len(missing)} images, like {missing[0]}")
        crops = meta["config"]["crops"] if split == "train" else 1
        rng = np.random.default_rng((cfg.seed, SPLITS.index(split)))
        index = [rng.choice(captions[name]) for name in names for _ in range(crops)]
        rows[split] = embeds[index].reshape(-1, clip.dim)                          # (rows, D)
    counts = write_text_dump(out, meta, arrays, rows, vqgan, clip)
    print(f"wrote {counts['train']} training and {counts['val']} validation rows to {out}, each "
          f"with one of {len(texts)} captions")
    return 0


if __name__ == "__main__":
    run_main(main)
