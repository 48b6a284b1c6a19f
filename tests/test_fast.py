"""The fast paths: each computes the plain network, and an edited model.py is noticed.

The Triton kernels are tested in tests/triton_interpreted.py, which runs in a process of its own.
"""
import importlib.util
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import fast
import sample
from fast import accelerate, cpu
from fast.cpu import MAX_FBGEMM_ROWS, CPUGenerator, PackedLinear
from model import GPT
from tests.helpers import (
    ROOT,
    cached_logits,
    fill_constants,
    plain_logits,
    rand,
    randn,
    tiny_gpt,
    tokens_for,
)

CPU_DTYPES = torch.float32, torch.bfloat16


@pytest.fixture
def one_thread():
    """Threads would wait for each other where other processes are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generator_for(gpt, dtype):
    """The accelerated network, which must not have fallen back to the plain one."""
    generator = accelerate(gpt, dtype)
    assert generator is not gpt
    return generator


def relative_error(logits, exact):
    return (logits - exact).norm() / exact.norm()


# ------------------------------------------------------------------------------------- on a CPU


@pytest.mark.parametrize("shape", [{}, {"classic": True}, {"n_prefix": 2}],
                         ids=["modern", "classic", "two prefix tokens"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_accelerated_sampling_is_the_same_network(shape, guidance):
    if guidance != 1 and "classic" in shape:
        pytest.skip("classic has no guidance")
    model = tiny_gpt(**shape)
    cond, tokens = model.condition(randn(3, 24)), tokens_for(model, 3)
    exact = plain_logits(model, cond, tokens, guidance)
    full, half = (generator_for(model, dtype) for dtype in CPU_DTYPES)
    limit = 1e-5 * exact.abs().max() * guidance
    assert (cached_logits(full, cond, tokens, guidance) - exact).abs().max() <= limit
    error = relative_error(cached_logits(half, cond, tokens, guidance), exact)
    assert 0 < error < 0.02 * guidance  # bfloat16 has 8 bits
    for generator, dtype in zip((full, half), CPU_DTYPES):
        packed = [*generator.layers, generator.cond_proj]
        assert len(packed) == 4 * 3 + 2 and {layer.dtype for layer in packed} == {dtype}
        assert {layer.bias.dtype for layer in packed} == {dtype}
        is_c = bool(dtype == torch.bfloat16 and cpu.compiled())
        assert all((b.attention is cpu.attention_in_c) == is_c for b in generator.blocks)
    alone_half, alone_full = (
        torch.cat([cached_logits(generator, c[None], t[None], guidance)
                   for c, t in zip(cond, tokens)]) for generator in (half, full))
    assert relative_error(alone_half, exact) < 0.02 * guidance
    assert (alone_full - exact).abs().max() <= limit  # laid out anew for one row


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("options", [{}, {"top_k": 20, "top_p": 0.9}, {"temperature": 0.0}])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_accelerated_tokens_are_the_plain_networks(guidance, options):
    model = tiny_gpt()
    cond, uniform = model.condition(randn(3, 24)), rand(3, 16)
    for negative in None, model.condition(randn(3, 24, seed=9)):
        args = (cond, uniform, guidance), {"temperature": 0.7, "negative": negative} | options
        tokens = generator_for(model, torch.float32).generate(*args[0], **args[1])
        assert torch.equal(tokens, model.generate(*args[0], **args[1]))


@pytest.mark.usefixtures("one_thread")
def test_an_accelerated_image_does_not_depend_on_its_neighbours():
    model, e = tiny_gpt(), randn(1, 24)
    model.spread.copy_(randn(24, 24, seed=5) / 10)
    generator = generator_for(model, torch.float32)

    def start(seed, key, count):
        return sample.conditions_and_uniforms(model, e, "text", seed, key, count, 0.5)
    many = generator.generate(*start(0, "a red bus", 6), guidance=2.0)
    for i in range(6):
        cond, uniform = start(0, "a red bus", i + 1)
        assert torch.equal(generator.generate(cond[i:], uniform[i:], guidance=2.0)[0], many[i])
    assert len({tuple(row.tolist()) for row in many}) == 6
    for seed, key in ((1, "a red bus"), (0, "a red car")):
        other = start(seed, key, i + 1)
        assert not torch.equal(cond, other[0]) and not torch.equal(uniform, other[1])


@pytest.mark.skipif(not cpu.has_bfloat16(), reason="needs a CPU with bfloat16")
@pytest.mark.parametrize("activation", [None, F.gelu])
def test_a_packed_layer_is_laid_out_for_its_rows(activation):
    layer = torch.nn.Linear(64, 48)
    packed = PackedLinear(layer, torch.bfloat16, activation)
    for rows in (1, 3, MAX_FBGEMM_ROWS, MAX_FBGEMM_ROWS + 1, 2, 8, 4):
        x = randn(rows, 1, 64, seed=rows)
        exact = activation(layer(x)) if activation else layer(x)
        assert packed(x).shape == exact.shape, rows
        assert relative_error(packed(x), exact) < 0.01, rows


@pytest.mark.parametrize("rows, heads, length, dim",
                         [(1, 16, 256, 64), (3, 5, 7, 9), (16, 2, 40, 36), (1, 1, 1, 1)])
def test_attention_in_c_is_torchs(rows, heads, length, dim):
    if not cpu.compiled():
        pytest.skip("needs a C compiler")
    cache = randn(rows, heads, 2, length, dim).bfloat16()
    for pos in {0, length // 2, length - 1}:
        qkv, filled = randn(rows, 1, 3 * heads * dim, seed=pos), cache.clone()
        q, k, v = qkv.view(rows, 3, heads, dim).unbind(1)
        filled[:, :, 0, pos], filled[:, :, 1, pos] = k, v
        keys, values = filled[:, :, :, :pos + 1].float().unbind(2)
        exact = F.scaled_dot_product_attention(q[:, :, None], keys, values).reshape(rows, 1, -1)
        y = cpu.attention_in_c(qkv, cache.transpose(1, 2)[:, :, :, :pos + 1])
        assert torch.equal(cache, filled)
        assert y.shape == exact.shape and (y - exact).abs().max() < 1e-5
        first = cpu.attention_in_c(qkv[:1], cache[:1].transpose(1, 2)[:, :, :, :pos + 1])
        assert torch.equal(y[:1], first)
    x = 3 * randn(rows, 1, heads * dim)
    exact = F.gelu(x)
    assert cpu.gelu_in_c(x) is x and (x - exact).abs().max() < 1e-5
    assert torch.tensor(1e-40) * 1 > 0  # denormals are not flushed to zero from now on


def without_compiler(monkeypatch, command):
    monkeypatch.setattr(cpu, "COMMAND", command)
    monkeypatch.setattr(cpu, "compiled", cpu.compiled.__wrapped__)


@pytest.mark.parametrize("command, reason", [
    (["no-such-compiler"], "no-such-compiler"),
    (["cc", "--no-such-option", "-o"], "no-such-option")])
def test_without_a_compiler_sampling_is_the_same_network(command, reason, monkeypatch):
    model = tiny_gpt()
    cond, tokens = model.condition(randn(3, 24)), tokens_for(model, 3)
    without_compiler(monkeypatch, command)
    with pytest.warns(UserWarning, match=reason if shutil.which(command[0]) else command[0]):
        generator = generator_for(model, torch.bfloat16)
    for guidance in 1.0, 2.0:
        exact = plain_logits(model, cond, tokens, guidance)
        error = relative_error(cached_logits(generator, cond, tokens, guidance), exact)
        assert 0 < error < 0.02 * guidance


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", CPU_DTYPES)
def test_accelerate_leaves_the_network_as_it_was(dtype):
    model = tiny_gpt()
    cond, uniform = model.condition(randn(3, 24)), rand(3, 16)
    attributes = {name: dict(vars(m)) for name, m in model.named_modules()}
    weights = {name: (x, x.clone()) for name, x in model.state_dict(keep_vars=True).items()}
    tokens = model.generate(cond, uniform, 2.0)
    generator = generator_for(model, dtype)
    for rows in 1, 3:
        generator.generate(cond[:rows], uniform[:rows], 2.0)
    assert {name: vars(m) for name, m in model.named_modules()} == attributes
    for name, x in model.state_dict(keep_vars=True).items():
        assert x is weights[name][0] and torch.equal(x, weights[name][1]), name
    assert torch.equal(model.generate(cond, uniform, 2.0), tokens)


def test_other_devices_keep_the_plain_network(monkeypatch, capsys):
    model = tiny_gpt()
    monkeypatch.setattr(fast, "generator_class", lambda kind, old=fast.generator_class: old("mps"))
    assert accelerate(model, torch.float32) is model and not capsys.readouterr().out


# ------------------------------------------------------------------------- an edited model.py

LOCAL_ATTENTION = """if t > 1:  # each position and the five before it
            mask = torch.ones(t, t, dtype=torch.bool).tril().triu(-5)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            y = attention(q, k[:, :, -6:], v[:, :, -6:])
        #"""

