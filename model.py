"""The networks of CLIP-GEN: a VQGAN that turns images into tokens and back, its PatchGAN
discriminator, and a GPT that writes such tokens behind a prefix made of a CLIP embedding.

    image  --Encoder--> z --Quantizer--> tokens        the GPT learns p(tokens | CLIP embedding)
    tokens --lookup---> codes --Decoder--> image

Nothing here reads files, parses options or prints. In shape comments: B batch, S image side in
pixels, h = w side of the token grid or a feature map, T = h*w tokens of an image, K codes, d length
of a code, D of a CLIP embedding, C width of the GPT, H heads, P prefix tokens, t positions.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


def attention(q, k, v, is_causal=False):
    """Scaled dot-product attention on (B, H, t, C/H); in float32 on a CPU, also under autocast."""
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # the CPU's bfloat16 backward is 3-10x slower at these lengths
        with torch.autocast("cpu", enabled=False):
            return attention(q.float(), k.float(), v.float(), is_causal)
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


# ------------------------------------------------------------------------------------------- VQGAN


@dataclass
class VQGANConfig:
    """Shape of a VQGAN. Beside each field: taming-transformers' published f=16 model."""
    image_size: int           # 256, side of the (square) images it is built for
    patch: int                # 1, fold patch x patch pixels into channels first
    ch: int                   # 128, width of the first level, a multiple of groups
    ch_mult: tuple            # (1, 1, 2, 2, 4), widths of the levels / ch; the grid halves between
    num_res_blocks: int       # 2, residual blocks a level
    attn_resolutions: tuple   # (16,), grid sides at which attention follows each residual block
    z_channels: int           # 256, channels before the 1x1 conv into the codebook's space
    codebook_size: int        # 16384, number of codes K
    code_dim: int             # 256, length d of a code
    l2_norm: bool             # False, compare codes at unit length (Yu et al. 2022)
    groups: int               # 32, of GroupNorm; fewer for ch < 128, where 32 wash out colours
    eps: float = 1e-6         # of GroupNorm

    @property
    def factor(self):
        """Pixels of an image's side that one token's side stands for (the f of f=16)."""
        return self.patch * 2 ** (len(self.ch_mult) - 1)


class GroupNorm(nn.GroupNorm):
    """GroupNorm in float32, also under autocast."""

    def forward(self, x):
        return super().forward(x.float())  # oneDNN's bfloat16 GroupNorm is 2-3x slower


class ResnetBlock(nn.Module):
    """(norm, SiLU, conv) twice, and a skip connection: a 1x1 conv where the width changes."""

    def __init__(self, c_in, c_out, cfg):
        super().__init__()
        self.norm1 = GroupNorm(cfg.groups, c_in, cfg.eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = GroupNorm(cfg.groups, c_out, cfg.eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))                     # (B, c_out, h, w)
        h = self.conv2(F.silu(self.norm2(h)))
        skip = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return h + skip


class AttnBlock(nn.Module):
    """Single-head attention over the h x w positions of a feature map."""

    def __init__(self, c, cfg):
        super().__init__()
        self.norm = GroupNorm(cfg.groups, c, cfg.eps)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        b, c, h, w = x.shape
        n = self.norm(x)
        q, k, v = (conv(n).flatten(2).transpose(1, 2)[:, None]    # (B, 1, hw, c): one head
                   for conv in (self.q, self.k, self.v))
        y = attention(q, k, v)[:, 0]                              # (B, hw, c)
        return x + self.proj_out(y.transpose(1, 2).reshape(b, c, h, w))


class Resample(nn.Module):
    """Halves (up=False) or doubles the sides of a feature map, by or before a convolution."""

    def __init__(self, c, up):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(c, c, 3, padding=1) if up else nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        if self.up:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.pad(x, (0, 1, 0, 1)))                  # taming pads right and below only


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention where the grid's side asks so."""

    def __init__(self, c_in, c, num_blocks, side, cfg):
        super().__init__()
        num_attn = num_blocks if side in cfg.attn_resolutions else 0
        self.block = nn.ModuleList(ResnetBlock(c if j else c_in, c, cfg) for j in range(num_blocks))
        self.attn = nn.ModuleList(AttnBlock(c, cfg) for _ in range(num_attn))

    def forward(self, h):
        for j, block in enumerate(self.block):
            h = block(h)                                          # (B, c, h, w)
            if len(self.attn):
                h = self.attn[j](h)
        return h


