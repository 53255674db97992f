"""OpenVLA's architecture at miniature size, with the published checkpoint's tensor names.

image [B, 3, size, size] in 0..1, prompt ids -> logits of the seven action tokens
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

N_ACTION = 7
N_BIN = 256
DINOV2 = ([0.484375, 0.455078125, 0.40625], [0.228515625, 0.2236328125, 0.224609375])
SIGLIP = ([0.5] * 3, [0.5] * 3)


@dataclass
class Sizes:
    image: int = 84
    patch: int = 14
    tower: int = 64  # 16 heads, which follow from the towers' timm names
    tower_ff: int = 256
    tower_blocks: int = 3  # of which the last is never run
    llama: int = 96
    llama_ff: int = 256
    llama_layers: int = 3
    llama_heads: int = 3
    n_piece: int = 800
    padding: int = 64
    causal: bool = True  # an OpenVLA-OFT's rows attend to all others

    @property
    def n_row(self):
        return self.n_piece + self.padding

    @property
    def n_patch(self):
        return (self.image // self.patch) ** 2


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.scale_factor


class Attention(nn.Module):
    HEADS = 16

    def __init__(self, dim):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, dim = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.HEADS, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, dim))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, hidden, layer_scale):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


def waves(dim, patch):
    """Cosines of both axes, the longest first, of each colour: what the patches' filters begin as.

    A thing's colour and place in its patch are linear in them, near enough.
    """
    frequencies = sorted(((a, b) for a in range(patch) for b in range(patch)), key=lambda f: (sum(f), f))
    half = torch.pi * (torch.arange(patch) + 0.5) / patch
    wave = [torch.outer((a * half).cos(), (b * half).cos()) for a, b in frequencies[: dim // 3 + 1]]
    colours = [F.one_hot(torch.tensor(c), 3)[:, None, None] * w for w in wave for c in range(3)]
    return 4.0 / patch**2 * torch.stack(colours)[:dim]


class PatchEmbed(nn.Module):
    def __init__(self, dim, patch):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, patch)
        self.proj.weight.data = waves(dim, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class AttentionPool(nn.Module):
    """SigLIP's head: in every checkpoint, never run."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)


def places(side, dim):
    """Where each patch is, in sines of both axes: where the position tables begin."""
    frequency = 2 * torch.pi * torch.arange(1, dim // 4 + 1) / dim
    angle = torch.outer(torch.arange(side) + 0.5, frequency)
    wave = torch.cat([angle.sin(), angle.cos()], 1)  # [side, dim / 2]
    y, x = wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)
    return torch.cat([y, x], 2).reshape(1, side * side, dim)


class Tower(nn.Module):
    """The patches' features after the second-to-last block, without the final norm."""

    def __init__(self, s, statistics, dinov2):
        super().__init__()
        dim = s.tower
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in statistics)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.patch_embed = PatchEmbed(dim, s.patch)
        self.pos_embed = nn.Parameter(0.5 * places(s.image // s.patch, dim))
        if dinov2:
            self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
            self.reg_token = nn.Parameter(0.02 * torch.randn(1, 4, dim))
        blocks = (Block(dim, s.tower_ff, dinov2) for _ in range(s.tower_blocks))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        if not dinov2:
            self.attn_pool = AttentionPool(dim, s.tower_ff)
        self.dinov2 = dinov2

    def forward(self, image):
        x = self.patch_embed((image - self.mean) / self.std) + self.pos_embed
        n = x.shape[1]
        if self.dinov2:
            prefix = torch.cat([self.cls_token, self.reg_token], 1).expand(len(x), -1, -1)
            x = torch.cat([prefix, x], 1)
        for block in self.blocks[:-1]:
            x = block(x)
        return x[:, -n:]


class VisionBackbone(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.featurizer = Tower(s, DINOV2, dinov2=True)
        self.fused_featurizer = Tower(s, SIGLIP, dinov2=False)

    def forward(self, image):
        return torch.cat([self.featurizer(image), self.fused_featurizer(image)], 2)


class Projector(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.fc1 = nn.Linear(n_in, 4 * n_in)
        self.fc2 = nn.Linear(4 * n_in, n_out)
        self.fc3 = nn.Linear(n_out, n_out)

    def forward(self, x):
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


class RmsNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


def rope(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class SelfAttention(nn.Module):
    def __init__(self, dim, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        for name in "qkvo":
            setattr(self, f"{name}_proj", nn.Linear(dim, dim, bias=False))

    def forward(self, x, cos, sin, at=None):
        """At all places, or at those of `at`, [B, n], alone."""
        split = lambda y: y.view(*y.shape[:2], self.heads, -1).transpose(1, 2)
        k, v = split(self.k_proj(x)), split(self.v_proj(x))
        k = rope(k, cos, sin)
        if at is None:
            q, mask = rope(split(self.q_proj(x)), cos, sin), None
        else:
            q = split(self.q_proj(x[torch.arange(len(x))[:, None], at]))
            q = rope(q, cos[at][:, None], sin[at][:, None])
            mask = (torch.arange(x.shape[1]) <= at[..., None])[:, None] if self.causal else None
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal and at is None)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class GatedMlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.input_layernorm = RmsNorm(s.llama)
        self.self_attn = SelfAttention(s.llama, s.llama_heads, s.causal)
        self.post_attention_layernorm = RmsNorm(s.llama)
        self.mlp = GatedMlp(s.llama, s.llama_ff)

    def forward(self, x, cos, sin, at=None):
        y = self.self_attn(self.input_layernorm(x), cos, sin, at)
        x = y + (x if at is None else x[torch.arange(len(x))[:, None], at])
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaModel(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.embed_tokens = nn.Embedding(s.n_row, s.llama)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        self.layers = nn.ModuleList(DecoderLayer(s) for _ in range(s.llama_layers))
        self.norm = RmsNorm(s.llama)
        self.half = s.llama // s.llama_heads // 2

    def forward(self, x, at):
        """The hidden states at `at`, [B, n, dim], the only ones the last layer computes; and those of
        all places after the first layer."""
        frequency = 10_000.0 ** (-torch.arange(self.half) / self.half)
        angle = torch.outer(torch.arange(x.shape[1]), frequency).repeat(1, 2)
        cos, sin = angle.cos(), angle.sin()
        first = x = self.layers[0](x, cos, sin)
        for layer in self.layers[1:-1]:
            x = layer(x, cos, sin)
        return self.norm(self.layers[-1](x, cos, sin, at)), first


class Llama(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.model = LlamaModel(s)
        self.lm_head = nn.Linear(s.llama, s.n_row, bias=False)


class OpenVla(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.vision_backbone = VisionBackbone(s)
        self.projector = Projector(2 * s.tower, s.llama)
        self.language_model = Llama(s)
        self.n_piece = s.n_piece

    def see(self, image):
        """The soft tokens, [B, n_patch, dim]."""
        return self.projector(self.vision_backbone(image))

    def forward(self, soft, ids, length):
        """ids: [B, n], each row a prompt of `length` ids, the first six action ids, padding.

        Returns the hidden states that the seven action tokens are predicted from, [B, 7, dim], and
        those of the whole prompt after the first layer.
        """
        text = self.language_model.model.embed_tokens(ids)
        at = length[:, None] - 1 + soft.shape[1] + torch.arange(N_ACTION)
        return self.language_model.model(torch.cat([text[:, :1], soft, text[:, 1:]], 1), at)
