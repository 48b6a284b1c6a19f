"""The networks of CLIP-GEN: a VQGAN that turns pictures into tokens and back, its PatchGAN discriminator, and a GPT
that writes such tokens behind one prefix token, a CLIP embedding. No files, no arguments, no printing.

    pictures --Encoder--> z --Quantizer--> tokens --GPT learns p(tokens | CLIP embedding)
    tokens --Quantizer.lookup--> codes --Decoder--> pictures

The layers at the end, Conv2d and PackedLinear, are torch's own, faster on a CPU: on a first reading leave them out.

Letters in shape comments: B pictures, T tokens of one, K codes in the codebook, C width, D embedding size, H heads.
"""
import contextlib
import functools
import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------------- VQGAN


@dataclass
class VQGANConfig:
    """Shape of a VQGAN. taming-transformers' published f=16 model is the default with `codes` 1024 or 16384."""
    image_size: int = 256                 # side of the (square) pictures it is built for
    patch: int = 1                        # fold patch x patch pixels into channels first: 1 is taming, 2 is 4x cheaper
    ch: int = 128                         # width of the first level, a multiple of groups
    ch_mult: tuple = (1, 1, 2, 2, 4)      # width of each level in units of ch; a factor 2 lies between two levels
    num_res_blocks: int = 2               # residual blocks a level
    attn_resolutions: tuple = (16,)       # grid sides at which attention follows each residual block
    z_channels: int = 256                 # channels between the convolutions and the 1x1 into the codebook's space
    codes: int = 16384                    # size K of the codebook
    code_dim: int = 256                   # length of a code
    l2_norm: bool = False                 # compare unit-length codes (Yu et al. 2022) instead of plain L2 ones
    groups: int = 32                      # of GroupNorm; fewer for widths under 128, where 32 wash out the colours
    eps: float = 1e-6                     # of GroupNorm

    @property
    def factor(self):
        """Pixels of a picture's side that one token's side stands for (the f of f=16)."""
        return self.patch * 2 ** (len(self.ch_mult) - 1)


