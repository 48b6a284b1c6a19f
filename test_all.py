"""What each part of the reading path promises, in reading order: model.py, vqgan.py, prepare.py,
train_gpt.py, sample.py, and all of them after each other. The other tests are in tests/, by topic.

    python -m pytest -q test_all.py                 everything here
    python -m pytest -q test_all.py -k "not world"  the parts alone, in seconds

Equalities of networks are tested after every zero-initialised tensor has been filled with noise, so
that none holds because something is zero. The last tests use a `world` of a few dozen drawings that
went through every stage by its command line (tests/helpers.py)."""
import itertools
import json
import math
import re
import shlex
import sys
import tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import prepare
import sample
import toy
import train_gpt
import vqgan
from common.checkpoints import load_gpt, load_vqgan
from common.clip_loss import embedding_loss
from common.dumps import open_dump
from common.files import hash_state
from common.images import crop, open_image, to_tensor
from common.modality import (
    GENERIC,
    gap_noise,
    measure_gap,
    neighbour_spread,
    shrinkage,
    text_mean,
)
from common.openai_clip import load_clip
from common.optim import learning_rate, newton_schulz
from common.options import parse_options
from common.perceptual import perceptual_distance
from common.sources import ImageSource, split_names
from model import Discriminator, GPTConfig, Quantizer, hinge_loss, sample_token
from tests.helpers import (
    DUMP_FILES,
    GPT_OPTIONS,
    PREPARE_OPTIONS,
    VQGAN_OPTIONS,
    cached_logits,
    fill_constants,
    is_finite,
    load_raw,
    one_line_error,
    plain_logits,
    rand,
    randn,
    random_dump,
    read_log,
    run_stage,
    run_stages,
    save_checkpoint,
    stage_error,
    tiny_gpt,
    tiny_vqgan,
    tokens_for,
)

# ================================================================================ model.py: VQGAN


def test_quantiser_loss_and_gradients_by_hand():
    q = Quantizer(3, 2, l2_norm=False)
    q.embedding.weight.data = torch.tensor([[0.0, 0.0], [1.0, 1.0], [3.0, -1.0]])
    z = torch.tensor([[0.9, 1.3], [2.0, -1.0]])           # two vectors, nearest to codes 1 and 2
    z = z.T.reshape(1, 2, 1, 2).requires_grad_()
    codes, loss, tokens = q(z, beta=0.25)
    assert tokens.flatten().tolist() == [1, 2]
    assert torch.allclose(codes.detach()[0, :, 0].T, q.embedding.weight.data[[1, 2]])
    # squared distances .1^2 + .3^2 and 1^2, a mean over four numbers: once for the codes, and beta
    # times for the encoder
    assert loss.item() == pytest.approx(1.25 * (0.01 + 0.09 + 1.0) / 4)

    weight = torch.tensor([[2.0, 5.0], [-1.0, 3.0]]).T.reshape(1, 2, 1, 2)
    ((codes * weight).sum() + loss).backward()
    z_minus_e = torch.tensor([[-0.1, 0.3], [-1.0, 0.0]]).T.reshape(1, 2, 1, 2)
    straight_through_and_commitment = weight + 0.25 * 2 * z_minus_e / 4
    assert torch.allclose(z.grad, straight_through_and_commitment, atol=1e-6)
    codebook_grad = torch.tensor([[0, 0], [0.1, -0.3], [1.0, 0]]) * 2 / 4
    assert torch.allclose(q.embedding.weight.grad, codebook_grad, atol=1e-6)


@pytest.mark.parametrize("l2_norm", [False, True])
def test_nearest_codes_equal_brute_force_in_float64(l2_norm):
    q = Quantizer(200, 8, l2_norm)
    q.embedding.weight.data = randn(200, 8, seed=6)
    z = randn(3000, 8, seed=7)
    tokens = q.nearest(q.to_unit(z))
    codebook = q.to_unit(q.embedding.weight.detach()).double()
    distances = (q.to_unit(z).double()[:, None] - codebook[None]).square().sum(-1)
    assert torch.equal(tokens, distances.argmin(1))
    assert len(tokens.unique()) > 100


def test_encode_and_decode_agree_with_forward_and_gradients_flow():
    model = fill_constants(tiny_vqgan()).eval()
    model.quantize.embedding.weight.data.normal_()
    x = randn(2, 3, 16, 16)
    recon, loss, tokens, z = model(x)
    assert torch.equal(model.encode(x), tokens)
    assert tokens.shape == (2, 4, 4) and z.shape == (32, 8)
    assert torch.allclose(model.decode(tokens), recon, atol=1e-5)

    (recon.square().mean() + loss).backward()
    grads = {n: p.grad for n, p in model.named_parameters()
             if not n.endswith("k.bias")}                # a key's bias changes nothing
    assert all(g is not None and g.abs().sum() > 0 for g in grads.values())

    for changes in ({"patch": 1}, {"patch": 4, "image_size": 32}, {"l2_norm": False}):
        other = tiny_vqgan(**changes)
        x = randn(1, 3, other.cfg.image_size, other.cfg.image_size)
        assert other(x)[0].shape == x.shape
        assert other(x, quantized=False)[2] is None


def test_kmeans_finds_clusters_and_dead_codes_restart():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[5.0, 0], [0, 5.0], [-5.0, 0], [0, -5.0]])
    z = (centres[:, None] + 0.01 * randn(4, 50, 2)).flatten(0, 1)
    q = Quantizer(16, 2, l2_norm=False)
    q.kmeans(z, generator)
    codes = q.lookup(q.nearest(z).view(1, 1, -1))[0, :, 0].T
    assert (z - codes).norm(dim=1).max() < 0.1

    q.embedding.weight.data[3] = 1e6                      # nothing is near it
    for _ in range(400):
        counts = torch.ones(16)
        counts[3] = 0
        dead = q.count_hits(counts)
        if len(dead):
            break
    assert dead.tolist() == [3]
    q.restart(dead, z, generator)
    assert q.embedding.weight[3].abs().max() < 6 and q.usage[3] == 1


