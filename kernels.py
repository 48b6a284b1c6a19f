"""Sampling on a GPU: model.GPT.run for one position, in as few and as short steps as can be.

Written call by call, a token of 24 layers starts about 400 small kernels, and starting them takes far longer than
reading the weights, which is all that one picture's token has to wait for. Two things change that. The token is
recorded as a CUDA graph, anew for each batch of pictures, and replayed (`capture`). And for one or two rows (a picture,
and itself without condition) what lies between two waits is one kernel, five a layer: a norm, the product behind it and
what follows that are `product`, the new key and value and the attention over all so far are `attention`. From Hopper on
each loads its weights, or the keys and values so far, while the kernel before it still computes: they do not depend on
it ("programmatic dependent launch").

Triton, in which the two are written, comes with torch for CUDA. Where it is missing or fails GPT samples by GPT.run."""
import functools

import torch
import triton
import triton.language as tl


@triton.jit
def product(x, gain, shift, weight, bias, y, N, K, R: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
            NORM: tl.constexpr, GELU: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr):
    """y (R, N) = f(norm(x (R, K)) @ weight (N, K).T + bias) or, if ADD, y += that. A program makes BN columns of y.

    A LayerNorm before the product is taken out of it, so that its statistics and the products are summed in one go:
    sum_k w (g (x - mean) / std + h) = (sum_k w g x - mean sum_k w g) / std + sum_k w h."""
    n, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    inside = (n < N)[:, None] & (k < K)[None, :]
    w = tl.load(weight + n[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float32)      # (BN, K)
    b = tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)                                   # (BN,)
    if NORM:
        g = tl.load(gain + k, mask=k < K, other=0.0)                                              # (K,)
        h = tl.load(shift + k, mask=k < K, other=0.0)
        b += tl.sum(w * h[None, :], 1)
        w *= g[None, :]
        wg = tl.sum(w, 1)                                                                         # (BN,)
    if EARLY:  # what stands above has not waited for the kernel before, whose results are read from here on
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    for r in tl.static_range(R):
        v = tl.load(x + r * K + k, mask=k < K, other=0.0).to(tl.float32)                          # (K,)
        out = tl.sum(w * v[None, :], 1)                                                           # (BN,)
        if NORM:
            mean = tl.sum(v, 0) / K
            out = (out - mean * wg) / tl.sqrt(tl.maximum(tl.sum(v * v, 0) / K - mean * mean, 0.0) + 1e-5)
        out += b
        if GELU:
            out = 0.5 * out * (1 + tl.erf(out * 0.7071067811865476))
        if ADD:
            out += tl.load(y + r * N + n, mask=n < N, other=0.0)
        tl.store(y + r * N + n, out.to(y.dtype.element_ty), mask=n < N)


@triton.jit
def attention(qkv, cache, position, y, T, H, D, BT: tl.constexpr, BD: tl.constexpr, EARLY: tl.constexpr):
    """y (R, H*D) = what each head of the one query in qkv (R, 3*H*D) sees of the keys and values so far, in cache
    (R, 2, H, T, D), to which its own are added at `position`. A program is one head of one row."""
    row, head, t, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BT), tl.arange(0, BD)
    now, C = tl.load(position), H * D
    where = cache + (row * 2 * H + head) * T * D                                                  # of its keys
    place, past = t[:, None] * D + d[None, :], (t < now)[:, None] & (d < D)[None, :]
    keys = tl.load(where + place, mask=past, other=0.0)                                           # (T, D)
    values = tl.load(where + H * T * D + place, mask=past, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    mine = qkv + row * 3 * C + head * D + d
    q = tl.load(mine, mask=d < D, other=0.0).to(tl.float32) / tl.sqrt(D.to(tl.float32))           # (D,)
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
    """A packed Linear, on rows x (R, K): layer(norm(x)), a GELU behind it where the layer has one, added to `add`
    (R, N) in place if given. More than two rows are left to cuBLAS."""
    rows, k = x.shape
    if rows > 2:
        y = layer(x if norm is None else norm(x))
        return y if add is None else add.add_(y)
    n = len(layer.weight)
    y = x.new_empty(rows, n, dtype=layer.weight.dtype if layer.gelu else torch.float32) if add is None else add
    width = triton.next_power_of_2(k)
    columns = max(1, (8192 if width <= 2048 else 32768) // width)  # as many weights as fit into a program's registers
    gain, shift = (layer.bias, layer.bias) if norm is None else (norm.weight, norm.bias)
    product[(triton.cdiv(n, columns),)](
        x, gain, shift, layer.weight, layer.bias, y, n, k, rows, columns, width, norm is not None, layer.gelu,
        add is not None, num_warps=4 if width <= 2048 else 8, **early(x.device))
    return y


def attend(qkv, cache, position):
    """Queries, keys and values qkv (R, 3C) of one position -> (R, C), the cache (R, 2, H, T, hd) filled up there."""
    rows, _, heads, t, d = cache.shape
    y = qkv.new_empty(rows, heads * d, dtype=cache.dtype)
    sides = triton.next_power_of_2(t), triton.next_power_of_2(d)
    attention[(rows, heads)](qkv, cache, position, y, t, heads, d, *sides,
                             num_warps=min(32, max(4, sides[0] * sides[1] // 2048)), **early(qkv.device))
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


def capture(gpt, x, caches):
    """The same as a CUDA graph, for inputs like x: a function with GPT.run's arguments, the position a number. What it
    returns is good until it is called again."""
    if caches.shape[-2] * caches.shape[-1] > 2 ** 16:
        raise ValueError("a head's keys are more than a kernel can hold")
    x, position = x.clone(), torch.zeros(1, dtype=torch.long, device=x.device)
    beside = side_stream(x.device)
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        run(gpt, x, position, caches)  # what is done but once, compiling above all, can't be recorded
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = run(gpt, x, position, caches)

    def replay(now, i, _):
        x.copy_(now)
        position.fill_(i)
        graph.replay()
        return logits
    return replay
