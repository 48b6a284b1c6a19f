"""Sampling on a CPU: model.GPT's network with its weights laid out for one position of a few rows.

A token has to wait until all weights are read. Each Linear is laid out once, as the fastest matmul
for its number of rows reads it. What lies between two matmuls is kept short: plain functions in
place of modules, and in bfloat16 attention and GELU in C, where there is a C compiler.

Letters in shape comments: R rows (B images, or 2B with guidance), C width, H heads, P prefix
tokens, t positions, N a Linear's outputs, K its inputs.
"""
import ctypes
import functools
import subprocess
import tempfile
import types
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

MAX_FBGEMM_ROWS = 4                      # with more rows oneDNN's bfloat16 matmul is faster
ONE_BY_ONE = [0, 0], [1, 1], [1, 1], 1   # padding, stride, dilation, groups of a 1x1 convolution


# -------------------------------------------------------------------------------- the linear layer


def has_bfloat16():
    """Whether oneDNN computes in bfloat16 on this CPU."""
    mkldnn = torch.ops.mkldnn
    return hasattr(mkldnn, "_is_mkldnn_bf16_supported") and mkldnn._is_mkldnn_bf16_supported()


class PackedLinear:
    """A Linear for inference in `dtype`, laid out for the number of rows that it is called with.

    layout "convolution", float32: oneDNN's 1x1 convolution with the rows as pixels. For a few rows
        it is up to twice as fast as F.linear, and a row's result does not depend on other rows.
    layout "inner product", bfloat16: FBGEMM for up to MAX_FBGEMM_ROWS rows, which holds weights in
        float16 (exact between 6e-5 and 65,504) and computes in float32; else oneDNN's.
    layout "plain": F.linear, where torch or the CPU lacks these.

    `activation`, F.gelu or gelu_in_c, is fused where the matmul can. The plain weights are shared
    with the Linear, which must not be trained on: another number of rows lays them out anew.
    """

    def __init__(self, linear, dtype, activation=None):
        self.weight = linear.weight.detach()                             # (N, K)
        self.bias = linear.bias.detach().to(dtype)                       # (N,)
        self.dtype, self.activation, self.layout = dtype, activation, "plain"
        self.packed = self.rows = self.is_small = None
        self.fbgemm, self.max_fbgemm_size = None, 0
        has_onednn = hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
        if has_onednn and dtype == torch.float32:
            self.layout = "convolution"
        elif has_onednn and dtype == torch.bfloat16 and has_bfloat16():
            self.layout = "inner product"
            if torch.backends.quantized.engine in ("x86", "fbgemm"):
                self.fbgemm = torch.ops.quantized.linear_dynamic_fp16.default
                self.max_fbgemm_size = MAX_FBGEMM_ROWS * linear.in_features
        else:
            self.weight = self.weight.to(dtype)

    def __call__(self, x):
        """x (..., K) in float32 or `dtype` -> (..., N) in one of them."""
        if self.layout == "inner product":
            return self.inner_product(x)
        if self.layout == "convolution":
            return self.convolution(x)
        y = F.linear(x.to(self.dtype), self.weight, self.bias)
        return F.gelu(y) if self.activation else y

    def inner_product(self, x):
        is_small = x.numel() <= self.max_fbgemm_size
        if is_small != self.is_small:
            weight, self.is_small = self.weight.to(torch.bfloat16), is_small
            if is_small:
                self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(),
                                                                      self.bias.float())
            else:
                self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        if is_small:
            y = self.fbgemm(x.float(), self.packed)
            return self.activation(y) if self.activation else y
        post_op, gelu_kind = self.post_op()
        return torch.ops.mkldnn._linear_pointwise.default(
            x.to(torch.bfloat16), self.packed, self.bias, post_op, [], gelu_kind)

    def convolution(self, x):
        k = x.shape[-1]
        rows, shape = x.numel() // k, x.shape
        if rows != self.rows:
            self.packed, self.rows = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight[..., None, None], *ONE_BY_ONE, [1, k, 1, rows]), rows
        post_op, gelu_kind = self.post_op()
        x = x.reshape(1, 1, rows, k).permute(0, 3, 1, 2)                 # (1, K, 1, rows)
        y = torch.ops.mkldnn._convolution_pointwise.default(
            x, self.packed, self.bias, *ONE_BY_ONE, post_op, [], gelu_kind)
        return y.permute(0, 2, 3, 1).reshape(*shape[:-1], -1)

    def post_op(self):
        """oneDNN's name for what follows the matmul; of GELU's kinds "none" is the exact one."""
        return ("gelu", "none") if self.activation else ("none", "")


