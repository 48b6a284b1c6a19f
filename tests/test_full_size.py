"""What only shows at full size: the perceptual loss sees all of the image, micro-batches and ranks
make no difference, k-means is bounded, dead codes restart in time, the paper's setting."""
from types import SimpleNamespace

import pytest
import torch

import model as networks
import train_gpt
import vqgan
from common.optim import set_learning_rate
from common.perceptual import blindness, perceptual_distance, perceptual_features, random_shift
from common.runtime import Runtime
from model import Quantizer
from tests.helpers import randn, run_stages, slow, tiny_clip


def step_on(images, steps=3, adaptive_weight=0.0, **options):
    """A few steps of vqgan.py's train_step on the same images -> (state, metrics of each step)."""
    defaults = {"image_size": 32, "ch_mult": (1, 2), "codebook_size": 64, "vq_start": 0,
                "batch_size": len(images), "disc_start": 1, "perceptual": 0.0, "grad_clip": 1.0,
                "max_steps": 40, "muon": False, "learning_rate": 1e-3}
    cfg = vqgan.Config(**defaults | options)
    runtime = Runtime("cpu", "float32")
    state = vqgan.make_state(vqgan.start_config(None, vqgan.VQGANConfig, cfg), cfg, runtime)

    state.adaptive_weight.fill_(adaptive_weight)

    def compute_losses(network, x, quantized, step=None):
        return vqgan.reconstruction_losses(network, x, None, None, cfg, quantized)
    metrics = []
    for step in range(steps):
        set_learning_rate(state.optimizers(), step, cfg)
        found, _ = vqgan.train_step(state, state.model, images, compute_losses, step, cfg, runtime)
        metrics.append(found)
        vqgan.update_average(state, step, True, cfg)
    return state, metrics


def test_micro_batches_make_no_difference():
    """To the gradients, with the discriminator and its adaptive weight, but for rounding."""
    images = randn(8, 3, 32, 32).clamp(-1, 1)
    whole, once = step_on(images, 1, 0.5, disc_start=0)
    parts, cut = step_on(images, 1, 0.5, disc_start=0, grad_accum_steps=4)
    for one, two in ((whole.model, parts.model), (whole.disc, parts.disc)):
        grads = dict(two.named_parameters())
        for name, p in one.named_parameters():
            assert (p.grad - grads[name].grad).norm() < 1e-4 * p.grad.norm() + 1e-6, name
    assert whole.adaptive_weight.item() == pytest.approx(parts.adaptive_weight.item(), rel=1e-4)
    assert whole.adaptive_weight.item() not in (0, 0.5)
    assert {"adaptive_weight", "grad_norm", "gan", "disc"} <= once[0].keys() == cut[0].keys()


@slow
def test_slow_two_ranks_of_two_parts_train_as_one_process(world, tmp_path):
    folder = world[0] if isinstance(world, tuple) else world
    words = ["vqgan.py", f"--data={folder}/data/toy/train", "--image_size=32", "--ch_mult=1,2",
             "--codebook_size=64", "--max_steps=5", "--vq_start=1", "--disc_start=2",
             "--batch_size=8", "--perceptual=0", "--dtype=float32", "--muon=False",
             "--learning_rate=1e-3", "--grad_clip=1"]
    run_stages((words + [f"--out={tmp_path}/one"], tmp_path, 0),
               (["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
                 str(networks.__file__).replace("model.py", "vqgan.py"), *words[1:],
                 "--grad_accum_steps=2", f"--out={tmp_path}/two"], tmp_path, 0))
    one, two = (torch.load(f"{tmp_path}/{x}/vqgan.ckpt", weights_only=True)["model"]
                for x in ("one", "two"))
    for name, x in one.items():
        assert (x - two[name]).norm() < 1e-3 * x.norm() + 1e-6, name


