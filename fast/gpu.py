"""Sampling on a GPU: one token of model.GPT.generate in as few and as short kernels as possible.

The step from one token's embedding to the next one's is captured as a CUDA graph and replayed. For
up to 16 rows a layer is five kernels (gpu_kernels.py): four of the linear layers with what goes
before and after them, and attention. The head is one more, and one draws the token.

Letters in shape comments: B images, R rows (B, or 2B with guidance), T tokens of an image, P prefix
tokens, t positions, C width, H heads, K codes; of a Linear N outputs and K inputs.
"""
import contextlib
import copy
import ctypes
import functools
import hashlib
import inspect
import types

import torch
import torch.nn.functional as F
from triton import cdiv, next_power_of_2
from triton.tools.tensor_descriptor import TensorDescriptor

from fast.gpu_kernels import attention_kernel, linear_kernel, sample_kernel
from model import sample_token

MAX_KERNEL_ROWS = 16  # more rows are cuBLAS's
LOOP_SHA256 = "edff7de5d872f7d1"  # of the source that GPUGenerator.generate_captured stands for


@torch.no_grad()
def fold_norms(gpt):
    """A copy of a GPT whose LayerNorms only divide by the root of the mean square.

    Everything that is added to the residual stream gets mean zero, so that the standard deviation
    is the root of the mean square. Gain g and shift h of a norm go into the Linear behind it:
    W (g x / std + h) + b = (W g) x / std + (W h + b).
    """
    gpt = copy.deepcopy(gpt).requires_grad_(False)
    writers = [gpt.cond_proj, *(layer for b in gpt.blocks for layer in (b.proj, b.fc_out))]
    added = [gpt.tok_emb.weight, gpt.pos_emb, *([] if gpt.null is None else [gpt.null])]
    added += [w.unflatten(0, (-1, gpt.cfg.n_embd)).movedim(1, -1)    # C last; P prefix tokens apart
              for layer in writers for w in (layer.weight, layer.bias)]
    for w in added:
        w -= w.mean(-1, keepdim=True)
    pairs = [pair for b in gpt.blocks for pair in ((b.ln_1, b.qkv), (b.ln_2, b.fc))]
    for norm, linear in [*pairs, (gpt.ln_f, gpt.head)]:
        linear.bias += linear.weight @ norm.bias
        linear.weight *= norm.weight
        norm.weight.fill_(1)
        norm.bias.zero_()
    return gpt


# ---------------------------------------------------------------------------------------- launches


def pdl_options(device):
    """Launch options: whether this GPU can start a kernel before the previous one has ended."""
    has_pdl = torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9
    return {"PDL": True, "launch_pdl": True} if has_pdl else {"PDL": False}


def fit_shared_memory(device, count, size):
    """`count`, halved until so many numbers of `size` bytes fit a program's shared memory."""
    properties = torch.cuda.get_device_properties(device)
    limit = getattr(properties, "shared_memory_per_block_optin", 2 ** 16)
    while count * size >= limit:
        count //= 2
    return count


@functools.cache
def set_carveout(function):
    """Give a kernel three quarters of a multiprocessor's memory as shared memory: kernels with
    unlike shares never run side by side, and by default each has what it needs."""
    carveout = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, in percent
    with contextlib.suppress(OSError):  # the name is Linux's
        ctypes.CDLL("libcuda.so.1").cuFuncSetAttribute(ctypes.c_void_p(function), carveout, 75)


def launch(kernel, grid, *args, **options):
    """Launch a kernel on the GPU of its first argument, with PDL where there is that."""
    options |= pdl_options(args[0].device)
    compiled = kernel[grid](*args, **options)
    if options["PDL"]:
        set_carveout(compiled.function)


