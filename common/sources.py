"""Where images come from: a folder or tars, in which every file met is accounted for."""
import collections
import contextlib
import glob
import hashlib
import io
import os
import re
import stat
import tarfile
from pathlib import Path

import numpy as np

from common.images import crop, open_image
from common.options import fail

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff",
            ".ppm", ".pgm", ".pbm", ".tga", ".jp2", ".avif"}
HEIC = {".heic", ".heif"}
ARCHIVES = {".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar"}


class ImageSource:
    """The images of a folder, at any depth, or of .tar shards: one, a folder of them, or a pattern.

    `names` are sorted; open(name) decodes one. Members of a tar are read in place, nothing is
    unpacked. Whatever else was met is counted: `skipped` [(name, reason)], for what has an image's
    name but is none, and `ignored` {kind: count}. `sha256` is of names, sizes and times.
    """

    def __init__(self, data):
        self.data, self.tar_index = Path(data), {}   # name in a tar -> (tar, offset, bytes)
        self.skipped, self.ignored = [], collections.Counter()
        self.suffixes = SUFFIXES | (HEIC if register_heic() else set())
        stamps, shards = {}, []                      # name -> size and time
        if self.data.is_dir():
            shards = self.walk(stamps)
        else:
            found = [self.data] if self.data.is_file() else sorted(map(Path, glob.glob(str(data))))
            shards = [shard for shard in found if self.look_at(shard, shard.name)]
            if not shards:
                fail(f"there is no folder or .tar {data}; --data takes a folder of images, or tars"
                     f"{self.passed_over()}")
        if shards and shards[0].suffix.lower() in self.suffixes and not self.data.is_dir():
            fail(f"{shards[0]} is a single image; --data takes the folder that it lies in")
        root = os.path.commonpath([s.parent for s in shards]) if shards else ""
        loose = bool(stamps)  # then members keep the tar's name in front, against collisions
        for shard in shards:
            name = shard.relative_to(root) if loose else shard.relative_to(root).with_suffix("")
            many = loose or len(shards) > 1
            self.index_tar(shard, f"{name.as_posix()}/" if many else "", stamps)
        self.names = sorted(stamps)
        listing = "\n".join(f"{name} {stamps[name]}" for name in self.names)
        self.sha256 = hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest()
        if not self.names:
            fail(f"no images in {data} (looked for {' '.join(sorted(SUFFIXES))} and .tar)"
                 f"{self.passed_over()}")

    def walk(self, stamps):
        """Find the images below the folder, following links but entering each folder once. Fills
        in stamps, skipped and ignored; returns the tars."""
        shards, entered = [], set()

        def refuse(error):
            self.skipped.append((error.filename, f"folder can't be opened: {error.strerror}"))

        for root, folders, files in os.walk(self.data, followlinks=True, onerror=refuse):
            real = os.path.realpath(root)
            if real in entered:
                folders.clear()
                continue
            entered.add(real)
            folders.sort()
            for file in files + [f for f in folders if Path(f).suffix.lower() in self.suffixes]:
                path = Path(root, file)
                name, suffix = path.relative_to(self.data).as_posix(), path.suffix.lower()
                if is_companion(path.relative_to(self.data)):
                    self.ignored["companion of macOS"] += 1
                elif suffix in self.suffixes | {".tar"}:
                    info = self.look_at(path, name)
                    if info and suffix == ".tar":
                        shards.append(path)
                    elif info:
                        stamps[name] = f"{info.st_size} {int(info.st_mtime)}"
                else:
                    self.ignored[kind_by_suffix(path)] += 1
        return sorted(shards)

    def look_at(self, path, name):
        """The stat of a regular file; None, and an entry in `skipped`, for anything else."""
        try:
            info = path.stat()
        except OSError as e:
            self.skipped.append((name, f"can't be opened: {e.strerror}"))
            return None
        if not stat.S_ISREG(info.st_mode):
            is_folder = stat.S_ISDIR(info.st_mode)
            self.skipped.append((name, "a folder" if is_folder else "not a plain file"))
            return None
        return info

    def index_tar(self, shard, prefix, stamps):
        """Note where each image of a tar lies."""
        try:
            with tarfile.open(shard, "r:") as tar:
                for m in tar:
                    name, suffix = prefix + m.name.removeprefix("./"), Path(m.name).suffix.lower()
                    if not m.isdir() and is_companion(Path(m.name)):
                        self.ignored["companion of macOS"] += 1
                    elif suffix in self.suffixes and m.isreg() and not m.issparse():
                        self.tar_index[name] = str(shard), m.offset_data, m.size
                        stamps[name] = f"{m.size} {int(m.mtime)}"
                    elif suffix in self.suffixes:
                        self.skipped.append((name, "a folder" if m.isdir() else "not a plain file"))
                    elif not m.isdir():
                        self.ignored[kind_by_suffix(Path(m.name))] += 1
        except (tarfile.TarError, OSError, ValueError) as e:
            with open(shard, "rb") as f:
                compressed = f.read(6)[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5", b"PK")
            hint = "it is compressed: unpack it first" if compressed else f"cut or damaged: {e}"
            fail(f"{shard} is no tar that can be read ({hint})")

    def account(self):
        """Every file met, in one line: images, what was ignored by kind, what was skipped and why.
        """
        return f"{len(self.names):,} images in {self.data}{self.passed_over()}"

    def passed_over(self):
        """What was not taken for an image, as the end of a sentence; empty if there is nothing."""
        words = [f"{n:,} {kind}" for kind, n in self.ignored.most_common()]
        if HEIC & set(self.ignored):
            words.append("HEIC can be read once pillow-heif is installed")
        if any(f".{kind.split('.')[-1]}" in ARCHIVES for kind in self.ignored):
            words.append("archives other than .tar must be unpacked first")
        text = f"; ignored {', '.join(words)}" if words else ""
        if self.skipped:
            text += f"; skipped {len(self.skipped)}: {count_reasons(self.skipped)}"
        return " ".join(text.split())

    def open(self, name, size=0):
        """An image as RGB, whose short side is at least a quarter of `size`. Raises OSError or
        ValueError, saying why not."""
        try:
            if name in self.tar_index:
                shard, offset, length = self.tar_index[name]
                with open(shard, "rb") as f:
                    f.seek(offset)
                    image = open_image(io.BytesIO(f.read(min(length, 1 << 30))))
            else:
                image = open_image(self.data / name)
        except (OSError, ValueError) as e:  # the same words wherever the file lies
            reason = re.sub(r"'?<_io\.BytesIO[^>]*>'?", "it", str(e))
            raise ValueError(reason.replace(f"'{self.data / name}'", "it")) from e
        if min(image.size) * 4 < size:
            raise ValueError(f"{image.width} x {image.height} pixels are too few for {size}")
        return image


def register_heic():
    """Whether Pillow can read HEIC, by the package pillow-heif."""
    with contextlib.suppress(ImportError):
        import pillow_heif
        pillow_heif.register_heif_opener()
        return True
    return False


def is_companion(path):
    """Whether macOS made this file beside another, for what is known of that one."""
    return path.name.startswith("._") or "__MACOSX" in path.parts


def kind_by_suffix(path):
    """What a file is counted as that is no image: .txt, .tar.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes if suffixes[:1] == [".tar"] else suffixes[-1:]) or "file without suffix"


def kind_of(reason):
    """A reason without its numbers: what many of one kind have in common."""
    return " ".join(word for word in reason.split() if not any(c.isdigit() for c in word))


def count_reasons(skipped):
    """[(name, reason)] -> "150 like thumbs/a.png: too few pixels; ...", a part for each kind."""
    kinds = {}
    for name, reason in skipped:
        kinds.setdefault(kind_of(reason), []).append(f"{name}: {reason}")
    return "; ".join(f"{len(found)} like {found[0]}" for found in kinds.values())


class BadImages:
    """The images that could not be read, {name: reason}: one line for each kind of reason, and an
    error once there are more than the share max_bad of all."""

    def __init__(self, max_bad, total, data):
        self.max_bad, self.total, self.data, self.reasons = max_bad, total, data, {}

    def add(self, failed, stop=False):
        """Note {name: reason} of more images; `stop`: nothing could be read instead of them."""
        kinds = set(map(kind_of, self.reasons.values()))
        for name, reason in sorted(failed.items()):
            if kind_of(reason) not in kinds:
                kinds.add(kind_of(reason))
                print(f"skipped {name} ({reason})", flush=True)
        self.reasons |= failed
        if stop or len(self.reasons) > self.max_bad * self.total:
            fail(f"{len(self.reasons)} of {self.total} images of {self.data} can't be used "
                 f"(--max_bad={self.max_bad}): {count_reasons(self.reasons.items())}")


def center_crops(source, names, size, count):
    """Centre crops of the first readable images, at most `count`: uint8 (N, size, size, 3)."""
    crops = []
    for name in names:
        with contextlib.suppress(OSError, ValueError):
            crops.append(crop(source.open(name, size), size))
        if len(crops) == count:
            break
    return np.array(crops)


def validation_images(source, val_names, train_names, size):
    """Centre crops of up to 256 held-out images, or of training ones where none can be read."""
    for names in (val_names, train_names[:1000]):
        crops = center_crops(source, names, size, 256)
        if len(crops):
            return crops
    fail(f"none of the first {len(train_names[:1000])} images of {source.data} can be read")


def split_names(source, percent):
    """An ImageSource's names -> (those to train on, those held out for validation), decided by the
    name alone."""
    def is_held_out(name):
        digest = hashlib.md5(name.encode(errors="surrogateescape")).hexdigest()
        return int(digest, 16) % 1000 < percent * 10

    splits = {True: [], False: []}
    for name in source.names:
        splits[is_held_out(name)].append(name)
    if not splits[False]:
        fail(f"all of {source.data} is held out, none left")
    return splits[False], splits[True]
