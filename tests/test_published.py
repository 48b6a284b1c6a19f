"""Weights published by others, and this project's presets: the same networks, by number."""
import json
import math
import sys
import types

import numpy as np
import pytest
import torch

import train_gpt
import vqgan
from common.checkpoints import load_vqgan, start_config
from common.options import parse_options
from common.published import convert_checkpoint
from model import GPT, VQGAN, GPTConfig, VQGANConfig
from tests.helpers import (
    FIXTURES,
    needs_fixtures,
    one_line_error,
    rand,
    randn,
    run_stage,
    stage_error,
    tiny_clip,
)


def fixture(name, leave_out="never"):
    """The weights of a fixture by its rule, and its reference outputs."""
    shapes, weights = json.loads((FIXTURES / f"{name}.json").read_text())["shapes"], {}
    for i, key in enumerate(sorted(k for k in shapes if not k.endswith(leave_out))):
        w = randn(*shapes[key], seed=i)
        if key.endswith("bias") or w.dim() < 2:
            weights[key] = 0.05 * w + (key.endswith("weight") and w.dim() == 1)
        else:
            weights[key] = w / math.sqrt(w[0].numel())
    return weights, dict(np.load(FIXTURES / f"{name}.npz"))


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert np.abs(ours.numpy() - theirs).max() <= 1e-4 * theirs.std()


@needs_fixtures
@pytest.mark.parametrize("name, side", [("taming_tiny", 32), ("taming_f16_1024", 256),
                                        ("hfai_vqgan", 256)])
def test_published_vqgans(tmp_path, name, side):
    """Through the loader that a user's file takes: the vectors, tokens and images of that project's
    own code."""
    weights, expected = fixture(name, "num_batches_tracked")
    lightning = {"state_dict": weights | {"loss.discriminator.x": torch.ones(3)}, "epoch": 1,
                 "global_step": 2}
    theirs = {"model": weights, "epoch": 0} if name == "hfai_vqgan" else lightning
    torch.save(theirs, tmp_path / "v.pt")
    model = load_vqgan(tmp_path / "v.pt", "cpu")
    n, step = len(expected["indices"]), 1 if name == "taming_tiny" else 4
    x = rand(n, 3, side, side, seed=1234) * 2 - 1
    with torch.no_grad():
        z = model.quant_conv(model.encoder(x))
        assert_close(z[:, :expected["z"].shape[1]], expected["z"])
        tokens = model.encode(x)
        assert np.array_equal(tokens.numpy(), expected["indices"])
        assert_close(model.decode(tokens)[:, :, ::step, ::step], expected["recon"])
    assert len(model.sha256) == 64 and model.cfg.image_size // model.cfg.factor == 16


@needs_fixtures
def test_published_gpt():
    weights, expected = fixture("hfai_gpt", ".mask")
    masks = {f"blocks.{i}.mask": torch.ones(16, 16, dtype=torch.bool).triu(1) for i in range(3)}
    checkpoint = convert_checkpoint({"model": weights | masks, "epoch": 0}, n_head=4)
    model = GPT(GPTConfig(**checkpoint["network"])).eval()
    model.load_state_dict(checkpoint["ema"])
    tokens = torch.randint(0, 64, (2, 15), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        assert_close(model(randn(2, 32, seed=8), tokens), expected["logits"])


def hfai_gpt(c=64):
    """A GPT in HFAiLab's names: 16 x 16 tokens of 64 codes, 32-d embeddings, one block."""
    weights = {"pos_emb": randn(1, 256, c), "tok_emb.weight": randn(64, c),
               "cond_proj.weight": randn(c, 32), "cond_proj.bias": randn(c),
               "norm.weight": randn(c), "norm.bias": randn(c), "head.weight": randn(64, c),
               "head.bias": randn(64), "blocks.0.mask": torch.ones(256, 256)}
    shapes = {"self_attn.in_proj_weight": (3 * c, c), "self_attn.in_proj_bias": (3 * c,),
              "self_attn.out_proj.weight": (c, c), "self_attn.out_proj.bias": (c,),
              "linear1.weight": (4 * c, c), "linear1.bias": (4 * c,),
              "linear2.weight": (c, 4 * c), "linear2.bias": (c,),
              "norm1.weight": (c,), "norm1.bias": (c,), "norm2.weight": (c,), "norm2.bias": (c,)}
    return weights | {f"blocks.0.encoder.{k}": randn(*s) * 0.1 for k, s in shapes.items()}


def test_a_published_pair_draws_from_the_command_line(tmp_path, monkeypatch):
    """A VQGAN as Lightning saves it, classes of Lightning's own in it, and a GPT in HFAiLab's
    names: no training, the settings of 2022 without an option, and no guidance."""
    shape = VQGANConfig(image_size=64, patch=1, ch=32, ch_mult=(1, 2, 2), num_res_blocks=1,
                        attn_resolutions=(16,), z_channels=32, codebook_size=64, code_dim=16,
                        l2_norm=False, groups=32)
    module = "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": module})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[module].ModelCheckpoint = callback
    torch.save({"state_dict": VQGAN(shape).state_dict(),
                "callbacks": {callback: {"best": torch.ones(1)}}}, tmp_path / "v.ckpt")
    assert load_vqgan(tmp_path / "v.ckpt", "cpu").cfg == shape
    torch.save({"model": hfai_gpt(), "epoch": 3}, tmp_path / "g.pt")
    torch.save(tiny_clip("vit").state_dict(), tmp_path / "clip.pt")

    args = ["sample.py", "a city bus driving on the city street", "--gpt=g.pt", "--clip=clip.pt"]
    output = run_stage(*args, "--vqgan=v.ckpt", cwd=tmp_path).stdout
    assert "best 8 of 64 by CLIP" in output
    assert len(list((tmp_path / "out/samples").glob("*.png"))) == 8
    assert "--guidance=1" in stage_error(*args, "--vqgan=v.ckpt", "--guidance=2", cwd=tmp_path)
    assert "--vqgan=FILE" in stage_error(*args, cwd=tmp_path)


