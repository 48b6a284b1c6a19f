"""The stages, run as a user would."""
import os
import subprocess
import sys
from pathlib import Path

from common.options import fail, format_value

ROOT = Path(__file__).parent.parent


def run_stage(script, options, threads=None, capture=True):
    """Run `python SCRIPT --name=value ...` of this repository, or a module of lab. Returns what it
    printed; without `capture` that is seen as it comes."""
    words = [f"--{name}={format_value(value)}" for name, value in options.items()]
    limit = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    program = [ROOT / script] if script.endswith(".py") else ["-m", script]
    done = subprocess.run([sys.executable, *program, *words], capture_output=capture, text=True,
                          env=os.environ | limit)
    if done.returncode:
        lines = (done.stderr or "").splitlines() or ["what it says above tells why"]
        fail(f"{script} --out={options.get('out')} failed: {lines[-1][-300:]}")
    return done.stdout