def test_a_loss_that_is_not_finite_moves_nothing():
    images = randn(4, 3, 32, 32)
    state, _ = step_on(images, steps=2)
    before = {k: v.clone() for k, v in [*state.model.state_dict().items(),
                                        *state.disc.state_dict().items()]}
    cfg = vqgan.Config(image_size=32, codebook_size=64, batch_size=4, vq_start=0, disc_start=0,
                       perceptual=0.0, muon=False)

    def compute_losses(network, x, quantized, step=None):
        recon, losses, tokens, z = vqgan.reconstruction_losses(network, x, None, None, cfg,
                                                               quantized)
        return recon, losses | {"pixel": losses["pixel"] * float("nan")}, tokens, z
    _, is_finite = vqgan.train_step(state, state.model, images, compute_losses, 5, cfg,
                                    Runtime("cpu", "float32"))
    after = [*state.model.state_dict().items(), *state.disc.state_dict().items()]
    assert not is_finite and all(torch.equal(before[k], v) for k, v in after)
    assert state.adaptive_weight.isfinite()


def test_the_perceptual_loss_of_a_resnet_reaches_errors_of_every_direction():
    """A ViT whose patches hold more numbers than its width is blind to errors in the null space of
    its first layer; a ResNet is not, and only the ViT is warned of."""
    vit, resnet = (tiny_clip(kind).requires_grad_(False) for kind in ("vit", "resnet"))
    weight = vit.visual.conv1.weight.flatten(1)                          # (64, 3 * 16 * 16)
    null = torch.linalg.svd(weight)[2][len(weight):]                     # (704, 768)
    error = (randn(len(null)) @ null).view(1, 3, 16, 16).repeat(1, 1, 4, 4)
    x = randn(1, 3, 64, 64)
    blind, seen = {}, {}
    for kind, clip in (("vit", vit), ("resnet", resnet)):
        features = perceptual_features(clip.visual)
        real = features(x)
        blind[kind] = perceptual_distance(real, features(x + error)).item()
        seen[kind] = perceptual_distance(real, features(x + randn(1, 3, 64, 64, seed=5))).item()
    assert blind["vit"] < 1e-6 < seen["vit"]
    assert blind["resnet"] > 0.2 * seen["resnet"] > 0

    features = perceptual_features(tiny_clip("resnet").requires_grad_(False).visual)
    fake = (x + 0.1 * randn(1, 3, 64, 64, seed=6)).requires_grad_()
    perceptual_distance(features(x), features(fake)).backward()
    patches = fake.grad.unfold(2, 16, 16).unfold(3, 16, 16)              # (1, 3, 4, 4, 16, 16)
    patches = patches.permute(2, 3, 0, 1, 4, 5).reshape(16, -1)
    assert (patches @ null.T).norm() > 0.5 * patches.norm()              # mostly in the blind space


def test_a_clip_that_is_blind_to_part_of_its_patches_is_warned_of():
    vit_b_32 = SimpleNamespace(conv1=SimpleNamespace(weight=torch.empty(768, 3, 32, 32)))
    vit_b_16 = SimpleNamespace(conv1=SimpleNamespace(weight=torch.empty(768, 3, 16, 16)))
    assert "75%" in blindness(vit_b_32) and "RN50" in blindness(vit_b_32)
    assert not blindness(vit_b_16) and not blindness(tiny_clip("resnet").visual)
    for name, preset in vqgan.PRESETS.items():
        assert preset["clip"] == "RN50" and preset["perceptual_shift"] > 0, name


def test_a_random_shift_is_the_same_for_both_images():
    x = randn(2, 3, 32, 32)
    a, b = random_shift((x, 2 * x), 8, (0, 2, 1))
    assert torch.equal(2 * a, b) and a.shape == x.shape and not torch.equal(a, x)
    assert torch.equal(a, random_shift((x,), 8, (0, 2, 1))[0])           # a function of the step
    assert len({random_shift((x,), 8, (0, 2, i))[0].sum().item() for i in range(9)}) > 5
    assert random_shift((x,), 0, 0)[0] is x


