"""Sampling on a GPU: a token of model.GPT.decode_logits in as few and as short steps as can be.

Written call by call, a token of 24 layers starts about 400 small kernels, and starting them takes far longer than
reading the weights, which is all that one picture's token has to wait for. Two things change that. A whole token, from
its embedding to the choice of the next, is recorded as a CUDA graph, anew for each batch of pictures, and replayed
(`capture`). And for one or two rows (a picture, and itself without condition) what lies between two waits is one
kernel, five a layer: a norm, the product behind it and what follows that are `product`, the new key and value and the
attention over all so far are `attention`. From Hopper on each loads its weights, or the keys and values so far, while
the kernels before it still compute: they do not depend on them ("programmatic dependent launch").

Triton, in which the two are written, comes with torch for CUDA. Where it is missing or fails GPT samples by GPT.run."""
import functools

import torch
import triton
import triton.language as tl
from triton import cdiv, next_power_of_2


@torch.no_grad()
def fold(gpt):
    """Takes all of a LayerNorm but the division by the standard deviation into the weights behind it, for good.

    W (g (x - mean) / std + h) + b = V x / std + (W h + b), where V is W g less the mean of each of its rows: x - mean
    is x without what it has in common with (1, ..., 1), and V gives 0 for that; in half precision nearly 0, which will
    do, for the inputs' mean is a few hundredths of their deviation (in the demo's GPT 0.08 at most)."""
    pairs = [pair for b in gpt.blocks for pair in ((b.ln_1, b.qkv), (b.ln_2, b.fc))]
    for norm, linear in [*pairs, (gpt.ln_f, gpt.head)]:
        linear.bias += linear.weight @ norm.bias
        linear.weight *= norm.weight
        linear.weight -= linear.weight.mean(1, keepdim=True)
        norm.weight.fill_(1)
        norm.bias.zero_()


@triton.jit
def add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def product(x, weight, bias, y, N, K: tl.constexpr, R: tl.constexpr, BN: tl.constexpr, NORM: tl.constexpr,
            GELU: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr):
    """y (R, N) = f(norm(x (R, K)) @ weight (N, K).T + bias) or, if ADD, y += that; of the norm, `fold` has left the
    division. A program makes BN columns of y.

    The weights lie in three dimensions, (BN, J, W), so that Triton gives a warp whole rows of them and a thread some
    neighbours in each of the J parts of a row: most of the sum is then within a thread, the rest within a warp."""
    if EARLY:  # the kernel behind this one may start: it waits below, after what it can do before
        tl.extra.cuda.gdc_launch_dependents()
    W: tl.constexpr = min(256, next_power_of_2(K))
    J: tl.constexpr = next_power_of_2(cdiv(K, W))
    n, k = tl.arange(0, BN), tl.arange(0, J)[:, None] * W + tl.arange(0, W)[None, :]              # (BN,), (J, W)
    at = tl.program_id(0) * BN + n
    w = tl.load(weight + tl.program_id(0).to(tl.int64) * BN * K + (n[:, None, None] * K + k[None]),
                mask=(at < N)[:, None, None] & (k < K)[None], other=0.0)                          # (BN, J, W)
    b = tl.load(bias + at, mask=at < N, other=0.0).to(tl.float32)                                 # (BN,)
    if EARLY:  # what stands above has not waited for the kernel before, whose results are read from here on
        tl.extra.cuda.gdc_wait()
    for r in tl.static_range(R):
        v = tl.load(x + r * K + k, mask=k < K, other=0.0).to(tl.float32)                          # (J, W)
        rest = b + tl.load(y + r * N + at, mask=at < N, other=0.0) if ADD else b
        out = tl.sum(tl.sum(w.to(tl.float32) * v[None], 1), 1)                                    # (BN,)
        if NORM:
            v = tl.ravel(v)
            total, squares = tl.reduce((v, v * v), 0, add_both)
            mean = total / K
            out *= tl.rsqrt(tl.maximum(squares / K - mean * mean, 0.0) + 1e-5)
        out += rest
        if GELU:
            out = 0.5 * out * (1 + tl.erf(out * 0.7071067811865476))
        tl.store(y + r * N + at, out.to(y.dtype.element_ty), mask=at < N)


