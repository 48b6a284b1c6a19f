"""What learners reach for: the pictures of docs/method.md, images beside words, reconstructions."""
import re

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import sample
from lab.reconstruct import fine_energy
from tests.helpers import ROOT, rand, randn, snapshot, tiny_gpt
from tests.inprocess import call_error, call_stage, link_world


def test_every_picture_of_the_method_is_drawn(world, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    folder = link_world(world[0], tmp_path)
    for name in ("not_centred", "unconditioned"):                  # as if trained already
        (folder / "out/explain" / name).mkdir(parents=True)
        (folder / "out/explain" / name / "gpt.pt").hardlink_to(folder / "out/toy/gpt.pt")
    before = snapshot(folder / "out/explain")
    output = call_stage("lab.explain", cwd=folder).stdout
    after = snapshot(folder / "out/explain")
    assert before.items() <= after.items()                         # what is there is kept
    assert {p.name for p in after if p.suffix == ".pt"} == {"gpt.pt", "steps.pt"}
    assert (folder / "out/explain/no_noise/gpt.pt").is_file()
    named = set(re.findall(r"\.\./assets/([\w.]+)", (ROOT / "docs/method.md").read_text()))
    drawn = {p.name: p for p in after if p.suffix in (".png", ".gif")
             and p.parent.name == "explain"}
    assert named == set(drawn) and len(drawn) >= 15
    for path in drawn.values():
        with Image.open(path) as image:
            assert min(image.size) >= 48 and len(set(image.convert("L").getdata())) > 1
    assert all(word in output for word in ("kept:", "gap,", "unseen:", "first token", "entropy"))


def test_no_picture_of_the_method_is_large():
    text = (ROOT / "docs/method.md").read_text()
    sizes = [(ROOT / "assets" / name).stat().st_size
             for name in set(re.findall(r"\.\./assets/([\w.]+)", text))]
    assert max(sizes) <= 150_000 and sum(sizes) <= 1_000_000


def test_curves_of_any_run_are_drawn(world, tmp_path):
    folder = link_world(world[0], tmp_path)
    call_stage("lab.explain", "--curves=out/toy", cwd=folder)
    with Image.open(folder / "out/toy/curves.png") as image:
        assert image.width > 900                                  # three stages side by side
    (folder / "empty").mkdir()
    assert "no toy.jsonl, vqgan.jsonl or gpt.jsonl" in call_error(
        "lab.explain", "--curves=empty", cwd=folder)


def test_mix_draws_from_between_an_image_and_words(world, tmp_path, monkeypatch):
    folder, found, draw = link_world(world[0], tmp_path), {}, sample.draw
    image = next((folder / "data/toy/heldout").iterdir()).relative_to(folder)

    def conditions(*options):
        def capture(generator, vqgan, cond, *rest):
            found["cond"] = cond
            return draw(generator, vqgan, cond, *rest)
        monkeypatch.setattr(sample, "draw", capture)
        call_stage("sample.py", "--n=2", "--variety=0", *options, cwd=folder)
        return found["cond"]
    words, alone = conditions("a red bus"), conditions(f"--image={image}")
    for mix in (0, 0.5, 1):
        cond = conditions("a red bus", f"--image={image}", f"--mix={mix}")
        expected = F.normalize((1 - mix) * alone + mix * words, dim=-1)
        assert torch.allclose(cond, expected, atol=1e-5)
    assert "--mix" in call_error("sample.py", "a red bus", "--mix=0.5", cwd=folder)
    assert "--mix" in call_error("sample.py", "a red bus", f"--image={image}", cwd=folder)


def test_negative_words_take_the_place_of_the_null_embedding(world, tmp_path, monkeypatch):
    gpt, cond, other = tiny_gpt(), *F.normalize(randn(2, 6, 24), dim=-1)
    uniform = rand(6, 16)
    plain = gpt.generate(cond, uniform)
    guided = gpt.generate(cond, uniform, 3.0)
    assert torch.equal(gpt.generate(cond, uniform, 3.0, negative=cond), plain)  # c + 3 (c - c)
    assert not torch.equal(gpt.generate(cond, uniform, 3.0, negative=other), guided)
    with torch.no_grad():
        null = gpt.null.expand(1, 1, -1)                           # as if words said nothing
        gpt.prefix, prefix = lambda c: null if c is other else prefix(c), gpt.prefix
    assert torch.equal(gpt.generate(cond, uniform, 3.0, negative=other), guided)

    folder, found, draw = link_world(world[0], tmp_path), [], sample.draw
    monkeypatch.setattr(sample, "draw", lambda *args: found.append(args[2::5]) or draw(*args))
    for options in ((), ("--negative=a blue fish",)):
        call_stage("sample.py", "a red bus", "--n=1", "--variety=0", *options, cwd=folder)
    call_stage("sample.py", "a blue fish", "--n=1", "--variety=0", cwd=folder)
    (red, nothing), (same, negative), (blue, _) = found            # conditions, and the negative
    assert nothing is None and torch.equal(red, same) and torch.equal(negative, blue)
    assert "--guidance" in call_error("sample.py", "a red bus", "--negative=a blue fish",
                                      "--guidance=1", cwd=folder)


def test_the_upper_half_of_the_spectrum_by_hand():
    x = np.arange(16)
    wave = {period: np.tile(128 + 100 * np.cos(2 * np.pi * x / period), (16, 1))
            for period in (2, 8)}
    images = [Image.fromarray(np.uint8(wave[period])) for period in (2, 8)]
    fine, coarse = map(fine_energy, images)
    assert coarse < 1e-5 and abs(fine - (100 / 255) ** 2) < 1e-3
    assert fine_energy(images[0].rotate(90)) == fine               # down as well as across


def test_reconstruct_lays_images_beside_what_the_vqgan_makes_of_them(world, tmp_path):
    folder = link_world(world[0], tmp_path)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 70, 3), np.uint8))
    photo.save(folder / "photo.jpg")
    drawing = next((folder / "data/toy/heldout").iterdir()).relative_to(folder)
    output = call_stage("lab.reconstruct", "photo.jpg", drawing, "--vqgan=out/toy/vqgan.pt",
                        cwd=folder).stdout
    psnr = [float(x) for x in re.findall(r"16 tokens, \d+ codes, PSNR ([\d.]+) dB", output)]
    assert len(psnr) == 2 and all(0 < x < 60 for x in psnr)
    said = float(re.search(r"mean PSNR ([\d.]+)", output)[1])
    assert abs(said - np.mean(psnr)) < 0.06 and "upper half of the spectrum" in output
    with Image.open(folder / "out/reconstructions.png") as sheet:
        assert sheet.width >= 4 * 96                               # two rows side by side
    call_stage("lab.reconstruct", drawing, "--image_size=64", "--out=out/large.png", cwd=folder)
    for words, options in (("no image", ["none.jpg"]), ("give an image", []),
                           ("does not divide", [drawing, "--image_size=60"]),
                           (".png", [drawing, "--out=out/a.jpg"])):
        assert words in call_error("lab.reconstruct", *options, cwd=folder)
