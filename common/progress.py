"""What a script says: lines that never end a run, progress of anything that takes long, a log of
metrics, what a dry run measured."""
import contextlib
import json
import math
import os
import shutil
import statistics
import sys
import time

import torch
from tqdm import tqdm

from common.files import atomic_write

try:
    import resource
except ImportError:  # Windows
    resource = None


class Output:
    """stdout or stderr of a script: whole lines, above the progress bar if there is one. What can't
    be written is dropped: nobody may read on (| head), or the disk behind a log may be full."""

    def __init__(self, stream):
        self.stream, self.rest = stream, ""

    def write(self, text):
        lines, newline, self.rest = (self.rest + text).rpartition("\n")
        if newline:
            self.put(lines + newline)
        return len(text)

    def flush(self):
        text, self.rest = self.rest, ""
        self.put(text)

    def put(self, text):
        try:
            with tqdm.external_write_mode(sys.__stderr__, nolock=True):
                self.stream.write(text)
                self.stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):  # what is buffered goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


class Progress:
    """A progress bar on a terminal, elsewhere a plain line every five seconds."""

    def __init__(self, total, initial=0, unit="step"):
        self.done, self.total, self.unit = initial, total, unit
        self.last, self.start = time.time(), (initial, time.time())
        dist = torch.distributed
        self.quiet = dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
        show_bar = sys.stderr and sys.stderr.isatty() and not self.quiet
        self.bar = tqdm(total=total, initial=initial, unit=unit, dynamic_ncols=True,
                        leave=False, file=sys.__stderr__) if show_bar else None

    def __call__(self, n=1, **metrics):
        self.done += n
        words = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items()]
        if self.bar:
            self.bar.set_postfix_str(fitting(words), refresh=False)
            self.bar.update(n)
        elif not self.quiet and (time.time() - self.last > 5 or self.done == self.total):
            self.last = time.time()
            rate = (self.done - self.start[0]) / max(1e-9, self.last - self.start[1])
            left = f"{(self.total - self.done) / rate / 60:.1f} min left" if rate else ""
            print(f"{self.unit} {self.done}/{self.total}  {rate:.3g}/s  {left}  {'  '.join(words)}",
                  flush=True)
        if self.bar and self.done == self.total:
            self.bar.close()


def fitting(words):
    """As many of the first words as leave room for a bar on this terminal."""
    room, text = shutil.get_terminal_size().columns - 65, ""
    for word in words:
        if len(text) + len(word) > room:
            break
        text += f"  {word}" if text else word
    return text


class Log:
    """A run's .jsonl, a line a step. One that goes on drops the lines after its checkpoint."""

    def __init__(self, path, last_step):
        self.path = path
        text = path.read_text(errors="replace") if last_step and path.exists() else ""
        with atomic_write(path) as f:
            f.write_text("".join(x + "\n" for x in text.splitlines() if step_of(x) <= last_step))
        self.file = open(path, "a", buffering=1)

    def write(self, step, metrics):
        metrics = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in metrics.items()}
        self.file.write(json.dumps({"step": step} | metrics) + "\n")


def step_of(line):
    """The step of a line of a log; infinite if the line is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class StepTimer:
    """When the steps of a dry run ended, and whether that was enough of them."""

    def __init__(self):
        self.ends = [time.perf_counter()]

    def end_step(self):
        """Returns whether enough steps were measured."""
        self.ends.append(time.perf_counter())
        ends = self.ends
        return len(ends) > 3 and (ends[-1] - ends[0] > 60 or len(ends) > 7 and
                                  ends[-1] - ends[2] > 5)

    def report(self, cfg, device):
        """What was measured: by the median of the steps but for two to warm up."""
        ends = self.ends[min(2, (len(self.ends) - 1) // 2):]
        seconds = statistics.median(b - a for a, b in zip(ends, ends[1:]))
        if device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            memory = resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        steps, batch_size = cfg["max_steps"], cfg["batch_size"]
        return (f"dry run: {(memory or 0) / 2 ** 30:.2f} GiB at most, {1 / seconds:.3g} steps/s, "
                f"{batch_size / seconds:.3g} rows/s; all {steps} steps would take "
                f"{seconds * steps / 3600:.2f} hours, evaluations apart; nothing was written")
