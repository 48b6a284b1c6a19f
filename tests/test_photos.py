"""Photographs by words, in miniature: coloured noise of two classes through small CLIP, judge, all
stages and the table."""
import io
import json
import shutil
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from common.clip_training import make_clip_state
from common.dumps import open_dump
from common.modality import GENERIC
from common.openai_clip import load_clip
from common.runtime import Runtime
from common.sampling import sampling_options
from common.sources import ImageSource, split_names
from lab import cifar, photo_judge, photos, small_clip
from lab.photo_table import Table, distances, diversity
from tests.helpers import GPT_OPTIONS, ROOT, VQGAN_OPTIONS, one_line_error
from tests.inprocess import call_error, call_stage, changed, link_world

CIFAR = ROOT.parent / "shared/data/cifar10-50k"
needs_cifar = pytest.mark.skipif(not CIFAR.with_suffix(".tar").is_file(),
                                 reason="needs shared/data/cifar10-50k.tar")
COLOURS = {"apple": (200, 60, 50), "sea": (40, 80, 190)}
DATA, OUT = "--data=data/noise.tar", "--out=out/noise"
CAPTIONS = ["--captions=data/captions.tsv"]
JUDGE = ["lab.photo_judge", "--data=data/noise", "--val_percent=10", "--max_steps=12",
         "--batch_size=32", "--warmup=2"]


def write_photos(folder, count=160):
    """folder/noise.tar and noise.tsv: noise of two colours, a class each."""
    rng, lines = np.random.default_rng(0), ["path\tlabel\n"]
    with tarfile.open(folder / "noise.tar", "w") as tar:
        for i in range(count):
            label = list(COLOURS)[i % 2]
            noise = rng.normal(0, 30, (32, 32, 3)) + COLOURS[label] + rng.normal(0, 15, 3)
            content = io.BytesIO()
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(content, "PNG")
            info = tarfile.TarInfo(f"{i:03d}.png")
            info.size = content.tell()
            content.seek(0)
            tar.addfile(info, content)
            lines.append(f"{info.name}\t{label}\n")
    (folder / "noise.tsv").write_text("".join(lines))


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """Every stage once, on noise -> (folder, what the small CLIP printed). Captions and classes are
    out of reach of VQGAN, dump and GPT."""
    d = tmp_path_factory.mktemp("noise")
    (d / "data").mkdir()
    write_photos(d / "data")
    call_stage("lab.cifar", "--data=data/noise", *CAPTIONS, cwd=d)
    said = call_stage("lab.small_clip", DATA, OUT, *CAPTIONS, "--max_steps=30", "--batch_size=32",
                      "--warmup=5", "--val_percent=10", "--vision_width=8", "--embed_dim=32",
                      "--text_layers=1", cwd=d).stdout
    for name in ("captions.tsv", "noise.tsv"):
        (d / "data" / name).rename(d / name)
    clip = "--clip=out/noise/clip.pt"
    call_stage("vqgan.py", DATA, OUT, clip, *changed(VQGAN_OPTIONS, max_steps=6, flip=True), cwd=d)
    call_stage("prepare.py", DATA, clip, "--vqgan=out/noise/vqgan.pt", "--out=data/noise_tokens",
               "--val_percent=10", "--crops=2", "--workers=0", cwd=d)
    call_stage("train_gpt.py", "--data=data/noise_tokens", OUT, *GPT_OPTIONS, cwd=d)
    for name in ("captions.tsv", "noise.tsv"):
        (d / name).rename(d / "data" / name)
    call_stage("lab.caption_dump", DATA, *CAPTIONS, "--dump=data/noise_tokens",
               "--out=data/caption_tokens", cwd=d)
    call_stage("train_gpt.py", "--data=data/caption_tokens", "--out=out/noise/captioned",
               "--spread=0", *GPT_OPTIONS, cwd=d)
    return d, said


# ------------------------------------------------------------------------------ small CLIP, dumps