def linear(x, layer, norm=False, gelu=False, residual=None, max_columns=32):
    """A Linear of a folded GPT on rows x (R, K): gelu(layer(norm(x))) (R, N). To a residual (R, N)
    it is added in place, and the sum returned. Many rows, odd widths and float32 are cuBLAS's."""
    (rows, k), n, warps = x.shape, len(layer.weight), 4 if x.shape[1] <= 2048 else 8
    split_k = min(k & -k, next_power_of_2(cdiv(k, warps)))  # a power of 2 that divides k
    if rows > MAX_KERNEL_ROWS or split_k < 16 or x.dtype == torch.float32:
        y = layer(F.layer_norm(x, (k,)) if norm else x)
        y = F.gelu(y) if gelu else y
        return y if residual is None else residual.add_(y).to(y.dtype)
    # weights of a program, tried on an H100
    weights = fit_shared_memory(x.device, 2 ** 16 if rows == 1 else 2 ** 15, x.itemsize)
    columns = min(max_columns, max(1, weights // next_power_of_2(k)))
    splits, y = next_power_of_2(k // split_k), x.new_empty(rows, n)
    weight = TensorDescriptor(layer.weight, [k // split_k, n, split_k], [split_k, k, 1],
                              [splits, columns, split_k])
    launch(linear_kernel, (cdiv(n, columns),), x, weight, layer.bias, y, residual, n, k, rows,
           splits, split_k, columns, norm, gelu, num_warps=warps)
    return y


def attention(qkv, cache, position):
    """qkv (R, 3C) of one position -> (R, C); the cache (R, 2, H, block_size, C/H) is filled in."""
    rows, _, heads, length, dim = cache.shape
    block_d = max(16, next_power_of_2(dim))
    # numbers of keys, and of values, that four warps can hold
    count = fit_shared_memory(qkv.device, 2 ** 14, 2 * cache.itemsize)
    chunk = max(16, min(next_power_of_2(length), count // block_d))     # positions at a time
    splits, y = min(4, chunk // 16), qkv.new_empty(rows, heads * dim)
    launch(attention_kernel, (rows, heads), qkv, cache, position, y, length, heads, dim, splits,
           chunk // splits, block_d, num_warps=4)
    return y


def forward_position(gpt, residual, x, position, caches):
    """Blocks and head of a folded GPT at one position, a tensor: its input (R, C) as float32
    residual and as x in the matmuls' dtype -> logits (R, K)."""
    for block, cache in zip(gpt.blocks, caches):
        qkv = linear(x, block.qkv, norm=True, max_columns=16).unflatten(-1, (3, block.n_head, -1))
        qkv = block.normalise(qkv).flatten(1)
        x = linear(attention(qkv, cache, position), block.proj, residual=residual)
        x = linear(linear(x, block.fc, norm=True, gelu=True), block.fc_out, residual=residual)
    return linear(x, gpt.head, norm=True)


@functools.cache
def side_stream(device):
    """One for all captures, since cuBLAS keeps memory for each stream."""
    return torch.cuda.Stream(device)


def capture(step, device):
    """Capture step() as a CUDA graph -> the function that replays it. It is run once before, since
    compiling can't be captured."""
    side = side_stream(device)
    side.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(side):
            step()
    finally:
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


# --------------------------------------------------------------------------------------- generator


def loop_sha256(gpt_class):
    """Identifies the sampling loop: the source of GPT.generate and sample_token."""
    source = inspect.getsource(gpt_class.generate) + inspect.getsource(sample_token)
    return hashlib.sha256(source.encode()).hexdigest()[:16]


class GPUGenerator:
    """A GPT's `generate` by these kernels, on a folded copy of its weights in `dtype`; the residual
    stream stays float32. `capture` may be replaced, by `lambda step, device: step` for no graph."""

    def __init__(self, gpt, dtype):
        self.plain, self.dtype, self.capture = gpt, dtype, capture
        self.gpt, self.cfg = fold_norms(gpt), gpt.cfg
        for block in self.gpt.blocks:
            for layer in (block.qkv, block.proj, block.fc, block.fc_out):
                layer.to(dtype)
        self.gpt.head.to(dtype)
        self.prefix, self.tok_emb, self.null = self.gpt.prefix, self.gpt.tok_emb, self.gpt.null
        if loop_sha256(type(gpt)) != LOOP_SHA256:
            print("fast: GPT.generate or sample_token was edited; sampling by them, without a CUDA "
                  "graph", flush=True)
            self.generate = types.MethodType(type(gpt).generate, self)

    def new_caches(self, rows):
        """Empty key-value caches of all blocks, (n_layer, R, 2, H, block_size, C/H)."""
        c = self.cfg
        shape = (c.n_layer, rows, 2, c.n_head, c.block_size, c.n_embd // c.n_head)
        return self.gpt.pos_emb.new_zeros(shape, dtype=self.dtype)

    def forward_embeddings(self, x, caches, pos=0):
        """Inputs (R, t, C) at positions pos.. -> logits (R, t, K), one position at a time."""
        outputs = []
        for i in range(x.shape[1]):
            position = torch.full((1,), pos + i, device=x.device)
            residual = x[:, i] + self.gpt.pos_emb[pos + i]                              # (R, C)
            logits = forward_position(self.gpt, residual, residual.to(self.dtype), position, caches)
            outputs.append(logits)
        return torch.stack(outputs, 1)

    @torch.inference_mode()
    def generate(self, cond, uniform, guidance=1.0, temperature=1.0, top_k=0, top_p=1.0,
                 negative=None):
        """GPT.generate. Where the kernels fail a line says so, and the plain network goes on."""
        assert guidance == 1.0 or not self.cfg.classic, "classic has no null embedding to guide by"
        assert uniform.shape == (len(cond), self.cfg.grid ** 2)
        options = guidance, temperature, top_k, top_p, negative
        try:
            return self.generate_captured(cond, uniform.contiguous(), *options)
        except Exception as e:  # compiling can fail in many ways
            reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
            print(f"fast: the GPU kernels failed ({reason}); using the plain network", flush=True)
            self.generate = self.plain.generate
            return self.generate(cond, uniform, *options)

    def generate_captured(self, cond, uniform, guidance, temperature, top_k, top_p, negative):
        gpt, cfg, (b, t), last = self.gpt, self.cfg, uniform.shape, self.cfg.n_prefix - 1
        prefix = self.prefix(cond).float()                                              # (B, P, C)
        if guidance != 1.0:
            null = gpt.null if negative is None else self.prefix(negative).float()
            prefix = torch.cat([prefix, null.expand_as(prefix)])                        # (2B, P, C)
        caches, residual = self.new_caches(len(prefix)), torch.zeros_like(prefix[:, last])
        x = residual.to(self.dtype)                                 # of float32 it is the residual
        tokens = torch.empty(t, b, dtype=torch.long, device=cond.device)
        position = torch.full((b,), last, device=cond.device)

        def sample_from_all(logits):
            launch(sample_kernel, (b,), logits, uniform, float(temperature), float(guidance),
                   tokens, gpt.tok_emb.weight, gpt.pos_emb, residual, x, position, b, t,
                   cfg.codebook_size, cfg.n_embd, len(prefix) // b, cfg.n_prefix, num_warps=16)

        def sample(logits):
            logits, i = logits.float(), position[:1] - last
            if guidance != 1.0:
                cond_logits, null_logits = logits.chunk(2)
                logits = null_logits + guidance * (cond_logits - null_logits)
            u = uniform[:, i].flatten()
            tokens[i] = token = sample_token(logits, u, temperature, top_k, top_p)      # (B,)
            position.add_(1)
            next_pos_emb = gpt.pos_emb[position[:1].clamp(max=cfg.block_size - 1)]      # (1, C)
            residual.view(-1, b, cfg.n_embd).copy_(gpt.tok_emb(token) + next_pos_emb)
            x.copy_(residual)

        from_all = top_k == 0 and top_p >= 1 and temperature >= 1e-6
        write_token = sample_from_all if from_all else sample
        step = self.capture(
            lambda: write_token(forward_position(gpt, residual, x, position, caches)), cond.device)
        if last:
            self.forward_embeddings(prefix[:, :last], caches)
        position.fill_(last)
        residual.copy_(prefix[:, last] + gpt.pos_emb[last])
        x.copy_(residual)
        for _ in range(t):
            step()
        return tokens.T.contiguous()
