"""Convolutional parts of a U-Net: norms, residual block, changes of resolution, embedding of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.types import KeysValues

__all__ = [
    "ACTIVATIONS",
    "BlockConfig",
    "Context",
    "Downsample",
    "EmbeddingMLP",
    "GroupNorm",
    "LayerNorm",
    "ResBlock",
    "Upsample",
    "dtype_of",
    "sinusoid",
    "zeroed",
]

M = TypeVar("M", bound=nn.Module)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What all residual blocks of a U-Net share; the defaults are latent diffusion's.

    Args:
        film: the embedding scales and shifts the second norm (ADM) instead of being added before it (DDPM).
        resample: "conv" = strided convolution down, nearest and convolution up; "conv_asymmetric" = the same,
            padded at the right and bottom only when going down (DDPM's TensorFlow padding); "residual" = a
            residual block that averages or repeats pixels between its norm and its first convolution (ADM).
        activation: after norms and inside the embedding; "gelu" (exact) for DeepFloyd IF.
        norm_groups: groups of every GroupNorm; divides every width.
        norm_eps: epsilon of every GroupNorm outside a spatial transformer, whose epsilon is 1e-6.
        dropout: probability, before the second convolution.
        residual_scale: factor of (skip + branch): 1, or sqrt(1/2) for Imagen-like nets.
        skip_scale: factor of what the descending half hands to the ascending one: 1, or sqrt(1/2) in Imagen's
            Efficient U-Net.
    """

    film: bool = False
    resample: Literal["conv", "conv_asymmetric", "residual"] = "conv"
    activation: Literal["silu", "gelu"] = "silu"
    norm_groups: int = 32
    norm_eps: float = 1e-5
    dropout: float = 0.0
    residual_scale: float = 1.0
    skip_scale: float = 1.0


class Context(NamedTuple):
    """What every block of a net may read besides its feature map."""

    embedding: Tensor
    """(B, E) time and pooled conditioning, after the activation."""
    kv: KeysValues
    """Keys and values of the tokens, one pair per attention that reads them."""
    mask: Tensor | None
    """(B, 1, 1, L) bool over the tokens, True = may be attended to."""


class GroupNorm(nn.GroupNorm):
    """GroupNorm that computes in float32 when its input is a 16-bit float."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, ...) -> same shape and dtype."""
        if x.dtype not in HALF:
            return super().forward(x)
        y = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis that computes in float32 when its input is a 16-bit float."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., C) -> same shape and dtype."""
        if x.dtype not in HALF:
            return super().forward(x)
        y = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


class ResBlock(nn.Module):
    """Norm, activation, convolution, twice, with the embedding in between.

    Ho et al. 2020 (arXiv:2006.11239); FiLM and resampling: Dhariwal & Nichol 2021 (arXiv:2105.05233).

    The second convolution starts at zero, so that a fresh block is its skip path.

    Args:
        channels: input and output width.
        embed_dim: width of the embedding.
        config: what all blocks of the net share.
        resample: halves or doubles the resolution of branch and skip, without parameters.
    """

    def __init__(
        self,
        channels: tuple[int, int],
        embed_dim: int,
        config: BlockConfig,
        resample: Literal["down", "up"] | None = None,
    ) -> None:
        super().__init__()
        c, (cin, cout) = config, channels
        self.film, self.scale, self.resample = c.film, c.residual_scale, RESAMPLE[resample]
        self.activation = ACTIVATIONS[c.activation]
        self.norm1 = GroupNorm(c.norm_groups, cin, eps=c.norm_eps)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.embed = nn.Linear(embed_dim, 2 * cout if c.film else cout)
        self.norm2 = GroupNorm(c.norm_groups, cout, eps=c.norm_eps)
        self.dropout = nn.Dropout(c.dropout)
        self.conv2 = zeroed(nn.Conv2d(cout, cout, 3, padding=1))
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (B, C_in, H, W) -> (B, C_out, H', W')."""
        h = self.conv1(self.resample(self.activation(self.norm1(x))))
        e = self.embed(context.embedding)[:, :, None, None]
        if self.film:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + e)
        h = self.skip(self.resample(x)) + self.conv2(self.dropout(self.activation(h)))
        return h if self.scale == 1.0 else h * self.scale


class Downsample(nn.Module):
    """Stride-2 convolution; padded on all sides, or at the right and bottom only."""

    def __init__(self, channels: int, *, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (B, C, H, W) -> (B, C, H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Nearest x2 and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (B, C, H, W) -> (B, C, 2H, 2W)."""
        return self.conv(_repeat(x))


def sinusoid(t: Tensor, dim: int, *, cos_first: bool = True, shift: float = 0.0) -> Tensor:
    """Sines and cosines of t * 10000^(-j / (half - shift)), j < half = dim // 2, in float32 or better.

    Args:
        t: (...) numbers, fractions allowed.
        dim: width of the result; an odd one is padded with a zero.
        cos_first: [cos, sin] as in ADM and latent diffusion; [sin, cos] as in DDPM.
        shift: 0 as in ADM; 1 as in DDPM and "Attention is all you need" (arXiv:1706.03762).

    Returns: (..., dim).
    """
    half = dim // 2
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    j = torch.arange(half, device=t.device, dtype=t.dtype)
    angles = t[..., None] * torch.exp(-math.log(10_000) * j / (half - shift))
    parts = [angles.cos(), angles.sin()] if cos_first else [angles.sin(), angles.cos()]
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))


class EmbeddingMLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, dim: int, out: int, activation: str) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(dim, out), nn.Linear(out, out)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """x (B, dim) -> (B, out)."""
        return self.linear2(self.activation(self.linear1(x)))


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype that the weights of a module want their input in."""
    return next(module.parameters()).dtype


def zeroed(module: M) -> M:
    """The module with all its parameters set to zero."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


HALF = (torch.float16, torch.bfloat16)


def _halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def _repeat(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _keep(x: Tensor) -> Tensor:
    return x


RESAMPLE: dict[str | None, Callable[[Tensor], Tensor]] = {None: _keep, "down": _halve, "up": _repeat}