class Middle(nn.Module):
    """The bottom of encoder and decoder: residual block, attention, residual block."""

    def __init__(self, c, cfg):
        super().__init__()
        self.block_1 = ResnetBlock(c, c, cfg)
        self.attn_1 = AttnBlock(c, cfg)
        self.block_2 = ResnetBlock(c, c, cfg)

    def forward(self, h):
        return self.block_2(self.attn_1(self.block_1(h)))


class Encoder(nn.Module):
    """Images (B, 3, S, S) to feature maps (B, z_channels, h, w). Names are taming's."""

    def __init__(self, cfg):
        super().__init__()
        self.patch = cfg.patch
        side, c = cfg.image_size // cfg.patch, cfg.ch
        self.conv_in = nn.Conv2d(3 * cfg.patch ** 2, c, 3, padding=1)
        self.down = nn.ModuleList()
        for i, mult in enumerate(cfg.ch_mult):
            level = Level(c, cfg.ch * mult, cfg.num_res_blocks, side, cfg)
            c = cfg.ch * mult
            if i < len(cfg.ch_mult) - 1:
                level.downsample = Resample(c, up=False)
                side //= 2
            self.down.append(level)
        self.mid = Middle(c, cfg)
        self.norm_out = GroupNorm(cfg.groups, c, cfg.eps)
        self.conv_out = nn.Conv2d(c, cfg.z_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))        # (B, ch, S/patch, S/patch)
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        h = self.mid(h)
        return self.conv_out(F.silu(self.norm_out(h)))            # (B, z_channels, h, w)


class Decoder(nn.Module):
    """Feature maps (B, z_channels, h, w) to images (B, 3, S, S); up[0] is the finest level."""

    def __init__(self, cfg):
        super().__init__()
        self.patch = cfg.patch
        side, c = cfg.image_size // cfg.factor, cfg.ch * cfg.ch_mult[-1]
        self.conv_in = nn.Conv2d(cfg.z_channels, c, 3, padding=1)
        self.mid = Middle(c, cfg)
        levels = []
        for i, mult in reversed(list(enumerate(cfg.ch_mult))):
            level = Level(c, cfg.ch * mult, cfg.num_res_blocks + 1, side, cfg)
            c = cfg.ch * mult
            if i > 0:
                level.upsample = Resample(c, up=True)
                side *= 2
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)
        self.norm_out = GroupNorm(cfg.groups, c, cfg.eps)
        self.conv_out = nn.Conv2d(c, 3 * cfg.patch ** 2, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))                             # (B, c, h, w)
        for level in reversed(self.up):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        h = self.conv_out(F.silu(self.norm_out(h)))               # (B, 3*patch^2, S/patch, S/patch)
        return F.pixel_shuffle(h, self.patch)                     # (B, 3, S, S)


MAX_DISTANCES = 2 ** 26  # in memory at once: 256 MiB


