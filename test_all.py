"""What the code promises, checked. `make test`, or: python -m pytest -q test_all.py

Networks first, each equality after every zero-initialised tensor has been filled with noise, so that nothing passes
because it is nought; then files and the config line; then every stage through its real command line, on a world of a
few dozen drawings; then every mistake a user can make."""
import contextlib
import copy
import dataclasses
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import types
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import prepare
import sample
import toy
import train_gpt
import vqgan
import evaluate
import kernels_cpu
from model import (GPT, VQGAN, Block, Conv2d, ConvolutionByColumns, Discriminator, GeluLinear, GPTConfig, PackedLinear,
                   Quantizer, VQGANConfig, cpu_has_bfloat16, hinge_loss, pick)

HERE = Path(__file__).parent
PHOTOS = HERE.parent / "shared/data/photos"
CLASSIC = [False, True]
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="takes long: make test-slow")


def fill_constants(model, seed=1):
    """Noise into every tensor that is all zero or all one, so that no equality holds by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for x in model.state_dict().values():
            if x.is_floating_point() and (not x.any() or (x == 1).all()):
                x.add_(torch.randn(x.shape, generator=generator) * 0.1)
    return model


def tiny_gpt(classic=False, fill=True, **changes):
    torch.manual_seed(0)
    cfg = {"codes": 48, "grid": 4, "cond_dim": 24, "n_layer": 3, "n_head": 4, "n_embd": 64, "classic": classic}
    model = GPT(GPTConfig(**cfg | changes)).eval()
    return fill_constants(model) if fill else model


def tiny_vqgan(**changes):
    torch.manual_seed(0)
    cfg = {"image_size": 16, "patch": 2, "ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 32,
           "attn_resolutions": (4,), "codes": 32, "code_dim": 8, "l2_norm": True, "groups": 8}
    return VQGAN(VQGANConfig(**cfg | changes))


def some(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens_for(model, b, seed=3):
    return torch.randint(model.cfg.codes, (b, model.cfg.grid ** 2), generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------- GPT


def test_first_loss_is_ln_k():
    model = tiny_gpt(fill=False)
    drop = torch.tensor([True, False, False, True, False])
    loss = model.loss(model.condition(some(5, 24)), tokens_for(model, 5), drop)
    assert loss.item() == pytest.approx(math.log(48), abs=1e-5)


@pytest.mark.parametrize("classic", CLASSIC)
def test_a_later_token_never_changes_an_earlier_logit(classic):
    model, cond = tiny_gpt(classic), some(2, 24)
    tokens = tokens_for(model, 2)[:, :-1]
    before = model(cond, tokens)
    for i in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[:, i] = (changed[:, i] + 7) % 48
        after = model(cond, changed)
        assert torch.equal(before[:, :i + 1], after[:, :i + 1])
        assert not torch.allclose(before[:, i + 1], after[:, i + 1], atol=1e-4)  # and it does change the next


@pytest.mark.parametrize("classic, guidance", [(False, 1.0), (False, 2.0), (False, 5.0), (True, 1.0)])
def test_cached_logits_equal_uncached(classic, guidance):
    model = tiny_gpt(classic)
    cond, tokens, seen = model.condition(some(3, 24)), tokens_for(model, 3), []

    def forced(i, logits):
        seen.append(logits)
        return tokens[:, i]
    assert torch.equal(model.decode_logits(cond, forced, guidance), tokens)
    cached = torch.stack(seen, 1)                                                    # (B, T, K)
    with torch.no_grad():
        plain = model(cond, tokens[:, :-1])
        if guidance != 1:
            null = model(cond, tokens[:, :-1], drop=torch.ones(3, dtype=torch.bool))
            plain = null + guidance * (plain - null)
    assert (cached - plain).abs().max() <= 1e-5 * plain.abs().max() * max(1, 2 * guidance)
    assert plain.std() > 0.05


def test_zero_init_is_a_start_and_no_other_network():
    """Each block starts as the identity; without, the last layers start as the others do."""
    zero, not_zero = tiny_gpt(fill=False), tiny_gpt(fill=False, zero_init=False)
    x = some(2, 5, 64)
    assert torch.equal(zero.blocks[0](x), x) and not torch.allclose(not_zero.blocks[0](x), x, atol=0.1)
    assert not zero.head.weight.any() and not_zero.head.weight.std() > 0.05
    not_zero.load_state_dict(zero.state_dict())
    assert torch.equal(not_zero.blocks[0](x), x)


def test_embedding_loss_by_hand_and_its_gradient():
    """Confident logits: the loss is 1 - cosine of the picture that those tokens give; unsure ones get a gradient."""
    gpt, vq = tiny_gpt(codes=32), tiny_vqgan().requires_grad_(False).eval()
    tokens, cond, wanted = tokens_for(gpt, 2), gpt.condition(some(2, 24)), some(2, 12)

    class Eye:
        size = 16

        def image(self, pixels):
            return F.normalize(pixels.flatten(1)[:, ::64], dim=-1)
    loss = train_gpt.embedding_loss(gpt, vq, Eye(), cond, tokens, wanted)
    likeliest = gpt(cond, tokens[:, :-1]).argmax(-1).view(2, 4, 4)
    seen = Eye().image((vq.decode(likeliest) + 1) / 2)
    assert loss.item() == pytest.approx(1 - F.cosine_similarity(seen, wanted).mean().item(), abs=1e-5)
    loss.backward()
    assert gpt.head.weight.grad.abs().sum() > 0 and gpt.cond_proj.weight.grad.abs().sum() > 0


def test_guidance_one_is_plain_conditional_sampling():
    model = tiny_gpt()
    cond, uniform = model.condition(some(4, 24)), torch.rand(4, 16, generator=torch.Generator().manual_seed(5))
    made = model.generate(cond, uniform, guidance=1.0, temperature=0.9, top_k=20, top_p=0.9)
    tokens = torch.empty(4, 0, dtype=torch.long)
    for i in range(16):  # no cache, no second row
        logits = model(cond, tokens)[:, -1]
        tokens = torch.cat([tokens, pick(logits, uniform[:, i], 0.9, 20, 0.9)[:, None]], 1)
    assert torch.equal(made, tokens)
    stronger = model.generate(cond, uniform, guidance=4.0, temperature=0.9, top_k=20, top_p=0.9)
    assert not torch.equal(made, stronger)


@pytest.mark.parametrize("packed", [False, True])
def test_a_picture_does_not_depend_on_its_neighbours(packed):
    model, e = tiny_gpt(), some(1, 24)
    model.spread.copy_(some(24, 24, seed=5) / 10)
    if packed:
        model.pack(torch.float32)
    many = model.generate(*sample.starts(model, e, "text", 0, "a red bus", 6, 0.5), guidance=2.0)
    for i in range(6):
        cond, uniform = sample.starts(model, e, "text", 0, "a red bus", i + 1, 0.5)
        assert torch.equal(model.generate(cond[i:], uniform[i:], guidance=2.0)[0], many[i])
    assert len({tuple(row.tolist()) for row in many}) == 6
    for seed, key in ((1, "a red bus"), (0, "a red car")):
        other = sample.starts(model, e, "text", seed, key, i + 1, 0.5)
        assert not torch.equal(cond, other[0]) and not torch.equal(uniform, other[1])


def test_variety_moves_conditions_by_the_spread():
    """By `variety` times the spread, renormalised, around the one condition that variety 0 gives to all."""
    model, e = tiny_gpt(), some(1, 24)
    model.spread.copy_(torch.diag(torch.arange(24.0)) / 100)
    plain = sample.starts(model, e, "text", 0, "x", 4000, 0.0)[0]
    assert torch.equal(plain, model.condition(e, "text").expand(4000, -1))
    cond, uniform = sample.starts(model, e, "text", 0, "x", 4000, 0.5)
    assert torch.allclose(cond.norm(dim=1), torch.ones(4000), atol=1e-5)
    away = cond / (cond * plain).sum(1, keepdim=True) - plain     # small, so nearly what was added, across `plain`
    wanted = 0.5 * model.spread.diagonal()
    assert torch.allclose(away.std(0)[plain[0].abs() < 0.1], wanted[plain[0].abs() < 0.1], atol=0.02)
    assert torch.equal(uniform, sample.starts(model, e, "text", 0, "x", 4000, 0.0)[1])


def test_classic_refuses_guidance_and_takes_the_raw_embedding():
    model = tiny_gpt(classic=True)
    model.means.fill_(0.3)
    c = some(2, 24)
    assert torch.allclose(model.condition(c), F.normalize(c, dim=-1))
    with pytest.raises(AssertionError):
        model.generate(c, torch.zeros(2, 16), guidance=2.0)


def test_dropped_rows_reach_the_null_embedding_only():
    model = tiny_gpt()
    cond = model.condition(some(4, 24)).requires_grad_()
    drop = torch.tensor([True, False, True, False])
    model.loss(cond, tokens_for(model, 4), drop).backward()
    assert model.null.grad.abs().sum() > 0
    assert torch.all(cond.grad[drop] == 0) and torch.all(cond.grad[~drop].abs().sum(1) > 0)


def test_condition_centres_and_adds_noise_of_the_length_asked_for():
    model, c = tiny_gpt(), F.normalize(some(3, 24), dim=-1)
    model.means.copy_(F.normalize(some(2, 24, seed=9), dim=-1) * 0.5)
    for row, modality in enumerate(("image", "text")):
        assert torch.allclose(model.condition(7 * c, modality), F.normalize(c - model.means[row], dim=-1), atol=1e-6)
    clean, noise = model.condition(c), 0.5 * F.normalize(some(3, 24, seed=4), dim=-1)
    assert torch.allclose(model.condition(c, noise=noise), F.normalize(clean + noise, dim=-1), atol=1e-6)


def test_pick_follows_the_probabilities_it_keeps():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    u = (torch.arange(10000) + 0.5) / 10000

    def shares(**how):
        return torch.bincount(pick(logits.expand(10000, -1), u, **how), minlength=4) / 10000
    assert torch.allclose(shares(), logits.softmax(-1)[0], atol=2e-4)
    assert torch.allclose(shares(temperature=0.5), (logits * 2).softmax(-1)[0], atol=2e-4)
    assert torch.allclose(shares(top_k=2), F.softmax(torch.tensor([-1e9, 3.0, 2.0, -1e9]), -1), atol=2e-4)
    assert torch.allclose(shares(top_p=0.7), F.softmax(torch.tensor([-1e9, 3.0, 2.0, -1e9]), -1), atol=2e-4)  # .65 < .7
    assert shares(top_p=0.5)[1] == 1 and shares(top_k=1)[1] == 1 and shares(temperature=0)[1] == 1
    assert shares(temperature=1e-300)[1] == 1
    assert shares(top_p=0.0)[1] == 1  # the likeliest always stays


# -------------------------------------------------------------------------------------------------------- VQGAN


def test_quantiser_loss_and_gradients_by_hand():
    q = Quantizer(3, 2, l2_norm=False)
    q.embedding.weight.data = torch.tensor([[0.0, 0.0], [1.0, 1.0], [3.0, -1.0]])
    z = torch.tensor([[0.9, 1.3], [2.0, -1.0]]).T.reshape(1, 2, 1, 2).requires_grad_()      # two vectors: codes 1 and 2
    out, loss, tokens = q(z, beta=0.25)
    assert tokens.flatten().tolist() == [1, 2]
    assert torch.allclose(out.detach()[0, :, 0].T, q.embedding.weight.data[[1, 2]])
    # squared distances .1^2 + .3^2 and 1^2, a mean over four numbers, once for the codes and beta times for the encoder
    assert loss.item() == pytest.approx(1.25 * (0.01 + 0.09 + 1.0) / 4)
    weight = torch.tensor([[2.0, 5.0], [-1.0, 3.0]]).T.reshape(1, 2, 1, 2)
    ((out * weight).sum() + loss).backward()
    dz = torch.tensor([[-0.1, 0.3], [-1.0, 0.0]]).T.reshape(1, 2, 1, 2)                       # z - e
    assert torch.allclose(z.grad, weight + 0.25 * 2 * dz / 4, atol=1e-6)                     # straight through + beta's
    assert torch.allclose(q.embedding.weight.grad, torch.tensor([[0, 0], [0.1, -0.3], [1.0, 0]]) * 2 / 4, atol=1e-6)


@pytest.mark.parametrize("l2_norm", [False, True])
def test_nearest_codes_equal_brute_force_in_float64(l2_norm):
    q = Quantizer(200, 8, l2_norm)
    q.embedding.weight.data = some(200, 8, seed=6)
    z = some(3000, 8, seed=7)
    found = q.nearest(q.unit(z))
    codes = q.unit(q.embedding.weight.detach()).double()
    brute = (q.unit(z).double()[:, None] - codes[None]).square().sum(-1).argmin(1)
    assert torch.equal(found, brute)
    assert len(found.unique()) > 100


def test_encode_decode_agree_with_forward_and_flow_gradients():
    model = fill_constants(tiny_vqgan()).eval()
    model.quantize.embedding.weight.data.normal_()
    x = some(2, 3, 16, 16)
    recon, loss, tokens, z = model(x)
    assert torch.equal(model.encode(x), tokens) and tokens.shape == (2, 4, 4) and z.shape == (32, 8)
    assert torch.allclose(model.decode(tokens), recon, atol=1e-5)
    (recon.square().mean() + loss).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if not n.endswith("k.bias")}  # a key's bias changes nothing
    assert all(g is not None and g.abs().sum() > 0 for g in grads.values())
    for changes in ({"patch": 1}, {"patch": 4, "image_size": 32}, {"l2_norm": False}):
        other = tiny_vqgan(**changes)
        x = some(1, 3, other.cfg.image_size, other.cfg.image_size)
        assert other(x)[0].shape == x.shape and other(x, quantized=False)[2] is None


def test_kmeans_finds_clusters_and_dead_codes_restart():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[5.0, 0], [0, 5.0], [-5.0, 0], [0, -5.0]])
    z = (centres[:, None] + 0.01 * some(4, 50, 2)).flatten(0, 1)
    q = Quantizer(16, 2, l2_norm=False)
    q.kmeans(z, generator)
    assert (z - q.lookup(q.nearest(z).view(1, 1, -1))[0, :, 0].T).norm(dim=1).max() < 0.1
    q.embedding.weight.data[3] = 1e6
    for _ in range(400):
        counts = torch.ones(16)
        counts[3] = 0
        moved = q.restart(counts, z, generator)
        if moved:
            break
    assert moved == 1 and q.embedding.weight[3].abs().max() < 6 and q.usage[3] == 1


def test_discriminator_and_hinge():
    assert Discriminator()(some(2, 3, 64, 64)).shape[:2] == (2, 1)
    assert hinge_loss(torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0])).item() == pytest.approx(0.5 * (0.5 + 1.0))


@pytest.mark.parametrize("b, side, k, stride, padding", [(3, 17, 3, 1, 1), (2, 45, 3, 1, 1), (2, 67, 3, 2, 0),
                                                         (1, 20, 4, 2, 1), (70, 5, 1, 1, 0)])
def test_wide_convolutions_learn_as_plain_ones_do(b, side, k, stride, padding):
    """On a CPU with AVX2 and no AVX-512 by matrix products, with more windows than fit into one and with fewer."""
    torch.manual_seed(0)
    conv = Conv2d(130, 70, k, stride, padding, bias=k != 4).to(memory_format=torch.channels_last)
    inputs = [torch.randn(b, 130, side, side, requires_grad=True), *conv.parameters()]
    plain = F.conv2d(inputs[0], conv.weight, conv.bias, stride, padding)
    wanted = torch.autograd.grad(plain, inputs, grad := torch.randn_like(plain))
    by_columns = ConvolutionByColumns.apply(inputs[0], conv.weight, conv.bias, conv.stride, conv.padding)
    for out in (by_columns, conv(inputs[0])):
        assert torch.equal(out, plain)
        for x, y in zip(torch.autograd.grad(out, inputs, grad), wanted):
            assert (x - y).norm() < 1e-5 * y.norm()


# --------------------------------------------------------------------------------------- files, config line, machine


@dataclass
class Options:
    prompts: tuple = ()
    size: common.Count = 4                    # how many
    rate: common.Amount = 0.5                 # how fast
    part: common.Share = 0.1
    flip: bool = True                         # mirror
    widths: tuple = (1, 2)
    name: str = "x"
    best: common.AutoCount = None             # or auto
    dtype: common.Dtype = "auto"


def test_config_line_types():
    assert common.configure(Options, []) == Options()
    cfg = common.configure(Options, ["a bus", "--size=7", "--rate=1e-3", "--flip=false", "--widths=3,4,5", "--name=a=b",
                                     "--best=3", "--dtype=float32"])
    assert cfg == Options(("a bus",), 7, 1e-3, 0.1, False, (3, 4, 5), "a=b", 3, "float32")
    assert common.configure(Options, ["--best=auto"]).best is None


@pytest.mark.parametrize("arg, says", [
    ("--sise=3", "--size"), ("--size=0", "whole number"), ("--size=two", "whole number"), ("--size=2.5", "whole"),
    ("--rate=-1", "number"), ("--rate=nan", "number"), ("--rate=inf", "number"), ("--part=1.5", "from 0 to 1"),
    ("--flip=maybe", "True, False"), ("--widths=1,x", "whole number"), ("--dtype=int8", "bfloat16"),
    ("--size", "--size=4"), ("--size 7", "--size=7"), ("--=3", "no option"), ("--prompts=3", "no option")])
def test_config_line_refuses(arg, says, capsys):
    with pytest.raises(SystemExit) as e:
        common.configure(Options, arg.split())
    err = capsys.readouterr().err
    assert e.value.code == 2 and says in err and err.count("\n") == 1


def test_help_names_every_option_with_default_and_comment(capsys):
    with pytest.raises(SystemExit) as e:
        common.configure(Options, ["--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and all(f"--{f}=" in out for f in Options.__dataclass_fields__ if f != "prompts")
    assert "--size=4" in out and "how many" in out and "--best=auto" in out


def test_learning_rate_curve():
    lr = [common.learning_rate(s, 1.0, 10, 100) for s in range(101)]
    assert lr[0] == 0.1 and lr[9] == lr[10] == 1.0 and lr[55] == pytest.approx(0.5) and lr[100] == pytest.approx(0)


def test_orthogonal_is_newton_schulz():
    """On the small side, all matrices of one such side together, it gives what plain steps in float64 give."""
    stacks = [some(n, *shape) for n, shape in ((3, (5, 30)), (1, (30, 5)), (2, (16, 16)), (1, (16, 40)))]
    found = common.orthogonal(stacks)
    assert [x.shape for x in found] == [x.shape for x in stacks]
    for x, z in zip(stacks, found):
        y = x.double() / (x.double() @ x.double().mT).norm(dim=(1, 2), keepdim=True).sqrt()
        for _ in range(3):
            a = y @ y.mT
            y = 3.4445 * y - 4.7750 * a @ y + 2.0315 * a @ a @ y
        assert (z - y).abs().max() < 1e-4
        singular = torch.linalg.svdvals(z)
        assert singular.max() < 1.3 and singular.median() > 0.6


def test_frechet_distance_by_hand():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6))
    assert evaluate.frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert evaluate.frechet(a, a + 3) == pytest.approx(6 * 9)                         # only the mean moves
    assert evaluate.frechet(a, 2 * a - a.mean(0)) == pytest.approx(np.trace(np.cov(a.T)))  # twice the spread, same mean


def test_a_ratio_of_shares_and_which_set_is_nearer_by_hand():
    a, b, full, none = (evaluate.share([True] * n + [False] * (200 - n)) for n in (180, 160, 200, 0))
    found = evaluate.ratio(a, b)
    assert found["ratio"] == pytest.approx(1.125)
    assert (found["low"], found["high"]) == pytest.approx((a["low"] / b["high"], a["high"] / b["low"]))
    assert evaluate.ratio(full, full)["low"] < 0.99 < 1.01 < evaluate.ratio(full, full)["high"] < 1.05
    assert math.isfinite(evaluate.ratio(a, none)["high"])
    assert evaluate.mean([3.0])["half"] is None and evaluate.mean([1.0, 3.0])["half"] == pytest.approx(1.96)
    reference, near, far = (np.random.default_rng(i).normal(size=(300, 4)) + x for i, x in enumerate((0, 0, 2)))
    assert evaluate.nearer(near, far, reference) == 1 and evaluate.nearer(far, near, reference) == 0


def test_the_mean_of_texts_is_of_those_that_suit_the_pictures():
    """Three phrases, pictures that fit the first two, one three times as often as the other: so they weigh."""
    phrases, pictures = torch.eye(4)[:3], torch.eye(4)[[0, 0, 0, 1]]
    assert torch.allclose(prepare.text_mean(phrases, pictures, 1000.0), torch.tensor([0.75, 0.25, 0, 0]))
    assert torch.allclose(prepare.text_mean(phrases, pictures, 0.0), torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]))
    every = set(evaluate.toy_prompts()[1])
    for c, o, b, s in itertools.product(toy.COLOURS, toy.OBJECTS, toy.BACKGROUNDS, toy.SIZES):
        every |= {t.format(colour=c, object=o, background=b, size=s) for t in toy.CAPTIONS}
    assert not every & set(prepare.GENERIC) and len(set(prepare.GENERIC)) == len(prepare.GENERIC)


def test_the_gap_is_a_constant_vector_of_that_length():
    e = F.normalize(some(50, 32), dim=-1)
    moved = evaluate.shifted(e, 0.8)
    assert torch.allclose(moved.norm(dim=-1), torch.ones(50), atol=1e-5)
    away = moved * (e + 0.8 * F.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)), dim=0)).norm(
        dim=-1, keepdim=True) - e
    assert torch.allclose(away.norm(dim=-1), torch.full((50,), 0.8), atol=1e-5)
    assert (away - away[0]).abs().max() < 1e-5


def test_retrieval_and_shares_by_hand():
    assert evaluate.share([True] * 8 + [False] * 2)["share"] == 0.8
    low, high = (evaluate.share([True] * 8 + [False] * 2)[k] for k in ("low", "high"))
    assert low == pytest.approx(0.4902, abs=1e-3) and high == pytest.approx(0.9433, abs=1e-3)  # Wilson 1927

    class Eye:  # sees the mean colour
        size, device = 8, "cpu"

        def image(self, pixels):
            return F.normalize(pixels.mean((2, 3)), dim=-1)
    pictures = np.zeros((4, 8, 8, 3), np.uint8)
    pictures[[0, 1], ..., 0], pictures[[2, 3], ..., 1] = 200, 100
    found = evaluate.retrieval(Eye(), pictures, torch.eye(3)[:2], [0, 0, 1, 0])
    assert found["retrieval"]["share"] == 0.75 and found["similarity"]["mean"] == pytest.approx(0.75)


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    common.write_json(path, 1)
    with pytest.raises(ZeroDivisionError):
        with common.whole(path) as f:
            f.write_text("half")
            1 / 0
    assert path.read_text() == "1\n" and os.listdir(tmp_path) == ["a.txt"]


def write_dump(folder, rows=50, t=16, d=24, codes=48, seed=0):
    rng = np.random.default_rng(seed)
    files = {}
    for split, n in (("train", rows), ("val", 8)):
        for kind, x in (("tokens", rng.integers(codes, size=(n, t)).astype(np.uint16)),
                        ("clip", rng.standard_normal((n, d)).astype(np.float16))):
            folder.mkdir(exist_ok=True)
            x.tofile(folder / f"{split}_{kind}.bin")
            files[f"{split}_{kind}.bin"] = common.file_sha256(folder / f"{split}_{kind}.bin"), x
    meta = {
        "train_rows": rows, "val_rows": 8, "tokens": t, "grid": 4, "codes": codes, "clip_dim": d,
        "tokens_dtype": "uint16", "clip_dtype": "float16", "files": {k: v[0] for k, v in files.items()}}
    (folder / "meta.json").write_text(json.dumps(meta | {"digest": common.digest(meta)}))
    return {k: v[1] for k, v in files.items()}


def test_dump_round_trip_and_batches_are_functions_of_seed_and_step(tmp_path):
    files = write_dump(tmp_path / "d")
    meta, arrays = train_gpt.open_dump(tmp_path / "d")
    for split in ("train", "val"):
        assert np.array_equal(arrays[split][0], files[f"{split}_tokens.bin"])
        assert np.array_equal(arrays[split][1], files[f"{split}_clip.bin"])
    cfg = train_gpt.Config(batch_size=16)
    one, two = (train_gpt.make_batches(*arrays["train"], cfg) for _ in range(2))
    first = [one(i) for i in range(12)]
    for i in (11, 4, 7):  # a reader that starts anywhere sees the same batch
        assert all(torch.equal(a, b) for a, b in zip(first[i], two(i)))
    seen = torch.cat([b[0] for b in first])[:150].view(3, 50, 16)
    for epoch in seen:  # every row once an epoch
        assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, files["train_tokens.bin"].tolist()))
    assert not torch.equal(seen[0], seen[1])
    other = train_gpt.make_batches(*arrays["train"], train_gpt.Config(batch_size=16, seed=1))(0)
    assert not torch.equal(other[0], first[0][0]) and not torch.equal(other[3], first[0][3])
    assert torch.allclose(first[0][3].norm(dim=1), torch.tensor(0.5))
    assert not torch.equal(first[0][3], first[1][3]) and not torch.equal(first[0][4], first[4][4])  # new every step


def test_a_tenth_of_what_is_read_is_another_pictures():
    tokens = np.arange(64 * 16, dtype=np.uint16).reshape(64, 16)  # token t of picture r is 16 r + t
    clip = np.ones((64, 8), np.float16)
    write, read, *_ = train_gpt.make_batches(tokens, clip, train_gpt.Config(batch_size=640, corrupt=0.1))(0)
    swapped = write != read
    assert 0.08 < swapped.float().mean() < 0.12 and torch.equal(write % 16, read % 16)  # its own place in the picture
    write, read, *_ = train_gpt.make_batches(tokens, clip, train_gpt.Config(batch_size=640, corrupt=0.0))(0)
    assert torch.equal(write, read)


def test_the_loss_is_of_the_true_tokens_behind_those_read():
    model = tiny_gpt()
    cond, tokens = model.condition(some(2, 24)), tokens_for(model, 2)
    assert model.loss(cond, tokens, read=tokens) == model.loss(cond, tokens)
    read = tokens.clone()
    read[:, -1] = (read[:, -1] + 1) % 48  # nothing comes behind the last
    assert model.loss(cond, tokens, read=read) == model.loss(cond, tokens)
    read[:, 5] = (read[:, 5] + 1) % 48
    logits = model(cond, read[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    assert model.loss(cond, tokens, read=read) == loss != model.loss(cond, tokens)


def test_spread_is_that_of_neighbours_not_of_all():
    """Twenty far clusters, each a little stretched along one axis: the noise has that stretch, not the clusters'."""
    model = tiny_gpt(cond_dim=24)
    centres = np.linalg.qr(some(24, 24).double().numpy())[0][:20]
    stretch = np.full(24, 0.01)
    stretch[3] = 0.1
    rows = centres.repeat(200, 0) + stretch * some(4000, 24, seed=5).double().numpy()
    root = train_gpt.neighbour_spread(model, rows.astype(np.float32), seed=0, share=0.04)
    covariance = root.T @ root
    assert np.allclose(covariance, covariance.T) and covariance.argmax() == 3 * 24 + 3
    assert 0.2 * 0.01 < covariance[3, 3] < 0.01 and np.trace(covariance) < 2 * 0.01
    assert np.isfinite(train_gpt.neighbour_spread(model, rows[:1].astype(np.float32), seed=0)).all()
    batch = train_gpt.make_batches(np.zeros((9, 16), np.uint16), rows[:9].astype(np.float16),
                                   train_gpt.Config(batch_size=4000, noise=0.0, spread=2.0), root)
    noise = batch(0)[3].numpy()
    assert np.allclose(noise.T @ noise / 4000, 4 * covariance, atol=0.3 * 4 * 0.01)