# --------------------------------------------------------------------- attention and GELU in C

SOURCE = r"""
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float to_float(uint16_t x)  // a bfloat16 is the upper half of a float32
{
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t to_bfloat16(float f)  // to the nearest, ties to even
{
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Attention of one position: qkv (rows, 3, heads, dim) -> y (rows, heads, dim). Its key and value
// are written into cache (rows, heads, 2, length, dim) at `pos`, and positions 0..pos are attended.
void attention(const float *qkv, uint16_t *cache, float *y,
               long rows, long heads, long length, long dim, long pos)
{
    #pragma omp parallel for
    for (long i = 0; i < rows * heads; i++) {
        const float *query = qkv + (i / heads * 3 * heads + i % heads) * dim;
        const float *key = query + heads * dim, *value = key + heads * dim;
        uint16_t *keys = cache + i * 2 * length * dim, *values = keys + length * dim;
        float p[pos + 1], sum[dim], max_score = -FLT_MAX, total = 0, scale = 1 / sqrtf(dim);
        for (long d = 0; d < dim; d++) {
            keys[pos * dim + d] = to_bfloat16(key[d]);
            values[pos * dim + d] = to_bfloat16(value[d]);
            sum[d] = 0;
        }
        for (long t = 0; t <= pos; t++) {
            float score = 0;
            // the values are read in the last loop
            for (long d = 0; d < dim; d += 32) __builtin_prefetch(values + t * dim + d);
            for (long d = 0; d < dim; d++) score += query[d] * to_float(keys[t * dim + d]);
            p[t] = score * scale;
            max_score = fmaxf(max_score, p[t]);
        }
        for (long t = 0; t <= pos; t++) total += p[t] = expf(p[t] - max_score);
        for (long t = 0; t <= pos; t++)
            for (long d = 0; d < dim; d++) sum[d] += p[t] * to_float(values[t * dim + d]);
        for (long d = 0; d < dim; d++) y[i * dim + d] = sum[d] / total;
    }
}

void gelu(float *x, long n)  // the exact one, in place
{
    #pragma omp parallel for simd
    for (long i = 0; i < n; i++) x[i] *= 0.5f + 0.5f * erff(x[i] * 0.70710678f);
}
"""
# -nostdlib: no start-up code that flushes the whole process's denormals to zero, and no second
# OpenMP beside torch's
COMMAND = ("cc -O3 -march=native -ffast-math -fopenmp -shared -fPIC -nostdlib -x c - -lm -lc "
           "-o").split()


