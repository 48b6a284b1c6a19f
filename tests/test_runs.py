"""Run folders: going on after any end, prolonged, anew, from other weights, after an edit; what a
run keeps, and what it says."""
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import count
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import prepare
import train_gpt
from common import progress, runtime
from common.checkpoints import load_gpt, write_checkpoint
from common.dumps import open_dump
from common.files import hash_state
from common.optim import learning_rate
from tests.helpers import (
    DUMP_FILES,
    GPT_OPTIONS,
    PREPARE_OPTIONS,
    ROOT,
    TOY_OPTIONS,
    VQGAN_OPTIONS,
    load_raw,
    read_log,
    run_stage,
    save_checkpoint,
    slow,
    snapshot,
    start_stage,
    tiny_gpt,
)
from tests.inprocess import call_error, call_stage, changed, link_world

TRAINERS = {"vqgan": VQGAN_OPTIONS, "train_gpt": GPT_OPTIONS}
STAGES = {  # stage: command, the files that it leaves for others
    "toy": (["toy.py", *TOY_OPTIONS, "--data={}/world", "--out={}", "--workers=1",
             "--dtype=float32"], ["clip.pt", "world/captions.tsv", "toy.jsonl"]),
    "vqgan": (["vqgan.py", *changed(VQGAN_OPTIONS, workers=0, eval_every=2), "--out={}",
               "--dtype=float32"], ["vqgan.jsonl"]),
    "prepare": (["prepare.py", "--val_percent=10", "--chunk=16", "--out={}", "--workers=0"],
                DUMP_FILES),
    "gpt": (["train_gpt.py", *changed(GPT_OPTIONS, eval_every=1), "--out={}", "--dtype=float32"],
            ["gpt.jsonl"])}


def assert_same_weights(a, b, *parts):
    """The weights of two checkpoint files, bit for bit."""
    a, b = load_raw(a), load_raw(b)
    for part in parts:
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][k], b[part][k]) for k in b[part]), part


def without_rates(path):
    return [metrics | {"tokens_per_s": 0} for metrics in read_log(path)]


# -------------------------------------------------------------------------------------- killed


def result(stage, folder):
    """What a finished stage left, comparable: weights and files, logs without their rates."""
    found = {}
    for name in STAGES[stage][1]:
        is_log = name.endswith(".jsonl")
        found[name] = without_rates(folder / name) if is_log else (folder / name).read_bytes()
    if stage != "prepare":
        state, final = load_raw(folder / f"{stage}.ckpt"), load_raw(folder / f"{stage}.pt")
        found |= {k: v.numpy().tobytes() for k, v in state["model"].items()}
        found |= {f"final {k}": v.numpy().tobytes() for k, v in (final["ema"] or {}).items()}
        found["step"] = final["step"]
    return found


def kill_and_go_on(world, tmp_path, stage, kills, seed):
    """Killed by the system at random moments of its life, the same command again ends with what an
    uninterrupted run leaves, bit for bit, the log with every line once, and no temporary file."""
    d, rng, said = world[0], np.random.default_rng(seed), tmp_path / f"{stage}-said"
    whole, killed = tmp_path / stage / "whole", tmp_path / stage / "killed"

    def run(folder):
        args = [a.format(folder) for a in STAGES[stage][0]]
        return start_stage(*args, cwd=d, stdout=subprocess.DEVNULL, stderr=said.open("w"))
    start = time.time()
    assert run(whole).wait() == 0, said.read_text()
    length, left = time.time() - start, kills
    for _ in range(100):
        child, until, start = run(killed), rng.uniform(0.3, 1) * length, time.time()
        try:
            child.wait(until if left else 240)
            assert child.returncode == 0, said.read_text()
            if not left:
                break
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            left -= 1
            continue
        shutil.rmtree(killed)  # it finished before it was to be killed: from the beginning
        length = time.time() - start  # as fast as the machine is now
    assert not left and result(stage, whole) == result(stage, killed)
    assert not list(killed.glob("**/*clipgen*")) and not list(killed.glob("**/*partial*"))


