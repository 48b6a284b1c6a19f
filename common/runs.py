"""A run folder: going on after a stop, the log, progress, checkpoints, the best weights."""
import contextlib
import dataclasses
import json
import math
import os
import signal
import statistics
import sys
import time
from pathlib import Path

import torch

import model
from common.checkpoints import load_checkpoint
from common.files import atomic_write, file_sha256, hash_state, lock_folder
from common.options import fail, format_value
from common.process import signals
from common.progress import Progress

try:
    import resource
except ImportError:  # Windows
    resource = None

MAY_CHANGE = ("out", "device", "compile", "workers", "trust_jit", "max_bad", "dry_run", "fresh",
              "init_from", "max_steps")  # options that may differ when a run goes on


class Run:
    """A run folder: `stage.ckpt` to go on from, `stage.jsonl` its log and, once it is finished,
    `stage.pt` with the weights of the lowest validation loss.

    `inputs` are hashes of what the run is made from, `about` what its checkpoints say of the
    network. After construction: `finished`, `resume` (a checkpoint's contents, or None), `step`.
    """

    def __init__(self, stage, cfg, runtime, inputs, about, code):
        self.stage, self.cfg, self.runtime = stage, dataclasses.asdict(cfg), runtime
        self.inputs, self.about = inputs, about
        self.code = {Path(f).name: file_sha256(f) for f in (code, model.__file__)}
        self.final, self.path = Path(cfg.out, f"{stage}.pt"), Path(cfg.out, f"{stage}.ckpt")
        self.is_dry = getattr(cfg, "dry_run", False)
        self.resume, self.step, self.finished = None, 0, False
        self.best = {"val_loss": math.inf, "step": 0, "ema": None}
        self.val_losses, self.warned = [], False
        self.log_file, self.signalled, self.stop_requested = None, False, False
        self.consecutive_bad_steps = self.bad_steps = 0
        self.step_end_times = [time.perf_counter()]   # of a dry run
        self.measured = False                         # whether a dry run has seen enough steps
        self.lock = None if self.is_dry else lock_folder(cfg.out, runtime.rank)
        if not self.is_dry:
            self.open_folder()
        self.progress = Progress(cfg.max_steps, self.step)

    def open_folder(self):
        """Go on from the checkpoint that is there, if there is one, after checking that it fits."""
        print0 = self.runtime.print0
        if self.path.exists() and self.cfg["fresh"]:
            print0(f"--fresh=True: a new run replaces {self.path} and {self.final}")
            return
        if not self.path.exists():
            if self.final.exists() and not self.cfg["fresh"]:
                fail(f"{self.final} is there without {self.path.name}, so nothing can go on from "
                     f"it: choose another --out, or --fresh=True to replace it")
            return
        self.resume = load_checkpoint(self.path, self.stage)
        self.check_same_options()
        self.step, old = self.resume["step"], self.resume["config"]
        self.best = self.resume.get("best") or self.best
        self.val_losses = self.resume.get("val_losses", [])
        self.finished = self.step >= self.cfg["max_steps"] and self.final.exists()
        changed = [f for f, sha in self.resume.get("code", {}).items() if self.code.get(f) != sha]
        if changed:
            print0(f"the code has changed since this run began ({', '.join(changed)}): for a run "
                   f"of the new code choose another --out, or --fresh=True")
        if self.finished:
            print0(f"{self.final} is finished (step {self.step}); a larger --max_steps goes on, "
                   f"--fresh=True or another --out trains anew")
            return
        longer = f" of now {self.cfg['max_steps']}, whose learning rate it follows" if (
            old["max_steps"] != self.cfg["max_steps"]) else ""
        print0(f"going on from {self.path}, step {self.step}{longer}")
        device, dtype = self.resume.get("computed", ("", ""))
        if self.cfg["dtype"] == "auto" and device == self.runtime.device.type:
            self.runtime.dtype = getattr(torch, dtype)   # resume with the original dtype

    def check_same_options(self):
        """Refuse to go on with other options, or with inputs that have changed."""
        # an option that the run was made without had its default
        old = {k: v for k, v in self.cfg.items()} | self.resume.get("config", {})
        differ = [k for k in self.cfg if k not in MAY_CHANGE and not same(old.get(k), self.cfg[k])]
        if self.cfg["max_steps"] < self.resume["step"]:
            differ.append("max_steps")
        if differ:
            was = ", ".join(f"{k}={format_value(old.get(k))}" for k in differ)
            fail(f"{self.path} was made with other options ({was}); repeat those, choose another "
                 f"--out, or --fresh=True to replace it")
        for what, sha in self.inputs.items():
            if self.resume.get("inputs", {}).get(what) != sha:
                fail(f"{self.path} was started from another {what}; put that back, choose another "
                     f"--out, or --fresh=True to replace it")

    def warn_if_few(self, count, what):
        """Say what to expect of a training on few images or rows."""
        if count < 1000:
            self.runtime.print0(
                f"{count} {what} are few: expect the validation loss to rise after some epochs; "
                f"{self.final.name} will hold the weights of its lowest")

    def catch_signals(self):
        """From now on a signal lets the step under way finish; a second one stops at once."""
        pid = os.getpid()

        def request_stop(number, frame):
            if os.getpid() != pid:   # a forked worker, which ends with its parent
                return
            if self.signalled:
                os._exit(130)
            self.signalled = True
            with contextlib.suppress(OSError):
                self.runtime.print0("stopping after this step")
        for number in signals():
            signal.signal(number, request_stop)

    def end_step(self, step, metrics):
        """After each step, on every rank: log its metrics, and agree on whether to stop."""
        self.stop_requested = self.runtime.any_rank(self.signalled)
        if self.is_dry:
            self.step_end_times.append(time.perf_counter())
            ends = self.step_end_times
            enough = len(ends) > 3 and (ends[-1] - ends[0] > 60 or len(ends) > 7 and
                                        ends[-1] - ends[2] > 5)
            self.measured = len(ends) > 3 and self.runtime.any_rank(enough)
        else:
            self.log(step, metrics)
        self.progress(**metrics)

    @property
    def should_stop(self):
        return self.stop_requested or self.measured

    def log(self, step, metrics):
        """Add a line to the log. A run that goes on first drops the lines after its checkpoint."""
        if self.runtime.rank > 0 or self.is_dry:
            return
        if not self.log_file:
            path = self.path.with_suffix(".jsonl")
            lines = path.read_text().splitlines() if self.step and path.exists() else []
            with atomic_write(path) as f:
                f.write_text("".join(x + "\n" for x in lines if step_of(x) <= self.step))
            self.log_file = open(path, "a", buffering=1)
        metrics = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in metrics.items()}
        try:
            self.log_file.write(json.dumps({"step": step} | metrics) + "\n")
        except OSError as e:
            self.runtime.print0(f"warning: could not write {self.log_file.name} ({e.strerror}); "
                                f"training goes on")

    def check_finite(self, step, is_finite):
        """Count steps that were skipped since loss or gradient was not finite; 20 in a row end the
        run."""
        self.consecutive_bad_steps = 0 if is_finite else self.consecutive_bad_steps + 1
        if not is_finite:
            self.bad_steps += 1
            self.runtime.print0(f"step {step}: loss or gradient not finite, step skipped "
                                f"({self.bad_steps} so far)")
        if self.consecutive_bad_steps == 20:
            exists = self.path.exists()
            kept = f"{self.path} holds the last good step" if exists else "nothing was saved yet"
            fail(f"20 steps in a row were not finite; {kept}. Try a smaller --learning_rate or "
                 f"--dtype=float32")

    def validated(self, step, metrics, ema, ceiling=math.inf):
        """Log metrics of the validation set, and keep the averaged weights if they are the best."""
        self.log(step, metrics)
        loss = metrics["val_loss"]
        words = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items())
        self.runtime.print0(f"step {step}: {words}")
        self.val_losses.append(loss)
        last = self.val_losses[-4:]
        if len(last) == 4 and last == sorted(set(last)) and not self.warned:
            self.warned = True
            self.runtime.print0(f"warning: validation loss has risen three times in a row, from "
                                f"{last[0]:.4f} to {loss:.4f}: overfitting. {self.final.name} will "
                                f"hold step {self.best['step']}")
        elif loss > ceiling and not self.warned:
            self.warned = True
            self.runtime.print0(f"warning: validation loss {loss:.4f} lies above {ceiling:.4f}, "
                                f"that of a model that knows nothing")
        if loss < self.best["val_loss"]:
            weights = {k: x.detach().cpu().clone() for k, x in ema.state_dict().items()}
            self.best = {"val_loss": loss, "step": step, "ema": weights}

    def save(self, step, state):
        """Write the checkpoint of `step`: options, hashes of the inputs, `state`, best weights."""
        if self.runtime.rank > 0 or self.is_dry:
            return
        computed = [self.runtime.device.type, str(self.runtime.dtype).removeprefix("torch.")]
        contents = {"stage": self.stage, "config": self.cfg, "inputs": self.inputs, "step": step,
                    "code": self.code, "computed": computed, "best": self.best,
                    "val_losses": self.val_losses, **self.about, **state}
        contents["sha256"] = hash_state(contents["ema"]) if "ema" in contents else ""
        write_checkpoint(self.path, contents)

    def show(self, draw, *args):
        """Call draw(*args), which only shows something: if it fails, a line says so."""
        try:
            if self.runtime.rank == 0 and not self.is_dry:
                draw(*args)
        except (Exception, SystemExit) as e:
            self.runtime.print0(f"could not draw ({type(e).__name__}: {e}); training goes on")

    def finish(self):
        """Write the best weights as the stage's result; or report a dry run. Returns an exit code.
        """
        if self.stop_requested:
            if not self.is_dry:
                self.runtime.print0(f"saved {self.path}; the same command goes on from there")
            return 130
        if self.is_dry:
            self.runtime.print0(self.report())
            return 0
        if self.runtime.rank == 0:
            contents = {"stage": self.stage, "config": self.cfg, "inputs": self.inputs,
                        **self.about, **self.best}
            if self.best["ema"]:
                contents["sha256"] = hash_state(self.best["ema"])
            write_checkpoint(self.final, contents)
        return 0

    def report(self):
        """What a dry run measured: by the median of its steps but for two to warm up."""
        ends = self.step_end_times[min(2, (len(self.step_end_times) - 1) // 2):]
        seconds = statistics.median(b - a for a, b in zip(ends, ends[1:]))
        if self.runtime.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            memory = resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        steps, batch_size = self.cfg["max_steps"], self.cfg["batch_size"]
        return (f"dry run: {(memory or 0) / 2 ** 30:.2f} GiB at most, {1 / seconds:.3g} steps/s, "
                f"{batch_size / seconds:.3g} rows/s; all {steps} steps would take "
                f"{seconds * steps / 3600:.2f} hours, evaluations apart; nothing was written")


def write_checkpoint(path, contents):
    with atomic_write(path) as f:
        torch.save(contents | {"digest": hash_state(contents)}, f)


def same(a, b):
    """Whether two values of an option mean the same: data/ and ./data are one path."""
    if isinstance(a, str) and isinstance(b, str) and a and b:
        return os.path.normpath(a) == os.path.normpath(b)
    return a == b


def step_of(line):
    """The step of a line of a log; infinite if the line is damaged."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def is_eval_step(step, cfg):
    """Whether validation and a checkpoint follow step `step`, counted from 0."""
    is_last = step + 1 == cfg.max_steps
    return not cfg.dry_run and (is_last or (step + 1) % cfg.eval_every == 0)
