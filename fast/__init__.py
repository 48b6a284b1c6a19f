"""The same sampling, faster: `accelerate(gpt, dtype)`. model.py knows nothing of this folder, and
without it everything works."""
import torch
import torch.nn.functional as F

ROWS = 8             # of the comparison, for sample.py's 4 images with guidance are 8 rows, too
TOKENS = 3           # of the comparison, behind the prefix
LATE_POSITION = 63   # the last one compared, where there are so many
MAX_FLOAT32 = 1e-4   # relative difference in float32; 24 layers of width 1024 have 2e-6
MAX_ROUNDINGS = 2    # in half precision, in units of autocast's difference; bfloat16 has up to 1


def accelerate(gpt, dtype):
    """What samples as `gpt` (a model.GPT) does by the same `generate`, but faster and in `dtype`;
    `gpt` itself is not changed. Where its logits differ from GPT.forward's by more than rounding,
    as after an edit of model.py, or anything fails, a line says so and `gpt` is returned."""
    try:
        Generator = generator_class(next(gpt.parameters()).device.type)
        if Generator is None:
            return gpt
        generator = Generator(gpt, dtype)
        error, tolerance = compare(generator, gpt, dtype)
    except Exception as e:  # an edited network may lack anything, compiling fails in many ways
        reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
        print(f"fast: this network can't be accelerated ({reason}); using the plain network",
              flush=True)
        return gpt
    if error <= tolerance:  # which NaN is not
        return generator
    print(f"fast: the accelerated logits differ from the plain network's by {100 * error:.2g}%, of "
          f"which rounding explains {100 * tolerance:.2g}% (was model.py edited?); using the plain "
          f"network", flush=True)
    return gpt


def generator_class(kind):
    """The class for a kind of device, None where there is none."""
    if kind == "cpu":
        from fast.cpu import CPUGenerator
        return CPUGenerator
    if kind == "cuda":
        from fast.gpu import GPUGenerator
        return GPUGenerator
    return None


@torch.inference_mode()
def compare(generator, gpt, dtype):
    """Relative RMS difference of a generator's logits from those of `gpt` in float32, and the most
    that rounding to `dtype` explains.

    The first logits are compared with the uncached GPT.forward, two images repeated to ROWS rows;
    those of a late position with the plain network's behind the same random keys and values.
    """
    cfg, device = gpt.cfg, next(gpt.parameters()).device
    rng = torch.Generator().manual_seed(0)
    cond = F.normalize(torch.randn(2, cfg.cond_dim, generator=rng), dim=-1).to(device)
    count = min(TOKENS, cfg.grid ** 2 - 1)
    tokens = torch.randint(cfg.codebook_size, (2, count), generator=rng).to(device)
    pos, repeat = min(LATE_POSITION, cfg.block_size - 1), ROWS // 2
    past = torch.randn(2, 1, 1, pos, cfg.n_embd // cfg.n_head, generator=rng).to(device)
    with torch.autocast(device.type, enabled=False):
        exact = gpt(cond, tokens).float()                                # (2, count+1, K)
        caches = gpt.new_caches(2)
        caches[..., :pos, :] = past
        late_exact = gpt.forward_embeddings(gpt.prefix(cond)[:, -1:], caches, pos).float()

        cond_rows = cond.repeat(repeat, 1)                               # (ROWS, D)
        logits = cached_logits(generator, cond_rows, tokens.repeat(repeat, 1))
        caches = generator.new_caches(ROWS)
        caches[..., :pos, :] = past.transpose(0, 1)
        x = generator.prefix(cond_rows)[:, -1:].float()
        late_logits = generator.forward_embeddings(x, caches, pos)       # (ROWS, 1, K)
    error = max(relative_error(logits, exact.repeat(repeat, 1, 1)),
                relative_error(late_logits, late_exact.repeat(repeat, 1, 1)))
    if dtype == torch.float32:
        return error, MAX_FLOAT32
    with torch.autocast(device.type, dtype):
        return error, MAX_ROUNDINGS * relative_error(gpt(cond, tokens), exact)


def relative_error(logits, exact):
    return ((logits.float() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def cached_logits(generator, cond, tokens):
    """The logits (B, t+1, K) before, between and behind tokens (B, t), one token at a time."""
    x, pos, outputs = generator.prefix(cond).float(), 0, []
    caches = generator.new_caches(len(x))
    for i in range(tokens.shape[1] + 1):
        outputs.append(generator.forward_embeddings(x, caches, pos)[:, -1])
        pos += x.shape[1]
        if i < tokens.shape[1]:
            x = generator.tok_emb(tokens[:, i])[:, None]
    return torch.stack(outputs, 1)