def kill_all(world, tmp_path, kills, seed):
    """Two stages at a time: most of a stage's life is spent importing torch."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda stage: kill_and_go_on(world, tmp_path, stage, kills, seed), STAGES))


def test_killed_at_random_moments(world, tmp_path):
    kill_all(world, tmp_path, 3, 0)


@slow
def test_slow_killed_at_random_moments(world, tmp_path):
    kill_all(world, tmp_path, 20, 1)


def test_a_killed_run_goes_on_to_the_same_weights(world, tmp_path):
    """Killed by the system (SIGKILL) at its first checkpoint, the same command ends with the
    uninterrupted weights."""
    d, args = world[0], changed(GPT_OPTIONS, dtype="float32", max_steps=30, eval_every=10)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    call_stage("train_gpt.py", *args, f"--out={whole}", cwd=d)
    child = start_stage("train_gpt.py", *args, f"--out={killed}", cwd=d, stdout=subprocess.DEVNULL)
    while child.poll() is None and not (killed / "gpt.ckpt").exists():
        pass
    child.kill()
    child.wait()
    step = load_raw(killed / "gpt.ckpt")["step"]
    assert not (killed / "gpt.pt").exists(), "finished before it could be killed"
    done = call_stage("train_gpt.py", *args, f"--out={killed}", cwd=d)
    assert f"going on from {killed}/gpt.ckpt, step {step}" in done.stdout
    assert_same_run(killed, whole)


def assert_same_run(a, b):
    """Two runs of the GPT: state, result and log."""
    assert_same_weights(a / "gpt.ckpt", b / "gpt.ckpt", "model", "ema")
    assert_same_weights(a / "gpt.pt", b / "gpt.pt", "ema")
    assert without_rates(a / "gpt.jsonl") == without_rates(b / "gpt.jsonl")


def test_a_run_goes_on_in_the_dtype_it_was_begun_in(world, tmp_path):
    """--dtype=auto measures what is faster; the second time that may be another."""
    args = ["train_gpt.py", *GPT_OPTIONS, "--dtype=auto"]
    with mock.patch.object(runtime, "bfloat16_pays", lambda: True):
        call_stage(*args, f"--out={tmp_path}/whole", cwd=world[0])
        with stopping_at(2):
            out = call_stage(*args, f"--out={tmp_path}/two", cwd=world[0], code=130).stdout
    assert f"saved {tmp_path}/two/gpt.ckpt; the same command goes on from there" in out
    with mock.patch.object(runtime, "bfloat16_pays", lambda: False):
        out = call_stage(*args, f"--out={tmp_path}/two", cwd=world[0]).stdout
    assert "step 2" in out and "cpu, bfloat16" in out
    assert_same_run(tmp_path / "two", tmp_path / "whole")


def test_nohup_is_respected(world, tmp_path):
    """A script that is started to ignore SIGHUP goes on when the session ends."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping_at(2, signal.SIGHUP):
            call_stage("train_gpt.py", *GPT_OPTIONS, f"--out={tmp_path}", cwd=world[0])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert load_raw(tmp_path / "gpt.ckpt")["step"] == 6


def stopping_at(number, with_signal=signal.SIGTERM):
    """The GPT's training gets a signal in the step of that number."""
    step, calls = train_gpt.train_step, []

    def stop(*args):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), with_signal)
        return step(*args)
    return mock.patch.object(train_gpt, "train_step", stop)


def wait_for(path, child):
    while not path.exists():
        assert child.poll() is None
        time.sleep(0.01)


def test_a_polite_kill_saves_first_and_a_folder_in_use_is_refused(world, tmp_path):
    run = ["train_gpt.py", *changed(GPT_OPTIONS, max_steps=100000, eval_every=100000),
           f"--out={tmp_path}"]
    for number in (signal.SIGTERM, signal.SIGHUP):  # as when a session ends
        child = start_stage(*run, cwd=world[0], stdout=subprocess.PIPE)
        wait_for(tmp_path / "gpt.jsonl", child)
        if number == signal.SIGTERM:
            for script, args in (("train_gpt.py", GPT_OPTIONS), ("vqgan.py", VQGAN_OPTIONS),
                                 ("prepare.py", [])):
                line = call_error(script, *args, f"--out={tmp_path}", cwd=world[0])
                assert "another run" in line
        child.send_signal(number)
        out = child.communicate(timeout=60)[0]
        step = load_raw(tmp_path / "gpt.ckpt")["step"]
        assert child.returncode == 130 and step >= 1
        assert f"saved {tmp_path}/gpt.ckpt; the same command goes on from there" in out
        (tmp_path / "gpt.jsonl").unlink()
    assert f"going on from {tmp_path}/gpt.ckpt" in out
    child = start_stage(*run, "--dry_run=True", cwd=world[0], stdout=subprocess.PIPE)
    while "knows nothing" not in child.stdout.readline():  # the last line before the steps
        assert child.poll() is None
    time.sleep(0.2)
    child.terminate()
    out = child.communicate(timeout=60)[0]
    assert child.returncode == 130 and "nothing was written" in out and "goes on" not in out
    assert not (tmp_path / "gpt.jsonl").exists()


# ------------------------------------------------------------------------- the same and others


def test_the_same_command_says_finished_and_another_config_is_refused(world):
    d = world[0]
    before = snapshot(d / "out")
    commands = [["toy.py", *TOY_OPTIONS], ["vqgan.py", *VQGAN_OPTIONS, "--out=out/toy"],
                ["train_gpt.py", *GPT_OPTIONS, "--out=out/toy"], ["prepare.py", *PREPARE_OPTIONS]]
    for script, *args in commands:
        same = call_stage(script, *args, cwd=d)
        assert "is finished" in same.stdout and "has changed" not in same.stdout
        name, value = ("crops", 1) if script == "prepare.py" else ("batch_size", 4)
        line = call_error(script, *changed(args, **{name: value}), cwd=d)
        assert f"{name}=" in line and "--out" in line
    assert snapshot(d / "out") == before


