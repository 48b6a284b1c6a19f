"""Sampling on a GPU: a token of model.GPT.decode_logits in as few and as short steps as can be.

Written call by call, a token of 24 layers starts about 400 small kernels, and starting them takes far longer than
reading the weights, which is all that a token has to wait for. Three things change that. A whole token, from its
embedding to the next one's, is recorded as a CUDA graph, anew for each batch of pictures, and replayed (`capture`). For
up to 16 rows (8 pictures, and themselves without condition) what lies between two waits is one kernel, five a layer: a
norm, the product behind it and what follows that are `product`, the new key and value and the attention over all so far
are `attention`. The head is one more, and `choose`, which draws the token. And from Hopper on each loads its weights,
or keys and values, while the kernels before it still compute, since these do not depend on them ("programmatic
dependent launch"): weights go by the tensor memory accelerator right into shared memory, which has room for a layer or
more.

Triton, in which they are written, comes with torch for CUDA. Where it is missing or fails GPT samples by GPT.run."""
import contextlib
import ctypes
import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton import cdiv, next_power_of_2
from triton.tools.tensor_descriptor import TensorDescriptor

from model import Draw


@torch.no_grad()
def fold(gpt):
    """Takes all of a LayerNorm but the division into the weights around it, for good.

    A norm takes the stream's mean away. So what is added to the stream is given none, embeddings and the layers that
    write to it alike: then the standard deviation is the root of the mean square. Gain g and shift h go into the
    weights behind: W (g x / std + h) + b = (W g) x / std + (W h + b)."""
    added = [gpt.tok_emb.weight, gpt.pos_emb, gpt.cond_proj.weight.T, gpt.cond_proj.bias]               # (..., C)
    added += [] if gpt.null is None else [gpt.null]
    added += [w for b in gpt.blocks for layer in (b.proj, b.fc_out) for w in (layer.weight.T, layer.bias)]
    for w in added:
        w -= w.mean(-1, keepdim=True)
    pairs = [pair for b in gpt.blocks for pair in ((b.ln_1, b.qkv), (b.ln_2, b.fc))]
    for norm, linear in [*pairs, (gpt.ln_f, gpt.head)]:
        linear.bias += linear.weight @ norm.bias
        linear.weight *= norm.weight
        norm.weight.fill_(1)
        norm.bias.zero_()


@triton.jit
def product(x, weight, bias, y, stream, N, K: tl.constexpr, R: tl.constexpr, P: tl.constexpr, KP: tl.constexpr,
            BN: tl.constexpr, NORM: tl.constexpr, GELU: tl.constexpr, EARLY: tl.constexpr):
    """y (R, N) = f(norm(x (R, K)) @ weight.T + bias); where there is a float32 `stream` (R, N) it is added and the sum
    written to both. Of the norm, `fold` has left the division. A program makes BN columns of y.

    The weight (N, K) is described as (K / KP, N, KP), for P parts of a row. Triton shares a batch of products among the
    warps, and here the parts are the batch: each warp's tensor cores multiply a part of all rows, or several, and then
    the warps add up."""
    if EARLY:  # the kernel behind this one may start: it waits below, after what it can do before
        tl.extra.cuda.gdc_launch_dependents()
    at, r = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, next_power_of_2(R))
    k = tl.arange(0, P)[:, None, None] * KP + tl.arange(0, KP)[None, None, :]                     # (P, 1, KP)
    w = weight.load([0, tl.program_id(0) * BN, 0])                                                # (P, BN, KP)
    b = tl.load(bias + at, mask=at < N, other=0.0).to(tl.float32)                                 # (BN,)
    if EARLY:  # what stands above has not waited for the kernel before, whose results are read from here on
        tl.extra.cuda.gdc_wait()
    v = tl.load(x + (r[None, :, None] * K + k), mask=(r < R)[None, :, None] & (k < K), other=0.0)  # (P, R, KP)
    out = tl.sum(tl.dot(w, tl.permute(v, (0, 2, 1))), 0)                                          # (BN, R)
    if NORM:
        v = v.to(tl.float32)
        out *= tl.rsqrt(tl.sum(tl.sum(v * v, 2), 0) / K + 1e-5)[None, :]
    out += b[:, None]
    place, real = r[None, :] * N + at[:, None], (r < R)[None, :] & (at < N)[:, None]              # (BN, R)
    if stream is not None:
        out += tl.load(stream + place, mask=real, other=0.0)
        tl.store(stream + place, out, mask=real)
    if GELU:
        out = 0.5 * out * (1 + tl.erf(out * 0.7071067811865476))
    tl.store(y + place, out.to(y.dtype.element_ty), mask=real)