# name: text of model.py, what stands in its place, whether fast/ follows by itself
EDITS = {
    "nothing": ("import math", "import math", True),
    "norm of queries and keys": (
        "y = attention(q, k, v, is_causal=t > 1)",
        "q, k = F.layer_norm(q, q.shape[-1:]), F.layer_norm(k, k.shape[-1:])\n"
        "        y = attention(q, k, v, is_causal=t > 1)", False),
    "queries and keys of RMS 1": ("qk_norm: bool = False", "qk_norm: bool = True", True),
    "another activation": ("F.gelu(self.fc(", "F.relu(self.fc(", False),
    "scaled residual": ("x = x + self.dropout(self.proj(", "x = x + 0.7 * self.dropout(self.proj(",
                        False),
    "two prefix tokens": ("n_prefix: int = 1", "n_prefix: int = 2", True),
    "another prefix": ("cond * math.sqrt(cond.shape[-1])", "2 * cond", True),
    "no norm before attention": ("self.qkv(self.ln_1(x))", "self.qkv(x)", False),
    "no bias": ("self.qkv, self.proj = nn.Linear(c, 3 * c)",
                "self.qkv, self.proj = nn.Linear(c, 3 * c, bias=False)", False),
    "local attention": ("y = attention(q, k, v, is_causal=t > 1)", LOCAL_ATTENTION, False),
    "another guidance": ("null_logits + guidance * (", "null_logits + (guidance + 1) * (", True),
}


