"""Attention inside a U-Net: over pixels, over tokens, or over both; plain or as a transformer of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.nets.blocks import Context, GroupNorm, LayerNorm, zeroed
from sfumato.nets.transformer import merge_heads, split_heads

__all__ = [
    "Attention",
    "AttentionConfig",
    "AttentionPool",
    "SpatialAttention",
    "SpatialTransformer",
    "spatial_attention",
    "token_readers",
]


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Attention of one level. Exactly one of `heads` and `head_dim` is given.

    Args:
        kind: "self" = over the pixels (DDPM, ADM); "appended" = one softmax over tokens and pixels (GLIDE,
            unCLIP, DeepFloyd IF); "transformer" = `depth` blocks of self-attention, attention to the tokens
            and a gated feed-forward (latent diffusion, Stable Diffusion).
        heads: number of heads.
        head_dim: width of one head.
        depth: number of transformer blocks.
        to_pixels: False = "appended" reads the tokens only (IF's super-resolution), and the first attention
            of a transformer block reads the tokens as the second one does (Stable Diffusion's x4 upscaler).
        conv_proj: published files have the projections around a transformer as 1x1 convolutions; it is of no
            effect but on how they are written.
        norm_tokens: "appended" normalizes the tokens, over groups of channels and all positions (IF).
    """

    kind: Literal["self", "appended", "transformer"] = "self"
    heads: int = 0
    head_dim: int = 0
    depth: int = 1
    to_pixels: bool = True
    norm_tokens: bool = False
    conv_proj: bool = False

    def __post_init__(self) -> None:
        if (self.heads > 0) == (self.head_dim > 0):
            raise ValueError(f"attention has heads={self.heads}, head_dim={self.head_dim}: give exactly one")
        if self.kind == "self" and not self.to_pixels:
            raise ValueError("attention of kind 'self' with to_pixels=False has nothing to read")

    def heads_of(self, channels: int) -> int:
        """Number of heads at a width.

        Raises: ValueError if the heads do not divide the width.
        """
        divisor = self.heads or self.head_dim
        if channels % divisor:
            name = "heads" if self.heads else "head_dim"
            raise ValueError(f"attention at width {channels}: {name} {divisor} must divide it")
        return self.heads or channels // self.head_dim


