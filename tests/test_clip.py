"""OpenAI's CLIP by common/openai_clip.py: the same network, its nine files, those of others."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common import openai_clip
from common.files import file_sha256
from common.images import crop, to_tensor
from common.openai_clip import (
    CLIP_FILES,
    MEAN,
    STD,
    Clip,
    build_clip,
    check_form,
    clip_package,
    load_clip,
)
from common.perceptual import perceptual_features
from tests.helpers import ROOT, one_line_error, rand, randn, slow, stage_error, tiny_clip


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_clip_through_our_loader_is_clip(tmp_path, kind):
    reference = tiny_clip(kind)
    torch.save(reference.state_dict(), tmp_path / "clip.pt")
    clip = load_clip(tmp_path / "clip.pt")
    assert (clip.size, clip.dim, clip.context) == (64, 32, 20)

    pixels, texts = rand(3, 3, 64, 64), ["a red bus", "something blue, with a comma",
                                         "ein grüner Fisch"]
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        image = F.normalize(reference.encode_image((pixels - mean) / std), dim=-1)
        text = F.normalize(reference.encode_text(clip.tokenize(texts)[0]), dim=-1)
        for ours, theirs in ((clip.encode_image(pixels), image), (clip.encode_text(texts), text)):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
            assert (theirs[0] - theirs[1]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_perceptual_features_are_those_of_clips_layers(kind):
    reference, clip = tiny_clip(kind), Clip(tiny_clip(kind), "tiny", "cpu")
    layers, outputs = [getattr(reference.visual, f"layer{i}", None) for i in range(1, 5)], []
    for layer in filter(None, layers):
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    features, pixels = perceptual_features(clip.model.visual), rand(3, 3, 64, 64)
    with torch.no_grad():
        reference.visual(pixels)
        for ours, theirs in zip(features(pixels), outputs):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert len(outputs) == (4 if kind == "resnet" else 0)
    # batch norms are folded into their convolutions
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in clip.model.visual.modules())
    a, b = features(pixels), features(pixels + 0.1)
    assert len(a) == 4 and all((x - y).abs().max() > 1e-4 for x, y in zip(a, b))


def test_tokenizer_keeps_the_end_of_a_cut_text():
    clip = Clip(tiny_clip("vit"), "tiny", "cpu")
    rows, cut = clip.tokenize(["a bus " * 40, "a bus", "", "\N{BUS}\N{SNOWMAN}"])
    assert len(cut) == 1 and rows.shape == (4, 20)
    assert rows[0, -1] == 49407 and rows[:, 0].eq(49406).all()
    assert rows[1].tolist()[:5] == [49406, 320, 2840, 49407, 0]
    assert rows[2].tolist()[:3] == [49406, 49407, 0]


@pytest.mark.parametrize("w, h", [(80, 53), (53, 80), (64, 64), (301, 200), (33, 500)])
def test_preprocessing_is_clips(w, h):
    """Resize of the short side with Pillow's bicubic, centre crop, scale to [0, 1], OpenAI's mean
    and standard deviation."""
    im = Image.fromarray(np.random.default_rng(0).integers(256, size=(h, w, 3)).astype(np.uint8))
    short, size = min(w, h), 32
    small = im.resize((size * w // short, size * h // short), Image.Resampling.BICUBIC)
    left, top = round((small.width - size) / 2), round((small.height - size) / 2)
    expected = np.asarray(small.crop((left, top, left + size, top + size))).astype(np.float32) / 255
    expected -= np.float32([0.48145466, 0.4578275, 0.40821073])
    expected /= np.float32([0.26862954, 0.26130258, 0.27577711])
    clip = Clip(tiny_clip("vit"), "tiny", "cpu")
    ours = clip.normalize(to_tensor(crop(im, size))[None])[0]
    assert np.abs(ours.numpy() - expected.transpose(2, 0, 1)).max() < 1e-6


# --------------------------------------------------------------------- the package called clip


def run_python(code, **environment):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | environment)


def test_clip_loads_without_running_its_package(tmp_path):
    """With a torchvision and a pkg_resources that explode on import, and without either."""
    for name in ("torchvision", "pkg_resources"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not to be imported')")
    code = ("from common.openai_clip import clip_package; m, t = clip_package(); "
            "print(m.CLIP.__name__, len(t.SimpleTokenizer().encode('a red bus')))")
    for environment in ({}, {"PYTHONPATH": str(tmp_path)}):
        done = run_python(code, **environment)
        assert done.stdout.split() == ["CLIP", "3"], done.stderr


@pytest.mark.parametrize("file", ["clip.py", "clip/__init__.py"])
def test_pypis_other_package_called_clip_is_named(tmp_path, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("def echo(text): print(text)\n")
    done = run_python("from common.openai_clip import clip_package; clip_package()",
                      PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "not OpenAI's" in done.stderr and "pip uninstall clip" in done.stderr


@pytest.mark.parametrize("package", ["ftfy", "regex"])
def test_a_package_that_the_tokenizer_needs_is_named(package):
    done = run_python(f"import sys; sys.modules[{package!r}] = None\n"
                      f"from common.openai_clip import clip_package; clip_package()")
    assert done.returncode == 2 and f"pip install {package}" in done.stderr, done.stderr


# ------------------------------------------------------------------------ OpenAI's nine networks


NINE = {  # embedding, input, vision layers, width, patch, text width, heads, parameters
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 512, 8, 102_007_137),
    "RN101": (512, 224, (3, 4, 23, 3), 64, None, 512, 8, 119_688_033),
    "RN50x4": (640, 288, (4, 6, 10, 6), 80, None, 640, 10, 178_300_601),
    "RN50x16": (768, 384, (6, 8, 18, 8), 96, None, 768, 12, 290_979_217),
    "RN50x64": (1024, 448, (3, 15, 36, 10), 128, None, 1024, 16, 623_258_305),
    "ViT-B/32": (512, 224, 12, 768, 32, 512, 8, 151_277_313),
    "ViT-B/16": (512, 224, 12, 768, 16, 512, 8, 149_620_737),
    "ViT-L/14": (768, 224, 24, 1024, 14, 768, 12, 427_616_513),
    "ViT-L/14@336px": (768, 336, 24, 1024, 14, 768, 12, 427_944_193)}


def published_clip(name, depth=None):
    """The network of that name, or the same with `depth` layers everywhere."""
    dim, size, layers, width, patch, text, heads, _ = NINE[name]
    if depth:
        layers = depth if patch else (depth,) * 4
    CLIP = clip_package()[0].CLIP
    return CLIP(dim, size, layers, width, patch, 77, 49408, text, heads, depth or 12).eval()


@pytest.mark.parametrize("name", NINE)
def test_the_nine_clips_by_shape(name):
    """On the meta device, which holds shapes and no numbers: every published network is recognised
    from its shapes."""
    assert set(NINE) == set(CLIP_FILES)
    with torch.device("meta"):
        reference = published_clip(name)
        ours = build_clip(reference.state_dict())
    check_form(reference.state_dict(), name)

    def shapes(model):
        return {k: v.shape for k, v in model.state_dict().items()}

    def heads(model):
        return [m.num_heads for m in model.modules() if hasattr(m, "num_heads")]
    assert shapes(ours) == shapes(reference) and heads(ours) == heads(reference)
    assert ours.visual.input_resolution == NINE[name][1] and ours.context_length == 77
    assert sum(p.numel() for p in ours.parameters()) == NINE[name][-1]


def save_archive(path, model, size, context):
    """A TorchScript archive, as OpenAI publishes its networks."""
    example = torch.rand(1, 3, size, size), torch.randint(1, 100, (1, context))
    torch.jit.trace(model, example, check_trace=False).save(str(path))


def check_clip_by_number(tmp_path, name, capsys):
    """At one layer each, in half precision as published, as a TorchScript archive and as a state
    dict: the embeddings are those of clip.model.CLIP holding the same weights in float32."""
    torch.manual_seed(0)
    reference, size = published_clip(name, depth=1), NINE[name][1]
    with torch.no_grad():
        for x in reference.state_dict().values():
            if x.is_floating_point():
                x.copy_(x.half())  # the numbers that half precision can hold
    pixels, tokens = torch.rand(1, 3, size, size), torch.randint(1, 49406, (1, 77))
    tokens[0, 9] = 49407
    save_archive(tmp_path / "jit.pt", reference, size, 77)
    half = {k: v.half() if v.is_floating_point() else v for k, v in reference.state_dict().items()}
    torch.save(half, tmp_path / "sd.pt")
    with one_line_error(capsys, "none of OpenAI's nine"):
        load_clip(tmp_path / "jit.pt")
    with torch.no_grad():
        theirs = reference.encode_image(pixels), reference.encode_text(tokens)
        for clip in (load_clip(tmp_path / "jit.pt", trust_jit=True), load_clip(tmp_path / "sd.pt")):
            ours = clip.model.encode_image(pixels), clip.model.encode_text(tokens)
            for a, b in zip(ours, theirs):
                assert (a - b).abs().max() <= 1e-5 * b.abs().max() and b.std() > 0


@pytest.mark.parametrize("name", ["RN50", "ViT-B/32"])
def test_clips_by_number(tmp_path, name, capsys):
    check_clip_by_number(tmp_path, name, capsys)


@slow
@pytest.mark.parametrize("name", [n for n in NINE if n not in ("RN50", "ViT-B/32")])
def test_slow_clips_by_number(tmp_path, name, capsys):
    check_clip_by_number(tmp_path, name, capsys)


def test_openais_own_archives_need_no_trust(tmp_path, monkeypatch, capsys):
    """From the usual cache, downloaded, checked and kept; or refused, and not kept."""
    save_archive(tmp_path / "jit.pt", tiny_clip("vit"), 64, 20)
    with one_line_error(capsys, "--trust_jit=True"):
        load_clip(tmp_path / "jit.pt")
    sha256 = file_sha256(tmp_path / "jit.pt")
    monkeypatch.setitem(CLIP_FILES, "RN50", sha256)
    assert load_clip(tmp_path / "jit.pt").dim == 32

    cached = tmp_path / ".cache/clip/RN50.pt"                  # by name, from clip's usual cache
    cached.parent.mkdir(parents=True)
    (tmp_path / "jit.pt").rename(cached)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_clip("RN50").size == 64

    site = tmp_path / "site" / sha256 / "RN50.pt"              # by download
    site.parent.mkdir(parents=True)
    cached.rename(site)
    monkeypatch.setattr(openai_clip, "CLIP_URL", (tmp_path / "site").as_uri())
    assert load_clip("RN50").size == 64 and cached.exists()

    cached.unlink()
    site.write_bytes(b"cut on the way")
    for reason in ("damaged", "could not download"):
        with one_line_error(capsys, reason):
            load_clip("RN50")
        assert not any(cached.parent.iterdir())
        site.unlink(missing_ok=True)
    cached.write_bytes(b"something else")
    with one_line_error(capsys, "checksum"):
        load_clip("RN50")


# -------------------------------------------------------------------- files of other projects


@pytest.mark.parametrize("wrap", [
    lambda w: {"state_dict": w, "epoch": 3}, lambda w: {"model_state_dict": w},
    lambda w: {f"module.{k}": v for k, v in w.items()},
    lambda w: {"state_dict": {f"module.{k}": v for k, v in w.items()}, "name": "run 1"}],
    ids=["state_dict", "model_state_dict", "module.", "state_dict, module."])
def test_a_state_dict_is_found_where_trainers_put_it(tmp_path, wrap):
    torch.save(tiny_clip("vit").state_dict(), tmp_path / "plain.pt")
    torch.save(wrap(tiny_clip("vit").state_dict()), tmp_path / "wrapped.pt")
    plain, wrapped = load_clip(tmp_path / "plain.pt"), load_clip(tmp_path / "wrapped.pt")
    assert plain.sha256 == wrapped.sha256
    pixels = rand(1, 3, 64, 64)
    assert torch.equal(plain.encode_image(pixels), wrapped.encode_image(pixels))


def openai_weights(width=768, text_width=512):
    """What check_form looks at, of a ViT."""
    return {"visual.proj": randn(width, 32), "ln_final.weight": randn(text_width),
            "text_projection": randn(text_width, 32), "logit_scale": torch.tensor(3.0),
            "visual.conv1.weight": randn(width, 3, 2, 2)}


OTHERS = {  # name: (weights, what is said of them)
    "Hugging Face": ({"text_model.final_layer_norm.weight": randn(8), "logit_scale": randn(1),
                      "vision_model.post_layernorm.weight": randn(8)}, "Hugging Face's form"),
    "open_clip": ({"text.transformer.resblocks.0.ln_1.weight": randn(8),
                   "visual.trunk.cls_token": randn(1, 1, 8)}, "open_clip's form"),
    "ViT-H": (openai_weights(1280, 1024), "width 1280"),
    "ViT-bigG": (openai_weights(1664, 1280), "width 1664"),
    "odd heads": (openai_weights(720), "width 720"),
    "half": ({k: v for k, v in openai_weights().items() if k != "text_projection"}, "not a CLIP"),
    "a list": ([1, 2], "not a CLIP"),
    "a checkpoint": ({"stage": "vqgan", "ema": {}}, "a checkpoint of this project"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_clips_of_other_kinds_are_told_apart_and_refused(tmp_path, name, capsys):
    weights, words = OTHERS[name]
    torch.save(weights, tmp_path / "c.pt")
    with one_line_error(capsys, "c.pt", words):
        load_clip(tmp_path / "c.pt")


@pytest.mark.parametrize("name", ["model.safetensors", "model.bin"])
def test_safetensors_are_recognised_by_their_form(tmp_path, name, capsys):
    header = json.dumps({"logit_scale": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}})
    data = len(header).to_bytes(8, "little") + header.encode() + bytes(4)
    (tmp_path / name).write_bytes(data)
    with one_line_error(capsys, name, "safetensors", "torch.save"):
        load_clip(tmp_path / name)


def test_only_what_would_run_code_is_said_to(tmp_path, capsys):
    class Unknown:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    torch.save({"state_dict": Unknown()}, tmp_path / "evil.pt")
    with one_line_error(capsys, "evil.pt", "without running code"):
        load_clip(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()
    torch.save(tiny_clip("vit").state_dict(), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:5000])
    with one_line_error(capsys, "cut.pt", "not a CLIP that can be read"):
        load_clip(tmp_path / "cut.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value, capsys):
    weights = tiny_clip("vit").state_dict()
    weights["visual.proj"][3, 3] = value
    torch.save(weights, tmp_path / "c.pt")
    with one_line_error(capsys, "c.pt", "not all finite"):
        load_clip(tmp_path / "c.pt")


def test_clips_are_refused_by_the_command_line_too(world, tmp_path):
    d, _ = world
    weights = torch.load(d / "out/toy/clip.pt", weights_only=True)
    weights["text_projection"][0, 0] = float("nan")
    torch.save(weights, tmp_path / "nan.pt")
    torch.save(OTHERS["ViT-H"][0], tmp_path / "h.pt")
    for script, file, words in (("prepare.py", "nan.pt", "not all finite"),
                                ("sample.py", "nan.pt", "not all finite"),
                                ("vqgan.py", "h.pt", "width 1280")):
        prompt = ["word"] if script == "sample.py" else []
        out = tmp_path / ("s.png" if prompt else "out")
        line = stage_error(script, *prompt, f"--clip={tmp_path}/{file}", f"--out={out}", cwd=d)
        assert words in line and file in line