def test_discriminator_and_hinge_loss():
    assert Discriminator()(randn(2, 3, 64, 64)).shape[:2] == (2, 1)
    loss = hinge_loss(torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 1.0]))
    assert loss.item() == pytest.approx(0.5 * (0.5 + 1.0))


# ================================================================================== model.py: GPT


@pytest.mark.parametrize("n_prefix", [1, 2])
def test_first_loss_is_ln_k(n_prefix):
    """With the head at zero all K codes are equally likely, whatever the condition."""
    model = tiny_gpt(fill=False, n_prefix=n_prefix)
    drop = torch.tensor([True, False, False, True, False])
    loss = model.loss(model.condition(randn(5, 24)), tokens_for(model, 5), drop)
    assert loss.item() == pytest.approx(math.log(48), abs=1e-5)


@pytest.mark.parametrize("classic, n_prefix", [(False, 1), (True, 1), (False, 2)])
def test_a_later_token_never_changes_an_earlier_logit(classic, n_prefix):
    model, cond = tiny_gpt(classic, n_prefix=n_prefix), randn(2, 24)
    tokens = tokens_for(model, 2)[:, :-1]
    before = model(cond, tokens)
    assert before.shape == (2, 16, 48)
    for i in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[:, i] = (changed[:, i] + 7) % 48
        after = model(cond, changed)
        assert torch.equal(before[:, :i + 1], after[:, :i + 1])
        assert not torch.allclose(before[:, i + 1], after[:, i + 1], atol=1e-4)  # the next changes


@pytest.mark.parametrize("n_prefix", [1, 2])
@pytest.mark.parametrize("classic, guidance", [(False, 1.0), (False, 2.0), (False, 5.0),
                                               (True, 1.0)])
def test_cached_logits_equal_uncached(classic, guidance, n_prefix):
    """Position by position behind a cache, the logits are those of forward on everything."""
    model = tiny_gpt(classic, n_prefix=n_prefix)
    cond, tokens = model.condition(randn(3, 24)), tokens_for(model, 3)
    cached = cached_logits(model, cond, tokens, guidance)                # (B, T, K)
    plain = plain_logits(model, cond, tokens, guidance)
    assert (cached - plain).abs().max() <= 1e-5 * plain.abs().max() * max(1, 2 * guidance)
    assert plain.std() > 0.05


def generate_plainly(model, cond, uniform, guidance, *options):
    """GPT.generate without a cache: forward on all tokens so far, and null rows beside it."""
    tokens = torch.empty(len(cond), 0, dtype=torch.long)
    for i in range(uniform.shape[1]):
        logits = model(cond, tokens)[:, -1]
        if guidance != 1:
            null = model(cond, tokens, drop=torch.ones(len(cond), dtype=torch.bool))[:, -1]
            logits = null + guidance * (logits - null)
        token = sample_token(logits, uniform[:, i], *options)
        tokens = torch.cat([tokens, token[:, None]], 1)
    return tokens


@pytest.mark.parametrize("n_prefix", [1, 2])
@pytest.mark.parametrize("classic, guidance", [(False, 1.0), (False, 3.0), (True, 1.0)])
def test_generate_is_a_plain_loop_over_forward(classic, guidance, n_prefix):
    model = tiny_gpt(classic, n_prefix=n_prefix)
    cond, uniform = model.condition(randn(4, 24)), rand(4, 16)
    for options in ((0.0, 0, 1.0), (0.9, 20, 0.9)):
        tokens = model.generate(cond, uniform, guidance, *options)
        assert torch.equal(tokens, generate_plainly(model, cond, uniform, guidance, *options))
    assert len(tokens.unique()) > 5


def test_guidance_one_is_plain_conditional_sampling():
    model = tiny_gpt()
    cond, uniform = model.condition(randn(4, 24)), rand(4, 16, seed=5)
    tokens = model.generate(cond, uniform, 1.0, 0.9, 20, 0.9)
    model.null.data += 1                                  # so it is not looked at
    assert torch.equal(tokens, model.generate(cond, uniform, 1.0, 0.9, 20, 0.9))
    assert torch.equal(tokens, generate_plainly(model, cond, uniform, 1.0, 0.9, 20, 0.9))
    assert not torch.equal(tokens, model.generate(cond, uniform, 4.0, 0.9, 20, 0.9))


def test_zero_init_is_a_start_and_no_other_network():
    """Each block starts as the identity; without, the last layers start as the others do."""
    zero, other = tiny_gpt(fill=False), tiny_gpt(fill=False, zero_init=False)
    x = randn(2, 5, 64)
    assert torch.equal(zero.blocks[0](x), x)
    assert not torch.allclose(other.blocks[0](x), x, atol=0.1)
    assert not zero.head.weight.any() and other.head.weight.std() > 0.05
    other.load_state_dict(zero.state_dict())
    assert torch.equal(other.blocks[0](x), x)


def test_classic_refuses_guidance_and_takes_the_raw_embedding():
    model = tiny_gpt(classic=True)
    model.means.fill_(0.3)
    embedding = randn(2, 24)
    assert torch.allclose(model.condition(embedding), F.normalize(embedding, dim=-1))
    with pytest.raises(AssertionError):
        model.generate(embedding, torch.zeros(2, 16), guidance=2.0)