class Attention(nn.Module):
    """Multi-head attention from x to itself, to tokens, or to both (tokens first) in one softmax.

    Query, key and value are separate and head-major, whatever order a published file has.

    Args:
        dim: width of x.
        heads: number of heads; divides dim.
        to_self: whether x is among what is read.
        token_dim: width of the tokens; 0 = none are read.
        token_groups: groups of a GroupNorm over the tokens; 0 = no norm.
        bias: whether query, key and value have one.
    """

    entrances = ("keys_values",)  # called from outside its block, see `tags.entrances_of`

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        to_self: bool = True,
        token_dim: int = 0,
        token_groups: int = 0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.to_self, self.token_dim = heads, to_self, token_dim
        self.slot = 0  # place of the token keys and values in Context.kv; the net numbers its readers
        self.q = nn.Linear(dim, dim, bias)
        if to_self:
            self.k, self.v = nn.Linear(dim, dim, bias), nn.Linear(dim, dim, bias)
        if token_dim:
            self.token_norm = GroupNorm(token_groups, token_dim) if token_groups else None
            self.token_k, self.token_v = nn.Linear(token_dim, dim, bias), nn.Linear(token_dim, dim, bias)
        self.out = nn.Linear(dim, dim)

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens (B, L, D): (B, heads, L, d) each."""
        if self.token_norm is not None:
            tokens = self.token_norm(tokens.transpose(1, 2)).transpose(1, 2)
        return split_heads(self.token_k(tokens), self.heads), split_heads(self.token_v(tokens), self.heads)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (B, N, C) -> (B, N, C)."""
        k, v, mask = self._read(x, context)
        y = F.scaled_dot_product_attention(split_heads(self.q(x), self.heads), k, v, attn_mask=mask)
        return self.out(merge_heads(y))

    def _read(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask of everything that x reads."""
        if not self.to_self:
            return *context.kv[self.slot], context.mask
        k, v = split_heads(self.k(x), self.heads), split_heads(self.v(x), self.heads)
        if not self.token_dim:
            return k, v, None
        token_k, token_v = context.kv[self.slot]
        mask = None if context.mask is None else F.pad(context.mask, (0, x.shape[1]), value=True)
        return torch.cat([token_k, k], dim=2), torch.cat([token_v, v], dim=2), mask


class SpatialAttention(nn.Module):
    """x + attention(norm(x)) over the pixels of a feature map; the output projection starts at zero."""

    def __init__(self, norm: GroupNorm, attention: Attention) -> None:
        super().__init__()
        self.norm, self.attention = norm, attention
        zeroed(attention.out)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (B, C, H, W) -> same."""
        return x + _image(self.attention(_sequence(self.norm(x)), context), like=x)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map (Rombach et al. 2022, arXiv:2112.10752, E.2.1).

    The projections in and out are linear; 1x1 convolutions in some published files are the same numbers.
    """

    def __init__(self, channels: int, config: AttentionConfig, token_dim: int, groups: int) -> None:
        super().__init__()
        heads = config.heads_of(channels)
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(
            TransformerBlock(channels, heads, token_dim, config.to_pixels) for _ in range(config.depth)
        )
        self.proj_out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (B, C, H, W) -> same."""
        h = self.proj_in(_sequence(self.norm(x)))
        for block in self.blocks:
            h = block(h, context)
        return x + _image(self.proj_out(h), like=x)


class TransformerBlock(nn.Module):
    """Pre-norm self-attention, attention to the tokens, gated feed-forward."""

    def __init__(self, dim: int, heads: int, token_dim: int, to_pixels: bool) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = LayerNorm(dim), LayerNorm(dim), LayerNorm(dim)
        first_dim = 0 if to_pixels else token_dim
        self.attention1 = Attention(dim, heads, to_self=to_pixels, token_dim=first_dim, bias=False)
        self.attention2 = Attention(dim, heads, to_self=False, token_dim=token_dim, bias=False)
        self.mlp = GatedFeedForward(dim, 4 * dim)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (B, N, C) -> same."""
        x = x + self.attention1(self.norm1(x), context)
        x = x + self.attention2(self.norm2(x), context)
        return x + self.mlp(self.norm3(x))


class GatedFeedForward(nn.Module):
    """GEGLU: down(a * gelu(b)), with (a, b) = up(x) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, C) -> same."""
        value, gate = self.up(x).chunk(2, dim=-1)
        return self.down(value * F.gelu(gate))


class AttentionPool(nn.Module):
    """One vector of a token sequence: its mean, plus a learned position, attends to itself and the tokens.

    Norm, attention, projection, norm, as DeepFloyd IF embeds T5's tokens.
    """

    def __init__(self, dim: int, out: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"attention pooling of width {dim}: heads {heads} must divide it")
        self.heads = heads
        self.norm1 = LayerNorm(dim)
        self.position = nn.Parameter(torch.randn(1, dim) / dim**0.5)
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, out)
        self.norm2 = LayerNorm(out)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, L, D) -> (B, out)."""
        x = self.norm1(tokens)
        mean = x.mean(dim=1, keepdim=True) + self.position
        x = torch.cat([mean, x], dim=1)
        q, k, v = (split_heads(y, self.heads) for y in (self.q(mean), self.k(x), self.v(x)))
        pooled = merge_heads(F.scaled_dot_product_attention(q, k, v))[:, 0]
        return self.norm2(self.proj(pooled))


def spatial_attention(
    channels: int, config: AttentionConfig, token_dim: int, *, groups: int, eps: float
) -> SpatialAttention | SpatialTransformer:
    """The attention of a level at a width; `token_dim` is the width of the tokens, 0 if the net has none.

    Raises: ValueError if the kind reads tokens and there are none.
    """
    if config.kind != "self" and not token_dim:
        raise ValueError(f"attention of kind {config.kind!r} reads tokens: give the U-Net a TokensConfig")
    if config.kind == "transformer":
        return SpatialTransformer(channels, config, token_dim, groups)
    attention = Attention(
        channels,
        config.heads_of(channels),
        to_self=config.to_pixels,
        token_dim=token_dim if config.kind == "appended" else 0,
        token_groups=groups if config.norm_tokens else 0,
    )
    return SpatialAttention(GroupNorm(groups, channels, eps=eps), attention)


def token_readers(net: nn.Module) -> list[Attention]:
    """Every attention of the net that reads tokens, in module order: the order of Conditioning.kv."""
    return [m for m in net.modules() if isinstance(m, Attention) and m.token_dim]


def _sequence(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


def _image(x: Tensor, like: Tensor) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W), in the memory layout of the sequence: channels last."""
    return x.transpose(1, 2).unflatten(2, like.shape[2:])