def test_a_clip_that_was_removed_is_written_again(world, tmp_path):
    d = link_world(world[0], tmp_path / "w")
    (d / "out/toy/clip.pt").unlink()
    assert "is finished" in call_stage("toy.py", *TOY_OPTIONS, cwd=d).stdout
    for name in ("clip.pt", "toy.jsonl"):
        assert (d / "out/toy" / name).read_bytes() == (world[0] / "out/toy" / name).read_bytes()


def test_paths_and_inputs_are_compared_by_what_they_are(world, tmp_path):
    """Another spelling of a path is the same path; other files under the old names are
    other inputs; where the dump or CLIP lies may differ, what it holds may not."""
    d = link_world(world[0], tmp_path / "w")
    run = ["--out=out/toy", "--data=./data/toy/train/"]
    assert "is finished" in call_stage("vqgan.py", *VQGAN_OPTIONS, *run, cwd=d).stdout
    run = ["--out=data/../data/toy_tokens/", f"--data={d}/data/toy/train",
           "--clip=out//toy/clip.pt"]
    assert "is finished" in call_stage("prepare.py", *PREPARE_OPTIONS, *run, cwd=d).stdout
    (d / "linked").symlink_to(d / "data/toy_tokens")
    run = ["--out=out/toy/", "--data=linked"]
    assert "is finished" in call_stage("train_gpt.py", *GPT_OPTIONS, *run, cwd=d).stdout
    path = sorted((d / "data/toy/train").glob("*.png"))[5]
    path.unlink()
    Image.new("RGB", (32, 32), "red").save(path)
    for script, args, says in (("vqgan.py", [*VQGAN_OPTIONS, "--out=out/toy"], "another images"),
                               ("prepare.py", PREPARE_OPTIONS, "sources_sha256")):
        assert says in call_error(script, *args, cwd=d)
    weights = load_raw(d / "out/toy/clip.pt")
    (d / "out/toy/clip.pt").unlink()
    torch.save(weights | {"logit_scale": weights["logit_scale"] + 1}, d / "out/toy/clip.pt")
    assert "another CLIP" in call_error("vqgan.py", *VQGAN_OPTIONS, "--out=out/toy", cwd=d)


def test_reasons_in_a_dump_do_not_differ_from_run_to_run(world, tmp_path):
    """No memory addresses, no folder names: two dumps of one folder are the same bytes."""
    metas = []
    for name in "ab":
        call_stage("prepare.py", *PREPARE_OPTIONS, "--workers=0", f"--out={tmp_path / name}",
                   cwd=world[0])
        meta = json.loads((tmp_path / name / "meta.json").read_text())
        assert meta.pop("digest")
        metas.append(meta | {"config": 0})
    assert metas[0] == metas[1] and metas[0]["skipped"][0][0] == "broken.png"
    assert "0x" not in json.dumps(metas[0]["skipped"]) and str(tmp_path) not in json.dumps(metas[0])


def test_a_run_made_without_an_option_goes_on_with_its_default(world, tmp_path):
    """Checkpoints from before an option was added: its default is what they were made with."""
    d = world[0]
    for name in ("vqgan.pt", "vqgan.ckpt"):
        made = load_raw(d / "out/toy" / name)
        config = {k: v for k, v in made["config"].items() if k != "muon"}
        (tmp_path / "run").mkdir(exist_ok=True)
        save_checkpoint(tmp_path / "run" / name, made, config=config)
    args = ["vqgan.py", *VQGAN_OPTIONS, f"--out={tmp_path}/run"]
    assert "is finished" in call_stage(*args, cwd=d).stdout
    assert "muon=True" in call_error(*args, "--muon=False", cwd=d)


def test_dry_runs_say_what_a_run_would_take_and_write_nothing(world):
    d = world[0]
    before = snapshot(d)
    for script, args in TRAINERS.items():
        args, seconds = changed(args, max_steps=1000, out="out/dry", dry_run=True), count()
        with mock.patch.object(progress.time, "perf_counter", lambda: float(next(seconds))):
            out = call_stage(f"{script}.py", *args, cwd=d).stdout
        assert "GiB" in out and "steps/s" in out and "hours" in out and "M parameters" in out
        assert "1 steps/s" in out and "8 rows/s" in out  # by a clock that counts the steps
        assert "nothing was written" in out
    run = [*PREPARE_OPTIONS, "--dry_run=True", "--out=out/dry"]
    out = call_stage("prepare.py", *run, cwd=d).stdout
    assert "images/s" in out and "hours" in out and "nothing was written" in out
    rows, size = re.search(r"read (\d+) rows, ([\d.]+) MB", out).groups()
    meta = json.loads((d / "data/toy_tokens/meta.json").read_text())
    bytes_a_row = 2 * meta["tokens"] + 2 * meta["clip_dim"]
    assert size == f"{int(rows) * bytes_a_row / 1e6:.1f}" != "0.0"
    assert snapshot(d) == before and not (d / "out/dry").exists()


