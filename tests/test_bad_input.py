"""Mistakes: each ends in one line that says what is the matter, exit code 2, nothing lost."""
import shutil
import subprocess
import time

import pytest
import torch
from PIL import Image

from common.dumps import write_dump
from common.files import hash_state
from common.openai_clip import load_clip
from tests.helpers import (
    load_raw,
    run_stages,
    save_checkpoint,
    snapshot,
    stage_command,
    stage_environment,
)
from tests.inprocess import call_error, call_stage, link_world

BAD = [
    ("vqgan.py --data=nowhere", "nowhere"), ("vqgan.py --data=empty", "no images in empty"),
    ("vqgan.py --data=rotten --out=out/r --workers=0", "read"),
    ("vqgan.py --clip=nowhere.pt", "nowhere.pt"),
    ("vqgan.py --clip=out/toy/vqgan.pt --out=out/x", "not a CLIP"),
    ("vqgan.py --image_size=30 --out=out/x", "image_size"),
    ("vqgan.py --ch=20 --out=out/x", "--groups"), ("vqgan.py --bathc_size=3", "--batch_size"),
    ("vqgan.py out/x", "--name=value"), ("vqgan.py --device=gpu9", "--device"),
    ("vqgan.py --dtype=float16", "float16"),
    ("prepare.py --data=nowhere --out=x", "nowhere"),
    ("prepare.py --data=rotten --out=x", "6 of 6"),
    ("prepare.py --vqgan=nowhere.pt --out=x", "nowhere.pt"),
    ("prepare.py --vqgan=out/toy/gpt.pt --out=x", "checkpoint of gpt"),
    ("prepare.py --vqgan=out/toy/clip.pt --out=x", "vqgan checkpoint"),
    ("prepare.py --vqgan=rotten/a.png --out=x", "rotten/a.png"),
    ("train_gpt.py --data=nowhere", "nowhere"),
    ("train_gpt.py --vqgan=other/vqgan.pt --out=out/x", "is another one than"),
    ("prepare.py --image_size=33 --out=x", "33"),
    ("train_gpt.py --n_embd=30 --n_head=4 --out=out/x", "--n_embd"),
    ("train_gpt.py --batch_size=7 --grad_accum_steps=2 --out=out/x", "batch_size"),
    ("sample.py", "a red bus"), ("sample.py word --gpt=nowhere.pt", "nowhere.pt"),
    ("sample.py word --gpt=out/toy/vqgan.pt", "vqgan"),
    ("sample.py word --vqgan=other/vqgan.pt", "is another one than"),
    ("sample.py --image=nowhere.png", "nowhere.png"),
    ("sample.py --image=rotten/a.png", "rotten/a.png"),
    ("sample.py word --clip=other/clip.pt", "is another one than"),
    ("sample.py word --top_p=2", "from 0 to 1"),
    ("sample.py word --dtype=~", "one of auto, float32"),
    ("vqgan.py --flip=~ --out=out/x", "one of True, False"),
    ("vqgan.py --out=published", "without vqgan.ckpt"),
    ("prepare.py --vqgan=other/old.pt --out=x", "unexpected"),
    ("prepare.py --val_percent=100 --out=x", "held out"),
    ("lab.bench --pixels=100", "--pixels"), ("sample.py word --out=x.txt", ".png"),
    ("lab.evaluate --data=empty", "no toy world"),
    ("lab.evaluate --data=rotten --texts=nowhere.txt", "nowhere.txt"),
    ("toy.py --data=empty --out=out/x", "no toy world"), ("toy.py --seed=5 --out=out/x", "seed"),
    ("toy.py --batch_size=1 --out=out/x", "--batch_size"),
    ("vqgan.py --data=shards/**.tar --out=out/x", "shards/**.tar"),
    ("vqgan.py --data=//nowhere --out=out/x", "nowhere"),
    ("sample.py --image=thin.png", "too thin"),
    ("sample.py word --guidance=1e39", "from 0 to 1e+06"),
    ("lab.ablate --data=nowhere", "no whole toy world"), ("lab.ablate --only=waltz", "waltz"),
    ("lab.ablate --dump=nowhere", "no dump in nowhere"), ("lab.bench --n_embd=100", "--n_head"),
    ("lab.bench --grid=2", "--grid"), ("lab.bench --out=thin.png", "thin.png"),
    # of later reports
    ("sample.py word --image=thin.png", "either words"), ("sample.py word --n=0", "--n=0"),
    ("sample.py word --gpt=out/toy", "out/toy"), ("train_gpt.py --data=out/toy", "no dump in"),
    ("prepare.py --data=data/toy/world.json --out=x", "world.json"),
    ("vqgan.py --vq_start=600 --out=out/x", "--vq_start=600"),
    ("train_gpt.py --init_from=nowhere.pt --out=out/x", "nowhere.pt"),
    ("vqgan.py --init_from=out/toy/gpt.pt --out=out/x", "checkpoint of gpt"),
    ("vqgan.py --beta2=1 --out=out/x", "--beta2=1"),
]
AS_PROCESSES = [line for line, _ in BAD if line in (
    "vqgan.py --data=empty", "prepare.py --data=rotten --out=x", "train_gpt.py --data=nowhere",
    "sample.py word --vqgan=other/vqgan.pt", "toy.py --seed=5 --out=out/x")]