@triton.jit
def attention(qkv, cache, position, y, T: tl.constexpr, H: tl.constexpr, D: tl.constexpr, EARLY: tl.constexpr):
    """y (R, H*D) = what each head of the one query in qkv (R, 3*H*D) sees of the keys and values so far, in cache
    (R, 2, H, T, D), to which its own are added at `position`. A program is one head of one row."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row, head, C = tl.program_id(0).to(tl.int64), tl.program_id(1), H * D
    t, d, now = tl.arange(0, next_power_of_2(T)), tl.arange(0, next_power_of_2(D)), tl.load(position)
    where = cache + (row * 2 * H + head) * T * D                                                  # of its keys
    place, past = t[:, None] * D + d[None, :], (t < now)[:, None] & (d < D)[None, :]
    keys = tl.load(where + place, mask=past, other=0.0)                                           # (T, D)
    values = tl.load(where + H * T * D + place, mask=past, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    mine = qkv + row * 3 * C + head * D + d
    q = tl.load(mine, mask=d < D, other=0.0).to(tl.float32) * D ** -0.5                           # (D,)
    k = tl.load(mine + C, mask=d < D, other=0.0).to(cache.dtype.element_ty)
    v = tl.load(mine + 2 * C, mask=d < D, other=0.0).to(cache.dtype.element_ty)
    tl.store(where + now * D + d, k, mask=d < D)
    tl.store(where + H * T * D + now * D + d, v, mask=d < D)
    score = tl.where(t < now, tl.sum(keys.to(tl.float32) * q[None, :], 1), -float("inf"))         # (T,)
    own = tl.sum(k.to(tl.float32) * q, 0)
    most = tl.maximum(tl.max(score, 0), own)
    p, p_own = tl.exp(score - most), tl.exp(own - most)
    out = tl.sum(values.to(tl.float32) * p[:, None], 0) + p_own * v.to(tl.float32)                # (D,)
    tl.store(y + row * C + head * D + d, (out / (tl.sum(p, 0) + p_own)).to(y.dtype.element_ty), mask=d < D)


def early(device):
    """Options of a launch: whether this GPU can start a kernel before the last one has ended."""
    can = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9
    return {"EARLY": True, "launch_pdl": True} if can else {"EARLY": False}


def linear(x, layer, norm=None, add=None):
    """A packed Linear, on rows x (R, K): layer(norm(x)) after `fold`, a GELU behind it where the layer has one, added
    to `add` (R, N) in place if given. More than two rows are left to cuBLAS."""
    rows, k = x.shape
    if rows > 2:
        y = layer(x if norm is None else norm(x))
        return y if add is None else add.add_(y)
    n = len(layer.weight)
    y = x.new_empty(rows, n) if add is None else add
    columns = max(1, (8192 if k <= 2048 else 32768) // next_power_of_2(k))  # as many as fit into a program's registers
    product[(cdiv(n, columns),)](x, layer.weight, layer.bias, y, n, k, rows, columns, norm is not None, layer.gelu,
                                 add is not None, num_warps=4 if k <= 2048 else 8, **early(x.device))
    return y


def attend(qkv, cache, position):
    """Queries, keys and values qkv (R, 3C) of one position -> (R, C), the cache (R, 2, H, T, hd) filled up there."""
    rows, _, heads, t, d = cache.shape
    y = qkv.new_empty(rows, heads * d)
    warps = min(32, max(4, next_power_of_2(t) * next_power_of_2(d) // 2048))
    attention[(rows, heads)](qkv, cache, position, y, t, heads, d, num_warps=warps, **early(qkv.device))
    return y


def run(gpt, x, position, caches):
    """GPT.run at one position, a tensor (1,): x (R, 1, C), caches (n_layer, R, 2, H, T, hd) -> logits (R, 1, K)."""
    x = (x + gpt.pos_emb[position])[:, 0]                                                         # (R, C)
    for block, cache in zip(gpt.blocks, caches):
        y = attend(linear(x, block.qkv, block.ln_1), cache, position)
        linear(y, block.proj, add=x)
        linear(linear(x, block.fc, block.ln_2), block.fc_out, add=x)
    return linear(x, gpt.head, gpt.ln_f)[:, None]


@functools.cache
def side_stream(device):
    """One for all recordings, since cuBLAS keeps memory for each stream it has seen."""
    return torch.cuda.Stream(device)


def capture(gpt, step):
    """step(i, run), which writes token i, as a CUDA graph: a function of i. It is run once before, for token 0, since
    what is done but once, compiling above all, can't be recorded."""
    if next_power_of_2(gpt.cfg.grid ** 2) * next_power_of_2(gpt.cfg.n_embd // gpt.cfg.n_head) > 2 ** 16:
        raise ValueError("a head's keys are more than a kernel can hold")
    position = torch.zeros(1, dtype=torch.long, device=gpt.pos_emb.device)
    token, beside = functools.partial(step, position, functools.partial(run, gpt)), side_stream(position.device)
    beside.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(beside):
            token()
    finally:
        torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token()

    def replay(i):
        position.fill_(i)
        graph.replay()
    return replay
