"""Which parameters Muon and AdamW move."""
import torch

import vqgan
from tests.helpers import GPT_OPTIONS, VQGAN_OPTIONS, load_raw
from tests.inprocess import call_stage, changed


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