class Quantizer(nn.Module):
    """The codebook: each vector of a feature map becomes its nearest code (van den Oord et al.
    2017). With `l2_norm` both are compared at unit length, which in few dimensions keeps the whole
    codebook in use (Yu et al. 2022)."""

    def __init__(self, codebook_size, code_dim, l2_norm):
        super().__init__()
        self.l2_norm = l2_norm
        self.embedding = nn.Embedding(codebook_size, code_dim)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)
        # moving average of each code's hits in a step, 1 being the fair share
        self.register_buffer("usage", torch.ones(codebook_size), persistent=False)

    def to_unit(self, x):
        """Vectors (..., d) at unit length where codes are compared so, else as they are."""
        return F.normalize(x, dim=-1) if self.l2_norm else x

    def nearest(self, z):
        """Vectors (N, d) -> index of the nearest code for each (N,), computed in float32."""
        codebook = self.to_unit(self.embedding.weight)                   # (K, d)
        squares = codebook.square().sum(1)                               # (K,)
        rows = max(1, MAX_DISTANCES // len(codebook))
        with torch.autocast(z.device.type, enabled=False):
            # |z - e|^2 without |z|^2, which is the same for all codes: (rows, K)
            return torch.cat([torch.addmm(squares, part, codebook.T, alpha=-2).argmin(1)
                              for part in z.float().split(rows)])

    def lookup(self, tokens):
        """Tokens (B, h, w) -> their codes as a feature map (B, d, h, w)."""
        return self.to_unit(self.embedding(tokens)).permute(0, 3, 1, 2)

    def forward(self, z, beta=0.25):
        """Feature map (B, d, h, w) -> (codes (B, d, h, w), loss (), tokens (B, h, w)).

        loss = |sg(z) - e|^2 + beta |z - sg(e)|^2, sg = stop-gradient: the codes follow the encoder,
        and beta weighs the encoder's commitment to its codes (eq. 3 of van den Oord et al. 2017).
        """
        z = self.to_unit(z.float().permute(0, 2, 3, 1))                      # (B, h, w, d)
        tokens = self.nearest(z.detach().flatten(0, 2)).view(z.shape[:3])    # (B, h, w)
        e = self.to_unit(self.embedding(tokens))                             # (B, h, w, d)
        loss = F.mse_loss(e, z.detach()) + beta * F.mse_loss(z, e.detach())
        straight_through = z + (e - z).detach()                 # the value of e, the gradient of z
        return straight_through.permute(0, 3, 1, 2), loss, tokens

    @torch.no_grad()
    def kmeans(self, z, generator, rounds=10):
        """Set the codebook to k-means centres of at most 16 * K of the vectors z (N, d)."""
        k = len(self.embedding.weight)
        if len(z) > 16 * k:
            z = z[torch.randperm(len(z), generator=generator)[:16 * k].to(z.device)]
        z = self.to_unit(z.float())
        chosen = torch.randperm(max(len(z), k), generator=generator)[:k] % len(z)
        self.embedding.weight.copy_(z[chosen.to(z.device)])
        for _ in range(rounds):
            tokens = self.nearest(z)                                         # (N,)
            count = torch.bincount(tokens, minlength=k)[:, None]             # (K, 1)
            total = torch.zeros_like(self.embedding.weight).index_add_(0, tokens, z)
            mean = self.to_unit(total / count.clamp(min=1))                  # (K, d)
            self.embedding.weight.copy_(torch.where(count > 0, mean, self.embedding.weight))

    @torch.no_grad()
    def count_hits(self, counts, memory=8, threshold=0.03):
        """Update `usage` by each code's hits in a step (K,): an average over the steps in which a
        code's fair share is `memory` hits. Returns the codes (n,) of a usage under `threshold`."""
        fair_share = counts.sum() / len(counts)
        weight = (fair_share / memory).clamp(max=0.5)
        self.usage.lerp_(counts / fair_share, weight)
        return (self.usage < threshold).nonzero()[:, 0]

    @torch.no_grad()
    def restart(self, dead, z, generator):
        """Move the codes `dead` (n,) onto encoder outputs, chosen from z (N, d)."""
        chosen = torch.randint(len(z), (len(self.usage),), generator=generator)[:len(dead)]
        self.embedding.weight[dead] = self.to_unit(z[chosen.to(z.device)].float())
        self.usage[dead] = 1.0


class VQGAN(nn.Module):
    """Encoder, codebook, decoder (Esser et al. 2021). Images are (B, 3, S, S) in [-1, 1]. Modules
    are named as in taming-transformers, so its published checkpoints load."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.quantize = Quantizer(cfg.codebook_size, cfg.code_dim, cfg.l2_norm)
        self.quant_conv = nn.Conv2d(cfg.z_channels, cfg.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(cfg.code_dim, cfg.z_channels, 1)

    def encode(self, x):
        """Images (B, 3, S, S) -> tokens (B, h, w)."""
        z = self.quant_conv(self.encoder(x)).permute(0, 2, 3, 1)         # (B, h, w, d)
        flat = self.quantize.to_unit(z.float()).flatten(0, 2)            # (B*h*w, d)
        return self.quantize.nearest(flat).view(z.shape[:3])

    def decode(self, tokens):
        """Tokens (B, h, w) -> images (B, 3, S, S)."""
        return self.decoder(self.post_quant_conv(self.quantize.lookup(tokens)))

    def forward(self, x, beta=0.25, quantized=True):
        """Images -> (reconstructions, quantiser loss (), tokens (B, h, w), z (B*h*w, d)). With
        quantized=False, as in warm-up, z goes straight to the decoder and tokens are None."""
        z = self.quant_conv(self.encoder(x))                             # (B, d, h, w)
        flat = z.detach().permute(0, 2, 3, 1).flatten(0, 2).float()      # (B*h*w, d)
        if quantized:
            codes, loss, tokens = self.quantize(z, beta)
        else:
            codes = self.quantize.to_unit(z.float().permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            loss, tokens = z.new_zeros(()), None
        return self.decoder(self.post_quant_conv(codes)), loss, tokens, flat


class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): is a patch real? Images (B, 3, S, S) -> logits (B, 1, h, w)."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        c = 64
        for width, stride in ((128, 2), (256, 2), (512, 1)):
            # GroupNorm for BatchNorm: no statistics over the batch, so any split of it is the same
            conv = nn.Conv2d(c, width, 4, stride, padding=1, bias=False)
            layers += [conv, GroupNorm(32, width), nn.LeakyReLU(0.2)]
            c = width
        self.body = nn.Sequential(*layers, nn.Conv2d(c, 1, 4, padding=1))

    def forward(self, x):
        return self.body(x)


def hinge_loss(real_logits, fake_logits):
    """Discriminator loss (Lim & Ye 2017): zero once real logits exceed 1 and fake ones are < -1."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


# --------------------------------------------------------------------------------------------- GPT


@dataclass
class GPTConfig:
    """Shape of a GPT over image tokens: n_prefix prefix tokens, then T = grid*grid image tokens."""
    codebook_size: int        # number of codes K it writes in
    grid: int                 # side of the token grid
    cond_dim: int             # length D of the CLIP embedding
    n_layer: int              # blocks
    n_head: int               # attention heads
    n_embd: int               # width C
    n_prefix: int = 1         # prefix tokens P made of the embedding
    classic: bool = False     # the 2022 network: raw unit embedding as prefix, no null embedding
    zero_init: bool = True    # each block's last layers and the head start at zero
    dropout: float = 0.0      # of the embeddings and of each block's two outputs, in training
    qk_norm: bool = False     # queries and keys of RMS 1 times a learned gain (Henry et al. 2020)

    @property
    def block_size(self):
        """Positions of a sequence: the prefix and all tokens but the last, which ends it."""
        return self.n_prefix + self.grid ** 2 - 1


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, cfg):
        super().__init__()
        c, self.n_head = cfg.n_embd, cfg.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.qkv, self.proj = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.fc, self.fc_out = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        self.dropout = nn.Dropout(cfg.dropout)
        self.qk_gain = nn.Parameter(torch.ones(2)) if cfg.qk_norm else None

    def normalise(self, qkv):
        """Queries and keys of RMS 1 times their gain, if so asked: (..., 3, H, C/H) -> the same."""
        if self.qk_gain is None:
            return qkv
        qk = F.rms_norm(qkv[..., :2, :, :].float(), qkv.shape[-1:])
        qk = qk * self.qk_gain.view(2, 1, 1)                             # (..., 2, H, C/H)
        return torch.cat([qk.to(qkv.dtype), qkv[..., 2:, :, :]], -3)

    def forward(self, x, cache=None, pos=0):
        """x (B, t, C) at positions pos.. -> (B, t, C). With a cache (2, B, H, block_size, C/H) the
        keys and values are written into it, and all up to these positions are attended to."""
        b, t, c = x.shape
        assert t == 1 or pos == 0, "behind other positions only one at a time"
        qkv = self.qkv(self.ln_1(x)).view(b, t, 3, self.n_head, -1)      # (B, t, 3, H, C/H)
        q, k, v = self.normalise(qkv).permute(2, 0, 3, 1, 4)             # 3 x (B, H, t, C/H)
        if cache is not None:
            cache[0, :, :, pos:pos + t] = k
            cache[1, :, :, pos:pos + t] = v
            k, v = cache[:, :, :, :pos + t]                              # 2 x (B, H, pos+t, C/H)
        y = attention(q, k, v, is_causal=t > 1)                          # (B, H, t, C/H)
        x = x + self.dropout(self.proj(y.transpose(1, 2).reshape(b, t, c)))
        return x + self.dropout(self.fc_out(F.gelu(self.fc(self.ln_2(x)))))