def test_perceptual_distance_is_that_of_unit_features():
    a, b = [some(2, 8, 5, 5, seed=1), some(2, 7, 8, seed=2)], [some(2, 8, 5, 5, seed=3), some(2, 7, 8, seed=4)]
    plain = [(torch.nn.functional.normalize(x, dim=d) - torch.nn.functional.normalize(y, dim=d)).square().sum(d).mean()
             for x, y, d in zip(a, b, (1, 2))]
    assert vqgan.perceptual_distance(a, b).item() == pytest.approx((sum(plain) / 2).item(), rel=1e-5)
    assert abs(vqgan.perceptual_distance(a, a).item()) < 1e-6
    dark = [torch.zeros_like(x, requires_grad=True) for x in b]  # as behind a ReLU
    vqgan.perceptual_distance(a, dark).backward()
    assert all(x.grad.isfinite().all() for x in dark)


@pytest.mark.parametrize("what", ["truncated", "edited", "meta"])
def test_a_damaged_dump_is_refused(tmp_path, what, capsys):
    write_dump(tmp_path)
    path = tmp_path / ("meta.json" if what == "meta" else "train_tokens.bin")
    data = bytearray(path.read_bytes())
    if what == "edited":
        data[100] ^= 1
    path.write_bytes(data if what == "edited" else data[:-40])
    with pytest.raises(SystemExit) as e:
        train_gpt.open_dump(tmp_path)
    assert e.value.code == 2 and path.name in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- CLIP and pictures