def edited_model(folder, edit):
    """model.py with an edit made in it, as a module."""
    old, new, _ = EDITS[edit]
    source = (ROOT / "model.py").read_text()
    assert source.count(old) == 1, f"model.py has changed: the edit of {old!r} finds no place"
    path = folder / "edited_model.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("edited_model", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["edited_model"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def edited_gpt(folder, edit, **changes):
    module = edited_model(folder, edit)
    torch.manual_seed(0)
    shape = {"codebook_size": 48, "grid": 4, "cond_dim": 24, "n_layer": 3, "n_head": 4,
             "n_embd": 64}
    return fill_constants(module.GPT(module.GPTConfig(**shape | changes)).eval())


def check_edited(gpt, dtype, follows, capsys, lines=0):
    """Accelerate an edited network and sample. Where fast/ follows the edit the result is the
    edited network's own; else one line says that the plain network samples."""
    generator = accelerate(gpt, dtype)
    output = capsys.readouterr().out
    assert (generator is not gpt) == follows, output
    assert output.count("\n") == (lines if follows else 1), output
    assert follows or output.startswith("fast: ") and "using the plain network" in output
    cond, uniform = gpt.condition(randn(3, 24)), rand(3, gpt.cfg.grid ** 2)
    for guidance in 1.0, 2.0:
        tokens = gpt.generate(cond, uniform, guidance, temperature=0)
        if dtype == torch.float32 or not follows:
            assert torch.equal(generator.generate(cond, uniform, guidance, temperature=0), tokens)
        exact = plain_logits(gpt, cond, tokens, guidance)
        error = relative_error(cached_logits(generator, cond, tokens, guidance), exact)
        assert error < (1e-5 if dtype == torch.float32 else 0.02) * guidance
    return generator


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("path", ["float32", "bfloat16", "bfloat16 without C"])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_network_is_followed_or_the_plain_one_samples(edit, path, tmp_path, monkeypatch,
                                                                capsys):
    gpt = edited_gpt(tmp_path, edit)
    if path == "bfloat16 without C":
        without_compiler(monkeypatch, ["no-such-compiler"])
        with pytest.warns(UserWarning, match="no-such-compiler"):
            check_edited(gpt, torch.bfloat16, EDITS[edit][2], capsys)
    else:
        check_edited(gpt, getattr(torch, path), EDITS[edit][2], capsys)


