"""The command line: what it takes, what it refuses, and in which words."""
import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
from PIL import Image

import prepare
import sample
import toy
import train_gpt
import vqgan
from common.options import check_range, format_command, parse_options, same
from common.runtime import Runtime
from tests.helpers import ROOT, one_line_error, stage_environment
from tests.inprocess import call_error, call_stage, without_privileges

STAGES = {"toy.py": toy, "vqgan.py": vqgan, "prepare.py": prepare, "train_gpt.py": train_gpt,
          "sample.py": sample}


@dataclass
class Options:
    prompts: tuple = ()
    size: int = 4                             # how many
    rate: float = 0.5                         # how fast
    part: float = 0.1
    flip: bool = True                         # mirror
    widths: tuple = (1, 2)
    name: str = "x"
    best: int | None = None                   # or auto
    dtype: str = "auto"
    preset: str = ""


PRESETS = {"small": {"size": 1, "flip": False}, "large": {"size": 9}}


def parse(argv):
    """A command line through all that a script checks of it."""
    cfg = parse_options(Options, PRESETS, argv)
    check_range(cfg, 1, 2 ** 62, "size", "best")
    check_range(cfg, 0, 1, "part")
    Runtime("cpu", cfg.dtype)
    return cfg


def test_config_line_types():
    assert parse([]) == Options()
    cfg = parse(["a bus", "--size=7", "--rate=1e-3", "--flip=false", "--widths=3,4,5",
                 "--name=a=b", "--best=3", "--dtype=float32"])
    assert cfg == Options(("a bus",), 7, 1e-3, 0.1, False, (3, 4, 5), "a=b", 3, "float32")
    assert parse(["--best=auto"]).best is None
    assert parse(["--widths="]).widths == ()
    assert parse(["--", "-n 4", "--size=3"]).prompts == ("-n 4", "--size=3")
    assert parse(["--preset=small", "--size=5"]) == Options(preset="small", size=5, flip=False)


@pytest.mark.parametrize("arg, says", [
    ("--sise=3", "--size"), ("--size=0", "whole number"), ("--size=two", "whole number"),
    ("--size=2.5", "whole"), ("--rate=-1", "number"), ("--rate=nan", "number"),
    ("--rate=inf", "number"), ("--part=1.5", "from 0 to 1"), ("--flip=maybe", "True, False"),
    ("--widths=1,x", "whole number"), ("--dtype=int8", "bfloat16"), ("--size", "--size=4"),
    ("--size 7", "--size=7"), ("--=3", "no option"), ("--prompts=3", "no option"),
    # a dash in front, as it is typed and as a word processor makes it
    ("-n 4", "-- goes before"), ("-size=3", "begins with a dash"),
    ("\u2014size=3", "begins with a dash"), ("\u2013\u2013size=3", "begins with a dash"),
    ("\u2212", "begins with a dash"), ("a -4", "begins with a dash"),
    # twice, empty, too large, unknown
    ("--size=3 --size=4", "--size is given 2 times"), ("--flip=True --flip=True", "2 times"),
    ("--name=", "--name= is empty"), ("--dtype=", "--dtype= is empty"),
    ("--size=9223372036854775808", "from 0 to 2^63 - 1"), ("--size=-1", "from 0 to 2^63 - 1"),
    ("--preset=huge", "one of small, large"), ("--zebra=3", "there is no option --zebra; --help")])
def test_config_line_refuses(arg, says, capsys):
    with one_line_error(capsys, says):
        parse(arg.split())