def clip_network(kind, seed=0):
    torch.manual_seed(seed)
    CLIP = common.clip_package()[0].CLIP
    layers, width, patch = (2, 64, 16) if kind == "vit" else ((1, 1, 1, 1), 64, None)
    model = CLIP(32, 64, layers, width, patch, 20, 49408, 64, 1, 2).eval()
    for x in model.state_dict().values():  # batch norm's statistics and the zero-initialised norms too
        if x.is_floating_point() and x.dim() == 1:
            x.add_(torch.rand(x.shape) * 0.2)
    return model


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_clip_through_our_loader_is_clip(tmp_path, kind):
    reference = clip_network(kind)
    torch.save(reference.state_dict(), tmp_path / "clip.pt")
    ours = common.load_clip(tmp_path / "clip.pt")
    assert (ours.size, ours.dim, ours.context) == (64, 32, 20)
    pixels = torch.rand(3, 3, 64, 64)
    texts = ["a red bus", "something blue, with a comma", "ein grüner Fisch"]
    with torch.no_grad():
        mean, std = torch.tensor(common.MEAN).view(3, 1, 1), torch.tensor(common.STD).view(3, 1, 1)
        image, text = reference.encode_image((pixels - mean) / std), reference.encode_text(ours.tokenize(texts)[0])
        for mine, theirs in ((ours.image(pixels), image), (ours.text(texts), text)):
            theirs = F.normalize(theirs, dim=-1)
            assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
            assert (theirs[0] - theirs[1]).abs().max() > 1e-4
    plain, layers = [], [getattr(reference.visual, f"layer{i}", None) for i in range(1, 5)]
    for layer in filter(None, layers):
        layer.register_forward_hook(lambda module, inputs, output: plain.append(output))
    features = vqgan.perceptual_features(ours.model.visual)
    with torch.no_grad():
        reference.visual(pixels)
        assert all((x - y).abs().max() <= 1e-5 * y.abs().max() for x, y in zip(features(pixels), plain))
    assert len(plain) == (4 if kind == "resnet" else 0)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in ours.model.visual.modules())
    a, b = features(pixels), features(pixels + 0.1)
    assert len(a) == 4 and all((x - y).abs().max() > 1e-4 for x, y in zip(a, b))


def test_clip_loads_without_running_its_package(tmp_path):
    """With a torchvision and a pkg_resources that explode on import, and without either."""
    for name in ("torchvision", "pkg_resources"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not to be imported')")
    code = ("import common; m, t = common.clip_package(); "
            "print(m.CLIP.__name__, len(t.SimpleTokenizer().encode('a red bus')))")
    for extra in ({}, {"PYTHONPATH": str(tmp_path)}):
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, env=os.environ | extra, capture_output=True,
                              text=True)
        assert done.stdout.split() == ["CLIP", "3"], done.stderr


def test_tokenizer_keeps_the_end_of_a_cut_text():
    clip = common.Clip(clip_network("vit"), "tiny", "cpu")
    rows, cut = clip.tokenize(["a bus " * 40, "a bus", "", "\N{BUS}\N{SNOWMAN}"])
    assert len(cut) == 1 and rows.shape == (4, 20) and rows[0, -1] == 49407 and rows[:, 0].eq(49406).all()
    assert rows[1].tolist()[:5] == [49406, 320, 2840, 49407, 0] and rows[2].tolist()[:3] == [49406, 49407, 0]


