"""Sampling in bfloat16 on a CPU: what takes longest between two products of model.GPT.decode_logits, in C.

A token has to wait for the weights to be read; what lies between two products comes on top, and the most of that is
attention. torch writes all keys and values so far out as float32 first and then computes a product for each head; with
a single query, starting a product costs more than computing it. Here a head is one loop: it reads each key and each
value once, in bfloat16, and widens it in a register; sums are float32. The GELU behind FBGEMM's product (of up to four
rows; oneDNN's products contain theirs) is next: torch has oneDNN compute it, and starting that takes longer than
computing a row's few thousand numbers. Heads and numbers are shared out among torch's own threads.

The machine's C compiler compiles this when a GPT is packed, in a fifth of a second or a third. Where there is none, or
it fails, model.py computes the same by torch."""
import ctypes
import functools
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

SOURCE = r"""
#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float widened(uint16_t x)  // a bfloat16 is the upper half of a float32
{
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint16_t rounded(float f)  // to the nearest, of two the even one
{
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// What the query of each head sees of the keys and values so far, in cache (rows, heads, 2, length, size), to which its
// own are added at `now`: qkv (rows, 3, heads, size) -> y (rows, heads, size).
void attention(const float *qkv, uint16_t *cache, float *y, long rows, long heads, long length, long size, long now)
{
    #pragma omp parallel for
    for (long i = 0; i < rows * heads; i++) {
        const float *query = qkv + (i / heads * 3 * heads + i % heads) * size;
        const float *key = query + heads * size, *value = key + heads * size;
        uint16_t *keys = cache + i * 2 * length * size, *values = keys + length * size;
        float p[now + 1], seen[size], most = -FLT_MAX, total = 0, scale = 1 / sqrtf(size);
        for (long d = 0; d < size; d++) {
            keys[now * size + d] = rounded(key[d]);
            values[now * size + d] = rounded(value[d]);
            seen[d] = 0;
        }
        for (long t = 0; t <= now; t++) {
            float score = 0;
            for (long d = 0; d < size; d += 32) __builtin_prefetch(values + t * size + d);  // by then they are here
            for (long d = 0; d < size; d++) score += query[d] * widened(keys[t * size + d]);
            p[t] = score * scale;
            most = fmaxf(most, p[t]);
        }
        for (long t = 0; t <= now; t++) total += p[t] = expf(p[t] - most);
        for (long t = 0; t <= now; t++)
            for (long d = 0; d < size; d++) seen[d] += p[t] * widened(values[t * size + d]);
        for (long d = 0; d < size; d++) y[i * size + d] = seen[d] / total;
    }
}

void gelu(float *x, long n)  // the exact one, in place
{
    #pragma omp parallel for simd
    for (long i = 0; i < n; i++) x[i] *= 0.5f + 0.5f * erff(x[i] * 0.70710678f);
}
"""
# Sums in whatever order is fast; -nostdlib keeps the compiler from adding code that rounds the whole process's smallest
# numbers to zero, and an OpenMP of its own beside torch's, whose threads would get into each other's way.
COMMAND = "cc -O3 -march=native -ffast-math -fopenmp -shared -fPIC -nostdlib -x c - -lm -lc -o".split()


@functools.cache
def compiled():
    """The two C functions, or None, with a warning, where they can't be had."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder, "kernels.so")
            subprocess.run([*COMMAND, library], input=SOURCE.encode(), check=True, capture_output=True, timeout=60)
            functions = ctypes.CDLL(str(library))
            functions.attention, functions.gelu  # are in it
    except (OSError, AttributeError, subprocess.SubprocessError) as e:
        why = (getattr(e, "stderr", None) or b"").decode(errors="replace").strip().split("\n")[0]
        warnings.warn(f"kernels_cpu.py can't be used here ({why or e}), sampling by torch alone")
        return None
    functions.attention.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_long] * 5
    functions.gelu.argtypes = [ctypes.c_void_p, ctypes.c_long]
    functions.attention.restype = functions.gelu.restype = None
    return functions.attention, functions.gelu


def attend(qkv, seen):
    """Queries, keys and values (R, 1, 3C) of one position, and views (R, 2, H, pos+1, hd) of the keys and values of a
    dense bfloat16 cache (R, H, 2, T, hd), of which it fills in the last -> (R, 1, C) float32. For where `compiled`
    returns the functions."""
    assert seen.dtype == torch.bfloat16 and seen.stride(2) == 2 * seen.stride(1)  # as C takes it to lie
    attention, _ = compiled()
    (rows, _, heads, t, size), qkv = seen.shape, qkv.float().contiguous()
    y = torch.empty(rows, 1, heads * size, dtype=torch.float32)
    attention(qkv.data_ptr(), seen.data_ptr(), y.data_ptr(), rows, heads, seen.stride(1) // size, size, t - 1)
    return y


def gelu(x):
    """The exact GELU of float32 numbers that lie one behind the other, in place. Returns x."""
    _, function = compiled()
    function(x.data_ptr(), x.numel())
    return x