def test_kmeans_and_nearest_codes_are_bounded_in_memory(monkeypatch):
    """In pieces the same codes are found; k-means looks at no more than 16 vectors a code."""
    q = Quantizer(50, 8, l2_norm=False)
    q.embedding.weight.data.normal_()
    z = randn(3000, 8)
    found, calls, nearest = q.nearest(z), [], q.nearest
    monkeypatch.setattr(networks, "MAX_DISTANCES", 50 * 70)
    assert torch.equal(q.nearest(z), found)
    monkeypatch.setattr(q, "nearest", lambda x: calls.append(len(x)) or nearest(x))
    q.kmeans(z, torch.Generator().manual_seed(0))
    assert calls and max(calls) == 16 * 50


def test_a_dead_code_restarts_soon_and_its_average_with_it():
    """Within the time of some thirty fair shares of hits, whatever the batch; not at the end."""
    images = randn(4, 3, 32, 32).clamp(-1, 1)
    state, metrics = step_on(images, steps=20, disc_start=1000)
    assert sum(m["restarted"] for m in metrics) == 0  # 64 tokens a step, 64 codes: too soon
    state, metrics = step_on(images, steps=60, max_steps=1000, disc_start=1000)
    assert sum(m["restarted"] for m in metrics) > 0
    q = Quantizer(16, 4, l2_norm=False)
    for hits in (1, 100):  # a step: 1/16 or 100/16 of a hit a code
        q.usage.fill_(1.0)
        counts, steps = torch.full((16,), hits / 15), 0
        counts[3] = 0
        while not len(dead := q.count_hits(counts)):
            steps += 1
        assert dead.tolist() == [3] and steps * hits / 16 < 50
    runtime, tokens = Runtime("cpu", "float32"), torch.zeros(4, 16, dtype=torch.long)
    state.model.quantize.usage.zero_()
    before = state.model.quantize.embedding.weight.detach().clone()
    late = vqgan.update_codebook(state, tokens, randn(64, 8), False, runtime)
    assert late["restarted"] == 0 and torch.equal(state.model.quantize.embedding.weight, before)
    state.model.quantize.usage.zero_()
    moved = vqgan.update_codebook(state, tokens, randn(64, 8), True, runtime)["restarted"]
    changed = (state.model.quantize.embedding.weight != before).any(1)
    assert moved == changed.sum() > 0
    assert torch.equal(state.ema.quantize.embedding.weight[changed],
                       state.model.quantize.embedding.weight[changed])


def test_the_papers_preset_is_its_authors_setting():
    cfg = train_gpt.Config(**train_gpt.PRESETS["paper"])
    assert (cfg.classic, cfg.zero_init, cfg.muon, cfg.token_corruption) == (True, False, False, 0)
    assert (cfg.dropout, cfg.learning_rate, cfg.batch_size, cfg.weight_decay) == (0.1, 5e-4, 256,
                                                                                 0.01)
    small = train_gpt.Config(**train_gpt.PRESETS["paper"] | {"n_layer": 2, "n_head": 2,
                                                             "n_embd": 32})
    shape = train_gpt.start_config(None, train_gpt.GPTConfig, small, codebook_size=48, grid=4,
                                   cond_dim=24)
    state = train_gpt.make_state(shape, {}, None, small, Runtime("cpu", "float32"), is_new=True)
    decayed, others = (group["params"] for group in state.adam.param_groups)
    assert state.adam.param_groups[0]["weight_decay"] == 0.01
    assert all(p.dim() == 2 for p in decayed) and state.adam.param_groups[1]["weight_decay"] == 0
    assert any(p is state.model.tok_emb.weight for p in others)
    assert any(p is state.model.pos_emb for p in others)
    torch.manual_seed(0)  # torch's own initialisation, as released: a Linear's is uniform
    weight = state.model.blocks[0].qkv.weight
    assert weight.abs().max() <= 32 ** -0.5 and weight.std() > 0.5 * 32 ** -0.5
    paper = vqgan.Config(**vqgan.PRESETS["paper"])
    assert (paper.mse, paper.perceptual, paper.code_dim, paper.l2_norm) == (0, 1, 256, False)
