"""Small nets beside the denoisers of latent diffusion: what they make of a class, and of a map of classes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["ClassToken", "ClassTokenConfig"]


@dataclass(frozen=True, kw_only=True)
class ClassTokenConfig:
    """`rows`: classes, the null class among them if there is one; `width`: of the token."""

    rows: int
    width: int


class ClassToken(nn.Module):
    """A class as the one token that attention reads (Rombach et al. 2022, arXiv:2112.10752, section 4.1)."""

    def __init__(self, config: ClassTokenConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.rows, config.width)

    def forward(self, label: Tensor) -> Tensor:
        """label (B,) int64 -> (B, 1, width)."""
        token: Tensor = self.embedding(label)[:, None]
        return token
