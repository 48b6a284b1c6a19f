"""lab/: the figures by hand, the evaluation, the ablations and the benchmark in miniature."""
import dataclasses
import importlib
import itertools
import json
import math
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sample
import toy
from common.checkpoints import load_vqgan
from common.drawings import draw
from common.dumps import open_dump
from common.modality import GENERIC, gap_noise
from common.openai_clip import load_clip
from common.runtime import Runtime
from common.sources import ImageSource, split_names
from lab import ablate, baselines, bench, comparisons, metrics, prompts, rows, seeds
from lab.bench_sampling import measure_sampling, plain_in, time_on_gpu
from lab.judge import ATTRIBUTES, get_judge, judge_features, match, train_judge
from lab.painter import (
    make_painter,
    move,
    own_vectors,
    shift,
    with_gap,
    with_shifted_text_mean,
)
from tests.helpers import (
    cached_logits,
    load_raw,
    one_line_error,
    rand,
    randn,
    run_stage,
    slow,
    snapshot,
    stage_error,
    tiny_gpt,
    tiny_vqgan,
    tokens_for,
)
from tests.inprocess import call_error, call_stage, link_world

EVALUATE = ["lab.evaluate", "--gpt=out/toy/gpt.pt", "--out=out/evaluated", "--n=1",
            "--judge_steps=3"]


# ------------------------------------------------------------------------------ figures by hand


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_frechet_distance_by_hand():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6))
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet(a, a + 3) == pytest.approx(6 * 9)         # only the mean moves
    twice = 2 * a - a.mean(0)                                        # twice the spread, same mean
    assert metrics.frechet(a, twice) == pytest.approx(np.trace(np.cov(a.T)))