@pytest.mark.parametrize("n_prefix", [1, 2])
def test_dropped_rows_reach_the_null_embedding_only(n_prefix):
    model = tiny_gpt(n_prefix=n_prefix)
    cond = model.condition(randn(4, 24)).requires_grad_()
    drop = torch.tensor([True, False, True, False])
    model.loss(cond, tokens_for(model, 4), drop).backward()
    assert model.null.grad.abs().sum() > 0
    assert torch.all(cond.grad[drop] == 0) and torch.all(cond.grad[~drop].abs().sum(1) > 0)


def test_condition_centres_and_adds_noise_of_the_length_asked_for():
    model, unit = tiny_gpt(), F.normalize(randn(3, 24), dim=-1)
    model.means.copy_(F.normalize(randn(2, 24, seed=9), dim=-1) * 0.5)
    for row, modality in enumerate(("image", "text")):
        centred = F.normalize(unit - model.means[row], dim=-1)
        assert torch.allclose(model.condition(7 * unit, modality), centred, atol=1e-6)
    model.shrink.copy_(torch.diag(torch.arange(24.0)))    # of texts alone
    images = F.normalize(unit - model.means[0], dim=-1)
    assert torch.allclose(model.condition(unit), images, atol=1e-6)
    shrunk = F.normalize(centred * torch.arange(24.0), dim=-1)
    assert torch.allclose(model.condition(unit, "text"), shrunk, atol=1e-6)
    assert torch.equal(model.condition(unit, "text")[1:2], model.condition(unit[1:2], "text"))
    clean, noise = model.condition(unit), 0.5 * F.normalize(randn(3, 24, seed=4), dim=-1)
    noisy = model.condition(unit, noise=noise)
    assert torch.allclose(noisy, F.normalize(clean + noise, dim=-1), atol=1e-6)


def test_two_prefix_tokens_are_both_read():
    """Each is a projection of its own, and the first token's logits depend on both."""
    model = tiny_gpt(n_prefix=2)
    cond, tokens = model.condition(randn(3, 24)), tokens_for(model, 3)[:, :-1]
    prefix = model.prefix(cond)
    assert prefix.shape == (3, 2, 64) and not torch.allclose(prefix[:, 0], prefix[:, 1], atol=0.1)
    assert model.pos_emb.shape == (2 + 15, 64)
    before = model(cond, tokens)[:, 0]
    for rows in (slice(0, 64), slice(64, 128)):
        other = tiny_gpt(n_prefix=2)
        other.cond_proj.weight.data[rows] += randn(64, 24) / 10
        assert not torch.allclose(other(cond, tokens)[:, 0], before, atol=1e-4)


def test_dropout_zero_is_none_and_more_is_for_training_alone():
    plain, dropped = tiny_gpt(dropout=0.0), tiny_gpt(dropout=0.1)
    dropped.load_state_dict(plain.state_dict())
    cond, tokens = plain.condition(randn(3, 24)), tokens_for(plain, 3)
    expected = plain.loss(cond, tokens)                   # of a network in eval mode
    assert dropped.loss(cond, tokens) == expected
    state = torch.get_rng_state()
    assert plain.train().loss(cond, tokens) == expected
    assert torch.equal(torch.get_rng_state(), state)      # not one random number was drawn
    losses = [dropped.train().loss(cond, tokens).item() for _ in range(2)]
    assert losses[0] != losses[1] and expected.item() not in losses


