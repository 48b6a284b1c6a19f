"""Training a small CLIP of OpenAI's form on images and captions, for whoever has none."""
import math

import torch
import torch.nn.functional as F

from common.checkpoints import TrainState
from common.images import resize, to_tensor
from common.openai_clip import Clip, clip_package
from common.optim import Muon, optimizer_step, set_learning_rate


def make_clip_state(cfg, size, runtime, blocks=(1, 1, 1, 1)):
    """A CLIP with a ModifiedResNet of four stages, of so many blocks, for images of `size`. Muon
    for convolutions and the transformer's matrices, AdamW for the rest. Not in float16."""
    if runtime.dtype == torch.float16:
        runtime.dtype = torch.float32  # small enough to do without, and so without a scaler
    torch.manual_seed(cfg.seed)
    model = clip_package()[0].CLIP(
        cfg.embed_dim, size, blocks, cfg.vision_width, None, cfg.context, 49408,
        cfg.text_width, cfg.text_width // 64, cfg.text_layers).to(runtime.device)
    matrices = [p for name, p in model.named_parameters()
                if p.dim() == 4 or p.dim() == 2 and "resblocks" in name]
    chosen = set(matrices)
    others = [p for p in model.parameters() if p not in chosen]
    adam = torch.optim.AdamW(others, 0.0, (0.9, 0.98), weight_decay=0.05, fused=runtime.fused)
    return TrainState(model=model, adam=adam, muon=Muon(matrices))


def contrastive_loss(model, image, text, same):
    """Cross-entropy over all pairs of a batch, both ways (Radford et al. 2021): unit embeddings
    (B, D) twice; same (B, B) is 1 where the captions of two rows are equal."""
    target = same / same.sum(1, keepdim=True)                       # (B, B), equals share
    logits = model.logit_scale.exp() * image @ text.T               # (B, B)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_clip(state, batch, texts, cfg, run, runtime, judge):
    """Train on batch(step) -> (images uint8 (B, S, S, 3), indices (B,) of their captions in
    `texts`). judge(model) gives the metrics after the last step. Returns whether it was stopped."""
    clip = Clip(state.model, "being trained", runtime.device)
    tokens, cut = clip.tokenize(texts)                              # (distinct captions, context)
    if cut:
        runtime.print0(f"warning: {len(cut)} of {len(texts)} captions are longer than the "
                       f"{clip.context} tokens of --context; the rest of them is cut off")
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=False)
    for step in range(run.step, cfg.max_steps):
        images, index = batch(step)
        pixels = resize(to_tensor(images).to(runtime.device), clip.size)         # (B, 3, C, C)
        same = torch.as_tensor(index[:, None] == index[None])                    # (B, B)
        lr = set_learning_rate(state.optimizers(), step, cfg)
        with runtime.autocast():
            image = state.model.encode_image(clip.normalize(pixels))             # (B, D)
            text = state.model.encode_text(tokens[index].to(runtime.device))
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        loss = contrastive_loss(state.model, image, text, same.float().to(runtime.device))
        state.model.zero_grad()
        loss.backward()
        params = list(state.model.parameters())
        _, is_finite = optimizer_step(state.optimizers(), params, loss.item(), scaler, runtime)
        run.check_finite(step + 1, is_finite)
        with torch.no_grad():
            state.model.logit_scale.clamp_(max=math.log(100))
        run.end_step(step + 1, {"loss": loss.item(), "lr": lr})
        is_last = step + 1 == cfg.max_steps
        if is_last:
            run.log(step + 1, judge(state.model))
        if is_last or run.stop_requested or (step + 1) % cfg.save_every == 0:
            run.save(step + 1, state.state_dict())
        if run.stop_requested:
            return True
    return False
