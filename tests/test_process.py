"""Processes: workers, memory, what a closed or full output does, terminals, two at once."""
import contextlib
import errno
import fcntl
import os
import pty
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import train_gpt
import vqgan
from common import openai_clip, process
from common.batches import ImageBatches
from common.images import save_each, save_grid
from common.runtime import Runtime
from tests.helpers import (
    GPT_OPTIONS,
    PREPARE_OPTIONS,
    ROOT,
    VQGAN_OPTIONS,
    load_raw,
    read_log,
    run_stages,
    stage_command,
    stage_environment,
    start_stage,
)
from tests.inprocess import call_error, call_stage, changed
from tests.test_files import can_mount

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def state_of(pid):
    """A process's state, and further on the time it has computed, in hundredths of a second."""
    file = Path(f"/proc/{pid}/stat")
    return file.read_text().rpartition(")")[2].split() if file.exists() else ["Z"]


def children_of(child):
    return Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()


def start_long_prepare(world, tmp_path):
    """A prepare.py of two workers whose chunks take for ever -> (process, pids of its workers)."""
    tmp_path.mkdir(exist_ok=True)
    for i in range(4):
        Image.new("RGB", (40, 32), (60 * i, 0, 99)).save(tmp_path / f"{i}.png")
    child = start_stage("prepare.py", f"--data={tmp_path}", f"--out={tmp_path}/d", "--chunk=2",
                        "--crops=20000", "--val_percent=0", "--workers=2", "--dtype=float32",
                        cwd=world[0], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    workers = []
    while child.poll() is None and (
            len(workers) < 2 or min(int(state_of(w)[11]) for w in workers) < 20):
        workers = children_of(child)
        time.sleep(0.01)
    assert len(workers) == 2
    return child, workers


def all_end(workers):
    """Whether these processes end within three seconds: their chunk would take longer."""
    end = time.time() + 3
    while workers and time.time() < end:
        workers = [w for w in workers if state_of(w)[0] != "Z"]
    return not workers


@linux
def test_workers_end_with_a_killed_prepare(world, tmp_path):
    """They compute for long where chunks are large; left behind, they would work beside those of
    the next run."""
    child, workers = start_long_prepare(world, tmp_path)
    child.kill()
    child.wait()
    assert all_end(workers)
    child.stderr.close()


@linux
def test_a_killed_worker_is_one_line_and_a_signal_ends_all(world, tmp_path):
    """The system kills the largest process when memory runs out; SIGHUP is SIGTERM."""
    child, workers = start_long_prepare(world, tmp_path / "a")
    os.kill(int(workers[0]), signal.SIGKILL)
    err = child.communicate(timeout=60)[1]
    assert child.returncode == 2 and err.count("\n") == 1, err
    assert err.startswith("error: a worker process ended") and "--workers=0" in err
    assert all_end(workers)
    child, workers = start_long_prepare(world, tmp_path / "b")
    child.send_signal(signal.SIGHUP)
    err = child.communicate(timeout=60)[1]
    assert child.returncode == 130 and err == "stopped; what is finished is kept\n"
    assert all_end(workers)


@pytest.mark.skipif(not can_mount(), reason="needs to mount a small file system (unshare)")
def test_a_small_shared_memory_is_one_line_and_no_hang(world, tmp_path):
    """As in a container; both that train or prepare with workers, and what they had done."""
    commands = {
        "vqgan.py": changed(VQGAN_OPTIONS, workers=2, batch_size=64, max_steps=30, eval_every=30,
                            out=tmp_path / "v"),
        "prepare.py": changed(PREPARE_OPTIONS, workers=2, chunk=64, crops=4, out=tmp_path / "p")}

    def run(job):
        words = shlex.join(stage_command(job[0], *job[1]))
        script = f"mount -t tmpfs -o size=64k tmpfs /dev/shm && exec {words}"
        return subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=world[0], timeout=100,
                              capture_output=True, text=True, env=stage_environment())
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(run, commands.items()):
            assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
            assert "--workers=0" in done.stderr and "memory" in done.stderr


