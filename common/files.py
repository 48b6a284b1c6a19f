"""Files: written atomically, hashed, and folders locked against a second run."""
import contextlib
import csv
import errno
import hashlib
import json
import os
import re
from pathlib import Path

import torch

from common.options import fail

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def atomic_write(path):
    """Write a file whole or not at all: yields a temporary path, renamed to `path` at the end."""
    path = Path(path)
    temporary = path.with_name(f"{path.stem}.clipgen-{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # some file systems refuse to sync a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        # torch.save wraps what the disk says into a RuntimeError, with a position instead of words
        if isinstance(e, OSError | RuntimeError):
            full = "no space left on the disk" if "unexpected pos" in str(e) else e
            fail(f"could not write {path}: {getattr(e, 'strerror', None) or full}; "
                 f"what was there before is untouched")
        raise


def write_json(path, value):
    with atomic_write(path) as f:
        f.write_text(json.dumps(value, indent=1) + "\n")


def save_tensors(path, contents):
    """torch.save, whole or not at all. The same contents are the same bytes: given a path, it would
    write that into the file."""
    with atomic_write(path) as temporary, open(temporary, "wb") as f:
        torch.save(contents, f)


def remove_stale(folder):
    """Remove the temporary files of atomic_write whose process was killed."""
    for path in Path(folder).glob("*.clipgen-*"):
        pid = re.search(r"\.clipgen-(\d+)(\.\w+)?$", path.name)
        try:
            os.kill(int(pid[1]) if pid else os.getpid(), 0)
        except (ProcessLookupError, OverflowError):
            path.unlink(missing_ok=True)
        except OSError:  # it is somebody else's process
            pass


def lock_folder(folder, rank=0):
    """Refuse to work in a folder that another run is working in. Returns what to keep for as long.

    The lock is a POSIX record lock: it ends with this process, however that ends, and forked
    workers do not hold it.
    """
    if rank > 0 or fcntl is None:
        return None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = open(Path(folder, ".lock"), "a")
    except OSError as e:
        fail(f"could not write in {folder}: {e.strerror}")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
            fail(f"another run is working in {folder}; wait for it, or choose another --out")
        print(f"warning: no locks on the file system of {folder} ({e.strerror}): a second run "
              f"there is not noticed", flush=True)
    else:
        remove_stale(folder)
    return file


def file_sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def hash_state(tree, h=None):
    """SHA-256 of everything in a checkpoint: nested dicts and lists of tensors and plain values."""
    top, h = h is None, h or hashlib.sha256()
    if isinstance(tree, dict):
        for k, v in sorted(tree.items(), key=lambda item: str(item[0])):
            h.update(f"{k}:".encode(errors="surrogateescape"))
            hash_state(v, h)
    elif isinstance(tree, list | tuple):
        for v in tree:
            hash_state(v, h)
    elif isinstance(tree, torch.Tensor):
        h.update(f"{tree.dtype}{tuple(tree.shape)}".encode())
        h.update(tree.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    else:
        h.update(repr(tree).encode(errors="surrogateescape"))
    return h.hexdigest() if top else None


def is_torch_zip(path):
    """Whether a file has torch's zip form, which can be memory-mapped (older files have not)."""
    with open(path, "rb") as f:
        return f.read(4) == b"PK\x03\x04"


def read_pairs(path, column):
    """The rows of a .tsv as pairs, its columns `path` and `column`; a quote is a letter there."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = csv.DictReader(f, delimiter="\t", quoting=csv.QUOTE_NONE)
            return [(row["path"], row[column]) for row in rows]
    except (OSError, KeyError, UnicodeError, csv.Error) as e:
        fail(f"{path} can't be read: columns path and {column}, a tab between ({e})")