@pytest.mark.parametrize("w, h", [(80, 53), (53, 80), (64, 64), (301, 200), (33, 500)])
def test_preprocessing_is_clips(w, h):
    """Resize of the short side with Pillow's bicubic, centre crop, scale to [0, 1], OpenAI's mean and std."""
    im = Image.fromarray(np.random.default_rng(0).integers(256, size=(h, w, 3)).astype(np.uint8))
    short, size = min(w, h), 32
    small = im.resize((size * w // short, size * h // short), Image.Resampling.BICUBIC)
    left, top = round((small.width - size) / 2), round((small.height - size) / 2)
    expected = np.asarray(small.crop((left, top, left + size, top + size))).astype(np.float32) / 255
    expected -= np.float32([0.48145466, 0.4578275, 0.40821073])
    expected /= np.float32([0.26862954, 0.26130258, 0.27577711])
    clip = common.Clip(clip_network("vit"), "tiny", "cpu")
    ours = clip.normalize(common.to_tensor(common.crop(im, size)))
    assert np.abs(ours.numpy() - expected.transpose(2, 0, 1)).max() < 1e-6


def test_pictures_of_every_mode(tmp_path):
    base = np.zeros((20, 30, 3), np.uint8)
    base[:, :10], base[:, 10:] = (200, 40, 40), (40, 40, 200)
    rgb = Image.fromarray(base)
    rgb.save(tmp_path / "rgb.png")
    rgb.quantize(8).save(tmp_path / "palette.png")
    rgb.convert("L").save(tmp_path / "grey.png")
    rgb.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    Image.fromarray((np.asarray(rgb.convert("L")).astype(np.uint16) * 257)).save(tmp_path / "deep.png")
    Image.merge("RGBA", (*rgb.split(), Image.new("L", rgb.size, 0))).save(tmp_path / "clear.png")
    rgb.save(tmp_path / "film.gif", save_all=True, append_images=[Image.new("RGB", rgb.size)])
    exif = Image.Exif()
    exif[0x112] = 6  # turn by 90 degrees
    rgb.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    read = {name: common.open_picture(tmp_path / name) for name in os.listdir(tmp_path)}
    assert all(im.mode == "RGB" for im in read.values())
    assert all(im.size == ((20, 30) if n == "turned.jpg" else (30, 20)) for n, im in read.items())
    for name in ("palette.png", "film.gif", "cmyk.jpg"):
        assert np.abs(np.asarray(read[name]).astype(int)[10, [3, 25]] - base[10, [3, 25]]).max() < 25, name
    grey = np.asarray(rgb.convert("L")).astype(int)[:, :, None]
    assert np.abs(np.asarray(read["deep.png"]).astype(int) - grey).max() <= 1
    assert np.asarray(read["clear.png"]).min() == 255


def test_a_tar_is_read_as_the_folder_it_was_made_of(tmp_path, capsys):
    """Same names, same pictures; links, devices, absolute and climbing names are inert: nothing is ever unpacked."""
    (tmp_path / "a/b").mkdir(parents=True)
    for i, name in enumerate(("z.png", "b/x.png", "b/\N{LATIN SMALL LETTER E WITH ACUTE}.png")):
        Image.new("RGB", (20 + i, 20), (i * 50, 0, 0)).save(tmp_path / "a" / name)
    (tmp_path / "a/notes.txt").write_text("no picture")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a", ".")
        for name, kind in (("link.png", tarfile.SYMTYPE), ("dev.png", tarfile.CHRTYPE), ("hard.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        for name in ("../up.png", "/tmp/abs.png"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"nope"))
    folder, tar = common.Pictures(tmp_path / "a"), common.Pictures(str(tmp_path / "a.tar"))
    assert tar.names == sorted([*folder.names, "../up.png", "/tmp/abs.png"]) and len(folder.names) == 3
    for name in folder.names:
        assert np.array_equal(np.asarray(folder.open(name)), np.asarray(tar.open(name)))
    for name in ("../up.png", "/tmp/abs.png"):
        with pytest.raises((OSError, ValueError)):
            tar.open(name)
    (tmp_path / "shards").mkdir()
    for n in "12":
        (tmp_path / f"shards/s{n}.tar").write_bytes((tmp_path / "a.tar").read_bytes())
    for many in (tmp_path / "shards", f"{tmp_path}/shards/*.tar"):
        assert len(common.Pictures(many).names) == 10
    mixed = tmp_path / "mixed"  # a tar unpacked where it lies, with and without a folder of its name
    for colour, where in (("red", "x"), ("green", "."), ("blue", "in_tar")):
        (mixed / where).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), colour).save(mixed / where / "a.png")
    with tarfile.open(mixed / "x.tar", "w") as tar:
        tar.add(mixed / "in_tar/a.png", "a.png")
    mixed = common.Pictures(mixed)
    assert mixed.names == ["a.png", "in_tar/a.png", "x.tar/a.png", "x/a.png"]
    assert [mixed.open(n).getpixel((0, 0)) for n in mixed.names] == [(0, 128, 0), (0, 0, 255), (0, 0, 255), (255, 0, 0)]
    (tmp_path / "bad.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(SystemExit) as e:
        common.Pictures(str(tmp_path / "bad.tar"))
    assert e.value.code == 2 and "bad.tar" in capsys.readouterr().err


def test_damaged_small_and_monstrous_pictures_give_a_reason(tmp_path):
    good = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 40, 3)).astype(np.uint8)).save(good, "PNG")
    good, ihdr = good.getvalue(), good.getvalue().index(b"IHDR")
    bomb = good[:ihdr + 4] + (40000).to_bytes(4, "big") * 2 + good[ihdr + 12:]
    bomb = bomb[:ihdr + 17] + zlib.crc32(bomb[ihdr:ihdr + 17]).to_bytes(4, "big") + bomb[ihdr + 21:]
    (tmp_path / "text.jpg").write_text("this is no picture")
    for name, data in (("cut.png", good[:len(good) // 2]), ("bomb.png", bomb), ("empty.gif", b"")):
        (tmp_path / name).write_bytes(data)
    Image.new("RGB", (12, 90)).save(tmp_path / "thin.png")
    pictures = common.Pictures(tmp_path)
    for name in pictures.names:
        with pytest.raises((OSError, ValueError)) as e:
            pictures.open(name, 64)
        assert str(e.value)
    assert pictures.open("thin.png", 48).size == (12, 90)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no folder of real photographs beside the project")
def test_real_photographs_are_read_and_cropped():
    names = common.Pictures(PHOTOS).names
    assert len(names) == 96
    for name in names[:12]:
        a, b = (common.crop(common.open_picture(PHOTOS / name), size, 1.1, 0.3, 0.8) for size in (64, 224))
        small = np.asarray(Image.fromarray(b).resize((64, 64), Image.Resampling.BICUBIC)).astype(float)
        moved = common.crop(common.open_picture(PHOTOS / name), 64, 1.1, 0.5, 0.4).astype(float)
        assert np.abs(small - a).mean() < 0.5 * np.abs(small - moved).mean()  # the two networks see the same part


# ------------------------------------------------------------------------------------ weights published by others


FIXTURES = HERE.parent / "shared/fixtures"
fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="no folder of reference outputs beside the project")


def published(name, leave_out="never"):
    """The weights of a fixture by its rule, and its reference outputs."""
    shapes, weights = json.loads((FIXTURES / f"{name}.json").read_text())["shapes"], {}
    for i, key in enumerate(sorted(k for k in shapes if not k.endswith(leave_out))):
        w = torch.randn(shapes[key], generator=torch.Generator().manual_seed(i))
        if key.endswith("bias") or w.dim() < 2:
            weights[key] = 0.05 * w + (key.endswith("weight") and w.dim() == 1)
        else:
            weights[key] = w / math.sqrt(w[0].numel())
    return weights, dict(np.load(FIXTURES / f"{name}.npz"))


def close(ours, theirs):
    assert ours.shape == theirs.shape and np.abs(ours.numpy() - theirs).max() <= 1e-4 * theirs.std()


NINE = {  # OpenAI's published CLIPs: embedding, input, vision layers, width, patch, text width, heads, and parameters
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
    """The network of that name, or the same with `depth` layers everywhere; its statistics and norms made unlike."""
    dim, size, layers, width, patch, text, heads, _ = NINE[name]
    if depth:
        layers = depth if patch else (depth,) * 4
    return common.clip_package()[0].CLIP(dim, size, layers, width, patch, 77, 49408, text, heads, depth or 12).eval()


@pytest.mark.parametrize("name", NINE)
def test_the_nine_clips_by_shape(name):
    """On the meta device, which holds shapes and no numbers: every published network is recognised from its shapes."""
    assert set(NINE) == set(common.CLIP_FILES)
    with torch.device("meta"):
        reference = published_clip(name)
        ours = common.build_clip(reference.state_dict())
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in reference.state_dict().items()}
    assert ours.visual.input_resolution == NINE[name][1] and ours.context_length == 77
    assert [m.num_heads for m in ours.modules() if hasattr(m, "num_heads")] == \
           [m.num_heads for m in reference.modules() if hasattr(m, "num_heads")]
    assert sum(p.numel() for p in ours.parameters()) == NINE[name][-1]


def check_clip_by_number(tmp_path, name):
    """At one layer each, in half precision as published, as a TorchScript archive and as a state dict: the embeddings
    are those of clip.model.CLIP holding the same weights in float32."""
    torch.manual_seed(0)
    reference = published_clip(name, depth=1)
    with torch.no_grad():
        for x in reference.state_dict().values():
            if x.is_floating_point():
                x.copy_(x.half())  # the numbers that half precision can hold, as in the published files
    pixels, tokens = torch.rand(1, 3, NINE[name][1], NINE[name][1]), torch.randint(1, 49406, (1, 77))
    tokens[0, 9] = 49407
    archive = torch.jit.trace(reference, (pixels, tokens), check_trace=False)
    archive.save(str(tmp_path / "jit.pt"))
    half = {k: v.half() if v.is_floating_point() else v for k, v in reference.state_dict().items()}
    torch.save(half, tmp_path / "sd.pt")
    with pytest.raises(SystemExit):
        common.load_clip(tmp_path / "jit.pt")  # not one of the nine files
    with torch.no_grad():
        theirs = reference.encode_image(pixels), reference.encode_text(tokens)
        for clip in (common.load_clip(tmp_path / "jit.pt", trust_jit=True), common.load_clip(tmp_path / "sd.pt")):
            for a, b in zip((clip.model.encode_image(pixels), clip.model.encode_text(tokens)), theirs):
                assert (a - b).abs().max() <= 1e-5 * b.abs().max() and b.std() > 0


@pytest.mark.parametrize("name", ["RN50", "ViT-B/32"])
def test_clips_by_number(tmp_path, name):
    check_clip_by_number(tmp_path, name)


@slow
@pytest.mark.parametrize("name", [n for n in NINE if n not in ("RN50", "ViT-B/32")])
def test_slow_clips_by_number(tmp_path, name):
    check_clip_by_number(tmp_path, name)


def test_openais_own_archives_need_no_trust(tmp_path, monkeypatch, capsys):
    reference = clip_network("vit")
    archive = torch.jit.trace(reference, (torch.rand(1, 3, 64, 64), torch.randint(1, 100, (1, 20))), check_trace=False)
    archive.save(str(tmp_path / "jit.pt"))
    with pytest.raises(SystemExit):
        common.load_clip(tmp_path / "jit.pt")
    assert "--trust_jit=True" in capsys.readouterr().err
    monkeypatch.setitem(common.CLIP_FILES, "RN50", common.file_sha256(tmp_path / "jit.pt"))
    assert common.load_clip(tmp_path / "jit.pt").dim == 32
    (tmp_path / ".cache/clip").mkdir(parents=True)  # and by name, from clip's usual cache
    (tmp_path / "jit.pt").rename(tmp_path / ".cache/clip/RN50.pt")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert common.load_clip("RN50").size == 64
    # downloaded, checked and kept, or refused and not kept
    site, sha = tmp_path / "site", common.CLIP_FILES["RN50"]
    (site / sha).mkdir(parents=True)
    (tmp_path / ".cache/clip/RN50.pt").rename(site / sha / "RN50.pt")
    monkeypatch.setattr(common, "CLIP_URL", site.as_uri())
    assert common.load_clip("RN50").size == 64 and (tmp_path / ".cache/clip/RN50.pt").exists()
    (tmp_path / ".cache/clip/RN50.pt").unlink()
    (site / sha / "RN50.pt").write_bytes(b"cut on the way")
    for reason in ("damaged", "could not download"):
        with pytest.raises(SystemExit) as e:
            common.load_clip("RN50")
        assert e.value.code == 2 and reason in capsys.readouterr().err
        assert not (tmp_path / ".cache/clip/RN50.pt").exists()
        (site / sha / "RN50.pt").unlink(missing_ok=True)
    (tmp_path / ".cache/clip/RN50.pt").write_bytes(b"something else")
    with pytest.raises(SystemExit):
        common.load_clip("RN50")
    assert "checksum" in capsys.readouterr().err


def test_presets_have_the_parameters_counted_by_hand():
    def gpt(k, t, d, n, c, classic):  # embeddings, prefix, blocks, head
        null = 0 if classic else c
        return k * c + (d * c + c) + null + t * c + n * (12 * c * c + 13 * c) + 2 * c + (c * k + k)
    for name, classic in (("paper", True), ("24gb", False)):
        cfg = common.configure(train_gpt.Config, [f"--preset={name}"], train_gpt.PRESETS)
        with torch.device("meta"):
            model = GPT(GPTConfig(16384, 16, 512, cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.classic))
        assert sum(p.numel() for p in model.parameters()) == gpt(16384, 256, 512, cfg.n_layer, 1024, classic)
        assert cfg.classic == classic
    assert (cfg.n_layer, common.configure(train_gpt.Config, ["--preset=paper"], train_gpt.PRESETS).n_layer) == (16, 24)
    cfg = common.configure(vqgan.Config, ["--preset=paper", "--codes=1024"], vqgan.PRESETS)
    assert (cfg.image_size, cfg.clip, cfg.codes) == (256, "ViT-B/32", 1024)  # an option beside the preset wins

    def res(a, b):
        return 2 * a + (9 * a * b + b) + 2 * b + (9 * b * b + b) + (a * b + b if a != b else 0)
    attn = 2 * 512 + 4 * (512 * 512 + 512)
    widths, enc, dec, c = [128, 128, 256, 256, 512], 9 * 3 * 128 + 128, 9 * 256 * 512 + 512, 128
    for i, w in enumerate(widths):
        enc += res(c, w) + res(w, w) + (2 * attn if w == 512 else 0) + (9 * w * w + w if i < 4 else 0)
        c = w
    middle = 2 * res(512, 512) + attn
    enc += middle + 2 * 512 + 9 * 512 * 256 + 256
    for i, w in reversed(list(enumerate(widths))):
        dec += res(c, w) + 2 * res(w, w) + (3 * attn if w == 512 else 0) + (9 * w * w + w if i else 0)
        c = w
    dec += middle + 2 * 128 + 9 * 128 * 3 + 3
    for name, dim in (("paper", 256), ("24gb", 8)):
        cfg = common.configure(vqgan.Config, [f"--preset={name}"], vqgan.PRESETS)
        with torch.device("meta"):
            model = VQGAN(vqgan.check(cfg, common.Machine("cpu", "float32")))
        total = enc + dec + 16384 * dim + (256 * dim + dim) + (dim * 256 + 256)
        assert sum(p.numel() for p in model.parameters()) == total


@fixtures
@pytest.mark.parametrize("name, side", [("taming_tiny", 32), ("taming_f16_1024", 256), ("hfai_vqgan", 256)])
def test_published_vqgans(tmp_path, name, side):
    """Through the loader a user's file takes: same vectors, same tokens, same pictures as that project's own code."""
    weights, want = published(name, "num_batches_tracked")
    lightning = {"state_dict": weights | {"loss.discriminator.x": torch.ones(3)}, "epoch": 1, "global_step": 2}
    torch.save({"model": weights, "epoch": 0} if name == "hfai_vqgan" else lightning, tmp_path / "v.pt")
    model, digest, cfg = common.load_vqgan(tmp_path / "v.pt", "cpu")
    n, step = len(want["indices"]), 1 if name == "taming_tiny" else 4
    x = torch.rand((n, 3, side, side), generator=torch.Generator().manual_seed(1234)) * 2 - 1
    with torch.no_grad():
        close(model.quant_conv(model.encoder(x))[:, :want["z"].shape[1]], want["z"])
        tokens = model.encode(x)
        assert np.array_equal(tokens.numpy(), want["indices"])
        close(model.decode(tokens)[:, :, ::step, ::step], want["recon"])
    assert len(digest) == 64 and cfg.image_size // cfg.factor == 16


@fixtures
def test_published_gpt():
    weights, want = published("hfai_gpt", ".mask")
    masks = {f"blocks.{i}.mask": torch.ones(16, 16, dtype=torch.bool).triu(1) for i in range(3)}
    found = common.adopt({"model": weights | masks, "epoch": 0}, n_head=4)
    model = GPT(GPTConfig(**found["network"])).eval()
    model.load_state_dict(found["ema"])
    tokens = torch.randint(0, 64, (2, 15), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        close(model(torch.randn((2, 32), generator=torch.Generator().manual_seed(8)), tokens), want["logits"])


def test_a_published_pair_draws_from_the_command_line(tmp_path, monkeypatch):
    """A VQGAN as Lightning saves it, classes of Lightning's own in it, and a GPT in HFAiLab's names: no training, the
    settings of 2022 without a flag, and no guidance."""
    shape = VQGANConfig(image_size=64, ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(16,),
                        z_channels=32, codes=64, code_dim=16)
    callback = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["pytorch_lightning.callbacks.model_checkpoint"].ModelCheckpoint = callback
    lightning = {"state_dict": VQGAN(shape).state_dict(), "callbacks": {callback: {"best": torch.ones(1)}}}
    torch.save(lightning, tmp_path / "v.ckpt")
    assert common.load_vqgan(tmp_path / "v.ckpt", "cpu")[2] == shape
    c, weights = 64, {"pos_emb": some(1, 256, 64), "tok_emb.weight": some(64, 64), "cond_proj.weight": some(64, 32),
                      "cond_proj.bias": some(64), "norm.weight": some(64), "norm.bias": some(64),
                      "head.weight": some(64, 64), "head.bias": some(64), "blocks.0.mask": torch.ones(256, 256)}
    for name, *s in (("self_attn.in_proj_weight", 3 * c, c), ("self_attn.in_proj_bias", 3 * c), ("norm1.weight", c),
                     ("self_attn.out_proj.weight", c, c), ("self_attn.out_proj.bias", c), ("norm1.bias", c),
                     ("linear1.weight", 4 * c, c), ("linear1.bias", 4 * c), ("norm2.weight", c),
                     ("linear2.weight", c, 4 * c), ("linear2.bias", c), ("norm2.bias", c)):
        weights[f"blocks.0.encoder.{name}"] = some(*s) * 0.1
    torch.save({"model": weights, "epoch": 3}, tmp_path / "g.pt")
    torch.save(clip_network("vit").state_dict(), tmp_path / "clip.pt")
    args = [HERE / "sample.py", "a city bus driving on the city street", "--gpt=g.pt", "--vqgan=v.ckpt",
            "--clip=clip.pt"]
    assert "best 8 of 64 by CLIP" in command(*args, cwd=tmp_path).stdout
    assert len(list((tmp_path / "out/samples").glob("*.png"))) == 8
    assert "--cfg=1" in command(*args, "--cfg=2", cwd=tmp_path, ok=2).stderr
    assert "--vqgan=FILE" in command(*args[:3], args[4], cwd=tmp_path, ok=2).stderr


@pytest.mark.parametrize("weights", [{"encoder.conv_in.weight": torch.ones(32, 3, 3, 3)}, {}, [1], {"a": 1}])
def test_half_a_published_checkpoint_is_refused(tmp_path, weights, capsys):
    torch.save({"state_dict": weights}, tmp_path / "v.pt")
    with pytest.raises(SystemExit) as e:
        common.load_vqgan(tmp_path / "v.pt", "cpu")
    assert e.value.code == 2 and "v.pt" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- the stages


def command(*args, cwd, ok=0, limit=240, **env):
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=limit,
                          env=os.environ | {"PYTHONPATH": str(HERE)} | env)
    assert done.returncode == ok, f"{args}\n{done.stdout}\n{done.stderr}"
    return done


def together(*jobs):
    """Independent commands (args, folder, exit code), two at a time -> their results, checked as `command` does."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: command(*job[0], cwd=job[1], ok=job[2], OMP_NUM_THREADS="1"), jobs))


TOY = ["--train_pictures=150", "--heldout_pictures=20", "--image_size=32", "--max_steps=6", "--batch_size=16",
       "--save_every=3"]
VQ = ["--image_size=32", "--ch_mult=1,2", "--codes=64", "--max_steps=8", "--vq_start=2", "--disc_start=5",
      "--batch_size=8", "--eval_every=4", "--val_percent=10", "--workers=1"]
GPT_ARGS = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--max_steps=6", "--batch_size=8", "--eval_every=3"]


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Every stage once, in miniature, through its command line; captions.tsv is out of reach from stage 1 on."""
    d = tmp_path_factory.mktemp("world")
    said = {"toy": command(HERE / "toy.py", *TOY, cwd=d).stdout}
    (d / "data/toy/captions.tsv").rename(d / "captions.tsv")
    (d / "data/toy/train/broken.png").write_bytes(b"not a picture")
    (d / "data/toy/train/deeper").mkdir()
    Image.new("L", (50, 40), 90).save(d / "data/toy/train/deeper/grey.jpg")
    said["vqgan"] = command(HERE / "vqgan.py", *VQ, "--out=out/toy", cwd=d).stdout
    said["prepare"] = command(HERE / "prepare.py", "--val_percent=10", "--chunk=64", "--crops=3", cwd=d).stdout
    said["train_gpt"] = command(HERE / "train_gpt.py", *GPT_ARGS, "--out=out/toy", cwd=d).stdout
    said["sample"] = command(HERE / "sample.py", "a red bus", "a blue fish", "--n=2", "--candidates=4", cwd=d).stdout
    (d / "captions.tsv").rename(d / "data/toy/captions.tsv")
    said["evaluate"] = command(HERE / "evaluate.py", "--n=1", "--judge_steps=3", "--optimise=3", cwd=d).stdout
    return d, said


def test_stages_end_to_end(world):
    d, said = world
    for path in ("clip.pt", "world.png", "vqgan.pt", "recon.png", "gpt.pt", "grid.png", "match.json", "match.png"):
        assert (d / "out/toy" / path).stat().st_size > 0
    for stage, steps in (("toy", 6), ("vqgan", 8), ("gpt", 6)):
        lines = [json.loads(x) for x in (d / f"out/toy/{stage}.jsonl").read_text().splitlines()]
        assert [x["step"] for x in lines if "loss" in x] == list(range(1, steps + 1))
        assert all(math.isfinite(v) for x in lines for v in x.values())
    log = [json.loads(x) for x in (d / "out/toy/vqgan.jsonl").read_text().splitlines()]
    assert [x["step"] for x in log if "perplexity" in x] == [3, 4, 5, 6, 7, 8]       # quantised from step vq_start on
    assert [x["step"] for x in log if "disc" in x] == [6, 7, 8]                       # and judged from disc_start on
    assert [x["step"] for x in log if "val_loss" in x] == [4, 8]
    assert "knows nothing is ln 64 = 4.159" in said["train_gpt"] and "tokens/s" in said["sample"]
    assert "best 2 of 4 by CLIP" in said["sample"] and "out/toy/gpt.pt" in said["sample"]
    assert Image.open(d / "out/samples.png").size[0] >= 64 and len(list((d / "out/samples").glob("*.png"))) == 4
    table = json.loads((d / "out/toy/match.json").read_text())["table"]
    assert len(table) == 34 and all(0 <= row["both"]["share"] <= 1 for row in table.values())
    assert table["true training pictures"]["nearest"]["mean"] == pytest.approx(0, abs=1e-3)
    assert "samples at guidance 2" in table and "samples at guidance 3" not in table  # the default is a row already
    assert table["samples at guidance 6, gap 0.8"]["both"]["n"] == table["samples at variety 1.5"]["both"]["n"] == 96
    for path in ("match.md", "compare.png", "guidance.png", "variety.png"):
        assert (d / "out/toy" / path).stat().st_size > 0
    assert len(list((d / "out/toy").glob("controls-*/*/gpt.pt"))) == 2
    report = (d / "out/toy/match.md").read_text()
    again = command(HERE / "evaluate.py", "--n=1", "--judge_steps=3", "--optimise=0", "--plots=False", cwd=d).stdout
    assert "captioned/gpt.pt is finished" in again and "unconditioned/gpt.pt is finished" in again
    assert "language-free / captioned: " in report and "seed 0" in report and "of the 3 prompts" in report
    figures = [c for line in report.splitlines() if line.startswith("| ") for c in line.split(" | ")[1:]]
    assert all("n=" in c and ("±" in c or "–" in c or "n=1" in c) for c in figures if any(x.isdigit() for x in c))
    assert "modality gap" in said["prepare"] and "to their own captions" in said["evaluate"]


def test_unseen_pairs_are_for_clip_alone(world):
    d, _ = world
    rows = [line.split("\t") for line in (d / "data/toy/captions.tsv").read_text().splitlines()[1:]]
    assert {r[6] for r in rows} == {"train", "unseen", "heldout"}
    from toy import UNSEEN
    assert len({o for _, o in UNSEEN}) == len(UNSEEN) == 12 and len({c for c, _ in UNSEEN}) == 8
    for path, thing, colour, *_, split in rows:
        assert path.startswith(split + "/") and (d / "data/toy" / path).is_file()
        if split != "heldout":
            assert (split == "unseen") == ((colour, thing) in UNSEEN)


def test_the_captioned_control_sees_the_captions_of_the_same_pictures(world):
    d, _ = world
    dump, = (d / "out/toy").glob("controls-*/caption_tokens")
    (meta, ours), (other, theirs) = (train_gpt.open_dump(p) for p in (d / "data/toy_tokens", dump))
    clip = common.load_clip(d / "out/toy/clip.pt")
    captions = dict(line.split("\t")[::5] for line in (d / "data/toy/captions.tsv").read_text().splitlines()[1:])
    names = [n for n in common.Pictures(d / "data/toy/train").names if n != "broken.png"]
    for split, names, crops in zip(("train", "val"), common.split_names(names, 10), (3, 1)):
        assert np.array_equal(ours[split][0], theirs[split][0])
        for i in range(0, len(names), 7):
            text = clip.text([captions.get(f"train/{names[i]}", "")])[0].numpy()
            assert np.abs(theirs[split][1][i * crops] - text).max() < 1e-3


def test_dump_rows_follow_the_sorted_sources(world):
    """Order, crops, held-out split and the skipped picture; tokens and embeddings as the networks give them alone."""
    d, _ = world
    meta, arrays = train_gpt.open_dump(d / "data/toy_tokens")
    names = common.Pictures(d / "data/toy/train").names
    train = [n for n in names if not common.held_out(n, 10) and n != "broken.png"]
    val = [n for n in names if common.held_out(n, 10) and n != "broken.png"]
    assert meta["train_rows"] == 3 * len(train) and meta["val_rows"] == len(val) and "deeper/grey.jpg" in names
    assert [x[0] for x in meta["skipped"]] == ["broken.png"] and meta["skipped_count"] == 1
    assert "'broken.png'" in meta["skipped"][0][1]
    network, digest, cfg = common.load_vqgan(d / "out/toy/vqgan.pt", "cpu")
    assert digest == meta["vqgan_sha256"] == common.digest(network.state_dict())
    clip = common.load_clip(d / "out/toy/clip.pt")
    for i in (0, 7, len(train) - 1):  # the first row of each picture is its centre crop
        picture = common.open_picture(d / "data/toy/train" / train[i])
        tokens = network.encode(common.to_tensor(common.crop(picture, 32))[None] * 2 - 1).flatten()
        assert (tokens.numpy() == arrays["train"][0][3 * i]).mean() > 0.9
        embedding = clip.image(common.to_tensor(common.crop(picture, clip.size))[None])[0]
        assert np.abs(embedding.numpy() - arrays["train"][1][3 * i]).max() < 2e-3
    embeddings = arrays["train"][1].astype(np.float32)
    assert np.allclose(np.linalg.norm(embeddings, axis=1), 1, atol=2e-3)
    assert np.allclose(embeddings.mean(0), meta["image_mean"], atol=1e-4)
    assert not np.array_equal(arrays["train"][1][0], arrays["train"][1][1])


def test_dump_is_the_same_for_any_number_of_workers(world, tmp_path):
    d, _ = world
    args = [HERE / "prepare.py", "--val_percent=10", "--chunk=64", "--crops=3"]
    command(*args, f"--out={tmp_path}/a", "--workers=0", cwd=d)
    command(*args, f"--out={tmp_path}/b", "--workers=3", cwd=d)
    for name in ("train_tokens.bin", "train_clip.bin", "val_tokens.bin", "val_clip.bin"):
        first = (d / "data/toy_tokens" / name).read_bytes()
        assert first == (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not (tmp_path / "b/parts").exists()


def test_another_picture_size_gives_another_grid(world, tmp_path):
    """A VQGAN is not tied to the size it was trained at: the token grid follows, through to the picture."""
    d, _ = world
    command(HERE / "prepare.py", "--image_size=48", "--val_percent=10", f"--out={tmp_path}/d", cwd=d)
    assert json.loads((tmp_path / "d/meta.json").read_text())["grid"] == 6
    command(HERE / "train_gpt.py", *GPT_ARGS, f"--data={tmp_path}/d", f"--out={tmp_path}/g", cwd=d)
    command(HERE / "sample.py", "a red bus", "--n=1", f"--gpt={tmp_path}/g/gpt.pt", f"--out={tmp_path}/s.png", cwd=d)
    assert Image.open(next((tmp_path / "s").glob("*.png"))).size == (48, 48)


def test_muon_moves_the_blocks_matrices_and_can_be_left_out(world, tmp_path):
    d, _ = world
    command(HERE / "train_gpt.py", *GPT_ARGS, "--muon=False", "--classic=True", f"--out={tmp_path}/adam", cwd=d)
    made, plain = (torch.load(p, weights_only=True) for p in (d / "out/toy/gpt.pt", tmp_path / "adam/gpt.pt"))
    moved = {k: len(o["state"]) for k, o in made["optimizers"].items()}
    assert moved == {"muon": 4 * 2, "adam": len(made["model"]) - 2 - 4 * 2}  # `means` and `spread` are no parameters
    assert {k: len(o["state"]) for k, o in plain["optimizers"].items()} == {"adam": len(plain["model"]) - 2}
    assert not torch.any(plain["model"]["means"]) and not torch.any(plain["model"]["spread"])
    command(HERE / "vqgan.py", *VQ, "--muon=False", "--max_steps=4", f"--out={tmp_path}/vq", cwd=d)
    made, plain = (torch.load(p, weights_only=True) for p in (d / "out/toy/vqgan.pt", tmp_path / "vq/vqgan.pt"))
    matrices, everything = sum(p.dim() == 4 for p in made["model"].values()), len(made["model"])
    moved = {k: len(o["state"]) for k, o in made["optimizers"].items() if k != "disc"}
    assert moved == {"muon": matrices, "adam": everything - matrices} and not vqgan.PRESETS["paper"]["muon"]
    assert {k: len(o["state"]) for k, o in plain["optimizers"].items() if k != "disc"} == {"adam": everything}


def test_a_killed_run_goes_on_to_the_same_weights(world, tmp_path, stage="train_gpt", args=GPT_ARGS):
    """Killed by the system (SIGKILL) at its first checkpoint, the same command ends with the uninterrupted weights."""
    d, _ = world
    name = "gpt"
    run = [sys.executable, str(HERE / f"{stage}.py"), *args, f"--out={tmp_path}"]
    child = subprocess.Popen(run, cwd=d, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": str(HERE)})
    while child.poll() is None and not (tmp_path / f"{name}.ckpt").exists():
        pass
    child.kill()
    child.wait()
    assert (tmp_path / f"{name}.ckpt").exists(), "finished before it could be killed"
    done = command(*run[1:], cwd=d)
    assert f"going on from {tmp_path}/{name}.ckpt, step" in done.stdout
    a, b = (torch.load(p / f"{name}.pt", weights_only=True) for p in (tmp_path, d / "out/toy"))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in b[part])
    logs = [[json.loads(x) for x in (p / f"{name}.jsonl").read_text().splitlines()] for p in (tmp_path, d / "out/toy")]
    assert [x | {"tokens_per_s": 0} for x in logs[0]] == [x | {"tokens_per_s": 0} for x in logs[1]]


def test_the_same_command_says_finished_and_another_config_is_refused(world):
    d, _ = world
    before = snapshot(d / "out")
    runs = [["toy.py", *TOY], ["vqgan.py", *VQ, "--out=out/toy"], ["train_gpt.py", *GPT_ARGS, "--out=out/toy"],
            ["prepare.py", "--val_percent=10", "--chunk=64", "--crops=3"]]
    for script, *args in runs:  # the same twice at once would find the folder in use
        other = "--crops=1" if script == "prepare.py" else "--batch_size=4"
        same = command(HERE / script, *args, cwd=d)
        done = command(HERE / script, *args, other, cwd=d, ok=2)
        assert "is finished" in same.stdout
        assert other[2:7] in done.stderr and "--out" in done.stderr and done.stderr.count("\n") == 1
    assert snapshot(d / "out") == before


def test_a_run_made_without_an_option_goes_on_with_its_default(world, tmp_path):
    """Checkpoints from before an option was added: its default is what they were made with."""
    d, _ = world
    made = torch.load(d / "out/toy/vqgan.pt", weights_only=True)
    del made["config"]["muon"], made["digest"]
    (tmp_path / "run").mkdir()
    torch.save(made | {"digest": common.digest(made)}, tmp_path / "run/vqgan.pt")
    args = [HERE / "vqgan.py", *VQ, f"--out={tmp_path}/run"]
    assert "is finished" in command(*args, cwd=d).stdout
    assert "muon=True" in command(*args, "--muon=False", cwd=d, ok=2).stderr


def test_sampling_is_reproducible_and_ranks_by_clip(world):
    d, _ = world

    def pictures(*args):
        said = command(HERE / "sample.py", "a red bus", f"--out={d}/s.png", *args, cwd=d).stdout
        found = sorted((d / "s").glob("*.png"))
        data = [p.read_bytes() for p in found]
        for p in found:
            p.unlink()
        return data, said
    two, four = pictures("--n=2")[0], pictures("--n=4", "--batch_size=3")[0]
    assert two == four[:2] and len(set(four)) == 4 and pictures("--n=2", "--seed=1")[0] != two
    best, said = pictures("--n=2", "--candidates=4")
    clip = common.load_clip(d / "out/toy/clip.pt")
    for i, b in enumerate(four):
        (d / f"c{i}.png").write_bytes(b)
    drawn = [common.open_picture(d / f"c{i}.png") for i in range(4)]
    scores = sample.similarity(clip, drawn, clip.text(["a red bus"])[0])
    order = sorted(range(4), key=lambda i: -scores[i])
    assert best == [four[i] for i in order[:2]] and f"{order[0]} ({scores[order[0]]:.3f})" in said
    command(HERE / "sample.py", f"--image={d}/c0.png", "--n=1", f"--out={d}/v.png", cwd=d)
    assert "cut off" in command(HERE / "sample.py", "a red bus " * 30, "--n=1", f"--out={d}/v.png", cwd=d).stdout


def test_two_processes_train_as_one(world, tmp_path):
    """torchrun with two ranks and one process, the same global batch: the same weights after AdamW steps."""
    d, _ = world
    args = [HERE / "train_gpt.py", *GPT_ARGS, "--dtype=float32", "--drop=0.3", "--eval_every=100"]
    command(*args, f"--out={tmp_path}/one", cwd=d)
    command("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *args, f"--out={tmp_path}/two", cwd=d)
    command(*args, f"--out={tmp_path}/parts", "--accumulate=2", cwd=d)
    one, two, parts = (torch.load(tmp_path / n / "gpt.pt", weights_only=True)["model"] for n in ("one", "two", "parts"))
    start = torch.load(tmp_path / "one/gpt.pt", weights_only=True)
    assert start["step"] == 6
    for k in one:
        assert (one[k] - two[k]).abs().max() <= 1e-5 and (one[k] - parts[k]).abs().max() <= 1e-5, k
    assert one["head.weight"].abs().max() > 1e-3  # it did move


def test_two_processes_prepare_the_same_files_and_train_the_same_vqgan(world, tmp_path):
    d, _ = world
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    args = ["--val_percent=10", "--chunk=64", "--crops=3", f"--out={tmp_path}/d"]
    threads = str(torch.get_num_threads())  # torchrun would set 1, and on some CPUs a sum's last bit depends on it
    command(*torchrun, HERE / "prepare.py", *args, cwd=d, OMP_NUM_THREADS=threads)
    for name in ("train_tokens.bin", "train_clip.bin", "val_tokens.bin", "val_clip.bin"):
        assert (d / "data/toy_tokens" / name).read_bytes() == (tmp_path / "d" / name).read_bytes()
    args = [*VQ, "--dtype=float32", "--max_steps=6", "--disc_start=2", "--eval_every=100", "--warmup=1",
            "--learning_rate=1e-3", "--vq_start=0",  # all losses at work; k-means would make much of the last bit,
            "--seed=1"]                              # as does a vector that lies between two codes, as one of seed 0's
    command(HERE / "vqgan.py", *args, f"--out={tmp_path}/one", cwd=d, OMP_NUM_THREADS="1")
    command(*torchrun, HERE / "vqgan.py", *args, f"--out={tmp_path}/two", cwd=d, OMP_NUM_THREADS="1")
    one, two = (torch.load(tmp_path / n / "vqgan.pt", weights_only=True) for n in ("one", "two"))
    for part in ("model", "disc"):
        difference = torch.cat([(one[part][k] - two[part][k]).flatten() for k in one[part]])
        assert difference.norm() <= 1e-4 * torch.cat([x.flatten() for x in one[part].values()]).norm(), part


@slow
def test_slow_a_compiled_vqgan_meets_its_discriminator(world, tmp_path):
    """Its steps go back through one graph several times, which a compiled one allows only if told beforehand."""
    command(HERE / "vqgan.py", *VQ, "--compile=True", f"--out={tmp_path}/vq", cwd=world[0], limit=600)


@slow
def test_slow_a_dead_rank_ends_the_job_and_a_restart_goes_on(world, tmp_path):
    args = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(HERE / "train_gpt.py"), *GPT_ARGS,
            "--dtype=float32"]
    command(*args, "--max_steps=300", "--eval_every=50", f"--out={tmp_path}/whole", cwd=world[0])
    args = [*args, "--max_steps=300", "--eval_every=50", f"--out={tmp_path}/killed"]

    def killed(number, after):
        """What a job says whose last rank gets this signal, once the file `after` is there."""
        job = subprocess.Popen([sys.executable, *args], cwd=world[0], env=os.environ | {"PYTHONPATH": str(HERE)},
                               stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while not after.exists():
            assert job.poll() is None
        os.kill(int(Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()[-1]), number)
        begun, said = time.time(), job.communicate(timeout=60)
        assert job.returncode != 0 and time.time() - begun < 60, said
        return said
    # a rank that is told to stop alone takes the others with it, and the first one saves
    assert "the same command goes on" in killed(signal.SIGTERM, tmp_path / "killed/gpt.jsonl")[0]
    (tmp_path / "killed/gpt.ckpt").unlink()
    assert "SIGKILL" in killed(signal.SIGKILL, tmp_path / "killed/gpt.ckpt")[1]
    command(*args, cwd=world[0])
    whole, killed = (torch.load(tmp_path / n / "gpt.pt", weights_only=True)["model"] for n in ("whole", "killed"))
    assert all(torch.equal(whole[k], killed[k]) for k in whole)


def test_a_tar_gives_the_folders_dump(world, tmp_path):
    d, _ = world
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(d / "data/toy/train", ".")
    command(HERE / "prepare.py", "--val_percent=10", "--chunk=64", "--crops=3", f"--data={tmp_path}/t.tar",
            f"--out={tmp_path}/d", cwd=d)
    for name in ("train_tokens.bin", "train_clip.bin", "val_tokens.bin", "val_clip.bin"):
        assert (d / "data/toy_tokens" / name).read_bytes() == (tmp_path / "d" / name).read_bytes()


def test_dry_runs_say_what_a_run_would_take_and_write_nothing(world):
    d, _ = world
    before = snapshot(d)
    jobs = [([HERE / f"{script}.py", *args, "--out=out/dry", "--max_steps=1000", "--dry_run=True"], d, 0)
            for script, args in (("vqgan", VQ), ("train_gpt", GPT_ARGS))]
    for said in (done.stdout for done in together(*jobs)):
        assert "GiB" in said and "steps/s" in said and "hours" in said and "M parameters" in said
    assert snapshot(d) == before


def test_too_many_bad_pictures_stop_a_run(world, tmp_path):
    d, _ = world
    args = [HERE / "prepare.py", "--val_percent=10", f"--out={tmp_path}"]
    done = command(*args, "--max_bad=0.001", cwd=d, ok=2)
    assert "--max_bad=0.001" in done.stderr and "broken.png" in done.stderr and done.stderr.count("\n") == 1
    command(*args, "--max_bad=0.5", cwd=d)  # told to go on, it does, in the same folder


# ------------------------------------------------------------------------------------- killed, damaged, hostile


STAGES = {  # stage: command, the files it leaves for others
    "toy": (["toy.py", *TOY, "--data={}/world", "--out={}", "--workers=1"],
            ["clip.pt", "world/captions.tsv", "toy.jsonl"]),
    "vqgan": (["vqgan.py", *VQ, "--out={}", "--workers=0"], ["vqgan.jsonl"]),
    "prepare": (["prepare.py", "--val_percent=10", "--chunk=16", "--out={}", "--workers=0"],
                ["train_tokens.bin", "train_clip.bin", "val_tokens.bin", "val_clip.bin"]),
    "gpt": (["train_gpt.py", *GPT_ARGS, "--eval_every=1", "--out={}"], ["gpt.jsonl"])}


def outcome(stage, folder):
    """What a finished stage left, comparable: weights and files, logs without their times."""
    found = {}
    for name in STAGES[stage][1]:
        data = (folder / name).read_bytes()
        found[name] = [json.loads(x) | {"tokens_per_s": 0} for x in data.splitlines()] if name.endswith("l") else data
    if stage != "prepare":
        checkpoint = torch.load(folder / f"{stage}.pt", weights_only=True)
        found |= {k: v.numpy().tobytes() for k, v in checkpoint["model"].items()}
    return found


def kill_and_go_on(world, tmp_path, stage, kills, seed):
    """Killed by the system at random moments of its life, the same command again ends with what an uninterrupted run
    leaves, bit for bit, the log with every line once, and no temporary file."""
    d, rng, said = world[0], np.random.default_rng(seed), tmp_path / "said"

    def run(folder):
        args = [a.format(folder) for a in STAGES[stage][0]]
        return subprocess.Popen([sys.executable, str(HERE / args[0]), *args[1:]], cwd=d, stdout=subprocess.DEVNULL,
                                stderr=said.open("w"), env=os.environ | {"PYTHONPATH": str(HERE)})
    begun = time.time()
    assert run(tmp_path / "whole").wait() == 0
    length, left = time.time() - begun, kills
    for attempt in range(100):
        child, until = run(tmp_path / "killed"), rng.uniform(0.3, 1) * length
        try:
            child.wait(until if left else 240)
            assert child.returncode == 0, said.read_text()
            if not left:
                break
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            left -= 1
            continue
        shutil.rmtree(tmp_path / "killed")  # it finished before it was to be killed: from the beginning
    assert outcome(stage, tmp_path / "whole") == outcome(stage, tmp_path / "killed")
    assert not list((tmp_path / "killed").glob("**/*tmp*"))


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random_moments(world, tmp_path, stage):
    kill_and_go_on(world, tmp_path, stage, 3, 0)


@slow
@pytest.mark.parametrize("stage", STAGES)
def test_slow_killed_at_random_moments(world, tmp_path, stage):
    kill_and_go_on(world, tmp_path, stage, 20, 1)


def test_a_polite_kill_saves_first(world, tmp_path):
    def begun(*more):
        args = [sys.executable, str(HERE / "train_gpt.py"), *GPT_ARGS, "--max_steps=100000", "--eval_every=100000",
                f"--out={tmp_path}", *more]
        return subprocess.Popen(args, cwd=world[0], stdout=subprocess.PIPE, text=True,
                                env=os.environ | {"PYTHONPATH": str(HERE)})
    child = begun()
    while not (tmp_path / "gpt.jsonl").exists():
        assert child.poll() is None
    child.terminate()
    out = child.communicate(timeout=60)[0]
    step = torch.load(tmp_path / "gpt.ckpt", weights_only=True)["step"]
    assert child.returncode == 130 and f"at step {step}; the same command goes on" in out and step >= 1
    child = begun("--dry_run=True")
    while "knows nothing" not in child.stdout.readline():  # the last line before the steps
        assert child.poll() is None
    child.terminate()
    out = child.communicate(timeout=60)[0]
    assert child.returncode == 130 and "nothing was written" in out and "goes on" not in out


def test_a_folder_in_use_is_refused(world, tmp_path):
    held = common.lock(tmp_path, common.Machine("cpu", "float32"))
    jobs = [([HERE / script, *args, f"--out={tmp_path}"], world[0], 2) for script, args in
            (("train_gpt.py", GPT_ARGS), ("vqgan.py", VQ), ("prepare.py", []))]
    assert all("another run" in done.stderr for done in together(*jobs))
    held.close()


def test_a_lock_ends_with_its_process_though_a_worker_lives_on(tmp_path):
    code = ("import os, sys, time, types, common; kept = common.lock(sys.argv[1], types.SimpleNamespace(rank=0)); "
            "os.fork() or (os.close(1), os.close(2), time.sleep(20)); os._exit(0)")
    machine = types.SimpleNamespace(rank=0)
    command("-c", code, tmp_path / "run", cwd=tmp_path)
    common.lock(tmp_path / "run", machine)  # the child sleeps on, the lock is free
    with pytest.raises(SystemExit):
        kept = common.lock(tmp_path / "busy", machine)
        common.lock(tmp_path / "busy", machine)
    assert kept


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers only decode")
def test_workers_end_with_a_killed_prepare(world, tmp_path):
    """They compute for long where chunks are large; left behind, they would work beside those of the next run."""
    for i in range(4):
        Image.new("RGB", (40, 32), (60 * i, 0, 99)).save(tmp_path / f"{i}.png")
    child = subprocess.Popen([sys.executable, HERE / "prepare.py", f"--data={tmp_path}", f"--out={tmp_path}/d",
                              "--chunk=2", "--crops=20000", "--val_percent=0", "--workers=2", "--dtype=float32"],
                             cwd=world[0], stdout=subprocess.DEVNULL)
    workers, children = [], Path(f"/proc/{child.pid}/task/{child.pid}/children")

    def stat(worker):  # its state, and further on the time it has computed, in hundredths of a second
        file = Path(f"/proc/{worker}/stat")
        return file.read_text().rpartition(")")[2].split() if file.exists() else ["Z"]
    while child.poll() is None and (len(workers) < 2 or min(int(stat(w)[11]) for w in workers) < 50):
        workers = children.read_text().split()
    child.kill()
    child.wait()
    alive, end = workers, time.time() + 3  # their chunk would take longer
    while alive and time.time() < end:
        alive = [w for w in workers if stat(w)[0] != "Z"]
    assert len(workers) == 2 and not alive


def test_a_full_disk_leaves_the_last_checkpoint(world, tmp_path):
    """Files may grow to 100 kB and no further, as on a disk that is full."""
    d, _ = world
    command(HERE / "train_gpt.py", *GPT_ARGS, f"--out={tmp_path}", cwd=d)
    (tmp_path / "gpt.pt").rename(tmp_path / "gpt.ckpt")
    checkpoint = torch.load(tmp_path / "gpt.ckpt", weights_only=True)
    checkpoint = {k: v for k, v in checkpoint.items() if k != "digest"} | {"step": 3}
    torch.save(checkpoint | {"digest": common.digest(checkpoint)}, tmp_path / "gpt.ckpt")
    before = (tmp_path / "gpt.ckpt").read_bytes()
    code = (f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)); "
            f"sys.argv[1:] = {[*GPT_ARGS, f'--out={tmp_path}']!r}; sys.path.insert(0, {str(HERE)!r}); "
            f"runpy.run_path({str(HERE / 'train_gpt.py')!r}, run_name='__main__')")
    done = command("-c", code, cwd=d, ok=2)
    assert "could not write" in done.stderr and "gpt.ckpt" in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "gpt.ckpt").read_bytes() == before
    done = command(HERE / "train_gpt.py", *GPT_ARGS, f"--out={tmp_path}/gpt.ckpt/sub", cwd=d, ok=2)
    assert "could not write" in done.stderr and done.stderr.count("\n") == 1


def test_steps_that_are_not_finite_are_skipped_and_many_stop_the_run(world, tmp_path):
    d, _ = world
    jobs = [([HERE / script, *args, "--learning_rate=1e38", "--max_steps=60", "--dtype=float32",
              f"--out={tmp_path}/{script}"], d, 2) for script, args in (("train_gpt.py", GPT_ARGS), ("vqgan.py", VQ))]
    for done in together(*jobs):
        assert "20 steps in a row were not finite" in done.stderr and done.stderr.count("\n") == 1
        assert "step skipped" in done.stdout


@pytest.mark.parametrize("what", ["cut", "bit", "swap"])
def test_damaged_checkpoints_are_found(world, tmp_path, what, capsys):
    data = bytearray((world[0] / "out/toy/vqgan.pt").read_bytes())
    if what == "bit":
        data[len(data) // 2] ^= 64
    elif what == "swap":  # another run's weights under this run's name
        checkpoint = torch.load(world[0] / "out/toy/vqgan.pt", weights_only=True)
        checkpoint["ema"] = {k: v + 0.1 for k, v in checkpoint["ema"].items()}
        torch.save(checkpoint, tmp_path / "v.pt")
        data = (tmp_path / "v.pt").read_bytes()
    (tmp_path / "v.pt").write_bytes(data[:-1000] if what == "cut" else data)
    with pytest.raises(SystemExit) as e:
        common.load_vqgan(tmp_path / "v.pt", "cpu")
    assert e.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def mutate(data, rng):
    """One of the ways in which files go bad: cut, bits flipped, a stretch zeroed, doubled or overwritten."""
    data, way = bytearray(data), rng.integers(5)
    a, b = sorted(rng.integers(len(data) + 1, size=2))
    if way == 0:
        return bytes(data[:a])
    if way == 1:
        for i in rng.integers(len(data), size=rng.integers(1, 20)):
            data[i] ^= 1 << rng.integers(8)
    elif way == 2:
        data[a:b] = bytes(b - a)
    elif way == 3:
        data[a:a] = data[a:b]
    else:
        data[a:a + 8] = rng.bytes(8)
    return bytes(data)


def fuzz(world, tmp_path, count, seed):
    """Mutated pictures, tars, metas, config lines and checkpoints: each is read in full, or refused by an OSError or
    ValueError (pictures, which are then skipped) or by one line and exit code 2. Anything else fails the test."""
    d, rng = world[0], np.random.default_rng(seed)
    seeds = []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        picture = io.BytesIO()
        Image.fromarray(rng.integers(256, size=(24, 24, 3)).astype(np.uint8)).save(picture, kind)
        seeds.append(("picture", picture.getvalue()))
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as t:
        for i in range(3):
            member = tarfile.TarInfo(f"{i}.png")
            member.size = len(seeds[0][1])
            t.addfile(member, io.BytesIO(seeds[0][1]))
    write_dump(tmp_path / "dump")
    seeds += [("tar", tar.getvalue()), ("meta", (tmp_path / "dump/meta.json").read_bytes()),
              ("config", "--size=7 --rate=0.5 --widths=1,2 --flip=True --best=3 --name=x".encode()),
              ("checkpoint", (d / "out/toy/gpt.pt").read_bytes()), ("clip", b"")]
    small = {"stage": "gpt", "network": {}, "ema": {"a": torch.ones(3)}, "step": 1}
    torch.save(small | {"digest": common.digest(small)}, tmp_path / "small.pt")
    seeds.append(("checkpoint", (tmp_path / "small.pt").read_bytes()))
    refused = 0
    for i in range(count):
        kind, data = seeds[i % len(seeds)]
        data = mutate(data, rng) if data else rng.bytes(100)
        path = tmp_path / f"fuzz{'.tar' if kind == 'tar' else '.png'}"
        path.write_bytes(data)
        begun = time.time()
        try:
            if kind == "picture":
                assert common.open_picture(path).mode == "RGB"
            elif kind == "tar":
                pictures = common.Pictures(str(path))
                for name in pictures.names:
                    with contextlib.suppress(OSError, ValueError):
                        pictures.open(name)
            elif kind == "meta":
                (tmp_path / "dump/meta.json").write_bytes(data)
                train_gpt.open_dump(tmp_path / "dump")
            elif kind == "config":
                common.configure(Options, data.decode(errors="surrogateescape").split())
            else:
                (common.load_clip if kind == "clip" else common.load_gpt)(path, "cpu")
        except SystemExit as e:
            assert e.code in (0, 2) if kind == "config" else e.code == 2  # 0: it may have turned into --help
            refused += 1
        except (OSError, ValueError):
            assert kind == "picture"
            refused += 1
        assert time.time() - begun < 20
    assert refused > count / 4


def test_fuzzed_files_are_read_or_refused(world, tmp_path):
    fuzz(world, tmp_path, 200, 0)


@slow
def test_slow_fuzzed_files_are_read_or_refused(world, tmp_path):
    fuzz(world, tmp_path, 2400, 1)


def test_odd_prompts_draw_or_are_refused(world, tmp_path):
    d, _ = world
    together(*[([HERE / "sample.py", prompt, "--n=1", f"--out={tmp_path}/{i}.png"], d, 0) for i, prompt in
               enumerate(("", "\N{BUS}\N{SNOWMAN}", "../../up", "a\nb"))])
    made = sorted(p.name for p in tmp_path.iterdir())
    assert made == sorted("0 1 2 3 0.png 1.png 2.png 3.png".split())  # nothing outside
    bad = [sys.executable.encode(), str(HERE / "sample.py").encode(), b"a \xff\xfe bus"]
    done = subprocess.run(bad, cwd=d, capture_output=True)
    assert done.returncode == 2 and b"UTF-8" in done.stderr and done.stderr.count(b"\n") == 1
    begun, clip = time.time(), common.load_clip(d / "out/toy/clip.pt")
    assert clip.tokenize(["a red bus " * 10 ** 6])[1] and clip.tokenize(["x" * 10 ** 7])[1] and time.time() - begun < 20


# ---------------------------------------------------------------------------------------------------------- bad input


BAD = [
    ("vqgan.py --data=nowhere", "nowhere"), ("vqgan.py --data=empty", "no pictures in empty"),
    ("vqgan.py --data=rotten --out=out/r --workers=0", "read"), ("vqgan.py --clip=nowhere.pt", "nowhere.pt"),
    ("vqgan.py --clip=out/toy/vqgan.pt --out=out/x", "not a CLIP"),
    ("vqgan.py --image_size=30 --out=out/x", "image_size"), ("vqgan.py --ch=20 --out=out/x", "--groups"),
    ("vqgan.py --bathc_size=3", "--batch_size"), ("vqgan.py out/x", "--name=value"),
    ("vqgan.py --device=gpu9", "--device"), ("vqgan.py --dtype=float16", "float16"),
    ("prepare.py --data=nowhere --out=x", "nowhere"), ("prepare.py --data=rotten --out=x", "6 of 6"),
    ("prepare.py --vqgan=nowhere.pt --out=x", "nowhere.pt"),
    ("prepare.py --vqgan=out/toy/gpt.pt --out=x", "checkpoint of gpt"),
    ("prepare.py --vqgan=out/toy/clip.pt --out=x", "vqgan checkpoint"),
    ("prepare.py --vqgan=rotten/a.png --out=x", "rotten/a.png"), ("train_gpt.py --data=nowhere", "nowhere"),
    ("train_gpt.py --vqgan=other/vqgan.pt --out=out/x", "another VQGAN"),
    ("prepare.py --image_size=33 --out=x", "33"),
    ("train_gpt.py --n_embd=30 --n_head=4 --out=out/x", "--n_embd"),
    ("train_gpt.py --batch_size=7 --accumulate=2 --out=out/x", "batch_size"), ("sample.py", "a red bus"),
    ("sample.py word --gpt=nowhere.pt", "nowhere.pt"), ("sample.py word --gpt=out/toy/vqgan.pt", "vqgan"),
    ("sample.py word --vqgan=other/vqgan.pt", "another VQGAN"), ("sample.py --image=nowhere.png", "nowhere.png"),
    ("sample.py --image=rotten/a.png", "rotten/a.png"), ("sample.py word --clip=other/clip.pt", "another CLIP"),
    ("sample.py word --top_p=2", "from 0 to 1"), ("sample.py word --dtype=~", "one of auto, float32"),
    ("vqgan.py --flip=~ --out=out/x", "one of True, False"), ("vqgan.py --out=published", "another CLIP"),
    ("prepare.py --vqgan=other/old.pt --out=x", "unexpected"), ("prepare.py --val_percent=100 --out=x", "held out"),
    ("bench.py --pixels=100", "--pixels"), ("sample.py word --out=x.txt", ".png"),
    ("evaluate.py --data=empty", "no toy world"), ("evaluate.py --data=rotten --texts=nowhere.txt", "nowhere.txt"),
    ("toy.py --data=empty --out=out/x", "no toy world"),
    ("toy.py --seed=5 --out=out/x", "seed"), ("toy.py --batch_size=1 --out=out/x", "--batch_size"),
    ("vqgan.py --data=shards/**.tar --out=out/x", "shards/**.tar"),
    ("vqgan.py --data=//nowhere --out=out/x", "nowhere"),
    ("sample.py --image=thin.png", "too thin"), ("sample.py word --cfg=1e39", "from 0 to 1e+06"),
    ("ablate.py --data=nowhere", "no toy world"), ("ablate.py --only=waltz", "waltz"),
    ("ablate.py --dump=nowhere", "no dump in nowhere"), ("bench.py --n_embd=100", "--n_head"),
    ("bench.py --grid=2", "--grid"), ("bench.py --out=thin.png", "thin.png"),
]


@pytest.fixture(scope="session")
def bad_world(world):
    d, _ = world
    (d / "empty").mkdir()
    (d / "rotten").mkdir()
    for name in "abcdef":
        (d / f"rotten/{name}.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing of sense")
    Image.new("L", (1, 1000)).save(d / "thin.png")
    (d / "other").mkdir()
    checkpoint = torch.load(d / "out/toy/vqgan.pt", weights_only=True)
    checkpoint["ema"] = {k: v + 0.01 for k, v in checkpoint["ema"].items()}
    checkpoint = {k: v for k, v in checkpoint.items() if k != "digest"} | {"sha256": common.digest(checkpoint["ema"])}
    torch.save(checkpoint | {"digest": common.digest(checkpoint)}, d / "other/vqgan.pt")
    older = checkpoint | {"network": checkpoint["network"] | {"an option of long ago": 1}}
    torch.save(older | {"digest": common.digest(older)}, d / "other/old.pt")
    (d / "published").mkdir()  # of taming-transformers' form
    torch.save({"state_dict": checkpoint["ema"]}, d / "published/vqgan.pt")
    weights = torch.load(d / "out/toy/clip.pt", weights_only=True)
    torch.save(weights | {"logit_scale": weights["logit_scale"] + 1}, d / "other/clip.pt")
    return d


def snapshot(d):
    return {p: p.stat().st_mtime_ns for p in d.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


@pytest.fixture(scope="session")
def bad_runs(bad_world):
    """All lines of BAD, two at a time, and the files that were there before and are not, or not the same, after."""
    def run(job):
        script, *args = job[1].replace("=out/x", f"=out/x{job[0]}").replace("--out=x", f"--out=x{job[0]}").split()
        return subprocess.run([sys.executable, str(HERE / script), *args], cwd=bad_world, capture_output=True,
                              text=True, timeout=240,
                              env=os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
    before = snapshot(bad_world)
    with ThreadPoolExecutor(2) as pool:
        done = dict(zip((b[0] for b in BAD), pool.map(run, enumerate(b[0] for b in BAD))))
    after = snapshot(bad_world)
    return done, [p for p in before if before[p] != after.get(p)]


@pytest.mark.parametrize("line, says", BAD, ids=[b[0] for b in BAD])
def test_bad_input_ends_in_one_line(bad_runs, line, says):
    done = bad_runs[0][line]
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr


def test_bad_input_loses_and_overwrites_nothing(bad_runs):
    assert bad_runs[1] == []


def test_a_checkpoint_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    torch.save({"stage": "vqgan", "x": Evil()}, tmp_path / "evil.pt")
    for args in (["prepare.py", "--vqgan=evil.pt", "--data=."], ["vqgan.py", "--clip=evil.pt", "--data=."]):
        Image.new("RGB", (8, 8)).save(tmp_path / "p.png")
        assert "evil.pt" in command(HERE / args[0], *args[1:], cwd=tmp_path, ok=2).stderr
    assert not (tmp_path / "owned").exists()


# ------------------------------------------------------------------------------------------------------------- speed


def forced_logits(model, cond, tokens, guidance=1.0):
    """The logits (B, T, K) of cached sampling when it is made to write these tokens."""
    seen = torch.empty(*tokens.T.shape, model.cfg.codes, device=cond.device)                     # (T, B, K)

    def forced(i, logits):
        seen[i] = logits
        return tokens[:, i].flatten()
    model.decode_logits(cond, forced, guidance)
    return seen.transpose(0, 1)


@pytest.mark.parametrize("classic, guidance", [(False, 1.0), (False, 2.0), (True, 1.0)])
def test_packed_sampling_is_the_same_network(classic, guidance):
    model = tiny_gpt(classic)
    cond, tokens = model.condition(some(3, 24)), tokens_for(model, 3)
    exact = forced_logits(model, cond, tokens, guidance)
    full, half = (copy.deepcopy(model).pack(dtype) for dtype in (torch.float32, torch.bfloat16))
    assert (forced_logits(full, cond, tokens, guidance) - exact).abs().max() <= 1e-5 * exact.abs().max() * guidance
    off = (forced_logits(half, cond, tokens, guidance) - exact).norm() / exact.norm()
    assert 0 < off < 0.02 * guidance  # the tolerance of bfloat16, whose numbers have 8 bits
    for net, dtype in ((full, torch.float32), (half, torch.bfloat16)):
        packed = [m for m in net.modules() if isinstance(m, PackedLinear)]
        assert len(packed) == 4 * 3 + 2 and {m.weight.dtype for m in packed} == {dtype}
        in_c = dtype == torch.bfloat16 and kernels_cpu.compiled()
        assert all(bool(m.attend_packed) == bool(in_c) for m in net.modules() if isinstance(m, Block))
    alone, again = [torch.cat([forced_logits(net, c[None], t[None], guidance) for c, t in zip(cond, tokens)])
                    for net in (half, full)]
    assert (alone - exact).norm() < 0.02 * guidance * exact.norm()
    assert (again - exact).abs().max() <= 1e-5 * exact.abs().max() * guidance  # laid out anew for one row


@pytest.mark.skipif(not cpu_has_bfloat16(), reason="needs a CPU with bfloat16")
@pytest.mark.parametrize("gelu", [False, True])
def test_a_packed_layer_is_laid_out_for_its_rows(gelu):
    layer = (GeluLinear if gelu else torch.nn.Linear)(64, 48)
    packed = PackedLinear(layer, torch.bfloat16)
    for rows in (1, 3, 4, 5, 2, 8, 4):
        x = some(rows, 1, 64, seed=rows)
        exact = layer(x)
        assert packed(x).shape == exact.shape and (packed(x) - exact).norm() < 0.01 * exact.norm(), rows


@pytest.mark.parametrize("rows, heads, length, size", [(1, 16, 256, 64), (3, 5, 7, 9), (16, 2, 40, 36), (1, 1, 1, 1)])
def test_attention_in_c_is_torchs(rows, heads, length, size):
    if not kernels_cpu.compiled():
        pytest.skip("needs a C compiler")
    cache = some(rows, heads, 2, length, size).bfloat16()
    for now in {0, length // 2, length - 1}:
        qkv, filled = some(rows, 1, 3 * heads * size, seed=now), cache.clone()
        q, k, v = qkv.view(rows, 3, heads, size).unbind(1)
        filled[:, :, 0, now], filled[:, :, 1, now] = k, v
        keys, values = filled[:, :, :, :now + 1].float().unbind(2)
        exact = F.scaled_dot_product_attention(q[:, :, None], keys, values).reshape(rows, 1, -1)
        y = kernels_cpu.attend(qkv, cache.transpose(1, 2)[:, :, :, :now + 1])
        assert torch.equal(cache, filled) and y.shape == exact.shape and (y - exact).abs().max() < 1e-5
        assert torch.equal(y[:1], kernels_cpu.attend(qkv[:1], cache[:1].transpose(1, 2)[:, :, :, :now + 1]))
    x = 3 * some(rows, 1, heads * size)
    exact = F.gelu(x)
    assert kernels_cpu.gelu(x) is x and (x - exact).abs().max() < 1e-5
    assert torch.tensor(1e-40) * 1 > 0  # the smallest numbers are not rounded to zero from now on


@pytest.mark.parametrize("command, why", [(["no-such-compiler"], "no-such-compiler"),
                                          (["cc", "--no-such-option", "-o"], "no-such-option")])
def test_without_a_compiler_sampling_is_the_same_network(command, why, monkeypatch):
    model = tiny_gpt()
    cond, tokens = model.condition(some(3, 24)), tokens_for(model, 3)
    monkeypatch.setattr(kernels_cpu, "COMMAND", command)
    monkeypatch.setattr(kernels_cpu, "compiled", kernels_cpu.compiled.__wrapped__)
    with pytest.warns(UserWarning, match=why if shutil.which(command[0]) else command[0]):
        packed = copy.deepcopy(model).pack(torch.bfloat16)
    for guidance in 1.0, 2.0:
        exact = forced_logits(model, cond, tokens, guidance)
        off = (forced_logits(packed, cond, tokens, guidance) - exact).norm() / exact.norm()
        assert 0 < off < 0.02 * guidance


INTERPRETED = """
import contextlib, types
import torch, kernels, model, test_all
torch.set_grad_enabled(False)
kernels.early, kernels.room = lambda device: {"EARLY": False}, lambda device, numbers, size: numbers

def pack(gpt, dtype):  # as GPT.pack on a GPU
    kernels.fold(gpt)
    for module in gpt.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, test_all.PackedLinear(child, dtype))

for rows, shape in (1, {}), (3, {}), (17, {}), (2, {"n_embd": 272}), (1, {"n_embd": 36}):
    for dtype in torch.float32, torch.float16:
        gpt = test_all.tiny_gpt(**({"n_embd": 48, "n_head": 2, "n_layer": 2} | shape))
        cond, tokens = gpt.condition(test_all.some(rows, 24)), test_all.tokens_for(gpt, rows)
        exact = test_all.forced_logits(gpt, cond, tokens)
        pack(gpt, dtype)
        x, caches, made = gpt.prefix(cond), torch.zeros(2, rows, 2, 2, 16, gpt.cfg.n_embd // 2, dtype=dtype), []
        for i in range(16):
            made.append(kernels.run(gpt, x, torch.tensor([i]), caches)[:, 0])
            x = gpt.tok_emb(tokens[:, i])[:, None]
        made = torch.stack(made, 1)
        if dtype == torch.float32:
            assert (made - exact).abs().max() <= 1e-5 * exact.abs().max(), (rows, shape)
        assert (made - exact).norm() < 2e-3 * exact.norm(), (rows, shape)

for rows, k, part in (1, 64, 16), (3, 48, 16), (2, 272, 16):  # float32 as float16 goes, to the last bits
    x, weight, bias = test_all.some(rows, k), test_all.some(40, k, seed=3), test_all.some(40, seed=4)
    x, stream = x - x.mean(1, keepdim=True), test_all.some(rows, 40, seed=5)
    parts = kernels.next_power_of_2(k // part)
    described = kernels.TensorDescriptor(weight, [k // part, 40, part], [part, k, 1], [parts, 16, part])
    for norm, gelu, added in (True, False, None), (True, True, None), (False, False, stream):
        want = torch.nn.functional.linear(torch.nn.functional.layer_norm(x, (k,)) if norm else x, weight, bias)
        want = torch.nn.functional.gelu(want) if gelu else want if added is None else want + added
        y = torch.empty(rows, 40)
        kernels.launch(kernels.product, (3,), x, described, bias, y, added, 40, k, rows, parts, part, 16, norm, gelu)
        assert (y - want).abs().max() <= 1e-5 * want.abs().max() and (added is None or torch.equal(added, y))

qkv, cache = test_all.some(2, 3 * 3 * 20), test_all.some(2, 2, 3, 40, 20, seed=3)
for i in (0, 15, 16, 39):  # 40 positions, 16 at a time
    full, y = cache.clone(), torch.empty(2, 60)
    q, full[:, 0, :, i], full[:, 1, :, i] = qkv.view(2, 3, 3, 20).unbind(1)
    kernels.attention[(2, 3)](qkv, cache, torch.tensor([i]), y, 40, 3, 20, 1, 16, 32, EARLY=False)
    want = model.attend(q[:, :, None], *full[:, :, :, :i + 1].unbind(1))
    assert torch.equal(cache[:, :, :, i], full[:, :, :, i]) and torch.allclose(y, want.reshape(2, 60), atol=1e-5), i

for guidance, rows in (1.0, 3), (2.0, 6), (0.0, 6):
    b, t, codes, c = 3, 16, 100, 40
    embeddings, places = test_all.some(codes, c), test_all.some(t, c, seed=3)
    uniform, position, tokens = torch.rand(b, t), torch.zeros(b, dtype=torch.long), torch.zeros(t, b, dtype=torch.long)
    stream, x = torch.zeros(rows, c), torch.zeros(rows, c, dtype=torch.float16)
    for i in range(t):
        logits = 3 * test_all.some(rows, codes, seed=i)
        kernels.launch(kernels.choose, (b,), logits, uniform, 0.7, guidance, tokens, embeddings, places, stream, x,
                       position, b, t, codes, c, rows // b)
        mixed = logits if rows == b else logits[b:] + guidance * (logits[:b] - logits[b:])
        assert torch.equal(tokens[i], model.pick(mixed, uniform[:, i], 0.7)) and (position == i + 1).all()
        assert torch.equal(stream.view(-1, b, c)[-1], embeddings[tokens[i]] + places[min(i + 1, t - 1)])
        assert torch.equal(x, stream.half())

class Recording:  # in CUDA's place; what is recorded does not run
    def __init__(self, graph):
        pass

    def __enter__(self):
        kernels.launch, self.launch = lambda *args, **options: None, kernels.launch

    def __exit__(self, *problem):
        kernels.launch = self.launch

torch.cuda.Stream = torch.cuda.current_stream = lambda *device: types.SimpleNamespace(wait_stream=lambda other: None)
torch.cuda.stream, torch.cuda.CUDAGraph = lambda stream: contextlib.nullcontext(), types.SimpleNamespace
torch.cuda.graph = Recording
for guidance in (1.0, 2.0):
    gpt = test_all.tiny_gpt(n_layer=2)
    cond, uniform = gpt.condition(test_all.some(3, 24)), torch.rand(3, 16, generator=torch.Generator().manual_seed(3))
    exact = gpt.generate(cond, uniform, guidance, 0.7)
    pack(gpt, torch.float32)

    def capture(*args):
        kept = kernels.capture(*args).__defaults__[0]  # the token that a graph would replay
        return lambda i: kept()
    gpt.capture = capture
    assert torch.equal(gpt.generate(cond, uniform, guidance, 0.7), exact) and gpt.capture
"""


def test_kernels_for_a_gpu_compute_the_same_network():
    """By Triton's interpreter, which needs no GPU."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", INTERPRETED], cwd=HERE,
                          env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert not done.returncode, done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float16, 5e-3), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("rows, guidance, shape", [(1, 1.0, {}), (1, 2.0, {}), (3, 1.0, {}), (3, 2.0, {}),
                                                   (8, 2.0, {}), (9, 2.0, {}), (2, 1.0, {"n_embd": 36}),
                                                   (1, 2.0, {"n_embd": 272, "n_head": 2, "codes": 100}),
                                                   (1, 2.0, {"n_embd": 128, "n_head": 2, "grid": 18}),
                                                   (1, 1.0, {"n_embd": 1024, "n_head": 16, "n_layer": 8})])
def test_sampling_on_a_gpu_is_the_same_network(rows, guidance, shape, dtype, tolerance):
    pytest.importorskip("triton")
    model = tiny_gpt(**shape).to("cuda")
    cond, tokens = model.condition(some(rows, 24).cuda()), tokens_for(model, rows).cuda()
    exact = forced_logits(model, cond, tokens, guidance)
    packed = copy.deepcopy(model).pack(dtype)
    for _ in range(2):  # the second time nothing is compiled any more
        off = (forced_logits(packed, cond, tokens, guidance) - exact).norm() / exact.norm()
        assert off < tolerance * guidance
    assert packed.capture  # has not failed
    uniform = torch.rand(rows, model.cfg.grid ** 2, generator=torch.Generator().manual_seed(3)).cuda()
    for options in {}, {"top_k": 20, "top_p": 0.9}:  # by `choose`, and as it stands
        made, capture = packed.generate(cond, uniform, guidance, 0.7, **options), packed.capture
        packed.capture = None
        same = (made == packed.generate(cond, uniform, guidance, 0.7, **options)).float()
        packed.capture = capture
        assert same.min() == 1 if dtype == torch.float32 else same[:, 0].mean() > 0.5


def test_where_kernels_fail_sampling_goes_on_without():
    model, uniform = tiny_gpt(), torch.rand(3, 16, generator=torch.Generator().manual_seed(3))
    cond = model.condition(some(3, 24))
    exact = model.generate(cond, uniform, guidance=2.0)

    def failing(gpt, step, *others):
        step(0)
        raise RuntimeError("no such kernel")
    model.capture = failing
    with pytest.warns(UserWarning, match="no such kernel"):
        assert torch.equal(model.generate(cond, uniform, guidance=2.0), exact)
    assert model.capture is None


def test_reading_ahead_changes_no_batch(tmp_path):
    write_dump(tmp_path / "d")
    tokens, clip = train_gpt.open_dump(tmp_path / "d")[1]["train"]
    cfg = train_gpt.Config(batch_size=16)
    on_disk = train_gpt.make_batches(tokens, clip, cfg)
    in_memory = train_gpt.make_batches(np.array(tokens), np.array(clip), cfg)
    all_ahead = train_gpt.make_batches(tokens, clip, cfg, idle=True)
    for step in (0, 1, 2, 2, 5, 11, 3, 4):  # in order, again, within what is read ahead and beyond, and back
        assert all(torch.equal(a, b) and torch.equal(a, c)
                   for a, b, c in zip(on_disk(step), in_memory(step), all_ahead(step)))


def resident():
    """Bytes of memory that belong to this process alone."""
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def grows(tmp_path, steps):
    """How many bytes memory grows over that many batches, after a tenth as many."""
    write_dump(tmp_path / "d")
    batch = train_gpt.make_batches(*train_gpt.open_dump(tmp_path / "d")[1]["train"], train_gpt.Config(batch_size=2))
    for step in range(steps // 10):
        batch(step)
    before = resident()
    for step in range(steps // 10, steps):
        batch(step)
    return resident() - before


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_is_flat_over_batches(tmp_path):
    assert grows(tmp_path, 5000) < 2 ** 20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_does_not_come_to_the_size_of_the_dump(tmp_path):
    """All of a 96 MiB dump is read, and its pages handed back (the thread that reads ahead holds some for a moment)."""
    arrays = []
    for name, dtype in (("tokens", np.uint16), ("clip", np.float16)):
        np.ones((2 ** 16, 384), dtype).tofile(tmp_path / name)
        arrays.append(np.memmap(tmp_path / name, dtype, "r", shape=(2 ** 16, 384)))

    def pages():  # those of mapped files too
        return int(Path("/proc/self/statm").read_text().split()[1])
    batch, before = train_gpt.make_batches(*arrays, train_gpt.Config(batch_size=256)), pages()
    for step in range(2 ** 16 // 256):
        batch(step)
    assert any((pages() - before) * os.sysconf("SC_PAGE_SIZE") < 16 * 2 ** 20 for _ in range(10 ** 5))


@slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_slow_memory_is_flat_over_100_000_batches(tmp_path):
    assert grows(tmp_path, 100_000) < 2 ** 20


@slow
def test_slow_memory_is_flat_over_a_million_rows_prepared(tmp_path):
    """A hundred times the rows, through networks that cost next to nothing, want no more memory: neither prepare.py nor
    its workers."""
    for n in (100, 10_000):
        (tmp_path / str(n)).mkdir()
        for i in range(n):
            Image.new("RGB", (20, 16), (i % 256, i // 256, 99)).save(tmp_path / f"{n}/{i}.png")
    command(HERE / "vqgan.py", "--data=100", "--out=vqgan", "--image_size=16", "--patch=16", "--ch=8", "--ch_mult=1",
            "--z_channels=8", "--codes=64", "--vq_start=0", "--perceptual=0", "--max_steps=1", cwd=tmp_path)
    clip = common.clip_package()[0].CLIP(16, 16, 1, 64, 16, 24, 49408, 64, 1, 1)
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    most = []
    for n in (100, 10_000):
        child = subprocess.Popen([sys.executable, HERE / "prepare.py", f"--data={n}", f"--out=rows{n}", "--crops=103",
                                  "--chunk=25", "--vqgan=vqgan/vqgan.pt", "--clip=clip.pt"], cwd=tmp_path,
                                 stdout=subprocess.DEVNULL)
        assert os.waitstatus_to_exitcode((ended := os.wait4(child.pid, 0))[1]) == 0
        most.append(ended[2].ru_maxrss * 1024)  # of itself and its finished workers, the largest
    assert json.loads((tmp_path / "rows10000/meta.json").read_text())["train_rows"] > 1_000_000
    assert most[1] - most[0] < 16 * 2 ** 20, most


def test_bench_times_sampling_and_refuses_unknown_parts(tmp_path, capsys):
    import bench
    cfg = bench.Config(n_layer=2, n_head=4, n_embd=64, grid=4, codes=48, batch=2)
    peak = {"products": 1e11, "convolutions": 1e11}
    limit = {"device": "cpu", "dtype": "float32", "read": 1e10, "float32": peak, "bfloat16": peak}
    rows = {r["what"]: r for r in bench.sample(dataclasses.replace(cfg, device="cpu", dtype="float32"), limit)}
    for b in (1, 2):
        assert 0 < rows[f"sampling, batch {b}, float32"]["share"] < 1.5
        assert rows[f"sampling, no cache, batch {b}, float32"]["rate"] > 0
    assert "sampling" in capsys.readouterr().out
    assert "there is no part dance" in command(HERE / "bench.py", "--parts=gpt,dance", cwd=tmp_path, ok=2).stderr


def test_bench_makes_its_data_where_no_other_lies(tmp_path):
    import bench
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine").write_text("precious")
    for _ in range(2):
        bench.make_data(bench.Config(out=str(tmp_path), jpegs=1), {"device": "cpu"})
    assert (tmp_path / "data/mine").exists() and len(list(tmp_path.iterdir())) == 2


@slow
def test_slow_ablations_in_miniature(world, tmp_path):
    d, _ = world
    args = [HERE / "ablate.py", "--only=noise 2,2 crops,256 codes,guidance 6", "--seeds=2", "--max_steps=20", "--n=1",
            "--vqgan_steps=160", f"--out={tmp_path}/ablations"]
    said = command(*args, cwd=d, limit=900).stdout
    runs = json.loads((tmp_path / "ablations/ablations.json").read_text())["runs"]
    names = ["reference", "noise 2", "2 crops a picture", "256 codes", "guidance 6 when sampling"]
    assert sorted({(r["name"], r["seed"]) for r in runs}) == sorted((n, s) for n in names for s in (0, 1))
    assert all(math.isfinite(r["val_loss"]) and 0 <= r["both"] <= 1 and r["frechet"] > 0 for r in runs)
    assert next(r["steps"] for r in runs if r["name"] == "reference") == 20
    assert (tmp_path / "ablations/noise.png").stat().st_size > 0
    table = (tmp_path / "ablations/ablations.md").read_text()
    assert table.count("\n") == 7 and table in said
    one, other = ([r for r in runs if r["name"] == n and r["seed"] == 1][0] for n in (names[0], names[-1]))
    assert one["val_loss"] == other["val_loss"] and one["frechet"] != other["frechet"]  # one training, drawn from twice
    assert command(*args, cwd=d).stdout.endswith(table)  # finished runs are kept


@slow
def test_slow_bench_in_miniature(tmp_path):
    command(HERE / "bench.py", "--n_layer=2", "--n_head=4", "--n_embd=64", "--grid=4", "--codes=64", "--batch=2",
            "--pixels=32", "--pictures=1", "--jpegs=32", "--mib=4", cwd=tmp_path)
    rows = json.loads((tmp_path / "out/bench/bench.json").read_text())["rows"]
    assert all(any(r["what"].startswith(w) for r in rows) for w in
               ("limits", "sampling", "GPT step", "VQGAN step", "prepare", "batches"))
    assert all(r["rate"] > 0 and (r["share"] or 1) > 0 for r in rows)


if __name__ == "__main__":
    sys.exit(pytest.main(["-q", __file__]))
