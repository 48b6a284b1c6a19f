"""Memory stays flat over batches and rows, however large the dump."""
import json
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_gpt
from common.dumps import open_dump
from common.openai_clip import clip_package
from tests.helpers import DUMP_FILES, PREPARE_OPTIONS, random_dump, run_stage, slow, start_stage
from tests.inprocess import call_stage

needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(),
                                reason="memory is read from /proc")


def resident():
    """Bytes of memory that belong to this process alone."""
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def growth(tmp_path, steps):
    """How many bytes memory grows over that many batches, after a tenth as many."""
    random_dump(tmp_path / "d")
    cfg = train_gpt.Config(batch_size=2, noise=0.5)
    batch = train_gpt.make_batches(*open_dump(tmp_path / "d")[1]["train"], cfg)
    for step in range(steps // 10):
        batch(step)
    before = resident()
    for step in range(steps // 10, steps):
        batch(step)
    return resident() - before


@needs_proc
def test_memory_is_flat_over_batches(tmp_path):
    assert growth(tmp_path, 5000) < 2 ** 20


@needs_proc
def test_memory_does_not_come_to_the_size_of_the_dump(tmp_path):
    """All of a 96 MiB dump is read, and its pages handed back (the thread that reads ahead holds
    some for a moment)."""
    arrays = []
    for name, dtype in (("tokens", np.uint16), ("clip", np.float16)):
        np.ones((2 ** 16, 384), dtype).tofile(tmp_path / name)
        arrays.append(np.memmap(tmp_path / name, dtype, "r", shape=(2 ** 16, 384)))

    def pages():  # those of mapped files too
        return int(Path("/proc/self/statm").read_text().split()[1])
    batch = train_gpt.make_batches(*arrays, train_gpt.Config(batch_size=256, noise=0.5))
    before = pages()
    for step in range(2 ** 16 // 256):
        batch(step)
    limit = 16 * 2 ** 20
    assert any((pages() - before) * os.sysconf("SC_PAGE_SIZE") < limit for _ in range(10 ** 5))


@slow
@needs_proc
def test_slow_memory_is_flat_over_100_000_batches(tmp_path):
    assert growth(tmp_path, 100_000) < 2 ** 20


@slow
def test_slow_memory_is_flat_over_a_million_rows_prepared(tmp_path):
    """A hundred times the rows, through networks that cost next to nothing, want no more memory:
    neither prepare.py nor its workers."""
    for n in (100, 10_000):
        (tmp_path / str(n)).mkdir()
        for i in range(n):
            Image.new("RGB", (20, 16), (i % 256, i // 256, 99)).save(tmp_path / f"{n}/{i}.png")
    run_stage("vqgan.py", "--data=100", "--out=vqgan", "--image_size=16", "--patch=16", "--ch=8",
              "--ch_mult=1", "--z_channels=8", "--codebook_size=64", "--vq_start=0",
              "--perceptual=0", "--max_steps=1", cwd=tmp_path)
    clip = clip_package()[0].CLIP(16, 16, 1, 64, 16, 24, 49408, 64, 1, 1)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    most = []
    for n in (100, 10_000):
        child = start_stage("prepare.py", f"--data={n}", f"--out=rows{n}", "--crops=103",
                            "--chunk=25", "--vqgan=vqgan/vqgan.pt", "--clip=clip.pt", cwd=tmp_path,
                            stdout=subprocess.DEVNULL)
        ended = os.wait4(child.pid, 0)
        assert os.waitstatus_to_exitcode(ended[1]) == 0
        most.append(ended[2].ru_maxrss * 1024)  # of itself and its finished workers, the largest
    assert json.loads((tmp_path / "rows10000/meta.json").read_text())["train_rows"] > 1_000_000
    assert most[1] - most[0] < 16 * 2 ** 20, most


def test_a_tar_gives_the_folders_dump(world, tmp_path):
    d = world[0]
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(d / "data/toy/train", ".")
    call_stage("prepare.py", *PREPARE_OPTIONS, f"--data={tmp_path}/t.tar", f"--out={tmp_path}/d",
               cwd=d)
    for name in DUMP_FILES:
        assert (d / "data/toy_tokens" / name).read_bytes() == (tmp_path / "d" / name).read_bytes()