ALLOCATION = ("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate "
              "memory: you tried to allocate 1073741824 bytes. Error code 12 (Cannot allocate "
              "memory)")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(ALLOCATION),
                                   torch.OutOfMemoryError("CUDA out of memory. Tried 2.00 GiB")],
                         ids=["MemoryError", "RuntimeError", "OutOfMemoryError"])
def test_no_memory_is_one_line_that_names_the_checkpoint(world, tmp_path, error):
    """What to make smaller, and what holds; other errors of torch's keep their traceback."""
    step = train_gpt.train_step

    def fail_at_fifth(*args):
        fail_at_fifth.calls += 1
        if fail_at_fifth.calls == 5:
            raise error
        return step(*args)
    fail_at_fifth.calls = 0
    run = ["train_gpt.py", *GPT_OPTIONS, f"--out={tmp_path}"]
    with mock.patch.object(train_gpt, "train_step", fail_at_fifth):
        line = call_error(*run, cwd=world[0])
    assert "out of memory" in line and "--batch_size" in line and f"{tmp_path}/gpt.ckpt" in line
    assert load_raw(tmp_path / "gpt.ckpt")["step"] == 3
    with mock.patch.object(train_gpt, "train_step", side_effect=error):
        assert f"{tmp_path}/gpt.ckpt is kept" in call_error(*run, cwd=world[0])
    with mock.patch.object(train_gpt, "train_step", side_effect=RuntimeError("a bug")):
        with pytest.raises(RuntimeError, match="a bug"):
            call_stage(*run, cwd=world[0])


@linux
def test_a_real_lack_of_memory_is_one_line(world, tmp_path):
    """The address space is limited to what importing torch takes and half a GiB."""
    code = ("import resource, runpy, sys, torch; sys.path.insert(0, sys.argv[1]); "
            "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + "
            "2 ** 29; resource.setrlimit(resource.RLIMIT_AS, (size, size)); sys.argv[:2] = []; "
            "runpy.run_path(sys.argv[0], run_name='__main__')")
    args = changed(GPT_OPTIONS, batch_size=200000, n_embd=256, out=tmp_path)
    done = subprocess.run(stage_command("-c", code, ROOT, ROOT / "train_gpt.py", *args),
                          cwd=world[0], capture_output=True, text=True, env=stage_environment())
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "out of memory" in done.stderr and "nothing was saved yet" in done.stderr


def test_prepare_goes_on_with_fewer_workers_and_rows(world, tmp_path):
    """--batch_size and --workers may differ when it goes on, the rows are the same."""
    from common import chunks
    real, run = chunks.atomic_write, ["prepare.py", *changed(PREPARE_OPTIONS, chunk=32),
                                      f"--out={tmp_path}/d"]

    def full(path):
        if path.name == "train000002.npz":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path)
    with mock.patch.object(chunks, "atomic_write", full):
        call_error(*run, "--workers=0", cwd=world[0])
    assert (tmp_path / "d/chunks/train000001.npz").exists()
    call_stage(*run, "--workers=1", "--batch_size=3", cwd=world[0])
    assert not (tmp_path / "d/chunks").exists()
    for name in ("train_tokens.bin", "val_tokens.bin"):
        assert (tmp_path / "d" / name).read_bytes() == (
            world[0] / "data/toy_tokens" / name).read_bytes()


# ------------------------------------------------------------------------------------ the output


