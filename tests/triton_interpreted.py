"""The GPU's kernels and its sampling loop by Triton's interpreter: needs TRITON_INTERPRET=1 from
the start. tests/test_fast.py runs this file in a process of its own. Shapes are tiny: a program of
a kernel takes milliseconds here."""
import contextlib
import types

import pytest
import torch
import torch.nn.functional as F
from triton import next_power_of_2
from triton.tools.tensor_descriptor import TensorDescriptor

import fast
from fast import gpu
from fast.gpu import GPUGenerator
from fast.gpu_kernels import attention_kernel, linear_kernel, sample_kernel
from model import GPT, sample_token
from tests.helpers import cached_logits, plain_logits, rand, randn, tiny_gpt, tokens_for
from tests.test_fast import EDITS, check_edited, edited_gpt

DTYPES = torch.float32, torch.float16


class Recording:
    """In the place of torch.cuda.graph: kernels that are recorded do not run."""

    def __init__(self, graph):
        self.launch = gpu.launch

    def __enter__(self):
        gpu.launch = lambda *args, **options: None

    def __exit__(self, *exception):
        gpu.launch = self.launch


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """GPUGenerator on the CPU's tensors. A step is run on the side and recorded; then it is called
    as it is, where a graph would be replayed."""
    def stream(*device):
        return types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    capture = gpu.capture
    monkeypatch.setattr(gpu, "capture", lambda step, device: capture(step, device) or step)
    monkeypatch.setattr(gpu, "pdl_options", lambda device: {"PDL": False})
    monkeypatch.setattr(gpu, "fit_shared_memory", lambda device, count, size: count)
    monkeypatch.setattr(fast, "generator_class", lambda kind: GPUGenerator)
    with torch.no_grad():
        yield


def small_gpt(**changes):
    return tiny_gpt(**{"n_embd": 48, "n_head": 2, "n_layer": 2, "grid": 2} | changes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, shape", [
    (1, {"grid": 4, "n_layer": 1}), (3, {}), (17, {"n_layer": 1}),
    (2, {"n_embd": 272, "n_layer": 1}), (1, {"n_embd": 36}), (2, {"n_prefix": 2})])
