"""A classifier of noisy pictures: the descending half of a U-Net and a head, for classifier guidance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.types import Conditioning
from sfumato.nets.blocks import GroupNorm, zeroed
from sfumato.nets.tags import fused
from sfumato.nets.transformer import merge_heads, split_heads
from sfumato.nets.unet import Encoded, Encoder, UNetConfig

__all__ = ["NoisyClassifier", "NoisyClassifierConfig"]

Pool = Literal["adaptive", "attention", "spatial", "spatial_v2"]


@dataclass(frozen=True, kw_only=True)
class NoisyClassifierConfig:
    """Shape of the classifier.

    Args:
        encoder: of its U-Net; what concerns the ascending half is not used.
        num_classes: number of logits.
        pool: "adaptive" = mean over the pixels; "attention" = attention from that mean to the pixels (all
            published ones); "spatial" = two layers on the means of every block's pixels; "spatial_v2" = the
            same with a norm and SiLU between them.
        size: side of the pictures; only "attention" is bound to it, by its positions.
        head_dim: width of a head of "attention".
        hidden: width between the layers of "spatial" and "spatial_v2".
    """

    encoder: UNetConfig
    num_classes: int = 1000
    pool: Pool = "attention"
    size: int = 64
    head_dim: int = 64
    hidden: int = 2048

    def __post_init__(self) -> None:
        if self.pool == "attention" and self.width % self.head_dim:
            raise ValueError(f"attention pooling: head_dim {self.head_dim} must divide width {self.width}")

    @property
    def width(self) -> int:
        """Of the coarsest level."""
        return self.encoder.levels[-1].channels

    @property
    def features(self) -> int:
        """Of the means of all blocks, middle included."""
        levels = self.encoder.levels
        per_level = [v.channels * (v.blocks + (i + 1 < len(levels))) for i, v in enumerate(levels)]
        return levels[0].channels + sum(per_level) + self.width


class NoisyClassifier(nn.Module):
    """net(x_t, t) -> logits (Dhariwal & Nichol 2021, arXiv:2105.05233, section 4)."""

    def __init__(self, config: NoisyClassifierConfig) -> None:
        super().__init__()
        c, groups, eps = config, config.encoder.block.norm_groups, config.encoder.block.norm_eps
        self.config = config
        self.encoder = Encoder(c.encoder)
        if c.pool in ("adaptive", "attention"):
            side = c.size // c.encoder.factor
            self.norm: nn.Module = GroupNorm(groups, c.width, eps=eps)
            self.head: nn.Module = (
                zeroed(nn.Linear(c.width, c.num_classes))
                if c.pool == "adaptive"
                else PixelPool(c.width, c.num_classes, heads=c.width // c.head_dim, pixels=side**2)
            )
        else:
            self.up = nn.Linear(c.features, c.hidden)
            self.norm = GroupNorm(groups, c.hidden, eps=eps) if c.pool == "spatial_v2" else nn.Identity()
            self.head = nn.Linear(c.hidden, c.num_classes)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning | None = None) -> Tensor:
        """x (B, C, H, W), t (B,) -> (B, num_classes).

        Raises: ValueError if attention pooling is given pictures of another size.
        """
        c = self.config
        if c.pool == "attention" and x.shape[-2] * x.shape[-1] != c.size**2:
            raise ValueError(f"x is {x.shape[-1]}x{x.shape[-2]}; this classifier needs {c.size}x{c.size}")
        encoded = self.encoder(x, t, cond or Conditioning())
        if c.pool in ("spatial", "spatial_v2"):
            h = self.norm(self.up(_means(encoded)))
            return self.head(F.relu(h) if c.pool == "spatial" else F.silu(h))
        h = F.silu(self.norm(encoded.h))
        return self.head(h.mean(dim=(2, 3)) if c.pool == "adaptive" else h)


class PixelPool(nn.Module):
    """Attention from the mean of the pixels to itself and to them, with learned positions."""

    def __init__(self, dim: int, out: int, *, heads: int, pixels: int) -> None:
        super().__init__()
        self.heads = heads
        self.positions = nn.Parameter(torch.randn(pixels + 1, dim) / dim**0.5)
        self.qkv = fused(nn.Linear(dim, 3 * dim), 3)
        self.out = nn.Linear(dim, out)

    def forward(self, h: Tensor) -> Tensor:
        """h (B, C, H, W) -> (B, out)."""
        x = h.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positions
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(merge_heads(F.scaled_dot_product_attention(q[:, :, :1], k, v))[:, 0])


def _means(encoded: Encoded) -> Tensor:
    """Over the pixels of every block, and of the middle, side by side."""
    return torch.cat([h.mean(dim=(2, 3)) for h in (*encoded.skips, encoded.h)], dim=1)