def test_normalised_queries_and_keys_forget_their_lengths():
    model = tiny_gpt(qk_norm=True)
    cond, tokens = model.condition(randn(3, 24)), tokens_for(model, 3)
    plain = plain_logits(model, cond, tokens, 1.0)
    assert (cached_logits(model, cond, tokens, 1.0) - plain).abs().max() <= 1e-5 * plain.abs().max()
    c, block = model.cfg.n_embd, model.blocks[0]
    with torch.no_grad():
        block.qkv.weight[:c] *= 7                         # queries
        block.qkv.bias[:c] *= 7
        scaled = plain_logits(model, cond, tokens, 1.0)
        block.qk_gain[0] *= 2
        sharper = plain_logits(model, cond, tokens, 1.0)
    assert torch.allclose(scaled, plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(sharper, plain, rtol=1e-2, atol=1e-2)


def test_sample_token_follows_the_probabilities_it_keeps():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    uniform = (torch.arange(10000) + 0.5) / 10000

    def shares(**options):
        tokens = sample_token(logits.expand(10000, -1), uniform, **options)
        return torch.bincount(tokens, minlength=4) / 10000
    two = F.softmax(torch.tensor([-1e9, 3.0, 2.0, -1e9]), -1)
    assert torch.allclose(shares(), logits.softmax(-1)[0], atol=2e-4)
    assert torch.allclose(shares(temperature=0.5), (logits * 2).softmax(-1)[0], atol=2e-4)
    assert torch.allclose(shares(top_k=2), two, atol=2e-4)
    assert torch.allclose(shares(top_p=0.7), two, atol=2e-4)  # the likeliest holds .65 < .7
    assert shares(top_p=0.5)[1] == 1 and shares(top_k=1)[1] == 1
    assert shares(temperature=0)[1] == 1 and shares(temperature=1e-300)[1] == 1
    assert shares(top_p=0.0)[1] == 1                      # the likeliest always stays


# ============================================================================ stage 1: vqgan.py


def test_perceptual_distance_is_that_of_unit_features():
    a = [randn(2, 8, 5, 5, seed=1), randn(2, 7, 8, seed=2)]   # of a ResNet (channels in dimension
    b = [randn(2, 8, 5, 5, seed=3), randn(2, 7, 8, seed=4)]   # 1) and a ViT (channels last)
    squares = [(F.normalize(x, dim=d) - F.normalize(y, dim=d)).square().sum(d).mean()
               for x, y, d in zip(a, b, (1, 2))]
    distance = perceptual_distance(a, b).item()
    assert distance == pytest.approx((sum(squares) / 2).item(), rel=1e-5)
    assert abs(perceptual_distance(a, a).item()) < 1e-6
    dark = [torch.zeros_like(x, requires_grad=True) for x in b]   # as behind a ReLU
    perceptual_distance(a, dark).backward()
    assert all(x.grad.isfinite().all() for x in dark)


def test_learning_rate_curve():
    lr = [learning_rate(step, 1.0, 10, 100) for step in range(101)]
    assert lr[0] == 0.1 and lr[9] == lr[10] == 1.0
    assert lr[55] == pytest.approx(0.5) and lr[100] == pytest.approx(0)


def test_newton_schulz_is_the_plain_iteration_in_float64():
    """On the short side, all matrices of one such side at once, it gives what plain steps give."""
    stacks = [randn(n, *shape) for n, shape in ((3, (5, 30)), (1, (30, 5)), (2, (16, 16)),
                                                (1, (16, 40)))]
    results = newton_schulz(stacks)
    assert [x.shape for x in results] == [x.shape for x in stacks]
    for x, result in zip(stacks, results):
        y = x.double() / (x.double() @ x.double().mT).norm(dim=(1, 2), keepdim=True).sqrt()
        for _ in range(3):
            a = y @ y.mT
            y = 3.4445 * y - 4.7750 * a @ y + 2.0315 * a @ a @ y
        assert (result - y).abs().max() < 1e-4
        singular_values = torch.linalg.svdvals(result)
        assert singular_values.max() < 1.3 and singular_values.median() > 0.6


# =========================================================================== stage 2: prepare.py


def test_text_mean_is_of_phrases_that_suit_the_images():
    """Three phrases, images that fit the first two, one three times as often: so they weigh."""
    phrases, images = torch.eye(4)[:3], torch.eye(4)[[0, 0, 0, 1]]
    weighted = text_mean(phrases, images, 1000.0)
    assert torch.allclose(weighted, torch.tensor([0.75, 0.25, 0, 0]))
    plain = text_mean(phrases, images, 0.0)
    assert torch.allclose(plain, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]))


def test_noise_fits_the_gap():
    """Half of the noise that has the cosine of an image to the nearest phrase, both centred."""
    c, u = F.normalize(randn(2, 1000, 512), dim=-1)       # far from a right angle to none
    for cosine in (0.3, 0.576, 0.9):
        moved = F.normalize(c + 2 * gap_noise(cosine) * u, dim=-1)
        assert abs((moved * c).sum(1).mean() - cosine) < 0.01
    assert gap_noise(0.576) == 0.71 and gap_noise(1) == 0  # the demo's; no gap at all
    assert gap_noise(-0.2) == gap_noise(0.1) == 4.97       # never endless
    assert gap_noise(None) == 0.5                          # a dump that does not say


def test_gap_is_measured_between_centred_embeddings():
    """Images e_i + a, phrases e_i + b: the means are a and b, so nothing but a constant is between
    them, and the nearest phrase is an image's own."""
    a, b = torch.zeros(2, 99)
    a[97], b[98] = 1, 2
    images, phrases = torch.eye(99)[:96] + a, torch.eye(99)[:96] + b
    clip = SimpleNamespace(encode_text=lambda texts: phrases,
                           model=SimpleNamespace(logit_scale=torch.tensor(0.0)))
    text, cosine, line = measure_gap(clip, images, images.mean(0))
    assert (text - phrases.mean(0)).norm() < 1e-3 and cosine > 0.999
    assert "gap: 2.236 " in line and "nearest phrase 1.000, centred 1.000, " in line
    assert "--noise=0.0" in line or "--noise=0.01" in line


def test_shrinkage_is_the_wiener_filter_of_the_image_conditions():
    """Images that vary along eight of 24 axes: an axis of theirs keeps (1/8) / (1/8 + 1/24) of a
    text, all others nothing, and texts that random vectors moved are nearer to their images."""
    model, images = tiny_gpt(), np.zeros((4000, 24), np.float16)
    images[:, :8] = randn(4000, 8).numpy()
    model.means.zero_()
    m = shrinkage(model, images)
    assert torch.allclose(m, torch.diag(torch.tensor([0.75] * 8 + [0.0] * 16)), atol=0.02)
    assert torch.allclose(shrinkage(model, images, max_rows=1000), m, atol=0.05)
    clean = model.condition(torch.from_numpy(images[:500]))
    moved = F.normalize(clean + 1.6 * F.normalize(randn(500, 24, seed=7), dim=-1), dim=-1)
    model.shrink.copy_(m)
    before, after = ((x * clean).sum(1).mean() for x in (moved, model.condition(moved, "text")))
    assert before < 0.55 and after > before + 0.15


def test_a_checkpoint_without_shrinkage_loads():
    model = tiny_gpt()
    weights = model.state_dict()
    model.shrink.fill_(7)
    model.load_state_dict({k: v for k, v in weights.items() if k != "shrink"})
    assert torch.equal(model.shrink, torch.eye(24))