def test_where_accelerating_fails_the_plain_network_samples(monkeypatch, capsys):
    def failing(gpt, dtype):
        raise RuntimeError("no such\nkernel")
    model = tiny_gpt()
    for target, name in ((fast, "generator_class"), (CPUGenerator, "forward_embeddings")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, failing if target is CPUGenerator else lambda _: failing)
            assert accelerate(model, torch.float32) is model
        output = capsys.readouterr().out
        assert output.count("\n") == 1 and "using the plain network" in output
        assert "no such kernel" in output or target is CPUGenerator


def test_logits_that_are_not_finite_fall_back(monkeypatch, capsys):
    model = tiny_gpt()
    def no_numbers(self, x, caches, pos=0):
        return torch.full((len(x), x.shape[1], 48), torch.nan)
    monkeypatch.setattr(CPUGenerator, "forward_embeddings", no_numbers)
    assert accelerate(model, torch.float32) is model
    assert capsys.readouterr().out.count("\n") == 1


# ------------------------------------------------------------------------------------- on a GPU


def test_kernels_for_a_gpu_compute_the_same_network():
    """By Triton's interpreter, which needs no GPU."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "--durations=8",
                           "-p", "no:cacheprovider", "tests/triton_interpreted.py"], cwd=ROOT,
                          env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr


GPU_CASES = [(1, 1.0, {}), (1, 2.0, {}), (3, 1.0, {}), (3, 2.0, {}), (8, 2.0, {}), (9, 2.0, {}),
             (3, 2.0, {"n_prefix": 2}), (2, 1.0, {"n_embd": 36}),
             (1, 2.0, {"n_embd": 272, "n_head": 2, "codebook_size": 100}),
             (1, 2.0, {"n_embd": 128, "n_head": 2, "grid": 18}),
             (1, 1.0, {"n_embd": 1024, "n_head": 16, "n_layer": 8})]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype, tolerance",
                         [(torch.float32, 1e-4), (torch.float16, 5e-3), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("rows, guidance, shape", GPU_CASES)
def test_sampling_on_a_gpu_is_the_same_network(rows, guidance, shape, dtype, tolerance, capsys):
    pytest.importorskip("triton")
    model = tiny_gpt(**shape).to("cuda")
    cond, tokens = model.condition(randn(rows, 24).cuda()), tokens_for(model, rows).cuda()
    exact = plain_logits(model, cond, tokens, guidance)
    generator = generator_for(model, dtype)
    for _ in range(2):  # the second time nothing is compiled any more
        error = relative_error(cached_logits(generator, cond, tokens, guidance), exact)
        assert error < tolerance * guidance
    uniform = rand(rows, model.cfg.grid ** 2).cuda()
    for options in {}, {"top_k": 20, "top_p": 0.9}:  # by sample_kernel, and by model.sample_token
        tokens = generator.generate(cond, uniform, guidance, 0.7, **options)
        call_by_call = types.MethodType(GPT.generate, generator)
        same = (tokens == call_by_call(cond, uniform, guidance, 0.7, **options)).float()
        assert same.min() == 1 if dtype == torch.float32 else same[:, 0].mean() > 0.5
    assert not capsys.readouterr().out  # nothing has failed
