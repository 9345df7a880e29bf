"""The pre-norm block of CLIP's towers and of DINOv2."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.nets.transformer import SelfAttention

__all__ = ["EncoderBlock", "Gated"]


class Gated(nn.Module):
    """Linear to two halves, SiLU of the first times the second, Linear (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, h = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * h)


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        width, heads: of the attention.
        mlp: feed-forward network.
        eps: of the norms.
        scaled: learned gain per channel on what each half adds (LayerScale, arXiv:2103.17239).
    """

    scale1: Tensor | None
    scale2: Tensor | None

    def __init__(
        self, width: int, heads: int, mlp: nn.Module, *, eps: float = 1e-5, scaled: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = mlp
        for name in ("scale1", "scale2"):
            self.register_parameter(name, nn.Parameter(torch.ones(width)) if scaled else None)

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        h = self.attention(self.norm1(x), causal=causal)
        x = x + (h if self.scale1 is None else self.scale1 * h)
        h = self.mlp(self.norm2(x))
        return x + (h if self.scale2 is None else self.scale2 * h)
