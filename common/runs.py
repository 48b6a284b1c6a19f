"""A run folder: going on after a stop, the log, progress, checkpoints, the best weights."""
import contextlib
import dataclasses
import math
import os
import signal
from pathlib import Path

import torch

import model
from common.checkpoints import load_checkpoint, write_checkpoint
from common.files import file_sha256, hash_state, lock_folder
from common.options import fail, format_value, same
from common.process import note_saved, signals
from common.progress import Log, Progress, StepTimer

MAY_CHANGE = ("out", "device", "compile", "workers", "trust_jit", "max_bad", "dry_run", "fresh",
              "max_steps")  # options that may differ when a run goes on


class Run:
    """A run folder: `stage.ckpt` to go on from, `stage.jsonl` its log and, once it is finished,
    `stage.pt` with the weights of the lowest validation loss.

    `inputs` are hashes of what the run is made from, `about` what its checkpoints say of the
    network. After construction: `finished`, `resume` (a checkpoint's contents, or None), `step`.
    """

    def __init__(self, stage, cfg, runtime, inputs, about, code):
        self.stage, self.cfg, self.runtime = stage, dataclasses.asdict(cfg), runtime
        self.defaults = {f.name: f.default for f in dataclasses.fields(cfg)}
        self.inputs, self.about = inputs, about
        self.code = {Path(f).name: file_sha256(f) for f in (code, model.__file__)}
        self.final, self.path = Path(cfg.out, f"{stage}.pt"), Path(cfg.out, f"{stage}.ckpt")
        self.is_dry = getattr(cfg, "dry_run", False)
        self.resume, self.step, self.finished = None, 0, False
        self.best = {"val_loss": math.inf, "step": 0, "ema": None}
        self.val_losses, self.warned = [], set()
        self.log_file, self.signalled, self.stop_requested = None, False, False
        self.consecutive_bad_steps = self.bad_steps = 0
        self.timer, self.measured = StepTimer(), False   # of a dry run: has it seen enough steps?
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
        self.finished = self.step >= self.cfg["max_steps"] and self.is_written()
        code = self.resume.get("code", self.code)
        changed = [name for name, sha in self.code.items() if code.get(name) != sha]
        if changed:
            print0(f"the code has changed since this run began ({', '.join(changed)}): for a run "
                   f"of the new code choose another --out, or --fresh=True")
        self.code = code
        if self.finished:
            print0(f"{self.final} is finished (step {self.step}); a larger --max_steps goes on, "
                   f"--fresh=True or another --out trains anew")
            return
        longer = f" of now {self.cfg['max_steps']}, whose learning rate it follows" if (
            old.get("max_steps") != self.cfg["max_steps"]) else ""
        print0(f"going on from {self.path}, step {self.step}{longer}")
        note_saved(self.path)
        device, dtype = self.resume.get("computed", ("", ""))
        if self.cfg["dtype"] == "auto" and device == self.runtime.device.type:
            self.runtime.dtype = getattr(torch, dtype)   # resume with the original dtype

    def is_written(self):
        """Whether stage.pt is what this run ends in, and not from before it was prolonged."""
        if not self.final.exists():
            return False
        final = load_checkpoint(self.final, self.stage)
        return final["config"]["max_steps"] == self.resume["config"]["max_steps"] and (
            (final["step"], final["val_loss"]) == (self.best["step"], self.best["val_loss"]))

    def check_same_options(self):
        """Refuse to go on with other options, or with inputs that have changed."""
        missing = [k for k in ("step", "config", "inputs") if k not in self.resume]
        if missing:
            fail(f"{self.path} lacks its {', '.join(missing)}; put an intact copy there, choose "
                 f"another --out, or --fresh=True to replace it")
        # an option that the run was made without had its default
        old = self.defaults | self.resume["config"]
        differ = [k for k in self.cfg if k not in MAY_CHANGE and not same(old.get(k), self.cfg[k])]
        if self.cfg["max_steps"] < self.resume["step"]:
            differ.append("max_steps")
        if differ:
            was = ", ".join(f"{k}={format_value(old.get(k))}" for k in differ)
            fail(f"{self.path} was made with other options ({was}); repeat those, choose another "
                 f"--out, or --fresh=True to replace it")
        for what, sha in self.inputs.items():
            if self.resume["inputs"].get(what) != sha:
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
            with contextlib.suppress(RuntimeError):  # a print that the signal interrupted
                self.runtime.print0("stopping after this step")
        for number in signals():
            signal.signal(number, request_stop)

    def end_step(self, step, metrics):
        """After each step, on every rank: log its metrics, and agree on whether to stop."""
        self.stop_requested = self.runtime.any_rank(self.signalled)
        if self.is_dry:
            self.measured = self.runtime.any_rank(self.timer.end_step())
        else:
            self.log(step, metrics)
        self.progress(**metrics)

    @property
    def should_stop(self):
        return self.stop_requested or self.measured

    def log(self, step, metrics):
        """Add a line to the log."""
        if self.runtime.rank > 0 or self.is_dry:
            return
        if not self.log_file:
            self.log_file = Log(self.path.with_suffix(".jsonl"), self.step)
        try:
            self.log_file.write(step, metrics)
        except OSError as e:
            self.warn_once("log", f"could not write {self.log_file.path} ({e.strerror}); training "
                           f"goes on")

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

    def warn_once(self, kind, message):
        if kind not in self.warned:
            self.warned.add(kind)
            self.runtime.print0(f"warning: {message}")

    def validated(self, step, metrics, ema, ceiling=math.inf, is_candidate=True):
        """Log metrics of the validation set, and keep the averaged weights if they are the best.
        Losses above `ceiling` are warned of; `is_candidate`: may these weights be the result?"""
        self.log(step, metrics)
        loss = metrics["val_loss"]
        words = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items())
        self.runtime.print0(f"step {step}: {words}")
        if not is_candidate:
            return
        is_better = loss < self.best["val_loss"] or math.isnan(self.best["val_loss"])
        if is_better or not self.best["ema"]:
            weights = {k: x.detach().cpu().clone() for k, x in ema.state_dict().items()}
            self.best = {"val_loss": loss, "step": step, "ema": weights}
        self.val_losses.append(loss)
        last = self.val_losses[-4:]
        if len(last) == 4 and last == sorted(set(last)):
            self.warn_once("overfitting", f"validation loss has risen three times in a row, from "
                           f"{last[0]:.4f} to {loss:.4f}: overfitting. {self.final.name} will hold "
                           f"step {self.best['step']}")
        elif loss > ceiling:
            self.warn_once("overfitting", f"validation loss {loss:.4f} lies above {ceiling:.4f}, "
                           f"that of a model that knows nothing")

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
        note_saved(self.path)
        if not self.resume and self.cfg["fresh"]:   # the result of the run that this one replaces
            self.final.unlink(missing_ok=True)

    def show(self, draw, *args):
        """Call draw(*args), which only shows something: if it fails, a line says so."""
        try:
            if self.runtime.rank == 0 and not self.is_dry:
                draw(*args)
        except (Exception, SystemExit) as e:
            self.runtime.print0(f"could not draw ({type(e).__name__}: {e}); training goes on")

    def finish(self, more=""):
        """Write the stage's result and say so, and `more`; or report a dry run. Returns an exit
        code."""
        if self.stop_requested:
            without = " without --fresh" if self.cfg["fresh"] else ""
            self.runtime.print0("stopped; nothing was written" if self.is_dry else
                                f"saved {self.path}; the same command{without} goes on from there")
            return 130
        if self.is_dry:
            self.runtime.print0(self.timer.report(self.cfg, self.runtime.device))
            return 0
        if self.runtime.rank == 0:
            contents = {"stage": self.stage, "config": self.cfg, "inputs": self.inputs,
                        **self.about, **self.best}
            of_step = f" (step {self.best['step']})" if self.best["ema"] else ""
            if self.best["ema"]:
                contents["sha256"] = hash_state(self.best["ema"])
            write_checkpoint(self.final, contents)
            self.runtime.print0(f"wrote {self.final}{of_step} {more}")
        return 0


def is_eval_step(step, cfg):
    """Whether validation and a checkpoint follow step `step`, counted from 0."""
    is_last = step + 1 == cfg.max_steps
    return not cfg.dry_run and (is_last or (step + 1) % cfg.eval_every == 0)