def test_generic_phrases_are_no_captions_and_no_prompts():
    """Nor does one name an object, a colour or a background of the toy world."""
    names = {*toy.OBJECTS, *toy.COLOURS, *toy.BACKGROUNDS}
    assert not names & {word for phrase in GENERIC for word in phrase.split()}
    captions = set()
    for c, o, b, s in itertools.product(toy.COLOURS, toy.OBJECTS, toy.BACKGROUNDS, toy.SIZES):
        captions |= {t.format(colour=c, object=o, background=b, size=s) for t in toy.CAPTIONS}
    assert len(set(GENERIC)) == len(GENERIC)
    assert not captions & set(GENERIC)
    prompts = pytest.importorskip("lab.prompts").toy_prompts()[1]
    assert not set(prompts) & set(GENERIC)


# ========================================================================= stage 3: train_gpt.py


def test_dump_round_trip_and_batches_are_functions_of_seed_and_step(tmp_path):
    files = random_dump(tmp_path / "d")
    meta, arrays = open_dump(tmp_path / "d")
    for split in ("train", "val"):
        assert np.array_equal(arrays[split][0], files[f"{split}_tokens.bin"])
        assert np.array_equal(arrays[split][1], files[f"{split}_clip.bin"])

    cfg = train_gpt.Config(batch_size=16, noise=0.5)
    one, two = (train_gpt.make_batches(*arrays["train"], cfg) for _ in range(2))
    batches = [one(step) for step in range(12)]
    for step in (11, 4, 7):                               # a reader that starts anywhere
        assert all(torch.equal(a, b) for a, b in zip(batches[step], two(step)))
    epochs = torch.cat([targets for targets, *_ in batches])[:150].view(3, 50, 16)
    rows = sorted(map(tuple, files["train_tokens.bin"].tolist()))
    for epoch in epochs:                                  # every row once an epoch
        assert sorted(map(tuple, epoch.tolist())) == rows
    assert not torch.equal(epochs[0], epochs[1])

    other_cfg = train_gpt.Config(batch_size=16, noise=0.5, seed=1)
    other = train_gpt.make_batches(*arrays["train"], other_cfg)(0)
    targets, inputs, embeds, noise, drop = batches[0]
    assert not torch.equal(other[0], targets) and not torch.equal(other[3], noise)
    assert torch.allclose(noise.norm(dim=1), torch.tensor(0.5))
    assert not torch.equal(noise, batches[1][3])          # new every step
    assert not torch.equal(drop, batches[4][4])


def test_reading_ahead_changes_no_batch(tmp_path):
    random_dump(tmp_path / "d")
    tokens, clip_embeds = open_dump(tmp_path / "d")[1]["train"]
    cfg = train_gpt.Config(batch_size=16, noise=0.5)
    on_disk = train_gpt.make_batches(tokens, clip_embeds, cfg)
    in_memory = train_gpt.make_batches(np.array(tokens), np.array(clip_embeds), cfg)
    in_thread = train_gpt.make_batches(tokens, clip_embeds, cfg, in_thread=True)
    # in order, again, within what is read ahead and beyond, and back
    for step in (0, 1, 2, 2, 5, 11, 3, 4):
        assert all(torch.equal(a, b) and torch.equal(a, c)
                   for a, b, c in zip(on_disk(step), in_memory(step), in_thread(step)))


def test_a_tenth_of_the_input_tokens_are_another_images():
    tokens = np.arange(64 * 16, dtype=np.uint16).reshape(64, 16)   # token t of image r is 16 r + t
    embeds = np.ones((64, 8), np.float16)

    def batch(share):
        cfg = train_gpt.Config(batch_size=640, noise=0.5, token_corruption=share)
        return train_gpt.make_batches(tokens, embeds, cfg)(0)[:2]
    targets, inputs = batch(0.1)
    assert 0.08 < (targets != inputs).float().mean() < 0.12
    assert torch.equal(targets % 16, inputs % 16)         # at its own place in the image
    targets, inputs = batch(0.0)
    assert torch.equal(targets, inputs)