class GroupNorm(nn.GroupNorm):
    """GroupNorm in float32 also under autocast: exact, and on a CPU 2-3x faster than its bfloat16 kernel."""

    def forward(self, x):
        return super().forward(x.float())


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, twice, around a skip connection; 1x1 on the skip where the width changes."""

    def __init__(self, c_in, c_out, cfg):
        super().__init__()
        self.norm1 = GroupNorm(cfg.groups, c_in, cfg.eps)
        self.conv1 = Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = GroupNorm(cfg.groups, c_out, cfg.eps)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


def attend(q, k, v, is_causal=False):
    """Attention on (B, H, t, hd). On a CPU in float32 whatever the autocast: torch's bfloat16 backward kernel is 3-10x
    slower at the lengths met here."""
    if not torch.is_autocast_enabled("cpu") or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=is_causal)


class AttnBlock(nn.Module):
    """Single-head attention over the h x w positions of a feature map."""

    def __init__(self, c, cfg):
        super().__init__()
        self.norm = GroupNorm(cfg.groups, c, cfg.eps)
        self.q, self.k, self.v, self.proj_out = (Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        b, c, h, w = x.shape
        n = self.norm(x)
        q, k, v = (conv(n).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))  # (B, 1, hw, c)
        y = attend(q, k, v)[:, 0]                                                                     # (B, hw, c)
        return x + self.proj_out(y.transpose(1, 2).reshape(b, c, h, w))


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # taming pads right and below only


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def level(c_in, c, blocks, attention, cfg):
    """One resolution: `blocks` residual blocks, each followed by attention if asked for. Returns a Module to fill."""
    m = nn.Module()
    m.block = nn.ModuleList(ResnetBlock(c_in if j == 0 else c, c, cfg) for j in range(blocks))
    m.attn = nn.ModuleList(AttnBlock(c, cfg) for _ in range(blocks if attention else 0))
    return m


def middle(c, cfg):
    """The bottom of encoder and decoder: residual block, attention, residual block."""
    m = nn.Module()
    m.block_1, m.attn_1, m.block_2 = ResnetBlock(c, c, cfg), AttnBlock(c, cfg), ResnetBlock(c, c, cfg)
    return m


def run_level(m, h):
    for j, block in enumerate(m.block):
        h = block(h)
        if len(m.attn):
            h = m.attn[j](h)
    return h


class Encoder(nn.Module):
    """Pictures to feature maps (Esser et al. 2021), module names as in taming-transformers."""

    def __init__(self, cfg):
        super().__init__()
        side, c = cfg.image_size // cfg.patch, cfg.ch
        self.patch = cfg.patch
        self.conv_in = Conv2d(3 * cfg.patch ** 2, c, 3, padding=1)
        self.down = nn.ModuleList()
        for i, mult in enumerate(cfg.ch_mult):
            self.down.append(level(c, cfg.ch * mult, cfg.num_res_blocks, side in cfg.attn_resolutions, cfg))
            c = cfg.ch * mult
            if i < len(cfg.ch_mult) - 1:
                self.down[i].downsample = Downsample(c)
                side //= 2
        self.mid = middle(c, cfg)
        self.norm_out = GroupNorm(cfg.groups, c, cfg.eps)
        self.conv_out = Conv2d(c, cfg.z_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))        # (B, 3, S, S) -> (B, ch, S/patch, S/patch)
        for m in self.down:
            h = run_level(m, h)
            if hasattr(m, "downsample"):
                h = m.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(F.silu(self.norm_out(h)))            # (B, z_channels, S/f, S/f)


class Decoder(nn.Module):
    """Feature maps to pictures; `up` is numbered from the finest level, as in taming-transformers."""

    def __init__(self, cfg):
        super().__init__()
        self.patch = cfg.patch
        c = cfg.ch * cfg.ch_mult[-1]
        side = cfg.image_size // cfg.factor
        self.conv_in = Conv2d(cfg.z_channels, c, 3, padding=1)
        self.mid = middle(c, cfg)
        up = []
        for i, mult in reversed(list(enumerate(cfg.ch_mult))):
            m = level(c, cfg.ch * mult, cfg.num_res_blocks + 1, side in cfg.attn_resolutions, cfg)
            c = cfg.ch * mult
            if i > 0:
                m.upsample = Upsample(c)
                side *= 2
            up.insert(0, m)
        self.up = nn.ModuleList(up)
        self.norm_out = GroupNorm(cfg.groups, c, cfg.eps)
        self.conv_out = Conv2d(c, 3 * cfg.patch ** 2, 3, padding=1)

    def forward(self, z):
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(self.conv_in(z))))
        for m in reversed(self.up):
            h = run_level(m, h)
            if hasattr(m, "upsample"):
                h = m.upsample(h)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)


class Quantizer(nn.Module):
    """The codebook: each vector of the feature map is replaced by its nearest code (van den Oord et al. 2017).

    With `l2_norm` vectors and codes are compared at unit length, which in few dimensions keeps the whole codebook in
    use (Yu et al. 2022).
    """

    def __init__(self, codes, dim, l2_norm):
        super().__init__()
        self.l2_norm = l2_norm
        self.embedding = nn.Embedding(codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)
        self.register_buffer("usage", torch.ones(codes), persistent=False)  # moving average of hits, 1 = the fair share

    def unit(self, x):
        return F.normalize(x, dim=-1) if self.l2_norm else x

    def nearest(self, z):
        """Vectors (N, d) -> index of the nearest code for each (N,), computed in float32."""
        codebook = self.unit(self.embedding.weight)                                    # (K, d)
        with torch.autocast(z.device.type, enabled=False):
            # |z - e|^2 without |z|^2, which is the same for all codes
            return torch.addmm(codebook.square().sum(1), z.float(), codebook.T, alpha=-2).argmin(1)

    def lookup(self, tokens):
        """Tokens (B, h, w) -> their codes as a feature map (B, d, h, w)."""
        return self.unit(self.embedding(tokens)).permute(0, 3, 1, 2)

    def forward(self, z, beta=0.25):
        """Feature map (B, d, h, w) -> (straight-through codes (B, d, h, w), loss (), tokens (B, h, w)).

        loss = |sg(z) - e|^2 + beta |z - sg(e)|^2: the codebook follows the encoder, and beta weighs the commitment of
        the encoder to its codes (eq. 3 of van den Oord et al. 2017).
        """
        z = self.unit(z.float().permute(0, 2, 3, 1))                                   # (B, h, w, d)
        tokens = self.nearest(z.detach().flatten(0, 2)).view(z.shape[:3])              # (B, h, w)
        e = self.unit(self.embedding(tokens))                                          # (B, h, w, d)
        loss = F.mse_loss(e, z.detach()) + beta * F.mse_loss(z, e.detach())
        return (z + (e - z).detach()).permute(0, 3, 1, 2), loss, tokens

    @torch.no_grad()
    def kmeans(self, z, generator, rounds=10):
        """Lay the codebook over vectors z (N, d), at least one each: k-means from randomly chosen vectors."""
        z, k = self.unit(z.float()), len(self.embedding.weight)
        pick = torch.randperm(max(len(z), k), generator=generator)[:k] % len(z)
        self.embedding.weight.copy_(z[pick.to(z.device)])
        for _ in range(rounds):
            tokens = self.nearest(z)
            count = torch.bincount(tokens, minlength=k)[:, None]                       # (K, 1)
            mean = torch.zeros_like(self.embedding.weight).index_add_(0, tokens, z) / count.clamp(min=1)
            self.embedding.weight.copy_(torch.where(count > 0, self.unit(mean), self.embedding.weight))

    @torch.no_grad()
    def restart(self, counts, z, generator, decay=0.99, threshold=0.03):
        """Move codes that went out of use onto encoder outputs, so that none dies. Returns how many were moved.

        counts (K,): hits of each code in the last step; z (N, d): encoder outputs to choose from. A code is out of use
        when the moving average of its hits is under `threshold` of the fair share.
        """
        k = len(counts)
        self.usage.lerp_(counts.float() * (k / counts.sum()), 1 - decay)
        dead = (self.usage < threshold).nonzero()[:, 0]
        pick = torch.randint(len(z), (k,), generator=generator).to(z.device)[: len(dead)]
        self.embedding.weight[dead] = self.unit(z[pick].float())
        self.usage[dead] = 1.0
        return len(dead)


class VQGAN(nn.Module):
    """Encoder, codebook, decoder (Esser et al. 2021). Pictures are (B, 3, S, S) in [-1, 1]; parameter names are
    taming-transformers', so its published checkpoints load strictly."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.quantize = Quantizer(cfg.codes, cfg.code_dim, cfg.l2_norm)
        self.quant_conv = Conv2d(cfg.z_channels, cfg.code_dim, 1)
        self.post_quant_conv = Conv2d(cfg.code_dim, cfg.z_channels, 1)

    def encode(self, x):
        """Pictures (B, 3, S, S) -> tokens (B, S/f, S/f)."""
        z = self.quant_conv(self.encoder(x)).permute(0, 2, 3, 1)                       # (B, h, w, d)
        return self.quantize.nearest(self.quantize.unit(z.float()).flatten(0, 2)).view(z.shape[:3])

    def decode(self, tokens):
        """Tokens (B, S/f, S/f) -> pictures (B, 3, S, S)."""
        return self.decoder(self.post_quant_conv(self.quantize.lookup(tokens)))

    def forward(self, x, beta=0.25, quantized=True):
        """Pictures -> (reconstructions, quantiser loss, tokens, encoder outputs (B*h*w, d)).

        With quantized=False the encoder's vectors go straight to the decoder: the continuous start.
        """
        z = self.quant_conv(self.encoder(x))                                           # (B, d, h, w)
        flat = z.detach().permute(0, 2, 3, 1).flatten(0, 2).float()                    # (B*h*w, d)
        if quantized:
            q, loss, tokens = self.quantize(z, beta)
        else:
            q = self.quantize.unit(z.float().permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            loss, tokens = z.new_zeros(()), None
        return self.decoder(self.post_quant_conv(q)), loss, tokens, flat


class Discriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): is a patch real or reconstructed? (B, 3, S, S) -> logits (B, 1, h, w)."""

    def __init__(self):
        super().__init__()
        body, c = [nn.Conv2d(3, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.2)], 64
        for width, stride in ((128, 2), (256, 2), (512, 1)):  # no batch statistics: ranks and batch sizes agree
            body += [nn.Conv2d(c, width, 4, stride, padding=1, bias=False), GroupNorm(32, width), nn.LeakyReLU(0.2)]
            c = width
        self.body = nn.Sequential(*body, nn.Conv2d(c, 1, 4, padding=1))

    def forward(self, x):
        return self.body(x)


def hinge_loss(real, fake):
    """Discriminator loss of Lim & Ye 2017 on logits of any equal shape: zero once real > 1 and fake < -1."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


