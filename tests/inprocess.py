"""A stage's main in this process: the same command line, handlers and exit codes, without the
seconds that a new process takes to import torch."""
import contextlib
import ctypes
import gc
import importlib
import io
import os
import signal
import sys
from types import SimpleNamespace
from unittest import mock

import torch

from common import process, runtime


def call_stage(script, *args, cwd, code=0):
    """main() of "vqgan.py" or "lab.bench" with these arguments, in the folder cwd, as run_stage
    runs it -> its stdout and stderr. `code` is the exit code that is asked for."""
    module = importlib.import_module(script.removesuffix(".py"))
    before = {number: signal.getsignal(number) for number in process.signals()}
    threads, streams = torch.get_num_threads(), (io.StringIO(), io.StringIO())
    found = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.chdir(cwd))
        stack.enter_context(contextlib.redirect_stdout(streams[0]))
        stack.enter_context(contextlib.redirect_stderr(streams[1]))
        stack.enter_context(mock.patch.object(sys, "argv", [script, *map(str, args)]))
        stack.enter_context(mock.patch.object(process, "saved", []))
        stack.enter_context(mock.patch.object(runtime, "keep_freed_memory", lambda: None))
        torch.set_num_threads(1)
        try:
            process.run_main(module.main)
        except SystemExit as e:
            found = e.code or 0
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            torch.set_num_threads(threads)
            gc.unfreeze()
    out, err = (stream.getvalue() for stream in streams)
    assert found == code, f"{script} {args} ended with {found}\n{out}\n{err}"
    return SimpleNamespace(stdout=out, stderr=err)


def call_error(script, *args, cwd):
    """A command that must end in one line and exit code 2 -> that line."""
    err = call_stage(script, *args, cwd=cwd, code=2).stderr
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@contextlib.contextmanager
def without_privileges():
    """Closed folders are closed in here to root as well, on Linux: this thread lays down the
    capabilities that override permissions."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    libc.capget(header, data)
    before = data[0]
    data[0] &= ~(1 << 1 | 1 << 2)   # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    libc.capset(header, data)
    try:
        yield
    finally:
        data[0] = before
        libc.capset(header, data)


def changed(options, **changes):
    """A list of options, some of them replaced or added."""
    kept = [o for o in options if o.partition("=")[0].removeprefix("--") not in changes]
    return kept + [f"--{name}={value}" for name, value in changes.items()]


def link_world(world, folder):
    """A folder that holds the world's files (as links), for runs that leave others in it."""
    for name in ("data", "out"):
        for path in sorted((world / name).rglob("*")):
            target = folder / path.relative_to(world)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                os.link(path, target)
    return folder