class GPT(nn.Module):
    """p(tokens | CLIP embedding). Input [prefix] t0 t1 ..., output the next token's logits.

    Buffers: `means` (2, D), mean embedding of images and of texts, which centring subtracts;
    `shrink` (D, D), which brings texts to where images are (shrinkage in common/modality.py);
    `spread` (D, D), factor R of the mean local covariance of image embeddings (neighbour_spread).
    """

    def __init__(self, cfg):
        super().__init__()
        assert cfg.n_embd % cfg.n_head == 0
        self.cfg = cfg
        c = cfg.n_embd
        self.tok_emb = nn.Embedding(cfg.codebook_size, c)
        self.cond_proj = nn.Linear(cfg.cond_dim, cfg.n_prefix * c)
        self.null = None if cfg.classic else nn.Parameter(torch.zeros(c))    # no condition
        self.pos_emb = nn.Parameter(torch.zeros(cfg.block_size, c))
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(c)
        self.head = nn.Linear(c, cfg.codebook_size)
        self.register_buffer("means", torch.zeros(2, cfg.cond_dim))
        self.register_buffer("shrink", torch.eye(cfg.cond_dim))
        self.register_load_state_dict_pre_hook(  # older checkpoints have none
            lambda _, weights, *args: weights.setdefault("shrink", torch.eye(cfg.cond_dim)))
        self.register_buffer("spread", torch.zeros(cfg.cond_dim, cfg.cond_dim))
        self.init_weights()

    def init_weights(self):
        """Classic keeps torch's defaults, as released. Else zero_init starts every block as the
        identity, and the loss at exactly ln K."""
        for name, p in self.named_parameters() if not self.cfg.classic else []:
            if p.dim() >= 2:
                nn.init.normal_(p, std=0.02 if "emb" in name else self.cfg.n_embd ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        zero_init_layers = [layer for b in self.blocks for layer in (b.proj, b.fc_out)]
        for layer in [self.head, *zero_init_layers] if self.cfg.zero_init else []:
            nn.init.zeros_(layer.weight)

    def condition(self, embedding, modality="image", noise=None):
        """CLIP embeddings (B, D) of any length -> conditions (B, D) of unit length.

        c = norm(norm(e) - mean of the modality): images and texts lie around two different means
        (Liang et al. 2022); centring cancels a constant shift between them. A text's: norm(c M), M
        the buffer `shrink`: without what no image varies by. With `noise` (B, D) the result is
        norm(c + noise), as in training (Zhou et al. 2022). Classic takes norm(e).
        """
        c = F.normalize(embedding.float(), dim=-1)
        if not self.cfg.classic:
            c = F.normalize(c - self.means[{"image": 0, "text": 1}[modality]], dim=-1)
            if modality == "text":  # a product for each row, so that none depends on the others
                c = F.normalize(torch.stack([x @ self.shrink for x in c]), dim=-1)
        return c if noise is None else F.normalize(c + noise, dim=-1)

    def prefix(self, cond, drop=None):
        """Conditions (B, D) -> prefix tokens (B, P, C); null embeddings where drop (B,) is True."""
        if not self.cfg.classic:
            cond = cond * math.sqrt(cond.shape[-1])                      # numbers of size 1
        x = self.cond_proj(cond).unflatten(-1, (self.cfg.n_prefix, -1))  # (B, P, C)
        if drop is not None:
            x = torch.where(drop[:, None, None], self.null.to(x.dtype), x)
        return x

    def forward_embeddings(self, x, caches=None, pos=0):
        """Inputs (B, t, C) at positions pos.. -> logits (B, t, K); caches as by new_caches(B)."""
        x = self.dropout(x + self.pos_emb[pos:pos + x.shape[1]])         # (B, t, C)
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i], pos)
        return self.head(self.ln_f(x))

    def forward(self, cond, tokens, drop=None):
        """Conditions (B, D) and tokens (B, t), t < T -> logits (B, t+1, K) of tokens 0..t."""
        x = torch.cat([self.prefix(cond, drop), self.tok_emb(tokens)], 1)    # (B, P+t, C)
        return self.forward_embeddings(x)[:, self.cfg.n_prefix - 1:]

    def loss(self, cond, targets, drop=None, inputs=None):
        """Mean cross-entropy in nats of all T tokens: conditions (B, D), targets (B, T) -> ().
        The network is shown `inputs` (B, T), by default the targets; in training they are partly
        corrupted, against exposure bias (Ranzato et al. 2016)."""
        inputs = targets if inputs is None else inputs
        logits = self(cond, inputs[:, :-1], drop)                        # (B, T, K)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def new_caches(self, rows):
        """Empty key-value caches of all blocks, (n_layer, 2, rows, H, block_size, C/H)."""
        c = self.cfg
        shape = (c.n_layer, 2, rows, c.n_head, c.block_size, c.n_embd // c.n_head)
        return self.pos_emb.new_zeros(shape)

    @torch.inference_mode()
    def generate(self, cond, uniform, guidance=1.0, temperature=1.0, top_k=0, top_p=1.0,
                 negative=None):
        """Sample images: conditions (B, D) and uniform numbers (B, T) in [0, 1) -> tokens (B, T).
        One number a token comes in, so that an image depends on its own row alone. With guidance g
        a second half of the batch has no condition, or the conditions `negative` (B, D) in its
        place: logits = null + g (cond - null) (Ho & Salimans 2022)."""
        assert guidance == 1.0 or not self.cfg.classic, "classic has no null embedding to guide by"
        assert uniform.shape == (len(cond), self.cfg.grid ** 2)
        x = self.prefix(cond).float()                                    # (B, P, C)
        if guidance != 1.0:
            null = self.null if negative is None else self.prefix(negative).float()
            x = torch.cat([x, null.expand_as(x)])                        # (2B, P, C)
        caches, pos = self.new_caches(len(x)), 0
        tokens = torch.empty(uniform.shape, dtype=torch.long, device=x.device)
        for i in range(tokens.shape[1]):
            logits = self.forward_embeddings(x, caches, pos)[:, -1].float()    # (B or 2B, K)
            pos += x.shape[1]
            if guidance != 1.0:
                cond_logits, null_logits = logits.chunk(2)
                logits = null_logits + guidance * (cond_logits - null_logits)  # (B, K)
            tokens[:, i] = sample_token(logits, uniform[:, i], temperature, top_k, top_p)
            x = self.tok_emb(tokens[:, i])[:, None]                      # (B, 1, C)
            if guidance != 1.0:
                x = torch.cat([x, x])                                    # (2B, 1, C)
        return tokens


def sample_token(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """Logits (B, K) and uniform numbers (B,) -> tokens (B,): the first code at which the summed
    probabilities pass the number. Only the top_k likeliest codes count (0: all), and of these the
    fewest that hold top_p of the mass (Holtzman et al. 2020). Never waits for the device."""
    if temperature < 1e-6:  # less would overflow
        return logits.argmax(-1)
    k = top_k if 0 < top_k < logits.shape[-1] else logits.shape[-1]
    codes = None
    if k < logits.shape[-1] or top_p < 1:
        logits, codes = logits.topk(k, -1)                               # (B, k), falling
    p = F.softmax(logits / temperature, -1)
    mass = p.cumsum(-1)
    if top_p < 1:
        before = mass - p                                                # 0 for the likeliest
        p = torch.where((before < top_p) | (before <= 0), p, 0.0)        # which always stays
        mass = p.cumsum(-1)
    i = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True)   # (B, 1)
    i = i.clamp(max=k - 1)
    return (i if codes is None else codes.gather(-1, i))[:, 0]