def test_cmmd_is_unbiased_and_grows_with_the_difference():
    rng = np.random.default_rng(0)

    def sample(n, shift=0.0):
        return unit(rng.normal(size=(n, 16)) + shift)
    same = [metrics.cmmd(sample(40), sample(60)) for _ in range(60)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 60 ** 0.5 and min(same) < 0 < max(same)
    assert max(same) < metrics.cmmd(sample(40), sample(60, 0.5)) \
        < metrics.cmmd(sample(40), sample(60, 2.0))
    a, b = np.eye(2), np.array([[0.6, 0.8], [0.8, 0.6]])
    k_aa, k_bb = np.exp(-2 / 2), np.exp(-0.08 / 2)  # by hand, at width 1
    k_ab = (np.exp(-0.8 / 2) + np.exp(-0.4 / 2)) / 2
    assert metrics.cmmd(a, b, 1.0) == pytest.approx(1000 * (k_aa + k_bb - 2 * k_ab))


def test_ratio_of_proportions_and_frechet_win_rate_by_hand():
    a, b, full, none = (metrics.proportion([True] * n + [False] * (200 - n))
                        for n in (180, 160, 200, 0))
    found = metrics.ratio(a, b)
    assert found["ratio"] == pytest.approx(1.125)
    assert found["low"] == pytest.approx(a["low"] / b["high"])
    assert found["high"] == pytest.approx(a["high"] / b["low"])
    found = metrics.ratio(full, full)
    assert found["low"] < 0.99 < 1.01 < found["high"] < 1.05
    assert math.isfinite(metrics.ratio(a, none)["high"])
    assert metrics.mean([3.0])["half"] is None
    assert metrics.mean([1.0, 3.0])["half"] == pytest.approx(1.96)
    reference, near, far = (np.random.default_rng(i).normal(size=(300, 4)) + x
                            for i, x in enumerate((0, 0, 2)))
    assert metrics.frechet_win_rate(near, far, reference) == 1
    assert metrics.frechet_win_rate(far, near, reference) == 0


def test_retrieval_and_proportions_by_hand():
    found = metrics.proportion([True] * 8 + [False] * 2)             # Wilson 1927
    assert found["share"] == 0.8 and found["n"] == 10
    assert found["low"] == pytest.approx(0.4902, abs=1e-3)
    assert found["high"] == pytest.approx(0.9433, abs=1e-3)
    assert metrics.proportion([]) is None

    embeds = torch.eye(3)[[0, 0, 1, 1]]
    found = metrics.retrieval(embeds, torch.eye(3)[:2], [0, 0, 1, 0])
    assert found["retrieval"]["share"] == 0.75
    assert found["similarity"]["mean"] == pytest.approx(0.75)


def test_diversity_and_nearest_training_image_by_hand():
    """Features are the mean colour; an image that was trained on is its own nearest."""
    images = np.zeros((4, 32, 32, 3), np.uint8)
    images[1, ..., 0], images[3, ..., 1] = 255, 51
    features = images.mean((1, 2)) / 255
    assert metrics.diversity(features, ["a", "a", "b", "b"])["mean"] == pytest.approx((1 + 0.2) / 2)
    assert metrics.diversity(features, "abcd") is None
    t = metrics.thumbnails(images)
    assert metrics.nearest(images, t)["mean"] == pytest.approx(0, abs=1e-3)
    assert metrics.nearest(images[1:2], t[:1])["mean"] == pytest.approx(3 ** -0.5, abs=1e-3)


def test_a_distance_stands_beside_its_floor_at_the_same_n():
    """Few true images are far from the reference by Frechet distance, by CMMD they are not."""
    rng = np.random.default_rng(0)
    true = rng.normal(size=(900, 16))
    reference = metrics.Reference(true[:300], unit(true[:300]))
    few, many = (reference.floor(true[300:], unit(true[300:]), n) for n in (20, 300))
    assert few["frechet_floor"]["n"] == few["cmmd_floor"]["n"] == 20
    assert few["frechet_floor"]["mean"] > 4 * many["frechet_floor"]["mean"]
    assert abs(few["cmmd_floor"]["mean"]) < few["cmmd_floor"]["half"]
    fresh, other = rng.normal(size=(20, 16)), rng.normal(size=(20, 16)) + 1
    for images, is_true in ((fresh, True), (other, False)):
        found = reference.judge(images, unit(images))
        assert found["frechet"]["n"] == 20 and found["cmmd"]["half"] > 0
        for name in ("frechet", "cmmd"):
            floor = few[f"{name}_floor"]
            assert (found[name]["mean"] < floor["mean"] + 2 * floor["half"]) == is_true


# ------------------------------------------------------------------------------ prompts and gaps


def test_two_sets_of_prompts():
    """None is in both, unseen pairs are reported alone, each asks for what it says."""
    choosing, kinds = prompts.choosing_prompts(), prompts.reported_prompts()
    assert set(kinds) == {"plain", "long", "paraphrased", "unseen"}
    reported = [text for kind in kinds.values() for text in kind.texts]
    assert not set(choosing.texts) & set(reported) and not set(GENERIC) & {*reported,
                                                                           *choosing.texts}
    assert len(choosing.texts) == len(set(choosing.texts)) == 84
    assert [len(kind.texts) for kind in kinds.values()] == [96, 96, 96, 12]
    assert not any(map(prompts.is_unseen, choosing.wanted))
    assert all(map(prompts.is_unseen, kinds["unseen"].wanted))
    for kind in (choosing, *kinds.values()):
        for text, wanted in zip(kind.texts, kind.wanted):
            words = text.replace(",", "").replace(".", "").split()
            assert {"colour", "object"} <= set(wanted) and set(wanted.values()) <= set(words)
            assert ("background" in wanted) == ("background" in words)
    templates = [t.format(colour=w["colour"], object=w["object"], size=size, background=b)
                 for t in toy.CAPTIONS for w in kinds["plain"].wanted for size in toy.SIZES
                 for b in toy.BACKGROUNDS]
    assert not set(kinds["paraphrased"].texts) & set(templates)


def test_gap_moves_each_text_by_its_own_vector():
    """Of that length, the same whatever other texts are asked for; images stay."""
    texts = [f"text {i}" for i in range(50)]
    e = F.normalize(randn(50, 32), dim=-1)
    moved = move(e, texts, 1.2)
    assert torch.allclose(moved.norm(dim=-1), torch.ones(50), atol=1e-5)
    assert (e * moved).sum(1).mean() == pytest.approx((1 + 1.2 ** 2) ** -0.5, abs=0.05)
    vectors = own_vectors(texts, 32)
    assert torch.allclose(F.normalize(e + 1.2 * vectors, dim=-1), moved)
    others = vectors @ vectors.T - torch.eye(50)
    assert others.abs().max() < 0.8 and abs(others.mean()) < 0.02    # no constant among them
    assert torch.equal(own_vectors(texts[3:5], 32), vectors[3:5])
    assert (own_vectors(texts, 32, draw=1) * vectors).sum(1).max() < 0.8

    class FakeClip:
        encode_text = staticmethod(lambda texts: e[:len(texts)])
        encode_image = "as it was"
    clip = FakeClip()
    assert torch.equal(with_gap(clip, 1.2).encode_text(texts), moved)
    assert torch.equal(clip.encode_text(texts), e) and with_gap(clip, 1).encode_image == "as it was"


def test_ceilings_of_a_gap():
    """All texts are found where none has moved, by chance where only the vectors count; a prompt
    of which no image is known counts for neither."""
    wanted = [{"colour": "red", "object": name} for name in ("bus", "car", "cup", "fish")]
    texts = [w["object"] for w in wanted]
    rows_of = [w for w in wanted[:3] for _ in range(4)]
    embeds = torch.eye(8)[:3].repeat_interleave(4, 0) + 0.1 * randn(12, 8)

    class FakeClip:
        size, device = 8, "cpu"
        encode_image = staticmethod(lambda x: embeds)
    table = types.SimpleNamespace(
        clip=FakeClip(), texts=torch.eye(8)[:4], data=types.SimpleNamespace(
            prompts=prompts.Prompts(texts, wanted), train=np.zeros((12, 8, 8, 3), np.uint8),
            train_rows=rows_of))
    found = rows.ceilings(table, (0.0, 1e4))
    assert list(found) == ["clean text", "images' mean"]
    for (_, near, low, high), (_, far, *_) in found.values():
        assert near == low == high == 1 and far < 0.6


def test_retrieval_takes_nothing_the_generator_has_not_seen():
    """The nearest two training images of each prompt; not those that CLIP alone was shown."""
    calls = []
    table = types.SimpleNamespace(
        n=2, texts=torch.eye(3)[:2], sheet={}, data=types.SimpleNamespace(
            prompts=prompts.Prompts(["x", "y"], ["wants x", "wants y"]),
            train=np.arange(6), is_learnt=np.array([True, False, True, True, True, False])),
        train_embeds=torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0, 1, 0], [0, 0, 1]]),
        add=lambda *args: calls.append(args))
    rows.add_retrieved(table)
    (_, images, wanted, groups, own), = calls
    assert images.tolist() == [0, 2, 3, 2] and own.tolist() == [0, 0, 1, 1]
    assert wanted == ["wants x", "wants x", "wants y", "wants y"] and groups == list("xxyy")