@triton.jit
def look(queries, keys, values, past, least, scale: tl.constexpr):
    """Scores, in powers of 2, of keys (P, TP, DP) for the query in each column of queries (P, DP, 1), where `past`
    (P, TP). Returns the greatest, `least` at least; the sum of 2 ** (score - greatest) * value (DP,); and the sum of
    2 ** (score - greatest)."""
    P: tl.constexpr = keys.shape[0]
    score = tl.reshape(tl.dot(keys, queries, input_precision="ieee"), (P, keys.shape[1]))
    score = tl.where(past, score * scale, -float("inf"))
    most = tl.maximum(tl.max(tl.max(score, 1), 0), least)
    p = tl.exp2(score - most)                                                                     # (P, TP)
    seen = tl.dot(p.to(values.dtype)[:, None, :], values, input_precision="ieee")                 # (P, 1, DP)
    # with the sum of p before that of the values Triton 3.6 has fewer loads under way at a time
    return most, tl.sum(tl.reshape(seen, (P, values.shape[2])), 0), tl.sum(tl.sum(p, 1), 0)


@triton.jit
def attention(qkv, cache, position, y, T: tl.constexpr, H: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
              TP: tl.constexpr, DP: tl.constexpr, EARLY: tl.constexpr):
    """y (R, H*D) = what each head of the one query in qkv (R, 3*H*D) sees of the keys and values so far, in cache
    (R, 2, H, T, D), to which its own are added at `position`. A program is one head of one row, which looks at P * TP
    positions at a time, TP a warp where P is 4, and then at its own."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row, head, C = tl.program_id(0).to(tl.int64), tl.program_id(1), H * D
    d, now = tl.arange(0, DP), tl.load(position)
    t = tl.arange(0, P)[:, None] * TP + tl.arange(0, TP)[None, :]                                 # (P, TP)
    where = cache + (row * 2 * H + head) * T * D                                                  # of its keys
    place, real = t[:, :, None] * D + d[None, None, :], (d < D)[None, None, :]                    # (P, TP, DP)
    keys = tl.load(where + place, mask=(t < now)[:, :, None] & real, other=0.0)
    values = tl.load(where + H * T * D + place, mask=(t < now)[:, :, None] & real, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    mine = qkv + row * 3 * C + head * D + d
    q = tl.load(mine, mask=d < D, other=0.0)                                                      # (DP,)
    k = tl.load(mine + C, mask=d < D, other=0.0)
    v = tl.load(mine + 2 * C, mask=d < D, other=0.0)
    tl.store(where + now * D + d, k, mask=d < D)
    tl.store(where + H * T * D + now * D + d, v, mask=d < D)
    scale: tl.constexpr = D ** -0.5 * 1.4426950408889634  # log2(e), for powers of 2
    own = tl.sum(k.to(tl.float32) * q.to(tl.float32), 0) * scale
    queries = tl.broadcast_to(q[None, :, None], (P, DP, 1))
    most, out, total = look(queries, keys, values, t < now, own, scale)
    for first in tl.static_range(P * TP, T, P * TP):
        past, before = first + t < now, most
        keys = tl.load(where + first * D + place, mask=past[:, :, None] & real, other=0.0)
        values = tl.load(where + (H * T + first) * D + place, mask=past[:, :, None] & real, other=0.0)
        most, seen, more = look(queries, keys, values, past, before, scale)
        out, total = out * tl.exp2(before - most) + seen, total * tl.exp2(before - most) + more
    p = tl.exp2(own - most)
    tl.store(y + row * C + head * D + d, ((out + p * v) / (total + p)).to(y.dtype.element_ty), mask=d < D)


@triton.jit
def choose(logits, uniform, temperature, guidance, tokens, embeddings, places, stream, x, position, B: tl.constexpr,
           T: tl.constexpr, K: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr):
    """Token `position` of B pictures into tokens (T, B), as model.pick draws it from all codes: logits (ROWS*B, K),
    of which a second half is without condition, and uniform numbers (B, T). Then its embedding, at the next position,
    into the float32 stream (ROWS*B, C) and into x, of the products' type. A program is one picture, and what it counts
    in `position` (B,) is its own, so that none waits for another."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    b, k, c = tl.program_id(0), tl.arange(0, next_power_of_2(K)), tl.arange(0, next_power_of_2(C))
    now = tl.load(position + b)
    u = tl.load(uniform + b * T + now)
    place = tl.load(places + tl.minimum(now + 1, T - 1) * C + c, mask=c < C)                      # (C,)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    z = tl.load(logits + b * K + k, mask=k < K, other=-float("inf")).to(tl.float32)               # (K,)
    if ROWS == 2:
        null = tl.load(logits + (B + b) * K + k, mask=k < K, other=0.0).to(tl.float32)
        z = null + guidance * (z - null)
    z = tl.where(k < K, z / temperature, -float("inf"))
    mass = tl.cumsum(tl.exp(z - tl.max(z, 0)), 0)
    token = tl.minimum(tl.sum((mass <= u * tl.max(mass, 0)).to(tl.int32), 0), K - 1)
    tl.store(tokens + now * B + b, token.to(tl.int64))
    e = tl.load(embeddings + token * C + c, mask=c < C) + place
    for r in tl.static_range(ROWS):
        tl.store(stream + (r * B + b) * C + c, e, mask=c < C)
        tl.store(x + (r * B + b) * C + c, e.to(x.dtype.element_ty), mask=c < C)
    tl.store(position + b, now + 1)