def arguments(line):
    """A line of BAD as a list; a folder of its own in the place of x."""
    number = [bad[0] for bad in BAD].index(line)
    line = line.replace("=out/x", f"=out/x{number}").replace("--out=x", f"--out=x{number}")
    return line.split()


@pytest.fixture(scope="session")
def bad_world(world, tmp_path_factory):
    d = link_world(world[0], tmp_path_factory.mktemp("bad"))
    for name in ("empty", "rotten", "other", "published"):
        (d / name).mkdir()
    for name in "abcdef":
        (d / f"rotten/{name}.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing of sense")
    Image.new("L", (1, 1000)).save(d / "thin.png")
    checkpoint = load_raw(d / "out/toy/vqgan.pt")
    ema = {k: v + 0.01 for k, v in checkpoint["ema"].items()}
    other = {"ema": ema, "sha256": hash_state(ema)}
    save_checkpoint(d / "other/vqgan.pt", checkpoint, **other)
    network = checkpoint["network"] | {"an option of long ago": 1}
    save_checkpoint(d / "other/old.pt", checkpoint, **other, network=network)
    torch.save({"state_dict": ema}, d / "published/vqgan.pt")  # of taming-transformers' form
    weights = load_raw(d / "out/toy/clip.pt")
    torch.save(weights | {"logit_scale": weights["logit_scale"] + 1}, d / "other/clip.pt")
    return d, snapshot(d)


@pytest.mark.parametrize("line, says", BAD, ids=[line for line, _ in BAD])
def test_bad_input_ends_in_one_line(bad_world, line, says):
    script, *args = arguments(line)
    assert says in call_error(script, *args, cwd=bad_world[0])


def test_bad_input_as_a_user_gives_it(bad_world):
    """The same by processes of their own: nothing but the line on stderr."""
    jobs = [(arguments(line), bad_world[0], 2) for line in AS_PROCESSES]
    assert len(jobs) == 5
    for done, line in zip(run_stages(*jobs), AS_PROCESSES):
        assert dict(BAD)[line] in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr


def test_bad_input_loses_and_overwrites_nothing(bad_world):
    d, before = bad_world
    after = snapshot(d)
    assert [p for p in before if before[p] != after.get(p)] == []


def test_odd_prompts_draw_or_are_refused(world, tmp_path):
    d, odd = world[0], ("", "\N{BUS}\N{SNOWMAN}", "../../up", "a\nb", "--", "-n 4", "x" * 300)
    for i, prompt in enumerate(odd):
        out = call_stage("sample.py", "--n=1", f"--out={tmp_path}/{i}.png", "--", prompt,
                         cwd=d).stdout
        assert prompt.isascii() or prompt in out  # the font lacks it, so the log says it
    made = sorted(p.name for p in tmp_path.iterdir())
    assert made == sorted([*"0123456", *(f"{i}.png" for i in range(7))])  # nothing outside
    assert all(len(list((tmp_path / str(i)).glob("*.png"))) == 1 for i in range(7))
    bad = [x.encode() for x in stage_command("sample.py")] + [b"a \xff\xfe bus"]
    done = subprocess.run(bad, cwd=d, capture_output=True, env=stage_environment())
    assert done.returncode == 2 and b"UTF-8" in done.stderr and done.stderr.count(b"\n") == 1
    start, clip = time.time(), load_clip(d / "out/toy/clip.pt")
    assert clip.tokenize(["a red bus " * 10 ** 6])[1] and clip.tokenize(["x" * 10 ** 7])[1]
    assert time.time() - start < 20