def test_constant_gap_is_a_constant_vector_of_that_length():
    e = F.normalize(randn(50, 32), dim=-1)
    moved = shift(e, 0.8)
    rng = torch.Generator().manual_seed(0)
    direction = F.normalize(torch.randn(32, generator=rng), dim=0)
    offset = moved * (e + 0.8 * direction).norm(dim=-1, keepdim=True) - e
    assert torch.allclose(offset.norm(dim=-1), torch.full((50,), 0.8), atol=1e-5)
    assert (offset - offset[0]).abs().max() < 1e-5


def test_shifted_text_mean_leaves_the_gpt_as_it_was():
    gpt = tiny_gpt()
    painter = make_painter(gpt, None, Runtime("cpu", "float32", training=False))
    before, mean, embeds = gpt.means.clone(), randn(24, seed=5), randn(3, 24)
    moved = with_shifted_text_mean(painter, mean)
    assert torch.equal(gpt.means, before) and torch.equal(moved.gpt.means[1], mean)
    assert moved.gpt.tok_emb is gpt.tok_emb and moved.generator is painter.generator
    assert torch.equal(moved.gpt.condition(embeds), gpt.condition(embeds))
    assert not torch.allclose(moved.gpt.condition(embeds, "text"), gpt.condition(embeds, "text"))
    not_centred = make_painter(tiny_gpt(fill=False), None, painter.runtime)
    assert not with_shifted_text_mean(not_centred, mean).gpt.means.any()


# ------------------------------------------------------------------------------ judge and rivals


@pytest.fixture(scope="module")
def drawings():
    """Drawings of 64 px, uint8 (N, 64, 64, 3), and their attributes."""
    rng, images, facts = np.random.default_rng(0), [], []
    for _ in range(600):
        fact = {name: str(rng.choice(list(values))) for name, values in ATTRIBUTES.items()}
        images.append(np.asarray(draw(64, fact["object"], toy.COLOURS[fact["colour"]],
                                      toy.BACKGROUNDS[fact["background"]], rng.uniform(.3, .4),
                                      *rng.uniform(.44, .56, 2), rng.uniform(.9, 1.1))))
        facts.append(fact)
    return np.stack(images), facts


def test_blur_counts(drawings):
    """Drawings shrunk to 24 px and back are far from drawings: the judge sees 64 px."""
    images, facts = drawings
    runtime = Runtime("cpu", "float32", training=False)
    judge = train_judge(40, images, facts, runtime).eval()
    reference, fresh, shrunk = (judge_features(judge, x, runtime) for x in (
        images[:300], images[300:], rows.blur(images[300:], 24)))
    assert rows.blur(images[:2], 24).shape == (2, 64, 64, 3)
    right = [match(judge, x, facts[300:], runtime)["colour"]["share"]
             for x in (images[300:], rows.blur(images[300:], 24))]
    assert right[0] > 0.5 and right[1] > 0.9 * right[0]         # blur hides no content
    floor, distance = (metrics.frechet(x, reference) for x in (fresh, shrunk))
    assert distance > 2 * floor  # a judge that sees 32 px: 1.2 times