@functools.cache
def compiled():
    """The compiled library with `attention` and `gelu`, or None, with a warning that says why."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernels.so")
            subprocess.run([*COMMAND, path], input=SOURCE.encode(), check=True,
                           capture_output=True, timeout=60)
            library = ctypes.CDLL(str(path))
            attention, gelu = library.attention, library.gelu
    except (OSError, AttributeError, subprocess.SubprocessError) as e:
        stderr = (getattr(e, "stderr", None) or b"").decode(errors="replace").strip()
        warnings.warn(f"fast/cpu.py can't compile its C ({stderr.splitlines()[0] if stderr else e})"
                      f", attention and GELU are computed by torch")
        return None
    attention.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 5
    gelu.argtypes = [ctypes.c_void_p, ctypes.c_long]
    attention.restype = gelu.restype = None
    return library


def attention_in_c(qkv, cache):
    """As attention_by_torch, for a bfloat16 cache that lies in memory as CPUGenerator makes it."""
    assert cache.dtype == torch.bfloat16 and cache.stride(2) == 2 * cache.stride(1)
    rows, _, heads, t, dim = cache.shape
    qkv = qkv.float().contiguous()
    y = torch.empty(rows, 1, heads * dim, dtype=torch.float32)
    compiled().attention(qkv.data_ptr(), cache.data_ptr(), y.data_ptr(),
                         rows, heads, cache.stride(1) // dim, dim, t - 1)
    return y


def gelu_in_c(x):
    """The exact GELU of a contiguous float32 tensor, in place."""
    compiled().gelu(x.data_ptr(), x.numel())
    return x


def attention_by_torch(qkv, cache):
    """Attention of one position: qkv (R, 1, 3C) -> (R, 1, C). The cache (R, 2, H, pos+1, C/H) ends
    with this position, whose key and value are written into it."""
    rows, _, heads, t, dim = cache.shape
    qkv = qkv.view(rows, 3, heads, 1, dim)
    cache.narrow(3, t - 1, 1).copy_(qkv.narrow(1, 1, 2))
    q, kv = qkv.select(1, 0).float(), cache.float()
    return F.scaled_dot_product_attention(q, *kv.unbind(1)).reshape(rows, 1, -1)


# ------------------------------------------------------------------------------------- the network


def layer_norm(norm):
    """An nn.LayerNorm as a plain function."""
    return functools.partial(torch.layer_norm, normalized_shape=norm.normalized_shape,
                             weight=norm.weight, bias=norm.bias, eps=norm.eps)


class PackedBlock:
    """model.Block at one position."""

    def __init__(self, block, dtype, attention, gelu):
        self.ln_1, self.ln_2 = layer_norm(block.ln_1), layer_norm(block.ln_2)
        self.qkv, self.proj = PackedLinear(block.qkv, dtype), PackedLinear(block.proj, dtype)
        self.fc = PackedLinear(block.fc, dtype, gelu)
        self.fc_out = PackedLinear(block.fc_out, dtype)
        self.attention, self.normalise, self.n_head = attention, block.normalise, block.n_head

    def __call__(self, x, cache):
        """x (R, 1, C) and the cache up to this position (R, 2, H, pos+1, C/H) -> (R, 1, C)."""
        qkv = self.qkv(self.ln_1(x)).unflatten(-1, (3, self.n_head, -1))  # (R, 1, 3, H, C/H)
        x = x + self.proj(self.attention(self.normalise(qkv), cache))
        return x + self.fc_out(self.fc(self.ln_2(x)))


class CPUGenerator:
    """A GPT's `generate` with packed layers in `dtype`; the stream between the blocks and the norms
    stay float32. `layers` are the packed layers that run for every token."""

    def __init__(self, gpt, dtype):
        self.generate, self.prefix = (types.MethodType(function, self) for function in
                                      (type(gpt).generate, type(gpt).prefix))
        attention, gelu = attention_by_torch, F.gelu
        if dtype == torch.bfloat16 and compiled():
            attention, gelu = attention_in_c, gelu_in_c
        self.cfg, self.dtype = gpt.cfg, dtype
        self.null, self.pos_emb, self.tok_emb = gpt.null, gpt.pos_emb, gpt.tok_emb.forward
        self.cond_proj, self.head = (PackedLinear(layer, dtype)
                                     for layer in (gpt.cond_proj, gpt.head))
        self.ln_f = layer_norm(gpt.ln_f)
        self.blocks = [PackedBlock(block, dtype, attention, gelu) for block in gpt.blocks]
        self.layers = [layer for b in self.blocks for layer in (b.qkv, b.proj, b.fc, b.fc_out)]
        self.layers.append(self.head)

    def new_caches(self, rows):
        """Empty key-value caches (n_layer, R, 2, H, block_size, C/H). In memory a head's values lie
        behind its keys, since the same core reads both."""
        c = self.cfg
        shape = (c.n_layer, rows, c.n_head, 2, c.block_size, c.n_embd // c.n_head)
        return self.pos_emb.new_zeros(shape, dtype=self.dtype).transpose(2, 3)

    def forward_embeddings(self, x, caches, pos=0):
        """Inputs (R, t, C) at positions pos.. -> logits (R, t, K), one position at a time."""
        if x.shape[1] > 1:
            return torch.cat([self.forward_embeddings(x[:, i:i + 1], caches, pos + i)
                              for i in range(x.shape[1])], 1)
        x = x + self.pos_emb[pos:pos + 1]                                # (R, 1, C)
        # all blocks' views at once: at batch 1 the calls between two matmuls count
        for block, cache in zip(self.blocks, caches.narrow(4, 0, pos + 1).unbind()):
            x = block(x, cache)
        return self.head(self.ln_f(x))