def early(device):
    """Options of a launch: whether this GPU can start a kernel before the last one has ended."""
    can = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9
    return {"EARLY": True, "launch_pdl": True} if can else {"EARLY": False}


def room(device, numbers, size):
    """`numbers` of `size` bytes each, or half as many and so on: as many as a program's shared memory can hold."""
    held = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 2 ** 16)
    while numbers * size >= held:
        numbers //= 2
    return numbers


@functools.cache
def share_memory(function):
    """Have a kernel run with three quarters of a multiprocessor's memory as shared memory and the rest as its cache.
    Kernels of unlike shares never run side by side there, and by default each has what it needs, so it changes."""
    carveout = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, in percent
    with contextlib.suppress(OSError):  # the name is Linux's
        ctypes.CDLL("libcuda.so.1").cuFuncSetAttribute(ctypes.c_void_p(function), carveout, 75)


def launch(kernel, grid, *args, **options):
    """Start a kernel on the GPU of its first argument, with what `early` says of that."""
    options |= early(args[0].device)
    compiled = kernel[grid](*args, **options)
    if options["EARLY"]:
        share_memory(compiled.function)


def linear(x, layer, norm=False, stream=None, most=32):
    """A packed Linear, on rows x (R, K): layer(norm(x)) after `fold`, a GELU behind it where the layer has one; where a
    stream (R, N) is given it is added to that in place and the sum returned. A program makes as many columns as it has
    room for, and at most `most`. Many rows, odd widths and float32 are cuBLAS's."""
    (rows, k), n, warps = x.shape, len(layer.weight), 4 if x.shape[1] <= 2048 else 8
    part = min(k & -k, next_power_of_2(cdiv(k, warps)))  # a power of 2 that divides k
    if rows > 16 or part < 16 or x.dtype == torch.float32:
        y = layer(F.layer_norm(x, (k,)) if norm else x)
        return y if stream is None else stream.add_(y).to(y.dtype)
    weights = room(x.device, 2 ** 16 if rows == 1 else 2 ** 15, x.itemsize)  # of a program, tried on an H100
    parts, columns = next_power_of_2(k // part), min(most, max(1, weights // next_power_of_2(k)))
    weight = TensorDescriptor(layer.weight, [k // part, n, part], [part, k, 1], [parts, columns, part])
    y = x.new_empty(rows, n)
    launch(product, (cdiv(n, columns),), x, weight, layer.bias, y, stream, n, k, rows, parts, part, columns, norm,
           layer.gelu, num_warps=warps)
    return y


def attend(qkv, cache, position):
    """Queries, keys and values qkv (R, 3C) of one position -> (R, C), the cache (R, 2, H, T, hd) filled up there."""
    rows, _, heads, t, d = cache.shape
    width = max(16, next_power_of_2(d))
    keys = room(qkv.device, 2 ** 14, 2 * cache.itemsize)  # numbers of keys, and of values, that four warps can hold
    seen = max(16, min(next_power_of_2(t), keys // width))  # positions at a time
    parts, y = min(4, seen // 16), qkv.new_empty(rows, heads * d)
    launch(attention, (rows, heads), qkv, cache, position, y, t, heads, d, parts, seen // parts, width, num_warps=4)
    return y


def network(gpt, stream, x, position, caches):
    """One position of the blocks and the head: its embeddings (R, C), in float32 and as x in the products' type, and
    caches (n_layer, R, 2, H, T, hd) -> logits (R, K). How many columns a program makes was tried on an H100."""
    for block, cache in zip(gpt.blocks, caches):
        y = attend(linear(x, block.qkv, norm=True, most=16), cache, position)
        x = linear(y, block.proj, stream=stream)
        x = linear(linear(x, block.fc, norm=True), block.fc_out, stream=stream)
    return linear(x, gpt.head, norm=True)


def run(gpt, x, position, caches):
    """GPT.run at one position, a tensor (1,): x (R, 1, C) -> logits (R, 1, K)."""
    stream = (x + gpt.pos_emb[position])[:, 0]                                                    # (R, C)
    return network(gpt, stream, stream.to(gpt.head.weight.dtype), position, caches)[:, None]


@functools.cache
def side_stream(device):
    """One for all recordings, since cuBLAS keeps memory for each stream it has seen."""
    return torch.cuda.Stream(device)


def capture(gpt, step, x, caches, tokens, draw, guidance):
    """A token of GPT.decode_logits as a CUDA graph: a function of its number, to be called in order.

    Where `draw` is a model.Draw from all codes, `choose` does what follows the logits. Otherwise step(i, run), which
    writes token i, is recorded as it stands. Either is run once before, since what is done but once, compiling above
    all, can't be recorded."""
    (t, b), device = tokens.shape, x.device
    position, rows = torch.zeros(b, dtype=torch.long, device=device), len(x) // b
    stream = torch.empty_like(x[:, 0])                                                            # (R, C), float32
    half = stream.to(gpt.head.weight.dtype)                                                       # for the products

    def token():
        if isinstance(draw, Draw) and draw.from_all:
            launch(choose, (b,), network(gpt, stream, half, position, caches), draw.uniform, float(draw.temperature),
                   float(guidance), tokens, gpt.tok_emb.weight, gpt.pos_emb, stream, half, position, b, t,
                   gpt.cfg.codes, gpt.cfg.n_embd, rows, num_warps=16)
        else:
            step(position[:1], functools.partial(run, gpt))
            position.add_(1)
    beside = side_stream(device)
    beside.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(beside):
            token()
    finally:
        torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token()
    position.zero_()
    stream.copy_((x + gpt.pos_emb[:1])[:, 0])
    half.copy_(stream)

    def replay(i, kept=token):  # whose tensors the graph reads and writes, `position` for i
        graph.replay()
    return replay