# --------------------------------------------------------------------------------------------------------- GPT


@dataclass
class GPTConfig:
    """Shape of a GPT over picture tokens."""
    codes: int = 16384        # size K of the codebook it writes in
    grid: int = 16            # side of the token grid; a picture is grid*grid tokens
    cond_dim: int = 512       # size D of the CLIP embedding
    n_layer: int = 24
    n_head: int = 16
    n_embd: int = 1024
    classic: bool = False     # the 2022 network: small weights at the start, the raw embedding as the prefix
    zero_init: bool = True    # each block's last layers and the head start at zero


class GeluLinear(nn.Linear):
    """A Linear with a GELU behind it, so that packed the two are one call."""

    def forward(self, x):
        return F.gelu(super().forward(x))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, cfg):
        super().__init__()
        c, self.n_head = cfg.n_embd, cfg.n_head
        self.ln_1, self.ln_2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.qkv, self.proj = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.fc, self.fc_out = GeluLinear(c, 4 * c), nn.Linear(4 * c, c)
        self.attend_packed = None  # kernels_cpu.attend, once packed in bfloat16 for a CPU

    def forward(self, x, cache=None):
        b, t, c = x.shape
        qkv = self.qkv(self.ln_1(x))                                                            # (B, t, 3C)
        if cache is None:
            qkv = qkv.view(b, t, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)                     # (3, B, H, t, hd)
            y = attend(*qkv.unbind(), is_causal=True).transpose(1, 2)                           # (B, t, H, hd)
        elif self.attend_packed:  # does what follows
            y = self.attend_packed(qkv, cache)                                                  # (B, 1, C)
        else:  # t is 1: write this position's key and value into the cache (B, 2, H, pos+1, hd), look at all up to it
            qkv = qkv.view(b, 3, self.n_head, 1, -1)                                            # (B, 3, H, 1, hd)
            cache.narrow(3, cache.shape[3] - 1, 1).copy_(qkv.narrow(1, 1, 2))
            read = torch.float32 if x.is_cpu else cache.dtype
            y = attend(qkv.select(1, 0).to(read), *cache.to(read).unbind(1))                    # (B, H, 1, hd)
        x = x + self.proj(y.reshape(b, t, c))
        return x + self.fc_out(self.fc(self.ln_2(x)))


