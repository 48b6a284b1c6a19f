"""CIFAR-10's 50,000 training photographs as a tar, and captions of them by a dozen wordings.

    python -m lab.cifar --archive=cifar-10-binary.tar.gz
(the archive is at https://www.cs.toronto.edu/~kriz/cifar.html)
writes data/cifar10-50k.tar and .tsv (path, label). Where these two lie already it only writes
data/cifar10-captions.tsv. The captions are for lab.small_clip alone."""
import hashlib
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from common.files import atomic_write, read_pairs, remove_stale
from common.options import fail, parse_options
from common.process import run_main


@dataclass
class Config:
    archive: str = ""               # CIFAR-10's binary version, as published; empty: use the tar
    data: str = "data/cifar10-50k"  # .tar and .tsv of this name
    captions: str = "data/cifar10-captions.tsv"   # to write


MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # of cifar-10-binary.tar.gz
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
WORDINGS = ("a photo of a {}", "a picture of a {}", "a {}", "the {}", "a small photo of a {}",
            "a blurry photo of a {}", "a {}, outdoors", "one {}", "a photo of the {}",
            "a close-up of a {}", "this is a {}", "a {} in the middle of the picture")


def write_tar(archive, data):
    """The training photographs of the published archive -> data.tar, and their classes data.tsv."""
    with open(archive, "rb") as f:
        if hashlib.file_digest(f, "md5").hexdigest() != MD5:
            fail(f"{archive} is not cifar-10-binary.tar.gz as published (its MD5 differs)")
    remove_stale(Path(data).parent)                          # of a call that was stopped
    records = []
    with tarfile.open(archive) as tar:
        for number in range(1, 6):
            member = f"cifar-10-batches-bin/data_batch_{number}.bin"
            records.append(np.frombuffer(tar.extractfile(member).read(), np.uint8))
    records = np.concatenate(records).reshape(-1, 3073)      # a label, then 3 x 32 x 32 pixels
    with atomic_write(f"{data}.tar") as f, tarfile.open(f, "w") as tar:
        for i, record in enumerate(records):
            content = io.BytesIO()
            Image.fromarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0)).save(content, "PNG")
            info = tarfile.TarInfo(f"{i:05d}.png")
            info.size = content.tell()
            content.seek(0)
            tar.addfile(info, content)
    with atomic_write(f"{data}.tsv") as f:
        rows = [f"{i:05d}.png\t{CLASSES[record[0]]}\n" for i, record in enumerate(records)]
        f.write_text("path\tlabel\n" + "".join(rows), encoding="utf-8")


def read_labels(data):
    """data.tsv -> {path: label} of the photographs in data.tar."""
    if not Path(f"{data}.tsv").is_file() or not Path(f"{data}.tar").is_file():
        fail(f"there is no {data}.tar with its .tsv; make them from CIFAR-10's binary version, "
             f"https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz: "
             f"python -m lab.cifar --archive=FILE")
    labels = {path: label for path, label in read_pairs(f"{data}.tsv", "label") if label}
    if not labels:
        fail(f"{data}.tsv has no class of any photograph: columns path and label, a tab between")
    return labels


def caption(wording, label):
    """A wording about a label, with the article that suits it."""
    text = wording.format(label)
    return text.replace(f"a {label}", f"an {label}") if label[0] in "aeiou" else text


def main():
    cfg = parse_options(Config)
    if cfg.archive:
        write_tar(cfg.archive, cfg.data)
    labels = read_labels(cfg.data)
    with atomic_write(cfg.captions) as f:
        rows = [f"{path}\t{caption(wording, label)}\n" for path, label in labels.items()
                for wording in WORDINGS]
        f.write_text("path\tcaption\n" + "".join(rows), encoding="utf-8")
    print(f"wrote {cfg.captions}: {len(rows)} captions of {len(labels)} images")
    return 0


if __name__ == "__main__":
    run_main(main)
