"""The learning rate's curve, and Muon."""
import pytest
import torch

import vqgan
from common.optim import learning_rate, newton_schulz
from tests.helpers import GPT_OPTIONS, VQGAN_OPTIONS, load_raw, randn
from tests.inprocess import call_stage, changed


def test_learning_rate_curve():
    lr = [learning_rate(step, 1.0, 10, 100) for step in range(101)]
    assert lr[0] == 0.1 and lr[9] == lr[10] == 1.0
    assert lr[55] == pytest.approx(0.5) and lr[100] == pytest.approx(0)


def test_newton_schulz_equals_plain_steps():
    """On the small side, all matrices of one such side together, it gives what plain steps in
    float64 give."""
    stacks = [randn(n, *shape) for n, shape in ((3, (5, 30)), (1, (30, 5)), (2, (16, 16)),
                                                (1, (16, 40)))]
    found = newton_schulz(stacks)
    assert [x.shape for x in found] == [x.shape for x in stacks]
    for x, z in zip(stacks, found):
        y = x.double() / (x.double() @ x.double().mT).norm(dim=(1, 2), keepdim=True).sqrt()
        for _ in range(3):
            a = y @ y.mT
            y = 3.4445 * y - 4.7750 * a @ y + 2.0315 * a @ a @ y
        assert (z - y).abs().max() < 1e-4
        singular = torch.linalg.svdvals(z)
        assert singular.max() < 1.3 and singular.median() > 0.6


def test_muon_moves_the_blocks_matrices_and_can_be_left_out(world, tmp_path):
    d = world[0]

    def moved(checkpoint):
        """How many parameters each optimiser has moved."""
        return {name: len(checkpoint[name]["state"]) for name in ("muon", "adam")
                if name in checkpoint}
    call_stage("train_gpt.py", *GPT_OPTIONS, "--muon=False", "--classic=True",
               f"--out={tmp_path}/adam", cwd=d)
    made, plain = (load_raw(p) for p in (d / "out/toy/gpt.ckpt", tmp_path / "adam/gpt.ckpt"))
    # `means` and `spread` are no parameters
    assert moved(made) == {"muon": 4 * 2, "adam": len(made["model"]) - 2 - 4 * 2}
    assert moved(plain) == {"adam": len(plain["model"]) - 2}
    assert not torch.any(plain["model"]["means"]) and not torch.any(plain["model"]["spread"])
    run = changed(VQGAN_OPTIONS, muon=False, max_steps=4, workers=0, out=tmp_path / "vq")
    call_stage("vqgan.py", *run, cwd=d)
    made, plain = (load_raw(p) for p in (d / "out/toy/vqgan.ckpt", tmp_path / "vq/vqgan.ckpt"))
    matrices = sum(p.dim() == 4 for p in made["model"].values())
    everything = len(made["model"])
    assert moved(made) == {"muon": matrices, "adam": everything - matrices}
    assert not vqgan.PRESETS["paper"]["muon"]
    assert moved(plain) == {"adam": everything}
