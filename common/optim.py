"""Optimisation: Muon, the learning rate's curve, one optimiser step, the moving average."""
import math

import torch


class Muon(torch.optim.Optimizer):
    """Momentum whose step for each matrix is made orthogonal (Jordan et al. 2024), so that all
    directions move alike. Convolutions count as matrices (out, kh*kw*in). The step has the size of
    AdamW's, so learning rates carry over. (torch.optim.Muon takes 2-D parameters only and iterates
    in bfloat16.)"""

    def __init__(self, params, lr=0.0, momentum=0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}  # matrices of one shape are stacked, and iterated together
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((p.shape[0], p[0].numel()), []).append(p)
            stacks = [self.nesterov(params, shape, group["momentum"])
                      for shape, params in by_shape.items()]
            for (shape, params), updates in zip(by_shape.items(), newton_schulz(stacks)):
                for p, update in zip(params, updates):
                    update = update.view(p.shape[0], *p.shape[2:], p.shape[1]).movedim(-1, 1)
                    p.add_(update, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)

    def nesterov(self, params, shape, momentum):
        """Gradients of parameters of one shape, with Nesterov's momentum: (n, out, kh*kw*in)."""
        stack = torch.empty(len(params), *shape, device=params[0].device)
        for p, out in zip(params, stack):
            g = p.grad.movedim(1, -1).flatten(1)      # no copy if channels-last
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(g)
            average = self.state[p]["momentum"].lerp_(g, 1 - momentum)
            torch.lerp(g, average, momentum, out=out)
        return stack


def newton_schulz(stacks, steps=3):
    """Stacks of matrices, each (n, rows, columns) -> about the nearest orthogonal ones.

    The plain iteration is X <- (a I + b A + c A A) X with A = X X^T: a polynomial that pushes all
    singular values towards 1. The polynomials commute with A, so they are multiplied up on the
    short side, for all matrices that share it at once, and X is multiplied twice in all. X starts
    as X / |A|^(1/2), nearer to 1 than Muon's X / |X|: three steps do what five did.
    """
    stacks = [x.float() for x in stacks]
    wide = [x.mT if x.shape[1] > x.shape[2] else x for x in stacks]       # (n, s, long), s short
    results = [None] * len(wide)
    for side in {x.shape[1] for x in wide}:
        chosen = [i for i, x in enumerate(wide) if x.shape[1] == side]
        eye = torch.eye(side, device=wide[0].device)
        a = torch.cat([wide[i] @ wide[i].mT for i in chosen])             # (N, s, s)
        scale = 1 / (torch.linalg.matrix_norm(a, keepdim=True).sqrt() + 1e-7)
        a, product = a * scale ** 2, None
        for step in range(steps):
            polynomial = torch.baddbmm(3.4445 * eye - 4.7750 * a, a, a, alpha=2.0315)
            product = polynomial @ product if step else polynomial * scale
            if step < steps - 1:
                a = polynomial @ a @ polynomial
        for i, p in zip(chosen, product.split([len(wide[i]) for i in chosen])):
            results[i] = p @ wide[i] if wide[i] is stacks[i] else stacks[i] @ p
    return results


def learning_rate(step, peak, warmup, max_steps):
    """Linear warm-up over `warmup` steps, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, max_steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizers, step, cfg):
    """Give all parameter groups the rate of this step; returns it."""
    lr = learning_rate(step, cfg.learning_rate, cfg.warmup, cfg.max_steps)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
    return lr


def optimizer_step(optimizers, params, loss, scaler, runtime, max_norm=0.0):
    """Average the gradients over ranks, clip them to max_norm (0: not at all) and step, unless loss
    or gradient is not finite. Returns (gradient norm, is_finite). scaler.update() is the caller's.
    """
    runtime.average_gradients(params)
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm or math.inf).item()
    is_finite = math.isfinite(loss + norm)
    for optimizer in optimizers if is_finite else []:
        scaler.step(optimizer)
    return norm, is_finite


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """Moving average of the parameters, whose memory grows with the first steps."""
    decay = min(decay, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