class GPT(nn.Module):
    """p(tokens | CLIP embedding). The input is [prefix] t0 t1 ... and the output at each position the next token's
    logits. `means` holds the two modalities' mean embeddings (row 0 pictures, row 1 texts) that centring subtracts,
    `spread` what pictures of one meaning differ by: e @ spread, e standard normal (train_gpt.neighbour_spread)."""

    def __init__(self, cfg):
        super().__init__()
        assert cfg.n_embd % cfg.n_head == 0
        self.cfg = cfg
        c = cfg.n_embd
        self.tok_emb = nn.Embedding(cfg.codes, c)
        self.cond_proj = nn.Linear(cfg.cond_dim, c)
        self.null = None if cfg.classic else nn.Parameter(torch.zeros(c))  # stands in for a dropped condition
        self.pos_emb = nn.Parameter(torch.zeros(cfg.grid ** 2, c))  # of the prefix and all tokens but the last
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(c)
        self.head = nn.Linear(c, cfg.codes)
        self.register_buffer("means", torch.zeros(2, cfg.cond_dim))
        self.register_buffer("spread", torch.zeros(cfg.cond_dim, cfg.cond_dim))
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, std=0.02 if "emb" in name or cfg.classic else c ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        self.capture = None  # kernels.capture, once packed for a GPU
        self.dtype = torch.float32  # of the cache, and once packed of the weights
        last = [self.head, *(layer for b in self.blocks for layer in (b.proj, b.fc_out))]
        for layer in last if cfg.zero_init else ():
            nn.init.zeros_(layer.weight)  # every block starts as the identity and the first loss is exactly ln K

    def condition(self, embedding, modality="image", noise=None):
        """CLIP embeddings (B, D) of any length -> what the prefix is made of (B, D).

        Unit length, minus the modality's mean, unit length again: pictures and texts lie around two different means
        (Liang et al. 2022), and this brings them onto each other. `noise` (B, D) is added and the result renormalised:
        in training c = norm(c + s e/|e| + ...), s the noise level (Zhou et al. 2022), and in training and sampling
        multiples of what pictures of one meaning differ by. Classic takes the raw unit embedding.
        """
        c = F.normalize(embedding.float(), dim=-1)
        if not self.cfg.classic:
            c = F.normalize(c - self.means[{"image": 0, "text": 1}[modality]], dim=-1)
        return c if noise is None else F.normalize(c + noise, dim=-1)

    def prefix(self, cond, drop=None):
        """Conditions (B, D) -> prefix token (B, 1, C); rows where drop (B,) is True get the null embedding."""
        x = self.cond_proj(cond if self.cfg.classic else cond * math.sqrt(cond.shape[-1]))      # (B, C)
        if drop is not None:
            x = torch.where(drop[:, None], self.null.to(x.dtype), x)
        return x[:, None]

    def run(self, x, pos=0, caches=None):
        """Embedded inputs (B, t, C) at positions pos.. -> logits (B, t, K). With caches (n_layer, B, 2, H, T, hd) of
        keys and values t is 1."""
        x = x + self.pos_emb[pos:pos + x.shape[1]]                                              # (B, t, C)
        # cut for all blocks at once: at batch 1 the calls between two products count
        each = [None] * len(self.blocks) if caches is None else caches.narrow(4, 0, pos + 1).unbind()
        for block, cache in zip(self.blocks, each):
            x = block(x, cache)
        return self.head(self.ln_f(x))

    def forward(self, cond, tokens, drop=None):
        """Conditions (B, D) and tokens (B, t), t < T -> logits (B, t+1, K) of tokens 0..t."""
        return self.run(torch.cat([self.prefix(cond, drop), self.tok_emb(tokens)], 1))

    def loss(self, cond, tokens, drop=None, read=None):
        """Mean cross-entropy in nats of all T tokens (B, T) given their conditions (B, D) and the tokens before each,
        as they stand in `read` (B, T), in training with some errors in it: a GPT that has only read flawless pictures
        trusts what it has written more than its condition (exposure bias; Ranzato et al. 2016)."""
        logits = self(cond, (tokens if read is None else read)[:, :-1], drop)                   # (B, T, K)
        return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    @torch.inference_mode()
    def decode_logits(self, cond, next_token, guidance=1.0):
        """Write one picture per row with a key-value cache. Returns tokens (B, T).

        next_token(i, logits (B, K)) -> tokens (B,) chooses token i. Where kernels.py records the step it is called but
        twice, with i a tensor (1,) instead of a number, and what it has the GPU do is repeated for every token: it must
        not wait for the GPU; a Draw from all codes is not called at all. With guidance g != 1 the same pass carries a
        second set of rows without condition, and logits = null + g (cond - null) (Ho & Salimans 2022).
        """
        assert guidance == 1.0 or not self.cfg.classic, "a classic GPT has no null embedding, so no guidance"
        b, t_max, c, h = len(cond), self.cfg.grid ** 2, self.cfg.n_embd, self.cfg.n_head
        x = self.prefix(cond).float()                                                           # (B, 1, C)
        if guidance != 1.0:
            x = torch.cat([x, self.null.expand_as(x)])                                          # (2B, 1, C)
        n, rows = len(self.blocks), len(x)
        if x.is_cpu and not self.capture:  # a head's values lie behind its keys: the same core reads both
            caches = x.new_zeros(n, rows, h, 2, t_max, c // h, dtype=self.dtype).transpose(2, 3)
        else:
            caches = x.new_zeros(n, rows, 2, h, t_max, c // h, dtype=self.dtype)                # keys and values
        tokens = torch.empty(t_max, b, dtype=torch.long, device=x.device)

        def step(i, run=self.run):
            logits = run(x, i, caches)[:, 0].float()                                            # (B or 2B, K)
            if guidance != 1.0:
                logits = logits[b:] + guidance * (logits[:b] - logits[b:])                      # (B, K)
            tokens[i] = chosen = next_token(i, logits)
            x.view(-1, b, c).copy_(self.tok_emb(chosen))                                        # (1 or 2, B, C)
        if self.capture:
            start = x.clone()
            try:
                step = self.capture(self, step, x, caches, tokens, next_token, guidance)
            except Exception as e:  # compiling can fail in many ways
                warnings.warn(f"kernels.py can't be used here ({type(e).__name__}: {e}), sampling call by call")
                self.capture = None
            x.copy_(start)
        for i in range(t_max):
            step(i)
        return tokens.T.contiguous()

    def pack(self, dtype):
        """Make this a network that only samples, in `dtype`, for good: every Linear is packed; the stream between the
        blocks and norms stay float32. On a CPU self.head and the like become plain functions, since beside weights that
        fill a core's caches all Python is slow, and in bfloat16, where there is a C compiler, kernels_cpu.py computes
        attention and GELU; on a GPU, where there is Triton, kernels.py takes the place of `run`, and its `fold` the
        norms into the weights."""
        self.dtype = dtype
        if self.pos_emb.device.type == "cuda" and not isinstance(self.head, PackedLinear):
            with contextlib.suppress(ImportError):  # where there is no Triton
                from kernels import capture, fold
                fold(self)
                self.capture = capture
        for module in list(self.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Linear):
                    child = PackedLinear(child, dtype)
                    setattr(module, name, child)
                if self.pos_emb.device.type == "cpu":  # what is found first, without nn.Module's bookkeeping
                    call = child.forward
                    if isinstance(child, nn.ModuleList):
                        call = [block.forward for block in child]
                    elif isinstance(child, nn.LayerNorm):
                        call = functools.partial(torch.layer_norm, normalized_shape=child.normalized_shape,
                                                 weight=child.weight, bias=child.bias, eps=child.eps)
                    module.__dict__[name] = call
        if self.pos_emb.device.type == "cpu" and dtype == torch.bfloat16:
            import kernels_cpu
            for module in self.modules() if kernels_cpu.compiled() else ():
                if isinstance(module, Block):
                    module.attend_packed = kernels_cpu.attend
                elif isinstance(module, PackedLinear):
                    module.activation = kernels_cpu.gelu
        return self

    def generate(self, cond, uniform, guidance=1.0, temperature=1.0, top_k=0, top_p=1.0):
        """Sample pictures: conditions (B, D) and uniform numbers (B, T) in [0, 1) -> tokens (B, T).

        The randomness comes in as numbers, one per token, so that a picture depends on its own row alone. top_k=0 and
        top_p=1 keep everything; temperature 0 takes the likeliest token.
        """
        assert uniform.shape == (len(cond), self.cfg.grid ** 2)
        return self.decode_logits(cond, Draw(uniform.contiguous(), temperature, top_k, top_p), guidance)


@dataclass
class Draw:
    """The next token of GPT.decode_logits by `pick`, from uniform numbers (B, T) in [0, 1)."""
    uniform: torch.Tensor
    temperature: float
    top_k: int
    top_p: float

    def __call__(self, i, logits):
        return pick(logits, self.uniform[:, i].flatten(), self.temperature, self.top_k, self.top_p)

    @property
    def from_all(self):
        """Whether any code can be drawn, and by chance."""
        return self.top_k == 0 and self.top_p >= 1 and self.temperature >= 1e-6


def pick(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Logits (B, K) and uniform numbers u (B,) -> tokens (B,), by the inverse of the cumulative distribution.

    Only the top_k likeliest codes, and of those the fewest that hold top_p of the mass (nucleus sampling, Holtzman et
    al. 2020), can be chosen. No synchronisation with the host.
    """
    if temperature < 1e-6:  # less would overflow
        return logits.argmax(-1)
    k, codes = top_k if 0 < top_k < logits.shape[-1] else logits.shape[-1], None
    if k < logits.shape[-1] or top_p < 1:
        logits, codes = logits.topk(k, -1)                                                      # (B, k), falling
    p = F.softmax(logits / temperature, -1)
    mass = p.cumsum(-1)
    if top_p < 1:
        above = mass - p                                                                        # 0 for the first
        p = torch.where((above < top_p) | (above <= 0), p, 0.0)  # keeps the code that crosses top_p and the first
        mass = p.cumsum(-1)
    i = torch.searchsorted(mass, u[:, None] * mass[:, -1:], right=True).clamp(max=k - 1)        # (B, 1)
    return (i if codes is None else codes.gather(-1, i))[:, 0]


# ----------------------------------------------------------------------------------- the same, faster on a CPU


class ConvolutionByColumns(torch.autograd.Function):
    """A convolution whose weight learns by matrix products: the gradient of the outputs times the windows that they
    were computed from, laid out as columns a thousand at a time, so that they stay in the cache."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad_x = grad_weight = None
        if wants_x:
            grad_x, _, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, ctx.stride, ctx.padding, (1, 1),
                                                               False, (0, 0), 1, (True, False, False))
        if wants_weight:
            grad_weight = weight_gradient(x, grad, weight.shape[2], ctx.stride[0], ctx.padding[0])
        return grad_x, grad_weight, grad.sum((0, 2, 3)) if wants_bias else None, None, None


def weight_gradient(x, grad, k, stride, padding):
    """Input (B, C, H, W) and gradient of the output (B, O, h, w) -> gradient of the weight (O, C, k, k)."""
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0) + 4 * (padding,)).contiguous()                     # (B, H, W, C)
    grad = grad.permute(0, 2, 3, 1).contiguous()                                               # (B, h, w, O)
    (b, h, w, o), c, (picture, line, pixel, _) = grad.shape, x.shape[3], x.stride()
    windows = x.as_strided((b, h, w, k, k * c), (picture, stride * line, stride * pixel, line, 1))
    pictures, lines = max(1, 1024 // (h * w)), max(1, 1024 // w)
    total = x.new_zeros(o, k * k * c)
    for i in range(0, b, pictures):
        for y in range(0, h, lines):
            columns = windows[i:i + pictures, y:y + lines].reshape(-1, k * k * c)
            total.addmm_(grad[i:i + pictures, y:y + lines].reshape(-1, o).T, columns)
    return total.view(o, k, k, c).permute(0, 3, 1, 2)                                          # channels-last


class Conv2d(nn.Conv2d):
    """nn.Conv2d (square, without groups or dilation), but on a CPU with AVX2 and no AVX-512 wide ones learn in float32
    by products, 1.2-2.8x faster than by oneDNN's kernel for it there (`weight_gradient`, the same to rounding)."""

    def forward(self, x):
        if (min(self.in_channels, 2 * self.out_channels) >= 128 and x.device.type == "cpu" and x.dtype == torch.float32
                and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
                and torch.backends.cpu.get_cpu_capability() == "AVX2"):
            return ConvolutionByColumns.apply(x, self.weight, self.bias, self.stride, self.padding)
        return super().forward(x)


def cpu_has_bfloat16():
    """Whether oneDNN computes in bfloat16 on this CPU. Where not, torch does, hundreds of times slower than float32."""
    return hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedLinear(nn.Module):
    """A Linear that samples and never learns: weights cast to `dtype` once, where autocast would cast all of them anew
    for every token, and for a CPU laid out as they are read fastest.

    In bfloat16, where the CPU can compute in it, that is as oneDNN's inner product does; for up to four rows as FBGEMM
    does, which keeps these numbers in float16 (none is lost between 6e-5 and 65,504), computes in float32 and reads
    half as fast again, but lays out 100 million a second. The plain weights are kept beside. In float32 it is as
    oneDNN's 1x1 convolution over the rows does, which reads up to twice as fast as its and MKL's products of a few rows
    and where tried gave a row the same bits whatever rows lay beside it. Where the layout depends on how many those
    are, another number of rows lays the weights out anew."""

    def __init__(self, linear, dtype):
        super().__init__()
        self.gelu, self.rows, self.layout = isinstance(linear, GeluLinear), 0, "plain"
        self.activation = F.gelu  # behind FBGEMM's product; GPT.pack may set a faster one
        self.weight, self.bias = linear.weight.detach().to(dtype), linear.bias.detach().to(dtype)
        if self.weight.device.type == "cpu" and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight"):
            if dtype == torch.float32:
                self.layout = "convolution"
            elif dtype == torch.bfloat16 and cpu_has_bfloat16():
                self.layout, self.laid_out, self.few, self.most = "product", None, None, 0
                if torch.backends.quantized.engine in ("x86", "fbgemm"):
                    self.fbgemm, self.most = torch.ops.quantized.linear_dynamic_fp16.default, FEW * linear.in_features

    def forward(self, x):
        then, kind = ("gelu", "none") if self.gelu else ("none", "")  # GELU's kind "none" is the exact one
        if self.layout == "product":
            few = x.numel() <= self.most
            if few != self.few:  # laid out for few rows or for many
                self.few, self.laid_out = few, (
                    torch.ops.quantized.linear_prepack_fp16(self.weight.float(), self.bias.float()) if few else
                    torch.ops.mkldnn._reorder_linear_weight(self.weight, 1))
            if few:
                y = self.fbgemm(x.float(), self.laid_out)
                return self.activation(y) if self.gelu else y
            x = x.to(torch.bfloat16)
            return torch.ops.mkldnn._linear_pointwise.default(x, self.laid_out, self.bias, then, [], kind)
        if self.layout == "convolution":
            n, c = x.numel() // x.shape[-1], x.shape[-1]
            if n != self.rows:
                dense = self.weight.to_dense() if self.weight.is_mkldnn else self.weight[..., None, None]
                self.weight = torch.ops.mkldnn._reorder_convolution_weight(dense, *ONE_BY_ONE, [1, c, 1, n])
                self.rows = n
            x, shape = x.reshape(1, 1, n, c).permute(0, 3, 1, 2), x.shape             # (1, C, 1, n), one line of pixels
            y = torch.ops.mkldnn._convolution_pointwise.default(x, self.weight, self.bias, *ONE_BY_ONE, then, [], kind)
            return y.permute(0, 2, 3, 1).reshape(*shape[:-1], -1)
        y = F.linear(x.to(self.weight.dtype), self.weight, self.bias)
        return F.gelu(y) if self.gelu else y


FEW = 4  # rows that count as few on a CPU in half precision
ONE_BY_ONE = [0, 0], [1, 1], [1, 1], 1  # padding, stride, dilation and groups of a 1x1 convolution
