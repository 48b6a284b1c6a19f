"""How a script starts and ends: signals, worker processes, and what the system refuses."""
import contextlib
import ctypes
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys

import torch

from common.options import fail
from common.progress import Output


def exit_on_signal(number, frame):
    """Ctrl-C, SIGTERM and SIGHUP where no training step has to be saved first."""
    with contextlib.suppress(RuntimeError):  # a print that the signal interrupted
        print("stopped; what is finished is kept", file=sys.stderr, flush=True)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(130)


def signals():
    """The signals that ask a script to stop; not those that it was started to ignore (nohup)."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def start_worker(worker=0):
    """In a forked worker: Ctrl-C is its parent's business, SIGTERM ends it, and so does, on Linux,
    the end of its parent. What it can't send, for want of shared memory, ends it too: dropped, as
    multiprocessing does, it would be waited for, for ever."""
    for number in signals():
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = lambda *args: os._exit(1)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != multiprocessing.parent_process().pid:  # it has ended already
            os._exit(1)


def run_main(main):
    """Run a script: its exit code is what main returns, and what the operating system refuses ends
    in one line and exit code 2."""
    for number in signals():
        signal.signal(number, exit_on_signal)
    with contextlib.suppress(AttributeError):  # a name that is no UTF-8 must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.stdout = Output(sys.stdout or open(os.devnull, "w"))
    sys.stderr = Output(sys.stderr or open(os.devnull, "w"))
    try:
        sys.exit(main())
    except (MemoryError, torch.OutOfMemoryError):
        out_of_memory()
    except OSError as e:
        fail(f"{e.filename or 'the system'}: {e.strerror or e}")
    except RuntimeError as e:
        explain_runtime_error(str(e))
        raise


def explain_runtime_error(message):
    """fail() with the line that fits, if a RuntimeError of torch's says that memory ran out."""
    if "DataLoader worker" in message or "shared memory" in message or "shm" in message:
        fail(f"a worker process ended, most likely for want of (shared) memory: try --workers=0, "
             f"or in a container a larger /dev/shm (docker run --shm-size=8g); {kept()}")
    if any(x in message for x in ("can't allocate memory", "out of memory", "not enough memory")):
        out_of_memory()


def out_of_memory():
    fail(f"out of memory; {kept()}. Try fewer --workers or a smaller --batch_size, which for a "
         f"trainer means another --out, or a smaller network")


saved = []  # the file or folder that a run can go on from, once there is one


def note_saved(path):
    saved[:] = [path]


def kept():
    """What a run that ends here can go on from, in words."""
    return f"{saved[0]} is kept, to go on from" if saved else "nothing was saved yet"