def test_many_prompts_make_a_grid_one_can_open(world, tmp_path):
    """120 prompts are no row of 8,000 pixels, and their files sort as numbers do."""
    (tmp_path / "texts.txt").write_text("\n".join(f"thing {i}" for i in range(120)))
    call_stage("sample.py", f"--texts={tmp_path}/texts.txt", "--n=1", f"--out={tmp_path}/s.png",
               cwd=world[0])
    sheet = Image.open(tmp_path / "s.png")
    assert sheet.width < 1600 and sheet.height < 3000
    names = sorted(p.name for p in (tmp_path / "s").glob("*.png"))
    assert names == [f"{i:03d}-thing-{i}-0.png" for i in range(120)]


def test_samples_of_one_call_do_not_mix_with_an_earlier_one(world, tmp_path):
    """What an earlier call wrote is replaced; what the user put there stays."""
    run = ["sample.py", f"--out={tmp_path}/s.png"]
    call_stage(*run, "a red bus", "--n=3", cwd=world[0])
    (tmp_path / "s/mine.png").write_bytes(b"precious")
    call_stage(*run, "a blue fish", "--n=1", "--candidates=3", cwd=world[0])
    names = sorted(p.name for p in (tmp_path / "s").glob("*.png"))
    assert len(names) == 2 and names[1] == "mine.png"
    assert names[0][:-5] == "00-a-blue-fish-" and names[0][-5] in "012"  # the candidate's number


def test_embeddings_that_are_not_finite_are_refused(world, tmp_path):
    """By weights that are no numbers, and by sound ones that overflow; before a dump or an
    image is written."""
    d, weights = world[0], load_raw(world[0] / "out/toy/clip.pt")
    image = weights["visual.attnpool.c_proj.weight"]
    for name, value in (("nan", float("nan")), ("inf", float("inf")), ("huge", 3e38)):
        changed = {"visual.attnpool.c_proj.weight": torch.full_like(image, value),
                   "text_projection": torch.full_like(weights["text_projection"], value)}
        torch.save(weights | changed, tmp_path / f"{name}.pt")
        clip = f"--clip={tmp_path}/{name}.pt"
        line = call_error("prepare.py", clip, f"--out={tmp_path}/dump", "--workers=0", cwd=d)
        assert "finite" in line and f"{name}.pt" in line
        assert not (tmp_path / "dump/meta.json").exists()
        gpt = load_raw(d / "out/toy/gpt.pt")
        save_checkpoint(tmp_path / "gpt.pt", gpt, clip=f"{name}.pt", clip_sha256=None,
                        vqgan=str(d / "out/toy/vqgan.pt"))
        for what in ("a red bus", f"--image={d}/out/toy/world.png"):
            line = call_error("sample.py", what, f"--gpt={tmp_path}/gpt.pt",
                              f"--out={tmp_path}/s.png", cwd=tmp_path)
            assert "finite" in line and (name == "huge" or f"{name}.pt" in line)
        assert not (tmp_path / "s.png").exists()
    tokens, embeddings = torch.zeros(4, 16).numpy(), torch.full((4, 64), float("nan")).numpy()
    with pytest.raises(SystemExit):
        write_dump(tmp_path / "hand", tokens.astype(int), embeddings, d / "out/toy/vqgan.pt",
                   d / "out/toy/clip.pt")
    assert not (tmp_path / "hand/meta.json").exists()
    shutil.rmtree(tmp_path / "hand", ignore_errors=True)
    for name in ("gpt", "vqgan"):
        made = load_raw(d / f"out/toy/{name}.pt")
        ema = {k: v * float("nan") for k, v in made["ema"].items()}
        save_checkpoint(tmp_path / f"{name}.pt", made, ema=ema, sha256=hash_state(ema))
        line = call_error("sample.py", "a bus", f"--gpt={d}/out/toy/gpt.pt",
                          f"--{name}={tmp_path}/{name}.pt", cwd=d) if name == "vqgan" else (
            call_error("sample.py", "a bus", f"--gpt={tmp_path}/gpt.pt", cwd=d))
        assert "not all finite" in line


def test_the_evaluation_looks_at_everything_before_it_works(world, tmp_path):
    """Without the dump it stops, and trains no judge first."""
    d = link_world(world[0], tmp_path / "w")
    shutil.rmtree(d / "data/toy_tokens")
    before = snapshot(d)
    line = call_error("lab.evaluate", "--n=1", "--judge_steps=1", cwd=d)
    assert "there is no dump in data/toy_tokens" in line
    assert snapshot(d) == before


def test_a_world_of_another_size_or_seed_is_not_overwritten(world, tmp_path):
    before = snapshot(world[0] / "data")
    for change in ("--image_size=64", "--train_images=10"):
        line = call_error("toy.py", change, f"--out={tmp_path}/t", cwd=world[0])
        assert "holds a world drawn with" in line and "--data" in line
    assert snapshot(world[0] / "data") == before