def test_steps_that_are_not_finite_are_skipped_and_many_stop_the_run(world, tmp_path):
    for script, args in TRAINERS.items():
        args = changed(args, learning_rate=1e38, max_steps=60, dtype="float32", workers=0)
        args = [a for a in args if script == "vqgan" or "workers" not in a]
        done = call_stage(f"{script}.py", *args, f"--out={tmp_path}/{script}", cwd=world[0], code=2)
        assert "20 steps in a row were not finite" in done.stderr and done.stderr.count("\n") == 1
        assert "step skipped" in done.stdout


def test_too_many_bad_images_stop_a_run(world, tmp_path):
    args = ["prepare.py", "--val_percent=10", f"--out={tmp_path}", "--workers=0"]
    line = call_error(*args, "--max_bad=0.001", cwd=world[0])
    assert "--max_bad=0.001" in line and "broken.png" in line
    call_stage(*args, "--max_bad=0.5", cwd=world[0])  # told to go on, it does, in the same folder


def test_unreadable_images_are_replaced_at_random(world, tmp_path):
    """A folder of tiny images among good ones ends nothing; a line says why, for each kind of
    reason and not for each file; --max_bad alone decides."""
    photos = tmp_path / "photos"
    (photos / "thumbs").mkdir(parents=True)
    for i in range(40):
        Image.new("RGB", (48, 40), (6 * i, 99, 0)).save(photos / f"a{i:02d}.png")
    for i in range(60):
        Image.new("RGB", (5 + i % 3, 4)).save(photos / f"thumbs/{i:02d}.png")
    for name in ("b.png", "c.png"):
        (photos / name).write_bytes(b"no image")
    run = [*changed(VQGAN_OPTIONS, max_steps=20, eval_every=20, val_percent=5, workers=0,
                    dtype="float32"), f"--data={photos}"]
    done = call_stage("vqgan.py", *run, "--max_bad=0.9", f"--out={tmp_path}/v", cwd=world[0])
    assert done.stdout.count("skipped ") == 2, done.stdout  # too few pixels, and no image
    assert "too few for 32" in done.stdout
    line = call_error("vqgan.py", *run, "--max_bad=0.2", f"--out={tmp_path}/w", cwd=world[0])
    assert "--max_bad=0.2" in line and "too few for 32" in line


# ------------------------------------------------------------- longer, anew, from other weights


@pytest.mark.parametrize("script, stage", [("vqgan", "vqgan"), ("train_gpt", "gpt")])
def test_a_larger_max_steps_goes_on(world, tmp_path, script, stage):
    """The log says so, the learning rate follows its curve for the new length, and what stage.pt
    holds is of the whole run; the same command again is finished, a smaller one refused."""
    d, args = world[0], changed(TRAINERS[script], out=tmp_path, warmup=2, dtype="float32")
    command = [f"{script}.py", *args]
    call_stage(*command, cwd=d)
    first = {name: (tmp_path / name).read_bytes() for name in (f"{stage}.pt", f"{stage}.jsonl")}
    steps = load_raw(tmp_path / f"{stage}.ckpt")["step"]
    longer = changed(command, max_steps=12)
    out = call_stage(*longer, cwd=d).stdout
    assert f"going on from {tmp_path}/{stage}.ckpt, step {steps} of now 12" in out
    assert "learning rate" in out
    log = read_log(tmp_path / f"{stage}.jsonl")
    assert [m["step"] for m in log if "loss" in m] == list(range(1, 13))
    peak = load_raw(tmp_path / f"{stage}.ckpt")["config"]["learning_rate"]
    for metrics in log:
        if "lr" in metrics:
            total = 12 if metrics["step"] > steps else steps
            expected = learning_rate(metrics["step"] - 1, peak, 2, total)
            assert metrics["lr"] == pytest.approx(expected, rel=1e-4)
    final = load_raw(tmp_path / f"{stage}.pt")
    assert final["config"]["max_steps"] == 12
    assert "is finished" in call_stage(*longer, cwd=d).stdout
    assert "max_steps" in call_error(*command, cwd=d)
    # killed after its last checkpoint and before its end: the earlier result is not the result
    (tmp_path / f"{stage}.pt").write_bytes(first[f"{stage}.pt"])
    assert "is finished" not in call_stage(*longer, cwd=d).stdout
    assert_same_weights(tmp_path / f"{stage}.ckpt", tmp_path / f"{stage}.ckpt", "ema")
    again = load_raw(tmp_path / f"{stage}.pt")
    assert again["config"]["max_steps"] == 12 and again["step"] == final["step"]
    assert all(torch.equal(again["ema"][k], final["ema"][k]) for k in final["ema"])


