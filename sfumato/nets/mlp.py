"""Residual MLP over vectors: a denoiser of embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.types import Conditioning
from sfumato.nets.blocks import sinusoid
from sfumato.nets.tags import fused, tagged

__all__ = ["MLP", "MLPConfig"]

TIME_FEATURES = 64  # width of the sinusoids of t


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Shape of an MLP on vectors of `in_channels` numbers.

    `num_classes` adds a label table with one more row, the null class; `pooled_dim` adds `cond.pooled`.
    """

    kind: Literal["mlp"] = "mlp"
    in_channels: int
    out_channels: int
    width: int = 256
    depth: int = 3
    num_classes: int | None = None
    pooled_dim: int | None = None


class MLP(nn.Module):
    """net(x, t, cond) on vectors: residual blocks modulated by time, label and pooled text.

    Li et al. 2024 (arXiv:2406.11838), sec. 3.3, whose blocks these are. A fresh net predicts zero.
    """

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        c = self.config = config
        self.enter = tagged(nn.Linear(c.in_channels, c.width), "edge")
        first, second = nn.Linear(TIME_FEATURES, c.width), nn.Linear(c.width, c.width)
        self.time = nn.Sequential(tagged(first, "edge"), nn.SiLU(), tagged(second, "edge"))
        self.label = nn.Embedding(c.num_classes + 1, c.width) if c.num_classes is not None else None
        self.pooled = tagged(nn.Linear(c.pooled_dim, c.width), "edge") if c.pooled_dim is not None else None
        self.blocks = nn.ModuleList(MLPBlock(c.width) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=1e-6)
        self.out = tagged(nn.Linear(c.width, c.out_channels), "edge")
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x (B, in_channels), t (B,) -> (B, out_channels).

        Raises: ValueError if x is no batch of vectors, or a conditioning it needs is missing.
        """
        if x.ndim != 2:
            raise ValueError(f"this MLP denoises vectors (B, D); x has shape {tuple(x.shape)}")
        signal = self.time(sinusoid(t, TIME_FEATURES).to(x.dtype))
        for name, embed in (("label", self.label), ("pooled", self.pooled)):
            value: Tensor | None = getattr(cond, name)
            if embed is None:
                continue
            if value is None:
                raise ValueError(f"this MLP needs cond.{name}")
            signal = signal + embed(value)
        signal = F.silu(signal)
        h = self.enter(x)
        for block in self.blocks:
            h = block(h, signal)
        return self.out(self.norm(h))


class MLPBlock(nn.Module):
    """x + gate * mlp(norm(x) (1 + scale) + shift); gate, scale and shift start at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = fused(nn.Linear(width, 3 * width), 3)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, signal: Tensor) -> Tensor:
        """x (B, width), signal (B, width) -> (B, width)."""
        shift, scale, gate = self.modulation(signal).chunk(3, dim=-1)
        return x + gate * self.down(F.silu(self.up(self.norm(x) * (1 + scale) + shift)))