def test_a_judge_of_another_form_is_not_taken(drawings, tmp_path, capsys):
    images, facts = drawings
    (tmp_path / "world.json").write_text("{}")

    def trains():
        get_judge(tmp_path, tmp_path, images, facts, Runtime("cpu", "float32", training=False), 1)
        return "training the judge" in capsys.readouterr().out
    assert trains() and not trains()
    assert b"clipgen" not in (tmp_path / "judge.pt").read_bytes()   # a temporary file's name
    saved = load_raw(tmp_path / "judge.pt")
    for other in (saved | {"layers": "Judge()"}, {k: saved[k] for k in ("judge", "world", "steps")},
                  saved | {"world": "another"}):
        torch.save(other, tmp_path / "judge.pt")
        assert trains() and not trains()


def test_optimisation_takes_its_crops_and_learning_rate(monkeypatch):
    """Many crops of each image are shown to CLIP; without a learning rate nothing changes."""
    batches, seconds = [], itertools.count()
    monkeypatch.setattr(baselines, "time", types.SimpleNamespace(time=lambda: next(seconds)))

    class FakeClip:
        size = 8

        def encode_image(self, pixels):
            batches.append(len(pixels))
            return F.normalize(pixels.mean((2, 3)), dim=-1)
    texts, vqgan = torch.eye(3)[:2], tiny_vqgan().requires_grad_(False).eval()
    runtime = Runtime("cpu", "float32", training=False)
    for crops, rate in ((1, 0.0), (5, 0.0), (5, 0.3)):
        first, last = baselines.vqgan_clip_baseline(vqgan, FakeClip(), texts, [0.5, 2.5], 4, 0,
                                                    runtime, crops, rate)
        assert batches == [2 * crops] * 4 and np.array_equal(first, last) == (rate == 0)
        batches.clear()


def test_a_control_is_given_the_options_that_suit_it(monkeypatch):
    """Most that is right, and of what draws as much the smallest Frechet distance."""
    shares = {1.0: 0.5, 1.5: 0.985, 2.0: 0.99, 3.0: 0.97}            # of each guidance
    monkeypatch.setattr(comparisons, "match", lambda judge, images, wanted, runtime: {
        "both": {"share": shares[images["guidance"]]}})
    table = types.SimpleNamespace(
        n=2, judge=None, runtime=None, clip=types.SimpleNamespace(encode_text=len),
        describe=lambda images: (images, images), reference=types.SimpleNamespace(
            distances=lambda x, _: (x["guidance"] + x["variety"] - x["temperature"], 0)))
    found, results = comparisons.choose_options(
        table, lambda embeds, texts, n, options: options, {"top_k": 7},
        prompts.Prompts(["a"], [{}]))
    assert found == {"top_k": 7, "guidance": 2.0, "temperature": 1.0, "variety": 0.0}
    assert len(results) == math.prod(map(len, comparisons.GRID.values()))


def test_chart_of_noise_has_the_reference_at_its_own(monkeypatch):
    """--noise=auto is another number for each gap."""
    charts = []
    monkeypatch.setattr(ablate, "save_chart", lambda *args: charts.append(args))
    names = ["reference", "noise 0", "noise 1"]
    runs = [{"name": name, "both": 0.9, "moved": 0.5} for name in names]
    ablate.save_noise_chart("noise.png", runs, names, 1, 0.71)
    assert [point[0] for point in charts[0][3]["as is"]] == [0, 0.71, 1]


# ----------------------------------------------------------------------------------- evaluation