def test_network(rows, shape, dtype):
    gpt = small_gpt(**shape)
    cond, tokens = gpt.condition(randn(rows, 24)), tokens_for(gpt, rows)
    exact = plain_logits(gpt, cond, tokens)
    weights = {name: x.clone() for name, x in gpt.state_dict().items()}
    logits = cached_logits(GPUGenerator(gpt, dtype), cond, tokens)
    if dtype == torch.float32:
        assert (logits - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert (logits - exact).norm() < 2e-3 * exact.norm()
    assert all(torch.equal(x, weights[name]) for name, x in gpt.state_dict().items())


@pytest.mark.parametrize("rows, k, split_k", [(1, 64, 16), (3, 48, 16), (2, 272, 16)])
def test_linear_kernel(rows, k, split_k):
    """In float32, which runs as float16 does, to the last bits."""
    x, weight, bias = randn(rows, k), randn(40, k, seed=3), randn(40, seed=4)
    x, added = x - x.mean(1, keepdim=True), randn(rows, 40, seed=5)
    splits = next_power_of_2(k // split_k)
    described = TensorDescriptor(weight, [k // split_k, 40, split_k], [split_k, k, 1],
                                 [splits, 16, split_k])
    for norm, gelu, residual in (True, False, None), (True, True, None), (False, False, added):
        exact = F.linear(F.layer_norm(x, (k,)) if norm else x, weight, bias)
        exact = F.gelu(exact) if gelu else exact if residual is None else exact + residual
        y = torch.empty(rows, 40)
        gpu.launch(linear_kernel, (3,), x, described, bias, y, residual, 40, k, rows, splits,
                   split_k, 16, norm, gelu)
        assert (y - exact).abs().max() <= 1e-5 * exact.abs().max()
        assert residual is None or torch.equal(residual, y)


@pytest.mark.parametrize("pos", [0, 15, 16, 39])  # of 40 positions, 16 at a time
def test_attention_kernel(pos):
    qkv, cache, y = randn(2, 3 * 3 * 20), randn(2, 2, 3, 40, 20, seed=3), torch.empty(2, 60)
    filled = cache.clone()
    q, filled[:, 0, :, pos], filled[:, 1, :, pos] = qkv.view(2, 3, 3, 20).unbind(1)
    attention_kernel[(2, 3)](qkv, cache, torch.tensor([pos]), y, 40, 3, 20, 1, 16, 32, PDL=False)
    keys, values = filled[:, :, :, :pos + 1].unbind(1)
    exact = F.scaled_dot_product_attention(q[:, :, None], keys, values).reshape(2, 60)
    assert torch.equal(cache[:, :, :, pos], filled[:, :, :, pos])
    assert torch.allclose(y, exact, atol=1e-5)


@pytest.mark.parametrize("n_prefix", [1, 2])
@pytest.mark.parametrize("guidance, rows", [(1.0, 3), (2.0, 6), (0.0, 6)])
def test_sample_kernel(guidance, rows, n_prefix):
    b, t, k, c = 3, 16, 100, 40
    tok_emb, pos_emb, uniform = randn(k, c), randn(n_prefix + t - 1, c, seed=3), rand(b, t)
    position, tokens = torch.full((b,), n_prefix - 1), torch.zeros(t, b, dtype=torch.long)
    residual, x = torch.zeros(rows, c), torch.zeros(rows, c, dtype=torch.float16)
    for i in range(t):
        logits = 3 * randn(rows, k, seed=i)
        gpu.launch(sample_kernel, (b,), logits, uniform, 0.7, guidance, tokens, tok_emb, pos_emb,
                   residual, x, position, b, t, k, c, rows // b, n_prefix)
        if rows > b:
            logits = logits[b:] + guidance * (logits[:b] - logits[b:])
        assert torch.equal(tokens[i], sample_token(logits, uniform[:, i], 0.7))
        assert (position == n_prefix + i).all()
        embeddings = tok_emb[tokens[i]] + pos_emb[min(n_prefix + i, len(pos_emb) - 1)]
        assert torch.equal(residual.view(-1, b, c)[-1], embeddings)
        assert torch.equal(x, residual.half())


@pytest.mark.parametrize("guidance, options", [
    (1.0, {}), (2.0, {}), (2.0, {"top_k": 20, "top_p": 0.9}), (2.0, {"temperature": 0.0}),
    (2.0, {"negative": randn(3, 24, seed=9)})])
@pytest.mark.parametrize("n_prefix", [1, 2])
def test_generate(guidance, options, n_prefix, capsys):
    gpt = small_gpt(n_prefix=n_prefix, n_layer=1)
    args = gpt.condition(randn(3, 24)), rand(3, 4), guidance
    generator = GPUGenerator(gpt, torch.float32)
    tokens = generator.generate(*args, **{"temperature": 0.7} | options)
    assert torch.equal(tokens, gpt.generate(*args, **{"temperature": 0.7} | options))
    assert not capsys.readouterr().out  # nothing has failed


def test_where_kernels_fail_sampling_goes_on_without(capsys):
    gpt = small_gpt()
    args = gpt.condition(randn(3, 24)), rand(3, 4), 2.0
    exact = gpt.generate(*args)
    generator = fast.accelerate(gpt, torch.float32)
    assert generator is not gpt

    def failing(step, device):
        step()
        raise RuntimeError("no such kernel")
    generator.capture = failing
    assert torch.equal(generator.generate(*args), exact)
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "no such kernel" in line and "using the plain network" in line
    assert torch.equal(generator.generate(*args), exact)
    assert not capsys.readouterr().out and generator.generate == gpt.generate


def test_the_loop_stands_for_generate():
    """GPUGenerator has a loop of its own. Where this fails GPT.generate or sample_token has been
    edited: do the same in GPUGenerator.generate_captured, and then renew LOOP_SHA256."""
    assert gpu.loop_sha256(GPT) == gpu.LOOP_SHA256


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_network_is_followed_or_the_plain_one_samples(edit, tmp_path, capsys):
    gpt = edited_gpt(tmp_path, edit, n_head=1, n_layer=2, n_embd=32,
                     grid=4 if edit == "local attention" else 2)
    follows, own_loop = EDITS[edit][2], edit != "another guidance"
    check_edited(gpt, torch.float32, follows, capsys, lines=0 if own_loop else 1)