def test_fresh_replaces_a_run_and_says_what(world, tmp_path):
    """Whatever was there, the weights are those of a run in an empty folder; an interrupted one
    goes on without --fresh; a result without its run is refused."""
    d, args = world[0], [*GPT_OPTIONS, "--dtype=float32"]
    other = changed(args, seed=7)
    call_stage("train_gpt.py", *args, f"--out={tmp_path}/a", cwd=d)
    call_stage("train_gpt.py", *other, f"--out={tmp_path}/b", cwd=d)
    out = call_stage("train_gpt.py", *args, f"--out={tmp_path}/b", "--fresh=True", cwd=d).stdout
    assert f"--fresh=True: a new run replaces {tmp_path}/b/gpt.ckpt" in out
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert "is finished" in call_stage("train_gpt.py", *args, f"--out={tmp_path}/b", cwd=d).stdout

    with stopping_at(2):
        out = call_stage("train_gpt.py", *other, f"--out={tmp_path}/b", "--fresh=True", cwd=d,
                         code=130).stdout
    assert "the same command without --fresh goes on" in out
    assert not (tmp_path / "b/gpt.pt").exists()  # the old run's result, not this one's
    call_stage("train_gpt.py", *other, f"--out={tmp_path}/b", cwd=d)
    call_stage("train_gpt.py", *other, f"--out={tmp_path}/c", cwd=d)
    assert_same_run(tmp_path / "b", tmp_path / "c")
    (tmp_path / "c/gpt.ckpt").unlink()
    before = snapshot(tmp_path / "c")
    line = call_error("train_gpt.py", *other, f"--out={tmp_path}/c", cwd=d)
    assert "c/gpt.pt is there without gpt.ckpt" in line and snapshot(tmp_path / "c") == before


@pytest.mark.parametrize("script, stage", [("vqgan", "vqgan"), ("train_gpt", "gpt")])
def test_init_from_starts_from_anothers_weights(world, tmp_path, script, stage):
    """The network's shape is taken from it, every other option is as given. With a learning rate
    of 0 a step changes nothing, so that the weights are seen as they were read."""
    d, source = world[0], world[0] / f"out/toy/{stage}.pt"
    shape = {"n_layer": 5, "n_embd": 64} if stage == "gpt" else {"ch": 16, "codebook_size": 32}
    run = changed(TRAINERS[script], init_from=source, out=tmp_path, learning_rate=0, max_steps=1,
                  warmup=0, seed=3, **shape, **({"vq_start": 0} if stage == "vqgan" else {}))
    out = call_stage(f"{script}.py", *run, cwd=d).stdout
    assert "going on" not in out
    made, source = load_raw(tmp_path / f"{stage}.ckpt"), load_raw(source)
    assert made["network"] == source["network"] and made["config"]["seed"] == 3
    assert all(torch.equal(made["model"][k], source["ema"][k]) for k in source["ema"]
               if k != "spread"), "weights"
    line = call_error(f"{script}.py", *changed(run, init_from=tmp_path / f"{stage}.pt"), cwd=d)
    assert "init_from=" in line  # a run that is there goes on as it was begun, or not at all
    other = "vqgan" if stage == "gpt" else "gpt"
    run = changed(run, init_from=d / f"out/toy/{other}.pt", out=tmp_path / "x")
    assert f"a checkpoint of {other}" in call_error(f"{script}.py", *run, cwd=d)


def test_init_from_the_2022_network_without_saying_so(world, tmp_path):
    """The checkpoint says that it is classic and drops out; a stop makes no difference."""
    gpt = tiny_gpt(codebook_size=64, grid=4, cond_dim=64, classic=True, dropout=0.3)
    write_checkpoint(tmp_path / "g.pt", {"stage": "gpt", "network": asdict(gpt.cfg),
                                         "ema": gpt.state_dict(), "sha256": ""})
    run = ["train_gpt.py", *changed(GPT_OPTIONS, eval_every=1, init_from=tmp_path / "g.pt")]
    call_stage(*run, f"--out={tmp_path}/a", cwd=world[0])
    with stopping_at(2):
        call_stage(*run, f"--out={tmp_path}/b", cwd=world[0], code=130)
    call_stage(*run, f"--out={tmp_path}/b", cwd=world[0])
    assert_same_run(tmp_path / "a", tmp_path / "b")
    made = load_raw(tmp_path / "a/gpt.pt")
    assert made["config"]["classic"] and made["network"]["classic"]
    assert all(torch.equal(made["ema"][k], getattr(gpt, k)) for k in ("means", "shrink", "spread"))


def test_init_from_leaves_centring_to_the_options(world, tmp_path):
    """The checkpoint is centred, the run is not."""
    run = changed(GPT_OPTIONS, init_from=world[0] / "out/toy/gpt.pt", center=False, max_steps=1)
    call_stage("train_gpt.py", *run, f"--out={tmp_path}", cwd=world[0])
    assert not load_raw(tmp_path / "gpt.pt")["ema"]["means"].any()