@linux
def test_a_failing_output_ends_no_training(world, tmp_path):
    """Nobody reads on (| head -1), a full disk behind the log, a closed stdout, both
    closed: trained to the end, exit code 0, nothing on stderr; the same images from sample.py."""
    train = stage_command("train_gpt.py", *changed(GPT_OPTIONS, max_steps=30, eval_every=5))
    draw = stage_command("sample.py", "a red bus", "--n=2", "--candidates=3")
    endings = {"head": "| head -1", "full": "> /dev/full", "both": ">&- 2>&-"}
    jobs = {f"t-{name}": f"{shlex.join([*train, f'--out={tmp_path}/{name}'])} {ending}"
            for name, ending in endings.items()}
    draws = {"head": "| head -1", "closed": ">&-"}
    jobs |= {f"s-{name}": f"{shlex.join([*draw, f'--out={tmp_path}/{name}.png'])} {ending}"
             for name, ending in draws.items()}

    def run(line):
        return subprocess.run(["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"], cwd=world[0],
                              capture_output=True, text=True, env=stage_environment(), timeout=200)
    with ThreadPoolExecutor(2) as pool:
        for name, done in zip(jobs, pool.map(run, jobs.values())):
            assert done.returncode == 0 and done.stderr == "", (name, done.returncode, done.stderr)
            assert done.stdout.count("\n") == ("head" in name)
    for name in endings:
        assert len(read_log(tmp_path / name / "gpt.jsonl")) == 36  # 30 steps, 6 validations
        assert load_raw(tmp_path / name / "gpt.pt")["step"] <= 30
    images = {tuple(p.read_bytes() for p in sorted((tmp_path / name).glob("[0-9]*.png")))
              for name in draws}
    assert len(images) == 1 and len(next(iter(images))) == 2


