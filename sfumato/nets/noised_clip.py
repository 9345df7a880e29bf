"""GLIDE's CLIP of noisy pictures: a text tower, and a vision tower that is told the time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.nets.transformer import FeedForward, merge_heads, split_heads

__all__ = ["NoisedText", "NoisedTextConfig", "NoisedVision", "NoisedVisionConfig"]

# Mean and deviation of the red, green and blue of its training pictures, of 255.
MEAN, STD = (122.77093945, 116.74601272, 104.09373519), (68.50053285, 66.63215831, 70.32316309)


@dataclass(frozen=True, kw_only=True)
class NoisedTextConfig:
    """Shape of the text tower; `embed` is the width of the shared space."""

    width: int = 512
    depth: int = 12
    heads: int = 8
    vocab: int = 65536
    context: int = 77
    embed: int = 512


@dataclass(frozen=True, kw_only=True)
class NoisedVisionConfig:
    """Shape of the vision tower for pictures of `size` pixels and `times` steps of noise."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    size: int = 64
    patch: int = 4
    times: int = 1000
    embed: int = 512


class NoisedText(nn.Module):
    """Texts -> features; causal, and the last real token stands for the text.

    Nichol et al. 2021 (arXiv:2112.10741), section 2.4.
    """

    def __init__(self, config: NoisedTextConfig) -> None:
        super().__init__()
        c = self.config = config
        self.tokens = nn.Embedding(c.vocab, c.width)
        self.positions = nn.Parameter(0.01 * torch.randn(c.context, c.width))
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width)
        self.projection = nn.Linear(c.width, c.embed, bias=False)

    def forward(self, ids: Tensor, length: Tensor) -> Tensor:
        """Ids (B, L) int64, of which the first `length` (B,) are real -> features (B, embed).

        Raises: ValueError if L exceeds the context.
        """
        if ids.shape[1] > len(self.positions):
            raise ValueError(
                f"{ids.shape[1]} tokens for a text tower with a context of {len(self.positions)}"
            )
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, causal=True)
        return self.projection(self.norm(x[torch.arange(len(x), device=x.device), length - 1]))


class NoisedVision(nn.Module):
    """Noisy pictures -> features; an embedding of the time takes the place of a class token."""

    def __init__(self, config: NoisedVisionConfig) -> None:
        super().__init__()
        c = self.config = config
        self.times = nn.Embedding(c.times, c.width)
        self.patches = nn.Conv2d(3, c.width, c.patch, c.patch, bias=False)
        self.positions = nn.Parameter(c.width**-0.5 * torch.randn((c.size // c.patch) ** 2 + 1, c.width))
        self.norm_in = nn.LayerNorm(c.width)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width)
        self.projection = nn.Linear(c.width, c.embed, bias=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Pictures (B, 3, size, size) on the scale of [-1, 1], times (B,) -> features (B, embed)."""
        mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device).view(3, 1, 1) for v in (MEAN, STD))
        h = self.patches(((x + 1) * 127.5 - mean) / std).flatten(2).mT
        h = self.norm_in(torch.cat([self.times(t.long())[:, None], h], dim=1) + self.positions)
        for block in self.blocks:
            h = block(h)
        return self.projection(self.norm(h[:, 0]))


class Block(nn.Module):
    """Pre-norm attention, whose keys have no bias, and feed-forward."""

    def __init__(self, c: NoisedTextConfig | NoisedVisionConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.norm1 = nn.LayerNorm(c.width)
        self.q = nn.Linear(c.width, c.width)
        self.k = nn.Linear(c.width, c.width, bias=False)
        self.v = nn.Linear(c.width, c.width)
        self.out = nn.Linear(c.width, c.width)
        self.norm2 = nn.LayerNorm(c.width)
        self.mlp = FeedForward(c.width, 4 * c.width)

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        """x (B, L, width)."""
        h = self.norm1(x)
        q, k, v = (split_heads(layer(h), self.heads) for layer in (self.q, self.k, self.v))
        x = x + self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=causal)))
        return x + self.mlp(self.norm2(x))