def test_the_loss_is_of_the_true_tokens_behind_corrupted_inputs():
    model = tiny_gpt()
    cond, targets = model.condition(randn(2, 24)), tokens_for(model, 2)
    assert model.loss(cond, targets, inputs=targets) == model.loss(cond, targets)
    inputs = targets.clone()
    inputs[:, -1] = (inputs[:, -1] + 1) % 48              # nothing comes behind the last
    assert model.loss(cond, targets, inputs=inputs) == model.loss(cond, targets)
    inputs[:, 5] = (inputs[:, 5] + 1) % 48
    logits = model(cond, inputs[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert model.loss(cond, targets, inputs=inputs) == loss != model.loss(cond, targets)


def test_spread_is_that_of_neighbours_not_of_all():
    """Twenty far clusters, each a little stretched along one axis: the noise has that stretch, not
    the clusters'."""
    model = tiny_gpt()
    centres = np.linalg.qr(randn(24, 24).double().numpy())[0][:20]
    stretch = np.full(24, 0.01)
    stretch[3] = 0.1
    rows = centres.repeat(200, 0) + stretch * randn(4000, 24, seed=5).double().numpy()
    rows = rows.astype(np.float32)
    root = neighbour_spread(model, rows, seed=0, neighbours=0.04)
    covariance = (root.T @ root).numpy()
    assert np.allclose(covariance, covariance.T) and covariance.argmax() == 3 * 24 + 3
    assert 0.2 * 0.01 < covariance[3, 3] < 0.01 and np.trace(covariance) < 2 * 0.01
    assert neighbour_spread(model, rows[:1], seed=0).isfinite().all()

    cfg = train_gpt.Config(batch_size=4000, noise=0.0, spread=2.0)
    batches = train_gpt.make_batches(np.zeros((9, 16), np.uint16), rows[:9].astype(np.float16), cfg,
                                     root)
    noise = batches(0)[3].numpy()
    assert np.allclose(noise.T @ noise / 4000, 4 * covariance, atol=0.3 * 4 * 0.01)


def test_embedding_loss_by_hand_and_its_gradient():
    """Confident logits: 1 - cosine of the image that those tokens give; unsure ones get a gradient.
    """
    gpt, vq = tiny_gpt(codebook_size=32), tiny_vqgan().requires_grad_(False).eval()
    tokens, cond = tokens_for(gpt, 2), gpt.condition(randn(2, 24))
    embeds = randn(2, 12)

    class PixelsAsClip:
        size = 16

        def encode_image(self, pixels):
            return F.normalize(pixels.flatten(1)[:, ::64], dim=-1)
    loss = embedding_loss(gpt, vq, PixelsAsClip(), cond, tokens, embeds)
    likeliest = gpt(cond, tokens[:, :-1]).argmax(-1).view(2, 4, 4)
    predicted = PixelsAsClip().encode_image((vq.decode(likeliest) + 1) / 2)
    cosine = F.cosine_similarity(predicted, embeds).mean().item()
    assert loss.item() == pytest.approx(1 - cosine, abs=1e-5)
    loss.backward()
    assert gpt.head.weight.grad.abs().sum() > 0 and gpt.cond_proj.weight.grad.abs().sum() > 0


# ============================================================================ stage 4: sample.py


def test_an_image_does_not_depend_on_its_neighbours():
    model, embedding = tiny_gpt(), randn(1, 24)
    model.spread.copy_(randn(24, 24, seed=5) / 10)

    def start(seed, prompt, count):
        return sample.conditions_and_uniforms(model, embedding, "text", seed, prompt, count, 0.5)
    many = model.generate(*start(0, "a red bus", 6), guidance=2.0)
    for i in range(6):
        cond, uniform = start(0, "a red bus", i + 1)
        alone = model.generate(cond[i:], uniform[i:], guidance=2.0)[0]
        assert torch.equal(alone, many[i])
    assert len({tuple(row.tolist()) for row in many}) == 6
    for seed, prompt in ((1, "a red bus"), (0, "a red car")):
        other = start(seed, prompt, 6)
        assert not torch.equal(cond, other[0]) and not torch.equal(uniform, other[1])


def test_variety_moves_conditions_by_the_spread():
    """By `variety` times the spread, renormalised, around the one condition of variety 0."""
    model, embedding = tiny_gpt(), randn(1, 24)
    model.spread.copy_(torch.diag(torch.arange(24.0)) / 100)

    def start(variety):
        return sample.conditions_and_uniforms(model, embedding, "text", 0, "x", 4000, variety)
    plain = start(0.0)[0]
    assert torch.equal(plain, model.condition(embedding, "text").expand(4000, -1))
    cond, uniform = start(0.5)
    assert torch.allclose(cond.norm(dim=1), torch.ones(4000), atol=1e-5)
    # small, so nearly what was added, in directions across `plain`
    moved = cond / (cond * plain).sum(1, keepdim=True) - plain
    expected, across = 0.5 * model.spread.diagonal(), plain[0].abs() < 0.1
    assert torch.allclose(moved.std(0)[across], expected[across], atol=0.02)
    assert torch.equal(uniform, start(0.0)[1])


# ============================================================= all stages, by their command lines


def test_stages_end_to_end(world):
    d, output = world
    for path in ("clip.pt", "world.png", "vqgan.pt", "recon.png", "gpt.pt", "grid.png"):
        assert (d / "out/toy" / path).stat().st_size > 0
    for stage, steps in (("toy", 6), ("vqgan", 8), ("gpt", 6)):
        log = read_log(d / f"out/toy/{stage}.jsonl")
        assert [x["step"] for x in log if "loss" in x] == list(range(1, steps + 1))
        assert all(is_finite(x) for x in log)
    log = read_log(d / "out/toy/vqgan.jsonl")
    # quantised from step vq_start on, and judged by the discriminator from disc_start on
    assert [x["step"] for x in log if "perplexity" in x] == [3, 4, 5, 6, 7, 8]
    assert [x["step"] for x in log if "disc" in x] == [6, 7, 8]
    assert [x["step"] for x in log if "val_loss" in x] == [4, 8]
    assert "knows nothing is ln 64 = 4.159" in output["train_gpt"]
    assert "modality gap" in output["prepare"]
    config = load_gpt(d / "out/toy/gpt.pt", "cpu")[1]["config"]
    assert f"--noise={config['noise']}," in output["prepare"]     # auto is what it says
    assert "tokens/s" in output["sample"] and "out/toy/gpt.pt" in output["sample"]
    assert "best 2 of 4 by CLIP" in output["sample"]
    assert Image.open(d / "out/samples.png").size[0] >= 64
    assert len(list((d / "out/samples").glob("*.png"))) == 4


def test_every_stage_says_what_comes_next(world, monkeypatch):
    """By a command that runs as printed and continues with the files just written."""
    d, output = world
    monkeypatch.chdir(d)
    for stage, module in (("toy", vqgan), ("vqgan", prepare), ("prepare", train_gpt),
                          ("train_gpt", sample)):
        command, = re.findall("next: python (.*)", output[stage])
        script, *argv = shlex.split(command)
        assert script == f"{module.__name__}.py"
        cfg = parse_options(module.Config, getattr(module, "PRESETS", {}), argv)
        files = [getattr(cfg, name, "") for name in ("data", "vqgan", "clip", "gpt")]
        assert all((d / file).exists() for file in files if file), command
    assert cfg.prompts == ("a red bus",)                  # of the toy world; not for photographs
    assert "images in" in run_stage(script, *argv, f"--out={d}/next.png", cwd=d).stdout


def test_unseen_pairs_are_for_clip_alone(world):
    d, _ = world
    lines = (d / "data/toy/captions.tsv").read_text().splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    assert {row[6] for row in rows} == {"train", "unseen", "heldout"}
    assert len({o for _, o in toy.UNSEEN}) == len(toy.UNSEEN) == 12
    assert len({c for c, _ in toy.UNSEEN}) == 8
    for path, thing, colour, *_, split in rows:
        assert path.startswith(split + "/") and (d / "data/toy" / path).is_file()
        if split != "heldout":
            assert (split == "unseen") == ((colour, thing) in toy.UNSEEN)


def test_dump_rows_follow_the_sorted_sources(world):
    """Order, crops, held-out split and the skipped image; tokens and embeddings as the networks
    give them for that image alone."""
    d, _ = world
    meta, arrays = open_dump(d / "data/toy_tokens")
    source = ImageSource(d / "data/toy/train")
    assert source.names == sorted(source.names) and "deeper/grey.jpg" in source.names
    source.names.remove("broken.png")
    train, val = split_names(source, 10)
    assert meta["train_rows"] == 3 * len(train) and meta["val_rows"] == len(val)
    assert [name for name, _ in meta["skipped"]] == ["broken.png"] and meta["skipped_count"] == 1
    reason = meta["skipped"][0][1]
    assert "cannot identify image" in reason and "0x" not in reason   # no memory address

    network = load_vqgan(d / "out/toy/vqgan.pt", "cpu")
    assert network.sha256 == meta["vqgan_sha256"] == hash_state(network.state_dict())
    clip = load_clip(d / "out/toy/clip.pt")
    assert clip.sha256 == meta["clip_sha256"]
    tokens, embeds = arrays["train"]
    for i in (0, 7, len(train) - 1):                      # an image's first row: its centre crop
        image = open_image(d / "data/toy/train" / train[i])
        expected = network.encode(to_tensor(crop(image, 32))[None] * 2 - 1).flatten()
        assert (expected.numpy() == tokens[3 * i]).mean() > 0.9
        expected = clip.encode_image(to_tensor(crop(image, clip.size))[None])[0]
        assert np.abs(expected.numpy() - embeds[3 * i]).max() < 2e-3
    assert not np.array_equal(embeds[0], embeds[1])       # the others are random crops
    embeds = embeds.astype(np.float32)
    assert np.allclose(np.linalg.norm(embeds, axis=1), 1, atol=2e-3)
    assert np.allclose(embeds.mean(0), meta["image_mean"], atol=1e-4)


def test_a_dump_written_from_arrays_trains(world, tmp_path):
    """Rows that do not come from a folder of images: prepare.write_dump, the format's own writer.
    """
    d, _ = world
    networks = d / "out/toy/vqgan.pt", d / "out/toy/clip.pt"
    tokens, embeds = tokens_for(tiny_gpt(), 40).numpy(), randn(40, 64).numpy()
    prepare.write_dump(tmp_path / "d", tokens, embeds, *networks, tokens[:8], embeds[:8])
    meta, rows = open_dump(tmp_path / "d")
    assert np.array_equal(rows["train"][0], tokens) and np.array_equal(rows["val"][0], tokens[:8])
    unit = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
    assert np.abs(rows["train"][1] - unit).max() < 1e-3
    assert np.allclose(meta["image_mean"], unit.mean(0), atol=1e-3)
    output = run_stage("train_gpt.py", *GPT_OPTIONS, f"--data={tmp_path}/d", f"--out={tmp_path}/g",
                       cwd=d).stdout
    assert "40 rows of 16 tokens" in output and (tmp_path / "g/gpt.pt").exists()
    for wrong in ((tokens + 48, embeds), (tokens[:, :15], embeds), (tokens, embeds[:, :3]),
                  (tokens, embeds * np.nan)):
        with pytest.raises(SystemExit):
            prepare.write_dump(tmp_path / "wrong", *wrong, *networks)
    assert not (tmp_path / "wrong/meta.json").exists()


def assert_same_dump(folder, other):
    for name in DUMP_FILES:
        assert (folder / name).read_bytes() == (other / name).read_bytes()


def test_dump_is_the_same_for_any_number_of_workers(world, tmp_path):
    d, _ = world
    for workers in (0, 3):
        out = tmp_path / str(workers)
        run_stage("prepare.py", *PREPARE_OPTIONS, f"--out={out}", f"--workers={workers}", cwd=d)
        assert_same_dump(d / "data/toy_tokens", out)
        assert not (out / "chunks").exists()


def test_a_tar_gives_the_folders_dump(world, tmp_path):
    d, _ = world
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(d / "data/toy/train", ".")
    run_stage("prepare.py", *PREPARE_OPTIONS, f"--data={tmp_path}/t.tar", f"--out={tmp_path}/d",
              cwd=d)
    assert_same_dump(d / "data/toy_tokens", tmp_path / "d")


def test_another_image_size_gives_another_grid(world, tmp_path):
    """A VQGAN is not tied to the size it was trained at: the token grid follows, to the image."""
    d, _ = world
    run_stage("prepare.py", "--image_size=48", "--val_percent=10", f"--out={tmp_path}/d", cwd=d)
    assert json.loads((tmp_path / "d/meta.json").read_text())["grid"] == 6
    run_stage("train_gpt.py", *GPT_OPTIONS, f"--data={tmp_path}/d", f"--out={tmp_path}/g", cwd=d)
    run_stage("sample.py", "a red bus", "--n=1", f"--gpt={tmp_path}/g/gpt.pt",
              f"--out={tmp_path}/s.png", cwd=d)
    assert Image.open(next((tmp_path / "s").glob("*.png"))).size == (48, 48)


def test_muon_moves_the_matrices_and_can_be_left_out(world, tmp_path):
    d, _ = world
    run_stages(
        (["train_gpt.py", *GPT_OPTIONS, "--muon=False", "--classic=True", f"--out={tmp_path}/g"],
         d, 0),
        (["vqgan.py", *VQGAN_OPTIONS, "--muon=False", f"--out={tmp_path}/v"], d, 0))

    def moved(checkpoint):
        return {name: len(checkpoint[name]["state"]) for name in ("muon", "adam")
                if name in checkpoint}
    made, plain = load_raw(d / "out/toy/gpt.ckpt"), load_raw(tmp_path / "g/gpt.ckpt")
    parameters = len(made["model"]) - 3                   # means, shrink, spread are buffers
    assert moved(made) == {"muon": 4 * 2, "adam": parameters - 4 * 2}
    assert moved(plain) == {"adam": len(plain["model"]) - 3}
    assert not torch.any(plain["model"]["means"]) and not torch.any(plain["model"]["spread"])

    made, plain = load_raw(d / "out/toy/vqgan.ckpt"), load_raw(tmp_path / "v/vqgan.ckpt")
    convolutions = sum(p.dim() == 4 for p in made["model"].values())
    assert moved(made) == {"muon": convolutions, "adam": len(made["model"]) - convolutions}
    assert moved(plain) == {"adam": len(plain["model"])}
    assert not vqgan.PRESETS["paper"]["muon"]


def test_two_prefix_tokens_and_dropout_train_and_sample(world, tmp_path):
    d, _ = world
    run_stage("train_gpt.py", *GPT_OPTIONS, "--n_prefix=2", "--dropout=0.1", "--qk_norm=True",
              f"--out={tmp_path}", cwd=d)
    gpt, checkpoint = load_gpt(tmp_path / "gpt.pt", "cpu")
    assert gpt.cfg.n_prefix == 2 and gpt.cfg.dropout == 0.1 and gpt.cfg.qk_norm
    assert gpt.cond_proj.weight.shape == (2 * 32, 64) and gpt.pos_emb.shape == (2 + 15, 32)
    assert all(is_finite(x) for x in read_log(tmp_path / "gpt.jsonl"))
    run_stage("sample.py", "a red bus", "--n=2", f"--gpt={tmp_path}/gpt.pt",
              f"--out={tmp_path}/s.png", cwd=d)
    assert len(list((tmp_path / "s").glob("*.png"))) == 2
    # an unchanged network is trained to the same weights by an explicit dropout of nothing
    run_stage("train_gpt.py", *GPT_OPTIONS, "--dropout=0", f"--out={tmp_path}/none", cwd=d)
    weights, expected = (load_raw(p / "gpt.pt")["ema"] for p in (tmp_path / "none", d / "out/toy"))
    assert all(torch.equal(weights[k], expected[k]) for k in expected)


def test_checkpoints_from_before_a_field_was_added_load_with_its_default(world, tmp_path, capsys):
    d, _ = world
    checkpoint = load_raw(d / "out/toy/gpt.pt")
    assert {"n_prefix", "dropout"} < set(checkpoint["network"])

    def save_without(*fields):
        network = {k: v for k, v in checkpoint["network"].items() if k not in fields}
        save_checkpoint(tmp_path / "g.pt", checkpoint, network=network)
        return tmp_path / "g.pt"
    gpt, _ = load_gpt(save_without("n_prefix", "dropout"), "cpu")
    assert gpt.cfg == GPTConfig(**checkpoint["network"]) and gpt.cfg.n_prefix == 1
    save_without("n_head")                                # no shape tells it, and it has no default
    with one_line_error(capsys, "g.pt", "n_head"):
        load_gpt(tmp_path / "g.pt", "cpu")
    line = stage_error("sample.py", "word", f"--gpt={tmp_path}/g.pt", cwd=d)
    assert "n_head" in line


def test_sampling_is_reproducible_and_ranks_by_clip(world):
    d, _ = world

    def draw(*options):
        output = run_stage("sample.py", "a red bus", f"--out={d}/s.png", *options, cwd=d).stdout
        files = sorted((d / "s").glob("*.png"))           # those of this call alone
        return [p.read_bytes() for p in files], [p.name for p in files], output
    four, names, _ = draw("--n=4", "--batch_size=3")
    two = draw("--n=2")[0]
    assert two == four[:2] and len(set(four)) == 4 and draw("--n=2", "--seed=1")[0] != two
    assert [name.rpartition("-")[2] for name in names] == ["0.png", "1.png", "2.png", "3.png"]

    best, names, output = draw("--n=2", "--candidates=4")
    clip = load_clip(d / "out/toy/clip.pt")
    for i, data in enumerate(four):
        (d / f"c{i}.png").write_bytes(data)
    images = [open_image(d / f"c{i}.png") for i in range(4)]
    scores = sample.similarity(clip, images, clip.encode_text(["a red bus"])[0])
    order = sorted(range(4), key=lambda i: -scores[i])
    assert best == [four[i] for i in sorted(order[:2])]
    assert [int(name[-5]) for name in names] == sorted(order[:2])   # a candidate keeps its number
    assert f"{order[0]} ({scores[order[0]]:.3f})" in output

    run_stage("sample.py", f"--image={d}/c0.png", "--n=1", f"--out={d}/v.png", cwd=d)
    output = run_stage("sample.py", "a red bus " * 30, "--n=1", f"--out={d}/v.png", cwd=d).stdout
    assert "cut off" in output


if __name__ == "__main__":
    sys.exit(pytest.main(["-q", __file__]))