def test_photographs_need_no_captions_from_stage_1_on(noise):
    """The fixture hid captions and classes from the three stages, which ended well."""
    d, _ = noise
    assert all((d / "out/noise" / f"{name}.pt").is_file() for name in ("clip", "vqgan", "gpt"))
    meta, arrays = open_dump(d / "data/noise_tokens")
    train, val = split_names(ImageSource(d / "data/noise.tar"), 10)
    assert [len(arrays[split][0]) for split in ("train", "val")] == [2 * len(train), len(val)]
    assert "captions" not in (d / "data/noise_tokens/meta.json").read_text()


def test_small_clip_says_how_many_held_out_images_it_names(noise):
    """Of all captions, 12 wordings of two classes, the nearest is one of the image's own."""
    d, said = noise
    held_out = split_names(ImageSource(d / "data/noise.tar"), 10)[1]
    assert "24 captions of" in said and f"of {len(held_out)} held-out images" in said
    share = float(said.split("names ")[1].split("%")[0])
    assert share > 85
    clip, lines = load_clip(d / "out/noise/clip.pt"), (d / "data/noise.tsv").read_text().split()
    labels = dict(zip(lines[2::2], lines[3::2]))
    texts = [cifar.caption(wording, c) for c in COLOURS for wording in cifar.WORDINGS]
    embeds, source = clip.encode_text(texts), ImageSource(d / "data/noise.tar")
    hits = []
    for name in held_out:
        pixels = torch.from_numpy(np.array(source.open(name))).movedim(-1, 0)[None] / 255
        nearest = (clip.encode_image(pixels) @ embeds.T).argmax().item()
        hits.append(list(COLOURS)[nearest // 12] == labels[name])
    assert share == pytest.approx(100 * np.mean(hits), abs=0.06)


def test_captioned_control_is_given_captions_of_the_same_photographs(noise):
    d, _ = noise
    (_, arrays), (meta, captioned) = (open_dump(d / "data" / name)
                                      for name in ("noise_tokens", "caption_tokens"))
    clip, rows = load_clip(d / "out/noise/clip.pt"), (d / "data/noise.tsv").read_text().split()
    labels, used = dict(zip(rows[2::2], rows[3::2])), set()
    embeds = {c: clip.encode_text([cifar.caption(w, c) for w in cifar.WORDINGS]).numpy()
              for c in COLOURS}
    splits = split_names(ImageSource(d / "data/noise.tar"), 10)
    for split, names, crops in zip(("train", "val"), splits, (2, 1)):
        assert np.array_equal(arrays[split][0], captioned[split][0])
        assert len(captioned[split][1]) == len(names) * crops
        for i, row in enumerate(captioned[split][1]):
            cosines = embeds[labels[names[i // crops]]] @ row.astype(np.float32)
            assert cosines.max() > 0.999
            used.add(cosines.argmax())
    assert len(used) > 6 and meta["image_mean"] == meta["text_mean"]


SMALL = ["lab.small_clip", DATA, *CAPTIONS, "--out=out/small", "--max_steps=2", "--batch_size=32",
         "--val_percent=10", "--vision_width=8", "--embed_dim=32", "--text_layers=1"]


def test_images_that_cannot_be_read_are_passed_over(noise, tmp_path):
    """Of those to train on another is drawn, of the held-out ones there is one less."""
    d = link_world(noise[0], tmp_path / "w")
    with tarfile.open(d / "data/noise.tar") as tar:
        tar.extractall(d / "images", filter="data")
    train, held_out = split_names(ImageSource(d / "images"), 10)
    for name in train[::4] + held_out[:1]:
        (d / "images" / name).write_bytes(b"not an image")
    args = changed(SMALL, data="images")
    said = call_stage(*args, cwd=d).stdout
    assert "skipped " in said and f"of {len(held_out) - 1} held-out images" in said
    assert load_clip(d / "out/small/clip.pt").size == 32
    assert "(--max_bad=0.01)" in call_error(*changed(args, out="x", max_bad=0.01), cwd=d)
    for name in train:
        (d / "images" / name).write_bytes(b"not an image")
    assert "can't be used" in call_error(*changed(args, out="x", max_bad=1), cwd=d)


def test_a_small_clip_goes_on_with_its_own_captions_only(noise, tmp_path):
    d = link_world(noise[0], tmp_path / "w")
    call_stage(*SMALL, cwd=d)
    text = (d / "data/captions.tsv").read_text()
    (d / "data/captions.tsv").unlink()   # it is a link
    (d / "data/captions.tsv").write_text(text.replace("photo", "portrait"))
    assert "from another caption file" in call_error(*changed(SMALL, max_steps=3), cwd=d)


def test_equal_runs_of_the_small_clip_are_equal_files(noise, tmp_path):
    d = link_world(noise[0], tmp_path / "w")
    for out in ("a", "b"):
        call_stage(*changed(SMALL, out=out), cwd=d)
    assert (d / "a/clip.pt").read_bytes() == (d / "b/clip.pt").read_bytes()
    assert b"clipgen" not in (d / "a/clip.pt").read_bytes()           # a temporary file's name


def test_clip_pt_of_another_is_kept_and_its_own_written_again(noise, tmp_path):
    d = link_world(noise[0], tmp_path / "w")
    call_stage(*SMALL, cwd=d)
    before = (d / "out/small/clip.pt").read_bytes()
    (d / "out/small/clip.pt").unlink()
    assert "is finished" in call_stage(*SMALL, cwd=d).stdout
    assert (d / "out/small/clip.pt").read_bytes() == before
    (d / "out/small/small_clip.ckpt").rename(d / "out/small/toy.ckpt")
    (d / "out/small/small_clip.pt").unlink()
    args = changed(SMALL, seed=1)
    assert "something else made it" in call_error(*args, cwd=d)
    assert (d / "out/small/clip.pt").read_bytes() == before
    call_stage(*args, "--fresh=True", cwd=d)
    assert (d / "out/small/clip.pt").read_bytes() != before


def test_captions_of_held_out_images_alone_end_in_one_line(noise, tmp_path):
    held_out = split_names(ImageSource(noise[0] / "data/noise.tar"), 10)[1]
    file = tmp_path / "captions.tsv"
    file.write_text("path\tcaption\n" + "".join(f"{name}\tnoise\n" for name in held_out))
    args = changed(SMALL, captions=file, out=tmp_path / "x")
    assert "of held-out images only" in call_error(*args, cwd=noise[0])
    assert not (tmp_path / "x").exists()


def test_captions_that_are_cut_are_counted(noise, tmp_path):
    """Of the 24, "an apple", "the sea", "one sea" and such are 4 tokens long, with two marks."""
    d, said = noise
    assert "cut off" not in said
    said = call_stage(*changed(SMALL, context=4, out=tmp_path / "x"), cwd=d).stdout
    assert "18 of 24 captions are longer than the 4 tokens of --context" in said


def test_quotes_are_part_of_a_caption_and_a_byte_order_mark_is_none_of_a_column(tmp_path):
    file, names = tmp_path / "x.tsv", ["0.png", "1.png", "2.png"]
    file.write_text('\ufeffpath\tcaption\tlabel\n0.png\t"a cat\t"cat\n1.png\t"dog" it says\tdog\n'
                    '2.png\tthe 5" model\t5"\n', encoding="utf-8")
    texts, captions = small_clip.read_captions(file, names)
    found = [texts[i] for name in names for i in captions[name]]
    assert found == ['"a cat', '"dog" it says', 'the 5" model']
    (tmp_path / "x.tar").touch()
    assert cifar.read_labels(tmp_path / "x") == dict(zip(names, ['"cat', "dog", '5"']))


# ------------------------------------------------------------------------------------------ judge


def test_judge_learns_and_is_kept_for_the_same_photographs(noise, tmp_path):
    d, _ = noise
    shutil.copytree(d / "data", tmp_path / "data", ignore=lambda *_: ["noise_tokens"])
    args = [*JUDGE, "--out=out"]
    said = call_stage(*args, cwd=tmp_path).stdout
    assert "step 12/12" in said and "names 100.0%" in said and "held-out photographs" in said
    before = (tmp_path / "out/judge.pt").read_bytes()
    assert b"clipgen" not in before                                   # a temporary file's name
    assert "step" not in call_stage(*args, cwd=tmp_path).stdout
    assert (tmp_path / "out/judge.pt").read_bytes() == before
    for option, value in (("batch_size", 16), ("learning_rate", 0.02), ("warmup", 3)):
        args = changed(args, **{option: value})
        assert "step 12/12" in call_stage(*args, cwd=tmp_path).stdout
    rows = (tmp_path / "data/noise.tsv").read_text()
    (tmp_path / "data/noise.tsv").write_text(rows.replace("sea", "lake"))
    said = call_stage(*args, cwd=tmp_path).stdout
    assert "of other photographs" in said and "step 12/12" in said
    (tmp_path / "out/judge.pt").write_bytes(b"damaged")
    assert "can't be read" in call_stage(*args, cwd=tmp_path).stdout


def test_judge_never_learns_from_held_out_photographs(noise, monkeypatch):
    d, _ = noise
    found, shown = photo_judge.read_photos(f"{d}/data/noise", 10), []
    assert len(found.train) + len(found.heldout) == 160 and found.classes == sorted(COLOURS)
    monkeypatch.setattr(photo_judge, "augment", lambda x, rng: shown.append(x) or x)
    cfg = photo_judge.Config(max_steps=12, batch_size=32, warmup=2)
    photo_judge.train_judge(found, cfg, photo_judge.Runtime("cpu", "float32"))
    shown = {x.tobytes() for x in np.concatenate(shown)}
    assert shown == {x.tobytes() for x in found.train}
    assert not shown & {x.tobytes() for x in found.heldout}


def test_classes_are_those_of_the_photographs_that_are_there(tmp_path):
    write_photos(tmp_path)
    with open(tmp_path / "noise.tsv", "a") as f:
        f.write("elsewhere.png\tmountain\n")
    assert photo_judge.read_photos(tmp_path / "noise", 10).classes == ["apple", "sea"]


def test_where_no_scaler_is_there_is_no_float16(noise):
    """The small CLIP (and so the toy's) and the judge are trained in float32 instead."""
    runtime = Runtime("cpu", "float32")
    runtime.dtype = torch.float16     # as auto chooses on an old GPU
    make_clip_state(small_clip.Config(vision_width=8, text_layers=1), 32, runtime)
    assert runtime.dtype == torch.float32
    runtime.dtype = torch.float16
    cfg = photo_judge.Config(max_steps=1, batch_size=4)
    photo_judge.train_judge(photo_judge.read_photos(f"{noise[0]}/data/noise", 10), cfg, runtime)
    assert runtime.dtype == torch.float32


def test_augmented_photographs_are_shifted_and_mirrored():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    many = photo_judge.augment(np.repeat(image[None], 300, 0), np.random.default_rng(1))
    padded, wanted = np.pad(image, ((4, 4), (4, 4), (0, 0)), "reflect"), set()
    for y in range(9):
        for x in range(9):
            window = padded[y:y + 32, x:x + 32]
            wanted |= {window.tobytes(), window[:, ::-1].tobytes()}
    found = {x.tobytes() for x in many}
    assert found <= wanted and len(found) > 100


# ------------------------------------------------------------------------------------------ table


def test_distances_and_diversity_by_hand():
    a, b = np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 4.0]])
    assert distances(a, b).tolist() == [[16.0], [9.0]]
    x = np.array([[0.0, 0], [3, 4], [10, 10], [10, 12], [10, 14]])
    labels = np.array([0, 0, 1, 1, 1])      # 5; the mean of 2, 2 and 4
    assert diversity(x, labels) == pytest.approx((5 + 8 / 3) / 2)
    assert diversity(x[1:3], labels[1:3]) is None


def test_clip_chooses_among_samples_of_one_prompt():
    """Two prompts, four samples each, best of two."""
    texts = torch.eye(2)
    table = SimpleNamespace(texts=texts, cfg=SimpleNamespace(n=4, best_of=2))
    first = torch.tensor([0.1, 0.9, 0.8, 0.2, 0.9, 0.1, 0.3, 0.7])
    embeds = torch.stack([first, 1 - first], 1)
    assert Table.best(table, embeds).tolist() == [1, 2, 5, 6]


@pytest.mark.parametrize("minimum, best", [(0.8, 2.0), (0.95, 1.0), (1.5, 1.0), (0.1, 6.0)])
def test_row_that_counts_is_the_most_right_of_those_diverse_enough(minimum, best):
    figures = {1.0: (0.5, 1.0), 2.0: (0.8, 0.85), 6.0: (0.9, 0.4)}   # right, diversity
    table = SimpleNamespace(rows={}, cfg=SimpleNamespace(min_diversity=minimum))

    def add_samples(name, painter, options):
        right, other = figures[options["guidance"]]
        table.rows[name] = {"right": {"share": right}, "diversity": other, "options": options}
    table.add_samples = add_samples
    name = photos.add_sweep(table, "samples", None, {"top_k": 0}, [1.0, 2.0, 6.0], [0.5])
    assert table.rows[name]["options"] == {"top_k": 0, "guidance": best, "variety": 0.5}


def test_prompts_of_the_table_are_no_captions():
    captions, prompts = ({cifar.caption(w, c) for w in wordings for c in cifar.CLASSES}
                         for wordings in (cifar.WORDINGS, photos.PROMPTS))
    assert len(captions) == 120 and len(prompts) == 10 * len(photos.PROMPTS)
    assert not prompts & (captions | set(GENERIC))
    assert "a photograph of an airplane" in prompts and "a photograph of a truck" in prompts
    makefile = (ROOT / "Makefile").read_text().split("CLASSES := ")[1].split("photos:")[0]
    shown = makefile.replace("\\", "").split('"')[1::2]
    assert len(shown) == 10 and set(shown) <= prompts


def test_table_of_photographs_end_to_end(noise):
    d, _ = noise
    call_stage(*JUDGE[:3], "--max_steps=20", "--out=out/table", cwd=d)   # else by default options
    args = ["lab.photos", "--data=data/noise", "--models=out/noise", "--out=out/table", "--n=4",
            "--best_of=2", "--guidance=1,3", "--variety=0.5", "--judge_steps=20", "--optimise=2",
            "--captioned=out/noise/captioned/gpt.pt", "--captioned_guidance=2", "--val_percent=10"]
    said = call_stage(*args, cwd=d).stdout
    assert "step" not in said
    written = json.loads((d / "out/table/photos.json").read_text())
    table, report = written["table"], (d / "out/table/photos.md").read_text()
    assert report in said and len(table) == 13
    held_out = table["held-out photographs"]
    assert held_out["right"]["share"] == 1 and held_out["diversity"] == pytest.approx(1)
    assert "frechet" not in held_out and table["photographs trained on"]["frechet"] > 0
    assert table["photographs trained on"]["nearest"] == pytest.approx(0, abs=1e-3)
    sampled = table["samples, guidance 3, variety 0.5"]
    assert sampled["right"]["n"] == 32 and sampled["best"]["n"] == 16
    assert sampled["options"]["guidance"] == 3 and sampled["frechet"] > 0
    assert written["row"] in table and written["row"].startswith("samples, guidance")
    assert table["retrieval: the 1 nearest of a prompt by CLIP"]["right"]["share"] == 1
    assert table["optimisation against CLIP, 100 times a sample's time"]["right"]["n"] == 2
    assert "nothing: guidance 0" in table and "captioned control, guidance 2, variety 0" in table
    assert "Its right classes / those of the captioned control" in report
    sheet = Image.open(d / "out/table/nearest.png")
    assert sheet.width > 5 * 3 * 96                                   # 5 triples side by side


def test_captioned_control_takes_texts_as_they_are(noise, monkeypatch):
    d, _ = noise
    monkeypatch.chdir(d)
    cfg = photos.Config(models="out/noise", captioned="out/noise/captioned/gpt.pt")
    runtime = photos.Runtime("cpu", "float32", training=False)
    gpt, vqgan, clip, _ = photos.load_guided("out/noise/gpt.pt", cfg, runtime)
    captioned = photos.load_captioned(cfg, gpt, vqgan, clip, runtime)
    plain = torch.eye(32)
    assert torch.equal(captioned.shrink, plain) and not torch.equal(gpt.shrink, plain)
    assert torch.equal(captioned.spread, gpt.spread) and captioned.spread.any()


def test_photographs_held_out_otherwise_are_refused(noise, tmp_path):
    d, _ = noise
    args = ["lab.photos", "--models=out/noise", f"--out={tmp_path}", "--val_percent=20"]
    assert "was trained on other photographs" in call_error(*args, "--data=data/noise", cwd=d)
    write_photos(tmp_path, 100)
    args[-1] = "--val_percent=10"
    assert "was trained on other" in call_error(*args, f"--data={tmp_path}/noise", cwd=d)
    assert not list(tmp_path.glob("judge.pt"))


# -------------------------------------------------------------------------------------- the files


def test_archive_becomes_tar_classes_and_captions(tmp_path, monkeypatch, capsys):
    """CIFAR-10's binary form: five files of records, a label and then three planes of 32 x 32."""
    records = np.random.default_rng(0).integers(0, 256, (10, 3073)).astype(np.uint8)
    records[:, 0] = np.arange(10)
    with tarfile.open(tmp_path / "archive.tar.gz", "w:gz") as tar:
        for number in range(1, 6):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/data_batch_{number}.bin")
            content = records[2 * number - 2:2 * number].tobytes()
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    args = ["lab.cifar", "--archive=archive.tar.gz", "--data=c", "--captions=captions.tsv"]
    assert "MD5 differs" in call_error(*args, cwd=tmp_path)
    with open(tmp_path / "archive.tar.gz", "rb") as f:
        monkeypatch.setattr(cifar, "MD5", cifar.hashlib.file_digest(f, "md5").hexdigest())
    (tmp_path / "c.clipgen-99999999.tar").touch()          # of a call that was stopped
    call_stage(*args, cwd=tmp_path)
    assert not list(tmp_path.glob("*clipgen*"))
    found = photo_judge.read_photos(str(tmp_path / "c"), 30)
    images = np.concatenate([found.train, found.heldout])
    labels = np.concatenate([found.train_labels, found.heldout_labels])
    wanted = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    for image, label in zip(images, labels):
        assert np.array_equal(image, wanted[cifar.CLASSES.index(found.classes[label])])
    lines = (tmp_path / "captions.tsv").read_text().splitlines()
    assert len(lines) == 1 + 120 and lines[1] == "00000.png\ta photo of an airplane"
    (tmp_path / "c.tsv").write_text("path\tlabel\nelsewhere.png\tcat\n")
    with one_line_error(capsys, "c.tsv", "00000.png"):
        photo_judge.read_photos(str(tmp_path / "c"), 30)


@pytest.mark.parametrize("line, words", [
    ("lab.cifar", "python -m lab.cifar --archive=FILE"),
    ("lab.photo_judge", "python -m lab.cifar --archive=FILE"),
    ("lab.small_clip --blocks=1,1", "--blocks=1,1"), ("lab.small_clip --blocks=1,1,0,1", "four"),
    ("lab.small_clip --text_width=1088", "from 1 to 1024"),
    ("toy.py --text_width=1088", "from 1 to 1024"),
    ("lab.photos", "python -m lab.cifar --archive=FILE"),
    ("lab.photos --n=6 --best_of=4", "does not divide"), ("lab.photos --best_of=0", "--best_of=0"),
    ("lab.photos --guidance=1,much", "--guidance=1,much"),
    ("lab.photos --captioned_variety=-1", "numbers of 0 or more")])
def test_bad_input_of_photographs_ends_in_one_line(tmp_path, line, words):
    script, *args = line.split()
    assert words in call_error(script, *args, cwd=tmp_path) and not list(tmp_path.iterdir())


def test_captions_are_given_to_the_dump_of_these_photographs_alone(noise, tmp_path):
    d, _ = noise
    write_photos(tmp_path, 20)
    args = ["lab.caption_dump", *CAPTIONS, "--dump=data/noise_tokens"]
    error = call_error(*args, f"--data={tmp_path}/noise.tar", "--out=data/x", cwd=d)
    assert "is no dump of" in error and not (d / "data/x").exists()
    assert "holds a dump" in call_error(*args, DATA, "--out=data/caption_tokens", cwd=d)
    short = tmp_path / "short.tsv"
    short.write_text("path\tcaption\n000.png\ta fruit\n")
    error = call_error(*changed(args, captions=short), DATA, "--out=data/x", cwd=d)
    assert "has no caption of" in error and not (d / "data/x").exists()


def test_a_missing_clip_is_not_named_by_an_option_that_is_not_there(noise, tmp_path):
    d = link_world(noise[0], tmp_path / "w")
    (d / "out/noise/clip.pt").unlink()
    line = call_error("lab.caption_dump", *CAPTIONS, DATA, "--dump=data/noise_tokens",
                      "--out=data/x", cwd=d)
    assert "out/noise/clip.pt: put that one back" in line and "=FILE" not in line


def test_a_photograph_without_a_class_is_left_out(tmp_path):
    (tmp_path / "x.tar").touch()
    (tmp_path / "x.tsv").write_text("path\tlabel\n0.png\tcat\n1.png\t\n2.png\n")
    assert cifar.read_labels(tmp_path / "x") == {"0.png": "cat"}
    (tmp_path / "x.tsv").write_text("path\tlabel\n")
    assert "no class" in call_error("lab.cifar", "--data=x", *CAPTIONS, cwd=tmp_path)
    assert not (tmp_path / "data").exists()


def test_too_few_held_out_photographs_end_in_one_line(tmp_path):
    """Two of 160, by chance one of each class."""
    write_photos(tmp_path)
    assert "--val_percent=1 holds out no two" in call_error(
        "lab.photos", f"--data={tmp_path}/noise", "--val_percent=1", cwd=tmp_path)


@needs_cifar
def test_real_photographs_all_have_a_class():
    labels, source = cifar.read_labels(CIFAR), ImageSource(f"{CIFAR}.tar")
    assert set(labels) == set(source.names) and len(labels) == 50000
    assert set(labels.values()) == set(cifar.CLASSES)
    assert source.open(source.names[7]).size == (32, 32)


def test_from_8_x_8_tokens_on_samples_are_drawn_as_photographs_are():
    """The options that suit photographs, but for those that are given."""
    def options(grid, drop=0.1, classic=False, **given):
        gpt = SimpleNamespace(cfg=SimpleNamespace(grid=grid, classic=classic))
        found = sampling_options(sample.Config(**given), gpt, {"config": {"cond_drop_prob": drop}})
        return found["guidance"], found["temperature"], found["variety"]
    assert options(4) == (3, 0.7, 0.5) and options(8) == options(16) == (2, 1, 1)
    assert options(8, guidance=4.0, variety=0.0) == (4, 1, 0)
    assert options(8, drop=0) == (1, 1, 1) and options(8, classic=True) == (1, 1, 0)