def test_help_names_every_option_with_default_and_comment(capsys):
    with pytest.raises(SystemExit) as e:
        parse_options(Options, PRESETS, ["--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0
    assert all(f"--{f}=" in out for f in Options.__dataclass_fields__ if f != "prompts")
    assert "--size=4" in out and "how many" in out and "--best=auto" in out
    assert "--preset=small stands for --size=1 --flip=False" in out


@pytest.mark.parametrize("script, typed, meant", [
    ("vqgan.py", "lr", "learning_rate"), ("vqgan.py", "codes", "codebook_size"),
    ("train_gpt.py", "steps", "max_steps"), ("train_gpt.py", "iters", "max_steps"),
    ("train_gpt.py", "batch", "batch_size"), ("train_gpt.py", "epochs", "max_steps"),
    ("train_gpt.py", "accumulate", "grad_accum_steps"), ("sample.py", "cfg", "guidance"),
    ("train_gpt.py", "learning-rate", "learning_rate"), ("prepare.py", "bathc_size", "batch_size"),
    ("prepare.py", "lr", None), ("sample.py", "zebra", None), ("toy.py", "guidance", None)])
def test_the_option_meant_is_named_and_only_a_near_one(script, typed, meant, tmp_path):
    line = call_error(script, f"--{typed}=1", cwd=tmp_path)
    assert f"there is no option --{typed};" in line
    assert (f"did you mean --{meant}?" if meant else "--help") in line
    assert ("did you mean" in line) == bool(meant)


@pytest.mark.parametrize("script", STAGES)
def test_every_script_refuses_dashes_repeats_and_empty_paths(script, tmp_path):
    """As a user meets them: nothing is taken for a prompt, nothing silently wins."""
    assert "begins with a dash" in call_error(script, "-n", "4", cwd=tmp_path)
    assert "begins with a dash" in call_error(script, "\u2014\u2014seed=4", cwd=tmp_path)
    assert "--out is given 2 times" in call_error(script, "--out=a", "--out=a", cwd=tmp_path)
    assert "--out= is empty" in call_error(script, "--out=", cwd=tmp_path)
    assert "2^63 - 1" in call_error(script, "--seed=9223372036854775808", cwd=tmp_path)
    if "preset" in STAGES[script].Config.__dataclass_fields__:
        assert "one of paper, 24gb" in call_error(script, "--preset=huge", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_pattern_and_a_single_image_are_recognised(tmp_path):
    """--data=photos/*.jpg as the shell expands it, and --data=one.jpg."""
    for name in "abc":
        Image.new("RGB", (40, 40)).save(tmp_path / f"{name}.jpg")
    for script in ("vqgan.py", "prepare.py"):
        for others in (["b.jpg"], ["b.jpg", "c.jpg"]):
            line = call_error(script, "--data=a.jpg", *others, cwd=tmp_path)
            assert "a pattern is written in quotes: --data='*.jpg'" in line
        line = call_error(script, "--data=a.jpg", cwd=tmp_path)
        assert "a.jpg is a single image" in line and "folder" in line


LONG = "x" * 300  # no file system has names of over 255 bytes
PATHS = [("toy.py", "data"), ("toy.py", "out"), ("vqgan.py", "data"), ("vqgan.py", "clip"),
         ("vqgan.py", "init_from"), ("vqgan.py", "out"), ("prepare.py", "data"),
         ("prepare.py", "vqgan"), ("prepare.py", "clip"), ("prepare.py", "out"),
         ("train_gpt.py", "data"), ("train_gpt.py", "vqgan"), ("train_gpt.py", "init_from"),
         ("train_gpt.py", "out"), ("sample.py", "gpt"), ("sample.py", "vqgan"),
         ("sample.py", "clip"), ("sample.py", "image"), ("sample.py", "texts"),
         ("sample.py", "out"), ("lab.evaluate", "data"), ("lab.evaluate", "out"),
         ("lab.evaluate", "gpt"), ("lab.evaluate", "judge"), ("lab.ablate", "data"),
         ("lab.ablate", "out"), ("lab.ablate", "dump")]


@pytest.mark.parametrize("script, option", PATHS)
def test_a_path_that_cannot_be_looked_at_is_one_line(world, tmp_path, script, option):
    """Names over 255 bytes, a file where a folder is needed, a closed folder."""
    value = f"{LONG}.png" if option in ("image", "out") else LONG
    words = ["a bus"] if script == "sample.py" and option not in ("image", "texts") else []
    words += [f"--out={tmp_path}/x.png"] if option != "out" else []
    assert "name too long" in call_error(script, *words, f"--{option}={value}", cwd=world[0])
    below = f"data/toy/world.json/x{'.png' if option in ('image', 'out') else ''}"
    line = call_error(script, *words, f"--{option}={below}", cwd=world[0])
    assert "data/toy/world.json" in line
    if sys.platform == "linux":
        closed = tmp_path / "closed"
        closed.mkdir(mode=0)
        with without_privileges():
            value = closed / f"x{'.png' if option in ('image', 'out') else ''}"
            line = call_error(script, *words, f"--{option}={value}", cwd=world[0])
        closed.chmod(0o700)
        assert "ermission denied" in line and "closed" in line and not list(closed.iterdir())


def test_a_file_of_prompts(world, tmp_path):
    """--texts draws one prompt a line, those of the command line first; others are one line."""
    (tmp_path / "texts.txt").write_text("a blue fish\n\n  a yellow star  \n", encoding="utf-8")
    out = call_stage("sample.py", "a red bus", f"--texts={tmp_path}/texts.txt", "--n=1",
                     f"--out={tmp_path}/s.png", cwd=world[0]).stdout
    assert "3 x 1 images" in out
    names = sorted(p.name for p in (tmp_path / "s").glob("*.png"))
    assert names == ["00-a-red-bus-0.png", "01-a-blue-fish-0.png", "02-a-yellow-star-0.png"]
    (tmp_path / "latin.txt").write_bytes(b"a gr\xfcn bus")
    (tmp_path / "empty.txt").write_text("\n \n")
    for name, says in (("latin.txt", "latin.txt"), ("nowhere.txt", "nowhere.txt"), (".", "prompts"),
                       ("empty.txt", "give either words")):
        for image in ([], ["--image=out/toy/world.png"]):
            args = [f"--texts={tmp_path}/{name}", *image]
            assert says in call_error("sample.py", *args, cwd=world[0])


def test_values_that_mean_the_same():
    assert same("data/x", "data/x/") and same("data/x", "./data//x") and same("", "")
    assert same((1, 2), (1, 2)) and same(None, None) and not same("data/x", "data/y")
    assert not same("", ".") and not same(1, "1")


def test_a_printed_command_is_read_back_as_it_was(tmp_path):
    line = format_command("sample.py", "a bus; it's $red", out="my photos/x.png", n=None, flip=True)
    shown = subprocess.run(["bash", "-c", f"python() {{ printf '%s\\n' \"$@\"; }}; {line}"],
                           capture_output=True, text=True).stdout.splitlines()
    assert shown == ["sample.py", "a bus; it's $red", "--out=my photos/x.png", "--n=auto",
                     "--flip=True"]


NOTEBOOK = """
import gc, os, runpy, signal, sys, json

def state():
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    return gc.isenabled(), [signal.getsignal(n) for n in numbers], sys.stdout, sys.stderr

before = state()
import toy, vqgan, prepare, train_gpt, sample
assert state() == before
if not os.fork():
    os._exit(0 if state() == before else 1)
assert os.wait()[1] == 0
codes = []
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as e:
        codes.append(e.code)
print(json.dumps(codes))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_an_import_changes_nothing_and_help_needs_no_docstrings(tmp_path):
    """`import sample` in a notebook leaves garbage collector, signals and streams alone;
    `python -OO SCRIPT --help`, where docstrings are gone, prints the options."""
    scripts = [str(ROOT / script) for script in STAGES]
    done = subprocess.run([sys.executable, "-OO", "-c", NOTEBOOK, *scripts], cwd=tmp_path,
                          capture_output=True, text=True, env=stage_environment())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [0] * 5
    assert done.stdout.count("--seed=0") == 5 and not done.stderr
