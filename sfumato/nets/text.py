"""The text tower that is trained together with a denoiser, as latent diffusion and GLIDE do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.nets.transformer import FeedForward, SelfAttention

__all__ = ["TextTransformer", "TextTransformerConfig"]


@dataclass(frozen=True, kw_only=True)
class TextTransformerConfig:
    """Shape of the tower; `context` is the fixed number of tokens per text."""

    vocab_size: int
    context: int = 16
    width: int = 256
    depth: int = 4
    heads: int = 4

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"text width {self.width} is not a multiple of heads {self.heads}")


class TextBlock(nn.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, 4 * width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class TextTransformer(nn.Module):
    """Bidirectional transformer over tokens (Rombach et al. 2022, arXiv:2112.10752, section 3.3).

    Padding is masked out of the attention and zeroed in the result, so that a text means the same whatever
    the length it was padded to.
    """

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.empty(config.context, config.width))
        self.blocks = nn.ModuleList(TextBlock(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, L) int64, mask (B, L) bool -> tokens (B, L, D) and their mean over real tokens (B, D).

        Raises: ValueError if L exceeds the context.
        """
        if ids.shape[1] > self.config.context:
            raise ValueError(
                f"{ids.shape[1]} tokens for a text tower with a context of {self.config.context}"
            )
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        real = mask[..., None].to(x.dtype)
        x = self.norm(x) * real
        return x, x.sum(1) / real.sum(1).clamp_min(1)
