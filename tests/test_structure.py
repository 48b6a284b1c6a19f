"""The rooms of the house: who imports whom, what an import does, and what can be deleted."""
import ast
import graphlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests import helpers
from tests.helpers import ROOT, load_raw, make_world, run_stage

STAGES = ["toy", "vqgan", "prepare", "train_gpt", "sample"]
MAY_IMPORT = {  # room: rooms
    "model": set(), "common": {"common", "model"}, "fast": {"fast", "model"},
    "lab": {"lab", "fast", "common", "model", *STAGES},
    "sample": {"common", "model", "fast"},
    **{stage: {"common", "model"} for stage in STAGES[:-1]}}


def project_files():
    """{module: its file} of everything but the tests."""
    files = [ROOT / f"{name}.py" for name in ["model", *STAGES]]
    for folder in ("common", "fast", "lab"):
        files += (ROOT / folder).glob("*.py")
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f
            for f in files}


def imports_of(file):
    """All names that a file imports, anywhere in it: modules, and what is taken from them."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def import_graph():
    """{module: the project's modules that it imports}, and the same of others."""
    files, inside, outside = project_files(), {}, {}
    for module, file in files.items():
        inside[module], outside[module] = set(), set()
        for name in imports_of(file):
            found = [m for m in files if name == m or name.startswith(m + ".")]
            if found:
                inside[module].add(max(found, key=len))
            else:
                outside[module].add(name.partition(".")[0])
    return inside, outside


def test_imports_point_one_way():
    """As MAY_IMPORT says: no stage imports a stage, only lab/ imports lab/, no cycles."""
    inside, outside = import_graph()
    assert set(STAGES) < set(inside) and len(inside) > 20
    for module, imported in inside.items():
        allowed = MAY_IMPORT[module.partition(".")[0]]
        wrong = {name for name in imported if name.partition(".")[0] not in allowed}
        assert not wrong, f"{module} imports {wrong}"
    assert outside["model"] - sys.stdlib_module_names == {"torch"}
    assert "common" not in {m.partition(".")[0] for m in inside["model"]}
    graphlib.TopologicalSorter(inside).prepare()               # raises CycleError


STATE = """
import gc, json, os, signal, sys, threading
import numpy, PIL.Image, PIL.ImageCms, PIL.PngImagePlugin, torch, torch.distributed, tqdm
hooks, register = [], os.register_at_fork

def register_at_fork(**options):
    file = sys._getframe(1).f_code.co_filename
    if file.startswith(ROOT):
        hooks.append(file)
    register(**options)

def state():
    numbers = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    return {str(n): str(signal.getsignal(n)) for n in numbers} | {
        "gc": [gc.isenabled(), gc.get_freeze_count(), gc.get_threshold()], "hooks": hooks,
        "torch": [torch.get_num_threads(), str(torch.get_default_dtype()), torch.is_grad_enabled(),
                  torch.initial_seed(), torch.get_float32_matmul_precision(),
                  torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark],
        "pillow": [PIL.Image.MAX_IMAGE_PIXELS, PIL.PngImagePlugin.MAX_TEXT_CHUNK],
        "process": [dict(os.environ), os.getcwd(), sys.path, sys.argv, threading.active_count(),
                    str(sys.excepthook), str(sys.stdout), sys.getrecursionlimit()]}

os.register_at_fork = register_at_fork
before = json.dumps(state())
for name in NAMES:
    __import__(name)
    after = json.dumps(state())
    if after != before:
        sys.exit(f"{name} changed\\n{before}\\nto\\n{after}")
"""


def test_importing_a_module_changes_nothing(tmp_path):
    """No signal handler, no fork hook, no switch of the garbage collector's or of torch's, nothing
    printed, nothing written: as in a notebook."""
    needs_triton = ("fast.gpu", "fast.gpu_kernels")
    names = [name for name in project_files() if name not in needs_triton]
    code = f"ROOT, NAMES = {str(ROOT)!r}, {json.dumps(names)}\n{STATE}"
    done = run_stage("-c", code, cwd=tmp_path)
    assert done.stdout == done.stderr == "" and not list(tmp_path.iterdir())


@pytest.fixture
def copy_without_rooms(tmp_path, monkeypatch):
    """A copy of the repository without fast/ and lab/, from which run_stage takes its scripts."""
    ignored = shutil.ignore_patterns(".git", ".venv", "data", "out", "__pycache__", "*.pt")
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=ignored)
    for room in ("fast", "lab"):
        shutil.rmtree(copy / room)
    monkeypatch.setattr(helpers, "ROOT", copy)
    return copy


def test_without_fast_and_lab_everything_works(world, tmp_path, copy_without_rooms):
    """The whole miniature pipeline, to the same weights and files."""
    (tmp_path / "w").mkdir()
    for room in ("fast", "lab"):
        run_stage("-c", f"import {room}", cwd=tmp_path, code=1)
    d, output = make_world(tmp_path / "w")
    for file in ("out/toy/vqgan.pt", "out/toy/gpt.pt"):
        weights, expected = (load_raw(Path(folder, file))["ema"] for folder in (d, world[0]))
        assert all(torch.equal(weights[k], expected[k]) for k in expected)
    for file in ("train_tokens.bin", "train_clip.bin"):
        ours, theirs = (Path(f, "data/toy_tokens", file).read_bytes() for f in (d, world[0]))
        assert ours == theirs
    assert "best 2 of 4 by CLIP" in output["sample"]
    assert len(list((d / "out/samples").glob("*.png"))) == 4


def test_without_fast_and_lab_the_tests_are_still_found(tmp_path, copy_without_rooms):
    done = run_stage("-m", "pytest", "-q", "--collect-only", "test_all.py", cwd=copy_without_rooms)
    assert "test_stages_end_to_end" in done.stdout