def test_init_from_must_fit_the_dump(world, tmp_path):
    """A GPT of another codebook, grid or CLIP is one line, before anything is trained."""
    d = world[0]
    run = ["train_gpt.py", *GPT_OPTIONS, f"--out={tmp_path}/run"]
    for shape in ({"codebook_size": 48}, {"grid": 5}, {"cond_dim": 24}):
        gpt = tiny_gpt(**{"codebook_size": 64, "grid": 4, "cond_dim": 64} | shape)
        write_checkpoint(tmp_path / "g.pt", {"stage": "gpt", "network": asdict(gpt.cfg),
                                             "ema": gpt.state_dict(), "sha256": ""})
        line = call_error(*run, f"--init_from={tmp_path}/g.pt", cwd=d)
        assert "g.pt" in line and next(iter(shape)) in line


# ---------------------------------------------------------------------------------- edited code


def test_edited_code_is_said_in_one_line(world, tmp_path):
    """A copy of the tree: an edited stage is said when a run goes on or is finished; weights that
    the edited network can't hold are one line, in every script that reads them."""
    tree, d = tmp_path / "tree", link_world(world[0], tmp_path / "w")
    tree.mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "common", ROOT / "fast"]:
        copy = shutil.copytree if path.is_dir() else shutil.copy
        if path.exists():
            copy(path, tree / path.name)

    def run(script, *args, code=0):
        return run_stage(tree / script, *args, cwd=d, code=code, PYTHONPATH=str(tree))
    gpt = [*GPT_OPTIONS, "--out=out/toy"]
    text = (tree / "train_gpt.py").read_text()
    (tree / "train_gpt.py").write_text(text + "\n# edited\n")
    finished = run("train_gpt.py", *gpt).stdout
    assert "the code has changed since this run began (train_gpt.py)" in finished
    assert "is finished" in finished and finished.count("\n") == 2
    out = run("train_gpt.py", *changed(gpt, max_steps=7)).stdout
    assert "the code has changed since this run began (train_gpt.py)" in out
    assert "wrote out/toy/gpt.pt" in out
    text = (tree / "model.py").read_text()
    edited = text.replace("self.ln_f = nn.LayerNorm(c)",
                          "self.ln_f = nn.LayerNorm(c)\n        self.extra = nn.Linear(c, c)")
    assert edited != text
    (tree / "model.py").write_text(edited)
    for script, *args in (["train_gpt.py", *changed(gpt, max_steps=9)],
                          ["sample.py", "a bus", "--gpt=out/toy/gpt.pt", "--out=s.png"]):
        done = run(script, *args, code=2)
        assert done.stderr.count("\n") == 1 and "model.py" in done.stderr, done.stderr
        assert done.stderr.startswith("error: ") and "out/toy/gpt" in done.stderr


# ------------------------------------------------------------------------------ what a run keeps


@pytest.mark.parametrize("script, stage, grid", [("vqgan", "vqgan", "recon.png"),
                                                 ("train_gpt", "gpt", "grid.png")])
def test_what_only_shows_something_ends_no_training(world, tmp_path, script, stage, grid):
    """The checkpoint is saved first; a grid that can't be written is a line, said before step 1."""
    (tmp_path / grid / "x").mkdir(parents=True)
    out = call_stage(f"{script}.py", *TRAINERS[script], f"--out={tmp_path}", cwd=world[0]).stdout
    lines = out.splitlines()
    assert sum("could not draw" in line for line in lines) >= 3
    first = next(i for i, line in enumerate(lines) if "could not draw" in line)
    assert first < next(i for i, line in enumerate(lines) if line.startswith("step "))
    assert load_raw(tmp_path / f"{stage}.ckpt")["step"] == (8 if stage == "vqgan" else 6)
    assert (tmp_path / f"{stage}.pt").exists()


def test_save_comes_before_drawing(world, tmp_path):
    """A crash while the grid is drawn, even of the process, loses no step."""
    def crash(*args):
        crash.calls += 1
        if crash.calls == 2:  # the first is the trial before step 1
            raise KeyboardInterrupt
    crash.calls = 0
    with mock.patch.object(train_gpt, "save_samples", crash), pytest.raises(KeyboardInterrupt):
        call_stage("train_gpt.py", *GPT_OPTIONS, f"--out={tmp_path}", cwd=world[0])
    assert load_raw(tmp_path / "gpt.ckpt")["step"] == 3


