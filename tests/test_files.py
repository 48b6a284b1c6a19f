"""Files: written whole or not at all, damaged ones found, folders locked, odd file systems."""
import contextlib
import errno
import gc
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from common import files
from common.checkpoints import load_checkpoint, load_gpt, load_vqgan, write_checkpoint
from common.dumps import open_dump
from common.files import atomic_write, lock_folder, remove_stale, write_json
from common.images import open_image
from common.openai_clip import load_clip
from common.options import parse_options
from common.sources import ImageSource
from tests.helpers import (
    DUMP_FILES,
    GPT_OPTIONS,
    PREPARE_OPTIONS,
    ROOT,
    TOY_OPTIONS,
    load_raw,
    one_line_error,
    random_dump,
    run_stage,
    save_checkpoint,
    slow,
    snapshot,
    stage_environment,
)
from tests.inprocess import call_error, call_stage, changed, link_world
from tests.test_options import Options


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    write_json(path, 1)
    with pytest.raises(ZeroDivisionError):
        with atomic_write(path) as f:
            f.write_text("half")
            raise ZeroDivisionError
    assert path.read_text() == "1\n" and os.listdir(tmp_path) == ["a.txt"]


def test_only_temporary_files_of_ended_processes_are_removed(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    for name in (f"a.clipgen-{ended.pid}.pt", f"a.clipgen-{os.getpid()}.pt", "a.clipgen-x.pt",
                 "b.pt", "my.clipgen-notes"):
        (tmp_path / name).touch()
    remove_stale(tmp_path)
    assert not (tmp_path / f"a.clipgen-{ended.pid}.pt").exists() and len(os.listdir(tmp_path)) == 4


# --------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("what", ["truncated", "edited", "meta"])
def test_a_damaged_dump_is_refused(tmp_path, what, capsys):
    random_dump(tmp_path)
    path = tmp_path / ("meta.json" if what == "meta" else "train_tokens.bin")
    data = bytearray(path.read_bytes())
    if what == "edited":
        data[100] ^= 1
    path.write_bytes(data if what == "edited" else data[:-40])
    with one_line_error(capsys, path.name):
        open_dump(tmp_path)


@pytest.mark.parametrize("what", ["cut", "bit", "swap"])
def test_damaged_checkpoints_are_found(world, tmp_path, what, capsys):
    data = bytearray((world[0] / "out/toy/vqgan.pt").read_bytes())
    if what == "bit":
        data[len(data) // 2] ^= 64
    elif what == "swap":  # another run's weights under this run's name
        checkpoint = load_raw(world[0] / "out/toy/vqgan.pt")
        checkpoint["ema"] = {k: v + 0.1 for k, v in checkpoint["ema"].items()}
        torch.save(checkpoint, tmp_path / "v.pt")
        data = (tmp_path / "v.pt").read_bytes()
    (tmp_path / "v.pt").write_bytes(data[:-1000] if what == "cut" else data)
    with one_line_error(capsys, "v.pt"):
        load_vqgan(tmp_path / "v.pt", "cpu")


def test_a_checkpoint_without_one_of_its_fields_is_one_line(world, tmp_path, capsys):
    """Whatever is missing from a checkpoint or from a dump's meta.json, and is needed, is
    named; nothing takes another value silently."""
    d = link_world(world[0], tmp_path / "w")
    sound = load_raw(d / "out/toy/gpt.pt")
    for name in ("codebook_size", "grid", "cond_dim", "n_layer", "n_head", "n_embd"):
        network = {k: v for k, v in sound["network"].items() if k != name}
        save_checkpoint(tmp_path / "g.pt", sound, network=network)
        with one_line_error(capsys, "g.pt", name):
            load_gpt(tmp_path / "g.pt", "cpu")
    sample = ["a red bus", "--n=1", f"--out={tmp_path}/s.png", f"--gpt={d}/out/toy/gpt.pt"]
    for name, says in (("ema", "lacks its ema"), ("network", "lacks its network"),
                       ("stage", "gpt.pt"), ("clip", "--clip"), ("vqgan", "--vqgan")):
        (d / "out/toy/gpt.pt").unlink()
        write_checkpoint(d / "out/toy/gpt.pt",
                         {k: v for k, v in sound.items() if k not in (name, "digest")})
        assert says in call_error("sample.py", *sample, cwd=tmp_path)
    sound = load_raw(d / "out/toy/gpt.ckpt")
    for name in ("step", "config", "inputs", "model", "ema", "adam"):
        (d / "out/toy/gpt.pt").unlink(missing_ok=True)
        (d / "out/toy/gpt.ckpt").unlink()
        write_checkpoint(d / "out/toy/gpt.ckpt",
                         {k: v for k, v in sound.items() if k not in (name, "digest")})
        line = call_error("train_gpt.py", *GPT_OPTIONS, "--out=out/toy", cwd=d)
        assert "gpt.ckpt" in line and name in line
    meta = json.loads((d / "data/toy_tokens/meta.json").read_text())
    for name in ("grid", "tokens", "train_rows", "files", "vqgan", "clip", "image_mean"):
        changed = {k: v for k, v in meta.items() if k not in (name, "digest")}
        write_json(d / "data/toy_tokens/meta.json",
                   changed | {"digest": files.hash_state(changed)})
        line = call_error("train_gpt.py", *GPT_OPTIONS, f"--out={tmp_path}/g", cwd=d)
        assert name in line and "toy_tokens" in line


def test_a_damaged_world_and_log_are_one_line_or_mended(world, tmp_path):
    """A drawing cut, captions.tsv cut in a line or between two, a log line that is no JSON."""
    d = link_world(world[0], tmp_path / "w")
    captions, drawing = d / "data/toy/captions.tsv", sorted((d / "data/toy/heldout").iterdir())[0]
    for path, cut in ((captions, 35), (captions, None), (drawing, 40)):
        data = path.read_bytes()
        end = data.rstrip(b"\n").rindex(b"\n") + 1  # without the last line
        path.unlink()
        path.write_bytes(data[:end] if cut is None else data[:-cut])
        assert "toy world" in call_error("toy.py", *TOY_OPTIONS, f"--out={tmp_path}/t", cwd=d)
        path.write_bytes(data)
    log, run = d / "out/toy/gpt.jsonl", changed(GPT_OPTIONS, out="out/toy", max_steps=9)
    lines = log.read_text().splitlines()
    log.unlink()
    log.write_bytes(b"\n".join([x.encode() for x in lines[:2]] + [
        b"\xff not JSON", b"[1]", b'{"step": "x"}', b"null", b'{"step": 3, "lo']) + b"\n")
    call_stage("train_gpt.py", *run, cwd=d)
    steps = [json.loads(x)["step"] for x in log.read_text().splitlines()]
    assert steps[:2] == [1, 2] and sorted(set(steps)) == [1, 2, 7, 8, 9]


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    torch.save({"stage": "vqgan", "x": Evil()}, tmp_path / "evil.pt")
    Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
    for script, *args in (["prepare.py", "--vqgan=evil.pt", "--data=."],
                          ["vqgan.py", "--clip=evil.pt", "--data=."],
                          ["vqgan.py", "--init_from=evil.pt", "--data=."]):
        assert "evil.pt" in call_error(script, *args, cwd=tmp_path)
    assert not (tmp_path / "owned").exists()


def mutate(data, rng):
    """One of the ways in which files go bad: cut, bits flipped, a stretch zeroed, doubled or
    overwritten."""
    data, way = bytearray(data), rng.integers(5)
    a, b = sorted(rng.integers(len(data) + 1, size=2))
    if way == 0:
        return bytes(data[:a])
    if way == 1:
        for i in rng.integers(len(data), size=rng.integers(1, 20)):
            data[i] ^= 1 << rng.integers(8)
    elif way == 2:
        data[a:b] = bytes(b - a)
    elif way == 3:
        data[a:a] = data[a:b]
    else:
        data[a:a + 8] = rng.bytes(8)
    return bytes(data)


def fuzz(world, tmp_path, count, seed):
    """Mutated images, tars, metas, config lines and checkpoints: each is read in full, or refused
    by an OSError or ValueError (images, which are then skipped) or by one line and exit code 2.
    Anything else fails the test."""
    d, rng = world[0], np.random.default_rng(seed)
    seeds = []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        image = io.BytesIO()
        Image.fromarray(rng.integers(256, size=(24, 24, 3)).astype(np.uint8)).save(image, kind)
        seeds.append(("image", image.getvalue()))
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as t:
        for i in range(3):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(seeds[0][1])
            t.addfile(member, io.BytesIO(seeds[0][1]))
    random_dump(tmp_path / "dump")
    seeds += [("tar", tar.getvalue()), ("meta", (tmp_path / "dump/meta.json").read_bytes()),
              ("config", b"--size=7 --rate=0.5 --widths=1,2 --flip=True --best=3 --name=x"),
              ("checkpoint", (d / "out/toy/gpt.pt").read_bytes()), ("clip", b"")]
    write_checkpoint(tmp_path / "small.pt",
                     {"stage": "gpt", "network": {}, "ema": {"a": torch.ones(3)}, "step": 1})
    seeds.append(("checkpoint", (tmp_path / "small.pt").read_bytes()))
    refused = 0
    for i in range(count):
        kind, data = seeds[i % len(seeds)]
        data = mutate(data, rng) if data else rng.bytes(100)
        path = tmp_path / f"fuzz{'.tar' if kind == 'tar' else '.png'}"
        path.write_bytes(data)
        start = time.time()
        try:
            if kind == "image":
                assert open_image(path).mode == "RGB"
            elif kind == "tar":
                source = ImageSource(str(path))
                for name in source.names:
                    with contextlib.suppress(OSError, ValueError):
                        source.open(name)
            elif kind == "meta":
                (tmp_path / "dump/meta.json").write_bytes(data)
                open_dump(tmp_path / "dump")
            elif kind == "config":
                parse_options(Options, {}, data.decode(errors="surrogateescape").split())
            else:
                (load_clip if kind == "clip" else load_gpt)(path, "cpu")
        except SystemExit as e:
            # 0: it may have turned into --help
            assert e.code in (0, 2) if kind == "config" else e.code == 2
            refused += 1
        except (OSError, ValueError):
            assert kind == "image"
            refused += 1
        assert time.time() - start < 20
    assert refused > count / 4


def test_fuzzed_files_are_read_or_refused(world, tmp_path):
    fuzz(world, tmp_path, 200, 0)


@slow
def test_slow_fuzzed_files_are_read_or_refused(world, tmp_path):
    fuzz(world, tmp_path, 2400, 1)


# ---------------------------------------------------------------------------------------- locks


def test_a_lock_ends_with_its_process_though_a_worker_lives_on(tmp_path, capsys):
    code = ("import os, sys, time; from common.files import lock_folder; "
            "kept = lock_folder(sys.argv[1]); "
            "os.fork() or (os.close(1), os.close(2), time.sleep(20)); os._exit(0)")
    run_stage("-c", code, tmp_path / "run", cwd=tmp_path)
    assert lock_folder(tmp_path / "run")  # the child sleeps on, the lock is free
    code = ("import sys, time; from common.files import lock_folder; "
            "kept = lock_folder(sys.argv[1]); print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path / "busy"], text=True,
                              env=stage_environment(), stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    with one_line_error(capsys, "another run is working in", "busy"):
        lock_folder(tmp_path / "busy")
    assert lock_folder(tmp_path / "busy", rank=1) is None  # other ranks share rank 0's
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert lock_folder(tmp_path / "busy")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_no_other_run(tmp_path, number, capsys):
    """Only a lock that is held means busy; elsewhere a line says what is lost."""
    refuse = OSError(number, os.strerror(number))
    with mock.patch.object(files.fcntl, "lockf", side_effect=refuse):
        assert lock_folder(tmp_path)
    assert "warning: no locks" in capsys.readouterr().out
    for busy in (errno.EWOULDBLOCK, errno.EACCES):
        with mock.patch.object(files.fcntl, "lockf", side_effect=OSError(busy, "busy")):
            with one_line_error(capsys, "another run"):
                lock_folder(tmp_path)


def test_a_run_where_folders_are_not_synced_and_files_not_mapped(world, tmp_path):
    """Fsync of a folder refused, mmap refused: the run works, and leaks no file."""
    d, fsync = world[0], os.fsync

    def no_folders(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(number)

    class Refused(np.memmap):
        def __new__(cls, *args, **options):
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
    with mock.patch.object(os, "fsync", no_folders), mock.patch.object(np, "memmap", Refused), \
            mock.patch.object(torch.UntypedStorage, "from_file",
                              side_effect=RuntimeError("unable to mmap 100 bytes")):
        gc.collect()
        opened = len(os.listdir("/dev/fd"))
        for i in range(20):
            write_json(tmp_path / f"{i}.json", i)
        assert len(os.listdir("/dev/fd")) <= opened
        out = call_stage("train_gpt.py", *GPT_OPTIONS, f"--out={tmp_path}/g", cwd=d).stdout
        assert "could not" not in out and "read as a whole" in out
        call_stage("sample.py", "a bus", "--n=1", f"--gpt={tmp_path}/g/gpt.pt",
                   f"--out={tmp_path}/s.png", cwd=d)
    plain = load_checkpoint(d / "out/toy/gpt.pt", "gpt")
    assert load_checkpoint(tmp_path / "g/gpt.pt", "gpt")["step"] == plain["step"]


# ------------------------------------------------------------------------------------- full disk


def test_a_full_disk_leaves_the_last_checkpoint(world, tmp_path):
    """Files may grow to 100 kB and no further, as on a disk that is full."""
    d = world[0]
    save_checkpoint(tmp_path / "gpt.ckpt", load_raw(d / "out/toy/gpt.ckpt"), step=3)
    before = (tmp_path / "gpt.ckpt").read_bytes()
    args = [*GPT_OPTIONS, f"--out={tmp_path}"]
    code = (f"import resource, runpy, sys; "
            f"resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)); "
            f"sys.argv[1:] = {args!r}; sys.path.insert(0, {str(ROOT)!r}); "
            f"runpy.run_path({str(ROOT / 'train_gpt.py')!r}, run_name='__main__')")
    done = run_stage("-c", code, cwd=d, code=2)
    assert "could not write" in done.stderr and "gpt.ckpt" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "gpt.ckpt").read_bytes() == before
    line = call_error("train_gpt.py", *GPT_OPTIONS, f"--out={tmp_path}/gpt.ckpt/sub", cwd=d)
    assert "could not write" in line


def can_mount():
    words = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /dev/shm"]
    found = shutil.which("unshare")
    return bool(found) and subprocess.run(words, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs to mount a small file system (unshare)")
def test_a_full_disk_is_called_one(world, tmp_path):
    """On a real one the line says what is the matter, and what was there stays."""
    (tmp_path / "small").mkdir()
    args = [sys.executable, str(ROOT / "train_gpt.py"), *GPT_OPTIONS, f"--out={tmp_path}/small"]
    script = (f"mount -t tmpfs -o size=200k tmpfs {tmp_path}/small && echo precious > "
              f"{tmp_path}/small/gpt.txt && \"$@\"; code=$?; cat {tmp_path}/small/gpt.txt; "
              f"ls {tmp_path}/small; exit $code")
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", *args], cwd=world[0],
                          capture_output=True, text=True, env=stage_environment())
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "could not write" in done.stderr and "o space left" in done.stderr
    assert "precious" in done.stdout and "clipgen" not in done.stdout


# ---------------------------------------------------------------- only what this program wrote


def test_no_folder_is_deleted_that_the_program_did_not_make(world, tmp_path):
    """A folder `chunks` or `WORLD.partial` of the user's is refused, and untouched."""
    d = world[0]
    for marker in ("photo.txt", "made.json"):
        precious = tmp_path / marker / "x/chunks" / marker
        precious.parent.mkdir(parents=True)
        precious.write_text("precious")
        line = call_error("prepare.py", *PREPARE_OPTIONS, f"--out={tmp_path / marker}/x", cwd=d)
        assert "chunks" in line and precious.read_text() == "precious"
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/photo.txt").write_text("precious")
    photos = [f"--data={d}/data/toy/train", f"--out={tmp_path}", "--workers=0"]
    call_stage("prepare.py", *PREPARE_OPTIONS, *photos, cwd=d)
    assert (tmp_path / "parts/photo.txt").read_text() == "precious"
    assert not (tmp_path / "chunks").exists()
    assert all((tmp_path / name).exists() for name in DUMP_FILES)
    precious = tmp_path / "toy.partial/photo.txt"
    precious.parent.mkdir()
    precious.write_text("precious")
    line = call_error("toy.py", *TOY_OPTIONS, f"--data={tmp_path}/toy", f"--out={tmp_path}/o",
                      cwd=d)
    assert "toy.partial" in line and precious.read_text() == "precious"
    before = snapshot(tmp_path)
    call_error("toy.py", *TOY_OPTIONS, f"--data={tmp_path}/parts", f"--out={tmp_path}/o", cwd=d)
    assert snapshot(tmp_path) == before