@pytest.mark.parametrize("weights", [{"encoder.conv_in.weight": torch.ones(32, 3, 3, 3)}, {}, [1],
                                     {"a": 1}], ids=["half", "empty", "list", "other"])
def test_half_a_published_checkpoint_is_refused(tmp_path, weights, capsys):
    torch.save({"state_dict": weights}, tmp_path / "v.pt")
    with one_line_error(capsys, "v.pt"):
        load_vqgan(tmp_path / "v.pt", "cpu")


# -------------------------------------------------------------------------------------- presets


def parameters_of(make):
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


@pytest.mark.parametrize("preset, classic, n_layer", [("paper", True, 24), ("24gb", False, 16)])
def test_gpt_presets_have_the_parameters_counted_by_hand(preset, classic, n_layer):
    cfg = parse_options(train_gpt.Config, train_gpt.PRESETS, [f"--preset={preset}"])
    assert (cfg.n_layer, cfg.classic) == (n_layer, classic)
    k, t, d, n, c = 16384, 256, 512, n_layer, 1024
    null = 0 if classic else c
    embeddings, prefix = k * c + t * c, d * c + c + null
    gains = 0 if classic else 2  # of queries and keys
    blocks, head = n * (12 * c * c + 13 * c + gains), 2 * c + c * k + k
    config = start_config(None, GPTConfig, cfg, codebook_size=k, grid=16, cond_dim=d)
    assert config.dropout == cfg.dropout == 0.1 and config.n_prefix == 1
    assert parameters_of(lambda: GPT(config)) == embeddings + prefix + blocks + head


def residual(a, b):
    """Parameters of a residual block from width a to b: norms, convolutions, 1x1 skip."""
    return 2 * a + (9 * a * b + b) + 2 * b + (9 * b * b + b) + (a * b + b if a != b else 0)


@pytest.mark.parametrize("preset, code_dim", [("paper", 256), ("24gb", 8)])
def test_vqgan_presets_have_the_parameters_counted_by_hand(preset, code_dim):
    attn = 2 * 512 + 4 * (512 * 512 + 512)
    widths, c = [128, 128, 256, 256, 512], 128
    encoder, decoder = 9 * 3 * 128 + 128, 9 * 256 * 512 + 512
    for i, w in enumerate(widths):
        encoder += residual(c, w) + residual(w, w) + (2 * attn if w == 512 else 0)
        encoder += 9 * w * w + w if i < 4 else 0
        c = w
    middle = 2 * residual(512, 512) + attn
    encoder += middle + 2 * 512 + 9 * 512 * 256 + 256
    for i, w in reversed(list(enumerate(widths))):
        decoder += residual(c, w) + 2 * residual(w, w) + (3 * attn if w == 512 else 0)
        decoder += 9 * w * w + w if i else 0
        c = w
    decoder += middle + 2 * 128 + 9 * 128 * 3 + 3
    codebook = 16384 * code_dim + (256 * code_dim + code_dim) + (code_dim * 256 + 256)
    cfg = parse_options(vqgan.Config, vqgan.PRESETS, [f"--preset={preset}"])
    vqgan.check(cfg)
    config = start_config(None, VQGANConfig, cfg)
    assert parameters_of(lambda: VQGAN(config)) == encoder + decoder + codebook


def test_an_option_beside_a_preset_wins():
    cfg = parse_options(vqgan.Config, vqgan.PRESETS, ["--preset=paper", "--codebook_size=1024"])
    assert (cfg.image_size, cfg.clip, cfg.codebook_size) == (256, "RN50", 1024)