def test_a_moved_folder_draws(world, tmp_path):
    """`out/` copied elsewhere samples from another working directory, the very same images; the
    message names both places where a network was looked for."""
    d = link_world(world[0], tmp_path / "w")
    call_stage("sample.py", "a red bus", "--n=2", f"--out={tmp_path}/here.png", cwd=d)
    shutil.copytree(d / "out/toy", tmp_path / "moved/run")
    (tmp_path / "elsewhere").mkdir()
    call_stage("sample.py", "a red bus", "--n=2", f"--gpt={tmp_path}/moved/run/gpt.pt",
               "--out=there.png", cwd=tmp_path / "elsewhere")
    images = [sorted(folder.glob("*.png")) for folder in (tmp_path / "here",
                                                          tmp_path / "elsewhere/there")]
    assert [p.read_bytes() for p in images[0]] == [p.read_bytes() for p in images[1]]
    assert len(images[0]) == 2
    # stages apart: the GPT in a folder of its own, at another depth, finds both of the others
    call_stage("train_gpt.py", *GPT_OPTIONS, "--out=run", cwd=d)
    shutil.copytree(d, tmp_path / "all")
    shutil.rmtree(d / "run")
    for cwd, gpt in ((tmp_path / "all", "run/gpt.pt"), (tmp_path, "all/run/gpt.pt")):
        call_stage("sample.py", "a red bus", "--n=1", f"--gpt={gpt}", "--out=s.png", cwd=cwd)
    (tmp_path / "all/out/toy/vqgan.pt").unlink()
    line = call_error("sample.py", "a bus", "--gpt=run/gpt.pt", cwd=tmp_path / "all")
    assert "run/vqgan.pt" in line and "out/toy/vqgan.pt" in line and "--vqgan=FILE" in line
    # another network under the name is not taken for it
    other = load_raw(d / "out/toy/vqgan.pt")
    ema = {k: v + 0.01 for k, v in other["ema"].items()}
    save_checkpoint(tmp_path / "all/run/vqgan.pt", other, ema=ema, sha256=hash_state(ema))
    line = call_error("sample.py", "a bus", "--gpt=run/gpt.pt", cwd=tmp_path / "all")
    assert "another one is at" in line
    shutil.copy(d / "out/toy/vqgan.pt", tmp_path / "all/out/toy/vqgan.pt")
    call_stage("sample.py", "a bus", "--n=1", "--gpt=run/gpt.pt", "--out=s.png",
               cwd=tmp_path / "all")
    # a linked run folder is found, and what is trained in one names its VQGAN rightly
    (tmp_path / "elsewhere/out").mkdir()
    (tmp_path / "elsewhere/out/linked").symlink_to(tmp_path / "moved/run")
    out = call_stage("sample.py", "a bus", "--n=1", cwd=tmp_path / "elsewhere").stdout
    assert "GPT out/linked/gpt.pt" in out
    (tmp_path / "far/away").mkdir(parents=True)
    (d / "out/far").symlink_to(tmp_path / "far/away")
    call_stage("train_gpt.py", *GPT_OPTIONS, "--out=out/far", cwd=d)
    out = call_stage("sample.py", "a bus", "--n=1", "--gpt=out/far/gpt.pt",
                     f"--out={tmp_path}/s.png", cwd=d).stdout
    assert "VQGAN out/far/" in out or "out/toy/vqgan.pt" in out


def test_the_best_weights_are_kept_and_overfitting_is_said_once(world, tmp_path):
    """Forty rows learnt by heart: gpt.pt is the average of the lowest val_loss in gpt.jsonl, while
    gpt.ckpt goes on from the last; one warning."""
    d, rng = world[0], np.random.default_rng(0)
    embeddings = rng.standard_normal((60, 64))
    tokens = rng.integers(64, size=(60, 16))
    prepare.write_dump(tmp_path / "few", tokens[:40], embeddings[:40], d / "out/toy/vqgan.pt",
               d / "out/toy/clip.pt", tokens[40:], embeddings[40:])
    run = changed(GPT_OPTIONS, data=tmp_path / "few", out=tmp_path / "run", max_steps=100,
                  eval_every=10, batch_size=20, learning_rate=2e-2, warmup=5, dtype="float32",
                  n_embd=64)
    out = call_stage("train_gpt.py", *run, cwd=d).stdout
    losses = {m["step"]: m["val_loss"] for m in read_log(tmp_path / "run/gpt.jsonl")
              if "val_loss" in m}
    best = min(losses, key=losses.get)
    final, last = load_raw(tmp_path / "run/gpt.pt"), load_raw(tmp_path / "run/gpt.ckpt")
    assert best < 100 and losses[100] > losses[best] + 0.2, losses  # it did overfit
    assert final["step"] == best and final["val_loss"] == pytest.approx(losses[best], abs=1e-4)
    assert last["step"] == 100 and not torch.equal(last["ema"]["head.weight"],
                                                   final["ema"]["head.weight"])
    assert f"wrote {tmp_path}/run/gpt.pt (step {best})" in out
    assert out.count("warning: validation loss") == 1 and "40 rows are few" in out
    # the weights have that loss
    gpt, rows = load_gpt(tmp_path / "run/gpt.pt", "cpu")[0], open_dump(tmp_path / "few")[1]["val"]
    again = train_gpt.validation_loss(gpt, torch.from_numpy(np.array(rows[0]).astype(np.int64)),
                            torch.from_numpy(np.array(rows[1]).astype(np.float32)),
                            runtime.Runtime("cpu", "float32"))
    assert again == pytest.approx(losses[best], abs=1e-4)
    call_stage("sample.py", "a bus", "--n=1", f"--gpt={tmp_path}/run/gpt.pt",
               f"--out={tmp_path}/s.png", cwd=d)
    assert math.log(64) == pytest.approx(read_log(tmp_path / "run/gpt.jsonl")[0]["ln_K"], rel=1e-5)


