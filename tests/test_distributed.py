"""torchrun: two processes do what one does; what is left over of it hinders nobody."""
import datetime
import os
import signal
import subprocess
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.helpers import (
    DUMP_FILES,
    GPT_OPTIONS,
    PREPARE_OPTIONS,
    ROOT,
    TOY_OPTIONS,
    VQGAN_OPTIONS,
    load_raw,
    run_stage,
    slow,
    start_stage,
)
from tests.inprocess import call_error, call_stage, changed

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def test_two_processes_train_as_one(world, tmp_path):
    """torchrun with two ranks and one process, the same global batch: the same weights after AdamW
    steps."""
    args = changed(GPT_OPTIONS, dtype="float32", cond_drop_prob=0.3, eval_every=100)
    call_stage("train_gpt.py", *args, f"--out={tmp_path}/one", cwd=world[0])
    run_stage(*TORCHRUN, ROOT / "train_gpt.py", *args, f"--out={tmp_path}/two", cwd=world[0])
    call_stage("train_gpt.py", *args, f"--out={tmp_path}/parts", "--grad_accum_steps=2",
               cwd=world[0])
    one, two, parts = (load_raw(tmp_path / n / "gpt.ckpt")["model"] for n in ("one", "two",
                                                                            "parts"))
    assert load_raw(tmp_path / "one/gpt.pt")["step"] == 6
    for k in one:
        assert (one[k] - two[k]).abs().max() <= 1e-5, k
        assert (one[k] - parts[k]).abs().max() <= 1e-5, k
    assert one["head.weight"].abs().max() > 1e-3  # it did move


def test_two_processes_prepare_the_same_files_and_train_the_same_vqgan(world, tmp_path):
    d = world[0]
    run_stage(*TORCHRUN, ROOT / "prepare.py", *PREPARE_OPTIONS, f"--out={tmp_path}/d", cwd=d)
    for name in DUMP_FILES:
        assert (d / "data/toy_tokens" / name).read_bytes() == (tmp_path / "d" / name).read_bytes()
    # all losses at work; k-means would make much of the last bit, as does a vector that lies
    # between two codes, as some do of other seeds
    args = changed(VQGAN_OPTIONS, dtype="float32", max_steps=6, disc_start=2, eval_every=100,
                   warmup=1, learning_rate=1e-3, vq_start=0, seed=3)
    call_stage("vqgan.py", *args, f"--out={tmp_path}/one", cwd=d)
    run_stage(*TORCHRUN, ROOT / "vqgan.py", *args, f"--out={tmp_path}/two", cwd=d)
    one, two = (load_raw(tmp_path / n / "vqgan.ckpt") for n in ("one", "two"))
    for part in ("model", "disc"):
        difference = torch.cat([(one[part][k] - two[part][k]).flatten() for k in one[part]])
        norm = torch.cat([x.flatten() for x in one[part].values()]).norm()
        assert difference.norm() <= 1e-4 * norm, part


@slow
def test_slow_a_compiled_vqgan_meets_its_discriminator(world, tmp_path):
    """Its steps go back through one graph several times, which a compiled one allows only if told
    beforehand."""
    run_stage("vqgan.py", *VQGAN_OPTIONS, "--compile=True", f"--out={tmp_path}/vq", cwd=world[0],
              timeout=600)


@slow
def test_slow_a_dead_rank_ends_the_job_and_a_restart_goes_on(world, tmp_path):
    args = [*TORCHRUN, ROOT / "train_gpt.py",
            *changed(GPT_OPTIONS, dtype="float32", max_steps=300, eval_every=50)]
    run_stage(*args, f"--out={tmp_path}/whole", cwd=world[0])
    args.append(f"--out={tmp_path}/killed")

    def killed(number, after):
        """What a job says whose last rank gets this signal, once the file `after` is there."""
        job = start_stage(*args, cwd=world[0], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        while not after.exists():
            assert job.poll() is None
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(children[-1]), number)
        start, said = time.time(), job.communicate(timeout=60)
        assert job.returncode != 0 and time.time() - start < 60, said
        return said
    # a rank that is told to stop alone takes the others with it, and the first one saves
    assert "the same command goes on" in killed(signal.SIGTERM, tmp_path / "killed/gpt.jsonl")[0]
    (tmp_path / "killed/gpt.ckpt").unlink()
    assert "SIGKILL" in killed(signal.SIGKILL, tmp_path / "killed/gpt.ckpt")[1]
    run_stage(*args, cwd=world[0])
    for name, part in (("gpt.ckpt", "model"), ("gpt.pt", "ema")):
        whole, killed = (load_raw(tmp_path / n / name)[part] for n in ("whole", "killed"))
        assert all(torch.equal(whole[k], killed[k]) for k in whole)


def set_ranks(monkeypatch, **values):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT",
                 "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_left_over_ranks_keep_nobody_waiting(world, tmp_path, monkeypatch):
    """What a batch system or an earlier torchrun left in the environment."""
    d, train = world[0], ["train_gpt.py", *GPT_OPTIONS, f"--out={tmp_path}/g"]
    set_ranks(monkeypatch, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    out = call_stage("sample.py", "a bus", "--n=1", f"--out={tmp_path}/s.png", cwd=d).stdout
    assert "wrote" in out
    out = call_stage("toy.py", *TOY_OPTIONS, cwd=d).stdout
    assert "is finished" in out
    for script, *args in (train, ["vqgan.py", *VQGAN_OPTIONS, f"--out={tmp_path}/v"],
                          ["prepare.py", f"--out={tmp_path}/p"]):
        line = call_error(script, *args, cwd=d)
        assert "RANK, WORLD_SIZE" in line and "MASTER_ADDR" in line and "torchrun" in line
    set_ranks(monkeypatch, WORLD_SIZE="2")
    assert "RANK" in call_error(*train, cwd=d)
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    set_ranks(monkeypatch, WORLD_SIZE="two", **ranks)
    assert "whole numbers" in call_error(*train, cwd=d)
    # the other process never comes: after the time that is waited, a line
    set_ranks(monkeypatch, WORLD_SIZE="2", **ranks)
    waits, join = [], torch.distributed.init_process_group

    def hurry(backend, timeout):
        waits.append(timeout)
        join(backend, timeout=datetime.timedelta(seconds=1))
    with mock.patch.object(torch.distributed, "init_process_group", hurry):
        line = call_error(*train, cwd=d)
    assert "did not meet" in line and waits[0] <= datetime.timedelta(minutes=10)
    set_ranks(monkeypatch, LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")  # of no consequence
    assert "wrote" in call_stage(*train, cwd=d).stdout


@pytest.mark.parametrize("script", ["toy.py", "sample.py"])
def test_stages_that_run_alone_say_so_under_torchrun(world, tmp_path, monkeypatch, script):
    """Two of them would race for one folder."""
    set_ranks(monkeypatch, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1",
              MASTER_PORT="29533", TORCHELASTIC_RUN_ID="none")
    words = ["a bus"] if script == "sample.py" else TOY_OPTIONS
    line = call_error(script, *words, f"--out={tmp_path}/x.png", cwd=world[0])
    assert "runs alone" in line and "torchrun" in line and not list(tmp_path.iterdir())
