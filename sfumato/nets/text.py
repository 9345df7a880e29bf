"""The text tower that is trained together with a denoiser, as latent diffusion and GLIDE do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sfumato.nets.transformer import FeedForward, SelfAttention

__all__ = ["TextTransformer", "TextTransformerConfig"]


@dataclass(frozen=True, kw_only=True)
class TextTransformerConfig:
    """Shape of the tower.

    Args:
        context: the fixed number of tokens per text.
        padding: positions behind a text are "masked" = not read, and zero in the result (latent diffusion);
            "learned" = an embedding each in the place of token and position, read like any other (GLIDE);
            "read" = read as the tokens that stand there. If they are read, the vector of the whole text is
            that of the last position, else the mean.
        head_dim: width of a head if it is not width / heads; see `SelfAttention`. The published towers of
            latent diffusion have 64.
    """

    vocab_size: int
    context: int = 16
    width: int = 256
    depth: int = 4
    heads: int = 4
    padding: Literal["masked", "learned", "read"] = "masked"
    head_dim: int = 0

    def __post_init__(self) -> None:
        if not self.head_dim and self.width % self.heads:
            raise ValueError(f"text width {self.width} is not a multiple of heads {self.heads}")


class TextBlock(nn.Module):
    """Pre-norm self-attention and feed-forward."""

    def __init__(self, width: int, heads: int, head_dim: int = 0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, head_dim=head_dim)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = FeedForward(width, 4 * width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class TextTransformer(nn.Module):
    """Bidirectional transformer over tokens (Rombach et al. 2022, arXiv:2112.10752, section 3.3).

    Padding that is masked out of the attention and zeroed in the result leaves a text the same whatever the
    length it was padded to; padding that is read does not (Nichol et al. 2022, arXiv:2112.10741).
    """

    padding: Tensor | None

    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Parameter(torch.empty(config.context, config.width))
        shape = config.width, config.heads, config.head_dim
        self.blocks = nn.ModuleList(TextBlock(*shape) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        learned = config.padding == "learned"
        self.register_parameter(
            "padding", nn.Parameter(torch.zeros_like(self.positions)) if learned else None
        )

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, L) int64, mask (B, L) bool -> tokens (B, L, D) and a vector of the whole (B, D).

        Raises: ValueError if L exceeds the context, or is less where the last position is the whole.
        """
        masked = self.config.padding == "masked"
        if ids.shape[1] < self.config.context and not masked:
            raise ValueError(f"{ids.shape[1]} tokens; pad them to the context, {self.config.context}")
        if ids.shape[1] > self.config.context:
            raise ValueError(
                f"{ids.shape[1]} tokens for a text tower with a context of {self.config.context}"
            )
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        if self.padding is not None:
            x = torch.where(mask[..., None], x, self.padding)
        for block in self.blocks:
            x = block(x, mask if masked else None)
        if not masked:
            x = self.norm(x)
            return x, x[:, -1]
        real = mask[..., None].to(x.dtype)
        x = self.norm(x) * real
        return x, x.sum(1) / real.sum(1).clamp_min(1)