def test_a_vqgan_is_kept_from_where_all_its_losses_are_at_work(world, tmp_path):
    """Before quantisation the reconstruction is better, and of no use to anybody."""
    run = changed(VQGAN_OPTIONS, vq_start=5, disc_start=1000, eval_every=2, workers=0,
                  dtype="float32", out=tmp_path / "late")
    out = call_stage("vqgan.py", *run, cwd=world[0]).stdout
    log = read_log(tmp_path / "late/vqgan.jsonl")
    losses = {m["step"]: m["val_loss"] for m in log if "val_loss" in m}
    kept = load_raw(tmp_path / "late/vqgan.pt")
    assert kept["step"] in (6, 8) and kept["val_loss"] == pytest.approx(
        min(losses[6], losses[8]), rel=1e-4)
    assert all("psnr" in m for m in log if "val_loss" in m)
    assert all(("val_codes" in m) == (m["step"] > 5) for m in log if "val_loss" in m)
    assert "codes" not in [x for x in out.splitlines() if x.startswith("step 2: val_loss")][0]
    assert " min left" in out
    assert "perplexity: " in out and "restarted: " in out  # said once what the words mean
    run = changed(run, disc_start=7, vq_start=2, out=tmp_path / "judged")
    call_stage("vqgan.py", *run, cwd=world[0])
    assert load_raw(tmp_path / "judged/vqgan.pt")["step"] == 8
    assert "adaptive_weight" in read_log(tmp_path / "judged/vqgan.jsonl")[-2]


def test_the_validation_loss_is_the_cross_entropy_alone(world, tmp_path):
    """Whatever else is trained, and the loss of a step too: with a learning rate of 0, so that the
    weights are the same; the gradients tell that the other loss is at work."""
    logs = []
    for weight in (0, 10 ** 6):
        run = changed(GPT_OPTIONS, clip_loss_weight=weight, learning_rate=0, max_steps=1,
                      dtype="float32", out=tmp_path / str(weight))
        call_stage("train_gpt.py", *run, cwd=world[0])
        logs.append(read_log(tmp_path / str(weight) / "gpt.jsonl"))
    (step, validation), (other_step, other_validation) = logs
    assert validation["val_loss"] == other_validation["val_loss"]
    assert step["loss"] == other_step["loss"]
    assert other_step["grad_norm"] > 1.1 * step["grad_norm"]


# -------------------------------------------------------------------------------- what it says


def following(out, script):
    """The command after `next:` in a stage's output, as an argument list; it is pasted as it is."""
    line = re.findall(r"next: (python .*)$", out, re.M)[-1]
    words = shlex.split(line)
    assert words[:2] == ["python", script] and "..." not in line, line
    return words[1:]


def test_hints_run_as_printed(world, tmp_path):
    """Every `next:` line, pasted, continues the chain just made: with names that a shell would
    take apart, and on images that are no toy world."""
    photos, rng = tmp_path / "my photos", np.random.default_rng(0)
    photos.mkdir()
    for i in range(30):
        Image.fromarray(rng.integers(256, size=(40, 44, 3)).astype(np.uint8)).save(
            photos / f"{i}.png")
    small = {"vqgan.py": changed(VQGAN_OPTIONS, workers=0),
             "prepare.py": [*PREPARE_OPTIONS, "--workers=0"], "train_gpt.py": GPT_OPTIONS,
             "sample.py": ["--n=1"]}
    call_stage("toy.py", *TOY_OPTIONS, "--data=it's data", "--out=out/my toy", cwd=tmp_path)
    words = ["vqgan.py", f"--data={photos}", "--clip=out/my toy/clip.pt", "--out=out/my run"]
    for script, after in (("vqgan.py", "prepare.py"), ("prepare.py", "train_gpt.py"),
                          ("train_gpt.py", "sample.py"), ("sample.py", None)):
        out = call_stage(*words, *small[script], cwd=tmp_path).stdout
        words = following(out, after) if after else words
    assert "red bus" not in " ".join(words)
    assert (tmp_path / "out/samples.png").exists()
    assert (tmp_path / "out/my run/gpt.pt").exists() and (tmp_path / "data/my run_tokens").exists()


def test_the_stages_work_on_each_others_defaults(tmp_path):
    """In an empty folder: toy.py, and then the others after each other without a path."""
    small = [["toy.py", *TOY_OPTIONS], ["vqgan.py", *VQGAN_OPTIONS],
             ["prepare.py", *PREPARE_OPTIONS, "--workers=0"], ["train_gpt.py", *GPT_OPTIONS],
             ["sample.py", "a red bus", "--n=1"]]
    for script, *args in small:
        out = call_stage(script, *args, cwd=tmp_path).stdout
        if script == "toy.py":
            words = following(out, "vqgan.py")
            assert "--data=data/toy/train" in words and "--clip=out/toy/clip.pt" in words
        if script == "train_gpt.py":
            assert following(out, "sample.py")[1] == "a red bus"
    assert (tmp_path / "out/vqgan/vqgan.pt").exists() and (tmp_path / "out/gpt/gpt.pt").exists()
    assert (tmp_path / "out/samples.png").exists()
