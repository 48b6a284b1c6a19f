"""The Triton kernels of gpu.py. TRITON_INTERPRET=1 runs them without a GPU, as the tests do.

linear_kernel: a LayerNorm, the matmul behind it, and a GELU or the residual. attention_kernel:
extends the key-value cache and attends. sample_kernel: logits to token to the next input.

With PDL (programmatic dependent launch, from Hopper on) a kernel loads its weights, or keys and
values, while the kernels before it still compute. Letters in shape comments are gpu.py's.
"""
import triton
import triton.language as tl
from triton import next_power_of_2


@triton.jit
def linear_kernel(x, weight, bias, y, residual, N, K: tl.constexpr, R: tl.constexpr,
                  SPLITS: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_N: tl.constexpr,
                  NORM: tl.constexpr, GELU: tl.constexpr, PDL: tl.constexpr):
    """y (R, N) = gelu(norm(x (R, K)) @ weight.T + bias). A float32 `residual` (R, N), unless None,
    is added, and the sum written to both. A program makes BLOCK_N columns of y.

    The weight (N, K) is described as (K / SPLIT_K, N, SPLIT_K), SPLITS parts of a row. They are the
    batch of tl.dot, which Triton shares among the warps; then the warps add up."""
    if PDL:  # the next kernel may start: it waits below, after what it can do before
        tl.extra.cuda.gdc_launch_dependents()
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, next_power_of_2(R))
    k = tl.arange(0, SPLITS)[:, None, None] * SPLIT_K + tl.arange(0, SPLIT_K)[None, None, :]
    w = weight.load([0, tl.program_id(0) * BLOCK_N, 0])                 # (SPLITS, BLOCK_N, SPLIT_K)
    b = tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)   # (BLOCK_N,)
    if PDL:  # from here on the previous kernel's results are read
        tl.extra.cuda.gdc_wait()
    v = tl.load(x + (rows[None, :, None] * K + k),                      # (SPLITS, R, SPLIT_K)
                mask=(rows < R)[None, :, None] & (k < K), other=0.0)
    out = tl.sum(tl.dot(w, tl.permute(v, (0, 2, 1))), 0)                # (BLOCK_N, R)
    if NORM:
        v = v.to(tl.float32)
        out *= tl.rsqrt(tl.sum(tl.sum(v * v, 2), 0) / K + 1e-5)[None, :]
    out += b[:, None]
    offsets = rows[None, :] * N + cols[:, None]                         # (BLOCK_N, R)
    mask = (rows < R)[None, :] & (cols < N)[:, None]
    if residual is not None:
        out += tl.load(residual + offsets, mask=mask, other=0.0)
        tl.store(residual + offsets, out, mask=mask)
    if GELU:
        out = 0.5 * out * (1 + tl.erf(out * 0.7071067811865476))
    tl.store(y + offsets, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def attend_chunk(queries, keys, values, in_past, min_max, scale: tl.constexpr):
    """Scores, in powers of 2, of keys (S, TS, D) for the query that is each column of queries
    (S, D, 1), where `in_past` (S, TS). Returns the greatest, at least `min_max`; the sum of
    2 ** (score - greatest) * value (D,); and the sum of 2 ** (score - greatest)."""
    S: tl.constexpr = keys.shape[0]
    score = tl.reshape(tl.dot(keys, queries, input_precision="ieee"), (S, keys.shape[1]))
    score = tl.where(in_past, score * scale, -float("inf"))
    max_score = tl.maximum(tl.max(tl.max(score, 1), 0), min_max)
    p = tl.exp2(score - max_score)                                      # (S, TS)
    out = tl.dot(p.to(values.dtype)[:, None, :], values, input_precision="ieee")     # (S, 1, D)
    # with the sum of p before that of the values Triton 3.6 has fewer loads under way at a time
    return max_score, tl.sum(tl.reshape(out, (S, values.shape[2])), 0), tl.sum(tl.sum(p, 1), 0)


@triton.jit
def attention_kernel(qkv, cache, position, y, T: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
                     SPLITS: tl.constexpr, SPLIT_T: tl.constexpr, BLOCK_D: tl.constexpr,
                     PDL: tl.constexpr):
    """y (R, H*D) = attention of the one query in qkv (R, 3*H*D) to the keys and values in cache
    (R, 2, H, T, D), into which its own are written at `position`. A program is one head of one row:
    SPLITS * SPLIT_T positions at a time, SPLIT_T a warp where SPLITS is 4, then its own."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row, head, C = tl.program_id(0).to(tl.int64), tl.program_id(1), H * D
    d, pos = tl.arange(0, BLOCK_D), tl.load(position)
    t = tl.arange(0, SPLITS)[:, None] * SPLIT_T + tl.arange(0, SPLIT_T)[None, :]
    head_keys = cache + (row * 2 * H + head) * T * D
    offsets = t[:, :, None] * D + d[None, None, :]                      # (SPLITS, SPLIT_T, BLOCK_D)
    mask = (d < D)[None, None, :]
    keys = tl.load(head_keys + offsets, mask=(t < pos)[:, :, None] & mask, other=0.0)
    values = tl.load(head_keys + H * T * D + offsets, mask=(t < pos)[:, :, None] & mask, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    query = qkv + row * 3 * C + head * D + d
    q = tl.load(query, mask=d < D, other=0.0)                           # (D,)
    k = tl.load(query + C, mask=d < D, other=0.0)
    v = tl.load(query + 2 * C, mask=d < D, other=0.0)
    tl.store(head_keys + pos * D + d, k, mask=d < D)
    tl.store(head_keys + H * T * D + pos * D + d, v, mask=d < D)
    scale: tl.constexpr = D ** -0.5 * 1.4426950408889634  # log2(e), for powers of 2
    self_score = tl.sum(k.to(tl.float32) * q.to(tl.float32), 0) * scale
    queries = tl.broadcast_to(q[None, :, None], (SPLITS, BLOCK_D, 1))
    max_score, out, total = attend_chunk(queries, keys, values, t < pos, self_score, scale)
    for first in tl.static_range(SPLITS * SPLIT_T, T, SPLITS * SPLIT_T):
        in_past, old_max = first + t < pos, max_score
        chunk, chunk_mask = head_keys + first * D + offsets, in_past[:, :, None] & mask
        keys = tl.load(chunk, mask=chunk_mask, other=0.0)
        values = tl.load(chunk + H * T * D, mask=chunk_mask, other=0.0)
        max_score, o, p_sum = attend_chunk(queries, keys, values, in_past, old_max, scale)
        out = out * tl.exp2(old_max - max_score) + o
        total = total * tl.exp2(old_max - max_score) + p_sum
    p = tl.exp2(self_score - max_score)
    out = (out + p * v) / (total + p)
    tl.store(y + row * C + head * D + d, out.to(y.dtype.element_ty), mask=d < D)


@triton.jit
def sample_kernel(logits, uniform, temperature, guidance, tokens, tok_emb, pos_emb, residual, x,
                  position, B: tl.constexpr, T: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
                  ROWS: tl.constexpr, P: tl.constexpr, PDL: tl.constexpr):
    """The token behind `position` (B,) into tokens (T, B), as model.sample_token draws it from all
    codes: logits (ROWS*B, K), a second half without condition, and uniform numbers (B, T). Then the
    next position's input into residual (ROWS*B, C), float32, and x, of the matmuls' dtype. A
    program is one image and counts its own position, so that none waits for another."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    b, k, c = tl.program_id(0), tl.arange(0, next_power_of_2(K)), tl.arange(0, next_power_of_2(C))
    pos = tl.load(position + b)
    i = pos - (P - 1)                                                   # number of the token
    u = tl.load(uniform + b * T + i)
    next_pos = tl.minimum(pos + 1, P + T - 2)
    next_pos_emb = tl.load(pos_emb + next_pos * C + c, mask=c < C)      # (C,)
    if PDL:
        tl.extra.cuda.gdc_wait()
    z = tl.load(logits + b * K + k, mask=k < K, other=-float("inf")).to(tl.float32)         # (K,)
    if ROWS == 2:
        null = tl.load(logits + (B + b) * K + k, mask=k < K, other=0.0).to(tl.float32)
        z = null + guidance * (z - null)
    z = tl.where(k < K, z / temperature, -float("inf"))
    mass = tl.cumsum(tl.exp(z - tl.max(z, 0)), 0)
    token = tl.minimum(tl.sum((mass <= u * tl.max(mass, 0)).to(tl.int32), 0), K - 1)
    tl.store(tokens + i * B + b, token.to(tl.int64))
    e = tl.load(tok_emb + token * C + c, mask=c < C) + next_pos_emb
    for r in tl.static_range(ROWS):
        tl.store(residual + (r * B + b) * C + c, e, mask=c < C)
        tl.store(x + (r * B + b) * C + c, e.to(x.dtype.element_ty), mask=c < C)
    tl.store(position + b, pos + 1)