def evaluate(d, *args, code=0):
    """lab.evaluate in the world's folder d, with fewer values of what it tries -> its output."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparisons, "GRID", {"guidance": (1.0, 3.0), "temperature": (0.7, 1.0),
                                            "variety": (0.0,)})
        patch.setattr(comparisons, "CROPS", (1, 4))
        patch.setattr(comparisons, "TIMES", (3, 10))
        patch.setattr(comparisons, "TRIED", 3)
        patch.setattr(rows, "SWEEPS", {"guidance": ("", (2.0, 3.0, 6.0)),
                                       "variety": ("", (0.0, 0.5, 1.5))})
        return call_stage(*EVALUATE, *args, cwd=d, code=code).stdout


@pytest.fixture(scope="session")
def evaluated(world):
    """lab.evaluate with everything on, in miniature -> (the world's folder, its output)."""
    d, _ = world
    return d, evaluate(d, "--optimise=3")


def test_evaluation_end_to_end(evaluated):
    d, output = evaluated
    out = d / "out/evaluated"
    for name in ("match.json", "match.md", "match.png", "compare.png", "guidance.png",
                 "variety.png", "moved.png", "optimised.png"):
        assert (out / name).stat().st_size > 0
    written = json.loads((out / "match.json").read_text())
    table, findings = written["table"], written["findings"]
    assert len(table) == 31 and all(0 <= row["both"]["share"] <= 1 for row in table.values())
    assert all(row[name]["n"] == row[f"{name}_floor"]["n"] for row in table.values()
               for name in ("frechet", "cmmd"))
    assert len(findings["grid, optimisation"]) == 6 and len(findings["grid, captions"]) == 4
    for kind in ("plain", "long", "paraphrased", "unseen"):
        assert findings[f"language-free / captioned, {kind}"]["low"] >= 0
    assert len(findings["ceilings"]["clean text"]) == 5
    assert written["notes"] == ["By the CLIP that conditioned the GPT: it flatters the GPT."]
    assert table["true training images"]["nearest"]["mean"] == pytest.approx(0, abs=1e-3)
    # the default is a row already
    assert "samples at guidance 2" in table and "samples at guidance 3" not in table
    assert table["samples at guidance 6, gap 1.2"]["both"]["n"] == 96
    assert table["samples, each text moved by 2.4"]["both"]["n"] == 96
    assert table["samples at variety 1.5"]["both"]["n"] == 96
    assert len(list(out.glob("controls-*/*/gpt.pt"))) == 2
    report = (out / "match.md").read_text()
    assert report in output
    assert report.count("language-free / captioned: ") == 4 and "seed 0" in report
    assert "of the 3 prompts" in report and "to their own captions" in output
    assert "retrieval † |" in report and "\n† By the CLIP that" in report
    figures = [cell for line in report.splitlines() if line.startswith("| ")
               for cell in line.split(" | ")[1:] if any(x.isdigit() for x in cell)]
    assert all("n=" in x and ("±" in x or "–" in x or "n=1" in x) for x in figures)


def test_evaluation_keeps_its_controls_and_asks_for_a_match(evaluated, capfd):
    d, _ = evaluated
    output = evaluate(d, "--optimise=0", "--plots=False", "--gap=", "--min_match=0.99", code=1)
    trained = capfd.readouterr().out  # by processes of their own
    assert "/captioned/gpt.pt is finished" in trained
    assert "/unconditioned/gpt.pt is finished" in trained
    assert "training the judge" not in output


def test_the_set_to_choose_by(evaluated):
    """Neither unseen pairs nor controls; the judge of another call is kept."""
    d, _ = evaluated
    done = call_stage(*EVALUATE, "--prompt_set=choose", "--gap=1.6",
                      "--plots=False", cwd=d)
    table = json.loads((d / "out/evaluated/match.json").read_text())["table"]
    assert "training the judge" not in done.stdout and len(table) == 10
    assert table["samples of the prompts, N=1"]["both"]["n"] == 84
    assert table["samples of the prompts, N=1"]["unseen"] is None
    assert not any("control" in name or "optimisation" in name for name in table)


def test_samples_are_those_of_sample_py(evaluated):
    """A painter draws what sample.py draws for the same seed and prompt."""
    d, _ = evaluated
    runtime = Runtime("cpu", "float32", training=False)
    cfg = sample.Config(gpt=str(d / "out/toy/gpt.pt"))
    gpt, vqgan, clip, options = sample.load(cfg, runtime)
    prompts = ["a red bus", "a blue fish"]
    images = make_painter(gpt, vqgan, runtime)(clip.encode_text(prompts), prompts, 2, options)
    call_stage("sample.py", *prompts, "--n=2", "--gpt=out/toy/gpt.pt",
               "--out=out/evaluated/x.png", cwd=d)
    files = sorted((d / "out/evaluated/x").glob("*.png"))
    assert len(files) == len(images) == 4
    assert all(np.array_equal(np.asarray(Image.open(f)), x) for f, x in zip(files, images))


def test_captioned_control_is_given_the_captions_of_the_same_images(evaluated):
    d, _ = evaluated
    dump, = (d / "out/evaluated").glob("controls-*/caption_tokens")
    (_, arrays), (meta, captioned) = open_dump(d / "data/toy_tokens"), open_dump(dump)
    clip = load_clip(d / "out/toy/clip.pt")
    assert load_vqgan(dump / meta["vqgan"], "cpu").sha256 == meta["vqgan_sha256"]
    lines = (d / "data/toy/captions.tsv").read_text().splitlines()[1:]
    captions = dict(line.split("\t")[::5] for line in lines)         # path: caption
    splits = split_names(ImageSource(d / "data/toy/train"), 10)
    for split, names, crops in zip(("train", "val"), splits, (3, 1)):
        names = [name for name in names if name != "broken.png"]
        assert np.array_equal(arrays[split][0], captioned[split][0])
        assert len(captioned[split][1]) == len(names) * crops
        for i in range(0, len(names), 7):
            text = clip.encode_text([captions.get(f"train/{names[i]}", "")])[0].numpy()
            assert np.abs(captioned[split][1][i * crops] - text).max() < 1e-3


def test_evaluation_looks_at_everything_before_it_works(evaluated, tmp_path):
    """No dump, or one of other images: found before the judge is trained."""
    d = link_world(evaluated[0], tmp_path)
    shutil.rmtree(d / "out/evaluated")
    (d / "data/toy_tokens").rename(d / "elsewhere")
    args = EVALUATE
    done = call_stage(*args, cwd=d, code=2)
    assert "no dump in data/toy_tokens" in done.stderr and "--controls=False" in done.stderr
    assert "judge" not in done.stdout and not (d / "out/evaluated").exists()
    (d / "elsewhere").rename(d / "data/toy_tokens")
    (d / "data/toy/train/new.png").write_bytes((d / "out/toy/world.png").read_bytes())
    done = call_stage(*args, "--controls=True", cwd=d, code=2)
    assert "is no dump of data/toy/train" in done.stderr and "judge" not in done.stdout
    done = call_stage(*args, "--optimise=0", "--plots=False", cwd=d)
    assert "no controls: data/toy_tokens is no dump of" in done.stdout
    assert "control:" not in (d / "out/evaluated/match.md").read_text()


def test_evaluation_of_images_without_captions(evaluated):
    """Any folder and a file of prompts: CLIP judges, whatever needs captions is left out."""
    d, _ = evaluated
    prompts = d / "out/evaluated/prompts.txt"
    prompts.write_text("a red bus\na blue fish\n\na red bus\n")
    args = ["lab.evaluate", "--gpt=out/toy/gpt.pt", "--n=1", "--data=data/toy/train",
            "--texts=out/evaluated/prompts.txt", "--out=out/judged"]
    done = call_stage(*args, cwd=d)
    written = json.loads((d / "out/judged/match.json").read_text())
    assert written["table"]["samples of the prompts, N=1"]["retrieval"]["n"] == 2
    assert len(written["table"]) == 9 and "both" not in done.stdout
    for words in ("clip.pt was trained on the toy world alone", "it flatters the GPT",
                  "Of 2 prompts chance alone finds 50%"):
        assert sum(words in note for note in written["notes"]) == 1 and words in done.stdout
    prompts.write_text("one\none\n")
    assert "holds 1 prompts" in call_error(*args, cwd=d)


# ------------------------------------------------------------------------------------ benchmark


def test_bench_times_sampling_and_refuses_unknown_parts(tmp_path, capsys):
    cfg = bench.Config(n_layer=2, n_head=4, n_embd=64, grid=4, codebook_size=48, batch=2,
                       device="cpu", dtype="float32")
    peaks = {"matmuls": 1e11, "convolutions": 1e11}
    limits = {"device": "cpu", "dtype": "float32", "read": 1e10, "float32": peaks,
              "bfloat16": peaks}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two wait for each other where other processes are busy
    for _ in range(3):        # a busy moment can last as long as all matmuls of so small a network
        rows = {row["what"]: row for row in measure_sampling(cfg, limits)}
        shares = [rows[f"sampling, batch {b}, float32"]["share"] for b in (1, 2)]
        if max(shares) < 1.5:
            break
    torch.set_num_threads(threads)
    assert 0 < min(shares) and max(shares) < 1.5
    for b in (1, 2):
        guided = rows[f"sampling, batch {b}, guidance, float32"]
        assert guided["share"] > 0 and guided["of"] == "the bare matmuls"
        assert rows[f"sampling, no cache, batch {b}, float32"]["rate"] > 0
    assert "sampling" in capsys.readouterr().out
    error = stage_error("-m", "lab.bench", "--parts=gpt,dance", cwd=tmp_path)
    assert "there is no part dance" in error


class FakeGPU:
    """Stands in for fast.gpu.GPUGenerator and for torch.cuda.Event: an event is a millisecond."""
    clock = 0

    def __init__(self, enable_timing=False):
        self.capture = lambda step, device: step

    def record(self):
        FakeGPU.clock += 1
        self.time = FakeGPU.clock

    def elapsed_time(self, later):
        return later.time - self.time

    def generate(self, cond, uniform, guidance):
        step = self.capture(lambda: None, cond.device)
        for _ in range(uniform.shape[1]):
            step()


def test_bench_times_every_token_on_a_gpu(monkeypatch, capsys):
    """Captured or call by call, by events around what is done for each token."""
    monkeypatch.setattr(torch.cuda, "Event", FakeGPU)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    cond, uniform, gpt = F.normalize(randn(2, 24), dim=-1), rand(2, 16), tiny_gpt()
    for generator in (gpt, plain_in(gpt, torch.float32), FakeGPU()):
        names = set(vars(generator))
        seconds = time_on_gpu(generator, cond, uniform, 2.0, torch.float32)
        assert seconds == [0.001] * 16 and set(vars(generator)) >= names
    broken = FakeGPU()
    broken.generate = lambda *args: None  # as where the kernels fail and the plain network goes on
    with one_line_error(capsys, "fast/gpu.py"):
        time_on_gpu(broken, cond, uniform, 1.0, torch.float32)


def test_bench_call_by_call_is_the_plain_network_in_half_precision():
    gpt, cond = tiny_gpt(), F.normalize(randn(2, 24), dim=-1)
    plain, tokens = plain_in(gpt, torch.bfloat16), tokens_for(gpt, 2)
    assert plain.blocks[0].fc.weight.dtype == plain.new_caches(2).dtype == torch.bfloat16
    assert gpt.blocks[0].fc.weight.dtype == plain.ln_f.weight.dtype == torch.float32
    exact = cached_logits(gpt, cond, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert plain.generate(cond, rand(2, 16), 2.0).shape == (2, 16)
        rounded = cached_logits(plain, cond, tokens).float()
    assert 0 < (rounded - exact).norm() < 0.02 * exact.norm()


def test_bench_makes_its_data_where_nothing_else_lies(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine").write_text("precious")
    cfg = bench.Config(out=str(tmp_path), jpegs=1)
    for _ in range(2):
        bench.make_data(cfg, {"device": "cpu"})
    assert (tmp_path / "data/mine").exists() and len(list(tmp_path.iterdir())) == 2
    foreign = dataclasses.replace(cfg, out=str(tmp_path / "other"))
    foreign.data.mkdir(parents=True)
    (foreign.data / "mine").write_text("precious")
    with pytest.raises(SystemExit):
        bench.make_data(foreign, {"device": "cpu"})
    assert "was not made by this program" in capsys.readouterr().err
    assert (foreign.data / "mine").read_text() == "precious"


# ------------------------------------------------------------------------------------ bad input


BAD = [  # beside those of test_bad_input.py
    ("lab.evaluate --data=data/toy/train --texts=nowhere.txt", "nowhere.txt"),
    ("lab.evaluate --texts=prompts.txt", "--texts is for other images"),
    ("lab.evaluate --optimise=1", "too few to compare"), ("lab.evaluate --gap=0.8,x", "--gap"),
    ("lab.evaluate --prompt_set=waltz", "report, choose"),
    ("lab.evaluate --data=data/toy/train --texts=x.txt --prompt_set=choose", "of the toy world"),
    ("lab.evaluate --prompt_set=choose --controls=True", "--prompt_set=choose"),
    ("lab.evaluate --min_match=2", "from 0 to"), ("lab.evaluate --n=0", "--n=0"),
    ("lab.evaluate --guidance=1 --plots=True", "--plots=True"),
    ("lab.evaluate --judge=nowhere.pt", "nowhere.pt"), ("lab.ablate --seeds=0", "--seeds"),
    ("lab.ablate --models=nowhere", "nowhere/clip.pt"), ("lab.bench --codes=64", "--codebook_size"),
]


@pytest.mark.parametrize("line, words", BAD, ids=[line for line, _ in BAD])
def test_bad_input_ends_in_one_line_and_changes_nothing(world, tmp_path_factory, line, words):
    d = tmp_path_factory.getbasetemp() / "lab_bad"
    if not d.exists():
        link_world(world[0], d)
    before = snapshot(d)
    script, *args = line.split()
    if script == "lab.evaluate":
        args.append("--gpt=out/toy/gpt.pt")
    assert words in call_error(script, *args, cwd=d)
    assert snapshot(d) == before


# ----------------------------------------------------------------------------------------- slow


@slow
def test_slow_ablations_in_miniature(world, tmp_path):
    d, _ = world
    args = ["-m", "lab.ablate", "--only=noise 2,2 crops,256 codes,guidance 6", "--seeds=2",
            "--max_steps=20", "--n=1", "--vqgan_steps=160", f"--out={tmp_path}/ablations"]
    output = run_stage(*args, cwd=d, timeout=1800).stdout
    runs = json.loads((tmp_path / "ablations/ablations.json").read_text())["runs"]
    names = ["reference", "noise 2", "2 crops an image", "256 codes", "guidance 6 when sampling"]
    found = sorted({(run["name"], run["seed"]) for run in runs})
    assert found == sorted((name, seed) for name in names for seed in (0, 1))
    assert all(math.isfinite(run["val_loss"]) and 0 <= run["both"] <= 1 and run["frechet"] > 0
               for run in runs)
    assert next(run["steps"] for run in runs if run["name"] == "reference") == 20
    assert (tmp_path / "ablations/noise.png").stat().st_size > 0
    table = (tmp_path / "ablations/ablations.md").read_text()
    assert table.count("\n") == 7 and table in output
    one, other = ([run for run in runs if run["name"] == name and run["seed"] == 1][0]
                  for name in (names[0], names[-1]))
    # one training, sampled twice
    assert one["val_loss"] == other["val_loss"] and one["frechet"] != other["frechet"]
    assert run_stage(*args, cwd=d).stdout.endswith(table)            # finished runs are kept


@slow
def test_slow_noises_in_miniature(world, tmp_path):
    d, _ = world
    args = ["-m", "lab.noises", "--noises=0.5,20", "--gaps=0,2.4", "--seeds=1", "--max_steps=20",
            "--n=1", f"--out={tmp_path}/noises"]
    output = run_stage(*args, cwd=d, timeout=1800).stdout
    table = (tmp_path / "noises/noises.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:4]]
    assert table in output and [row[0] for row in rows] == ["0", "2.4"]
    assert [gap_noise(float(row[1])) for row in rows] == pytest.approx(
        [float(row[2]) for row in rows], abs=0.02)
    assert all(row[3].startswith("**") and not row[4].startswith("**") for row in rows)
    assert run_stage(*args, cwd=d).stdout.endswith(table)        # finished runs are kept


def test_figures_of_seeds_are_put_together():
    def result(right, distance, bought):
        return {"table": {"samples": {"both": {"share": right, "n": 8}, "unseen": None,
                                      "frechet": {"mean": distance, "half": 1.0, "n": 8}}},
                "findings": {"language-free / captioned, plain": {"ratio": bought}, "grid": []}}
    first, second = result(0.5, 10.0, 1.0), result(1.0, 30.0, 0.9)
    first["table"]["optimised"] = {"both": {"share": 0.25, "n": 4}}
    table = seeds.to_markdown([first, second]).splitlines()
    assert table[3].startswith("| optimised | 25.0 |")
    cells = dict(zip(table[0].split(" | "), table[2].split(" | ")))
    assert cells["object and colour, %"] == "75.0 (50.0–100.0)" and cells["unseen pairs, %"] == ""
    assert cells["Fréchet distance"] == "20 (10–30)"
    assert table[-1] == ("* Right object and colour, language-free / captioned, plain: "
                         "0.950 (0.900–1.000).")


def test_every_stage_of_a_seed_has_the_options_that_it_is_given():
    given = dict(seeds.stages_of(7, seeds.Config()))
    for script, options in given.items():
        stage = importlib.import_module(script.removesuffix(".py"))
        assert set(options) <= {field.name for field in dataclasses.fields(stage.Config)}
    assert given["train_gpt.py"]["data"] == given["prepare.py"]["out"]
    assert given["vqgan.py"]["data"] == given["toy.py"]["data"] + "/train"
    assert [o["seed"] for s, o in given.items() if s != "prepare.py"] == [7] * 4
    assert [dict(seeds.stages_of(s, seeds.Config(optimise=5)))["lab.evaluate"]["optimise"]
            for s in (0, 1)] == [5, 0]


@slow
def test_slow_bench_in_miniature(tmp_path):
    run_stage("-m", "lab.bench", "--n_layer=2", "--n_head=4", "--n_embd=64", "--grid=4",
              "--codebook_size=64", "--batch=2", "--pixels=32", "--images=1", "--jpegs=32",
              "--mib=4", cwd=tmp_path, timeout=600)
    rows = json.loads(Path(tmp_path, "out/bench/bench.json").read_text())["rows"]
    assert all(any(row["what"].startswith(word) for row in rows) for word in
               ("limits", "sampling", "GPT step", "VQGAN step", "prepare", "batches"))
    assert all(row["rate"] > 0 and (row["share"] or 1) > 0 for row in rows)