def test_a_log_that_cannot_be_written_ends_no_training(world, tmp_path):
    """A full disk behind gpt.jsonl is said once."""
    class Full:
        path = tmp_path / "gpt.jsonl"

        def __init__(self, *args):
            pass

        def write(self, *args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch("common.runs.Log", Full):
        out = call_stage("train_gpt.py", *GPT_OPTIONS, f"--out={tmp_path}", cwd=world[0]).stdout
    assert out.count("could not write") == 1 and "No space left" in out
    assert load_raw(tmp_path / "gpt.pt")["step"] == 6


def test_an_output_without_reconfigure_and_a_name_that_is_no_utf8(world, tmp_path, capsysbinary):
    """Stdout as a notebook or a wrapper gives it; a file name of other bytes is printed."""
    folder = os.fsencode(tmp_path) + b"/\xff\xfe"
    os.mkdir(folder)
    for i in range(12):
        Image.new("RGB", (40, 40), (i * 20, 0, 0)).save(tmp_path / f"{i}.png")
    os.rename(tmp_path / "3.png", folder + b"/\xfd.png")
    for i in (5, 6):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    run = changed(PREPARE_OPTIONS, data=tmp_path, workers=0)
    out = call_stage("prepare.py", *run, f"--out={tmp_path}/d", cwd=world[0]).stdout  # StringIO
    assert "wrote" in out and "skipped" in out
    with open(folder + b"/bad.png", "wb") as f:
        f.write(b"no image")
    done = subprocess.run(stage_command("prepare.py", *run, f"--out={tmp_path}/e"), cwd=world[0],
                          capture_output=True, env=stage_environment(PYTHONIOENCODING="ascii"))
    assert done.returncode == 0 and not done.stderr, done.stderr


def on_terminal(words, cwd, columns):
    """Run a command on a terminal of so many columns -> (what was sent, lines as they are seen)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = subprocess.Popen(words, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs,
                             env=stage_environment(), start_new_session=True)
    os.close(theirs)
    sent = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # Linux's way of saying that the other end is closed
            break
        if not data:
            break
        sent += data
    assert child.wait() == 0, sent.decode(errors="replace")
    os.close(ours)
    screen, line, at = [], "", 0
    for character in re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", sent.decode()):
        if character == "\r":
            at = 0
        elif character == "\n":
            screen.append(line.rstrip())
            line, at = "", 0
        else:
            line, at = line[:at] + character + line[at + 1:], at + 1
    return sent.decode(), screen


def test_a_terminal_shows_messages_apart_from_a_bar_one_can_see(world, tmp_path):
    """On 80 columns."""
    args = changed(GPT_OPTIONS, max_steps=400, eval_every=100, out=tmp_path)
    sent, screen = on_terminal(stage_command("train_gpt.py", *args), world[0], 80)
    bars = re.findall(r"\d+%\|([^|]*)\|([^\r\n]*)", sent)
    assert len(bars) > 3 and all(len(bar) >= 10 for bar, _ in bars), bars
    assert any("loss" in after for _, after in bars)
    messages = [line for line in screen if "val_loss" in line]
    assert [line.split(":")[0] for line in messages] == [f"step {i}" for i in
                                                         (100, 200, 300, 400)], screen
    assert not any("%|" in line for line in screen) and screen[-1].startswith("wrote ")


@pytest.mark.parametrize("answer, says", [
    (b"this is no HTTP at all", "could not download"), (b"", "could not download"),
    (b"HTTP/1.0 404 Not Found\r\n\r\n", "could not download"),
    (b"HTTP/1.0 200 OK\r\n\r\n<html>log in to the network first</html>", "damaged")],
    ids=["garbage", "nothing", "404", "page"])
def test_a_download_answered_by_something_else_is_one_line(world, tmp_path, monkeypatch, answer,
                                                           says):
    """A proxy, a login page, a printer; nothing of it is kept."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection = server.accept()[0]
        connection.recv(4096)
        connection.sendall(answer)
        connection.close()
    thread = threading.Thread(target=serve)
    thread.start()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(openai_clip, "CLIP_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
    done = call_stage("vqgan.py", "--clip=RN50", f"--out={tmp_path}/v", cwd=world[0], code=2)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and says in line and "RN50" in line
    thread.join()
    server.close()
    assert not list((tmp_path / ".cache/clip").iterdir())


# ---------------------------------------------------------------------------------- two at once


def test_two_samples_at_once_with_one_out(world, tmp_path):
    """Both end well, and what is there is whole."""
    jobs = [(["sample.py", "a red bus", "--n=3", f"--out={tmp_path}/s.png"], world[0], 0)] * 2
    for done in run_stages(*jobs):
        assert "wrote" in done.stdout and not done.stderr
    assert len(list(tmp_path.rglob("*.png"))) == 4
    children, images = [], [Image.new("RGB", (16, 16), "red")] * 3
    for child in range(2):  # and for a while, each with names of its own
        children.append(os.fork())
        if not children[-1]:
            code = 1
            with contextlib.suppress(Exception):
                for i in range(30):
                    save_each(tmp_path / "s", [f"{child}{i % 3}{x}.png" for x in "abc"], images)
                    save_grid(tmp_path / "s.png", [images], ["red"])
                code = 0
            os._exit(code)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert not list(tmp_path.rglob("*clipgen*"))
    for path in tmp_path.rglob("*.png"):
        with Image.open(path) as image:
            image.load()


# ------------------------------------------------------------------------------------- batches


class Numbered:
    """A source of which the images `bad` can't be read; every image shows its number."""

    def __init__(self, bad):
        self.bad = bad

    def open(self, name, size=0):
        if name in self.bad:
            raise ValueError("5 x 4 pixels are too few for 16")
        return Image.new("RGB", (16, 16), (name % 256, name // 256, 0))


def test_no_image_stands_in_for_all_its_unreadable_neighbours():
    """Bad files sort together, and each is replaced by any of the good ones alike; the batch
    remains a function of seed and step, whatever share of it a rank makes."""
    cfg = vqgan.Config(batch_size=64, image_size=16, max_steps=200)
    names = list(range(400))
    batches = ImageBatches(Numbered(set(range(300))), names, cfg)
    shown = []
    for i in range(60):
        batch, failed = batches[i]
        shown += (batch[:, 0, 0, 0].int() + 256 * batch[:, 0, 0, 1].int()).tolist()
        assert failed and set(failed) <= set(range(300))
    counts = np.bincount(shown, minlength=400)
    assert counts[:300].sum() == 0 and counts[300:].min() > 0
    assert counts.max() < 3 * counts[300:].mean()
    again = torch.cat([ImageBatches(Numbered(set(range(300))), names, cfg, rank, 2)[7][0]
                       for rank in (0, 1)])
    assert torch.equal(batches[7][0], again)
    assert ImageBatches(Numbered(set(names)), names, cfg)[0][0] is None


def test_kept_names_what_there_is():
    with mock.patch.object(process, "saved", []):
        assert process.kept() == "nothing was saved yet"
        process.note_saved("out/gpt.ckpt")
        assert process.kept().startswith("out/gpt.ckpt")
    assert Runtime("cpu", "float32").world == 1
