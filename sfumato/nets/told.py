"""Small nets beside the denoisers of latent diffusion: what they make of a class, and of a map of classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ClassMap", "ClassMapConfig", "ClassToken", "ClassTokenConfig"]


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


@dataclass(frozen=True, kw_only=True)
class ClassMapConfig:
    """`classes` that a pixel may be of; `channels` that they are mixed into."""

    classes: int
    channels: int


class ClassMap(nn.Module):
    """A map of classes, halved bilinearly until it is as small as the latents, and mixed into a few channels.

    The spatial rescaler of semantic synthesis (Rombach et al. 2022, arXiv:2112.10752, section 4.3.2).
    """

    def __init__(self, config: ClassMapConfig) -> None:
        super().__init__()
        self.config = config
        self.mix = nn.Linear(config.classes, config.channels, bias=False)

    def forward(self, classes: Tensor, factor: int) -> Tensor:
        """classes (B, H, W) int64 -> (B, channels, H / factor, W / factor); factor is a power of 2."""
        x = F.one_hot(classes, self.config.classes).to(self.mix.weight.dtype).movedim(-1, 1)
        for _ in range(factor.bit_length() - 1):
            x = F.interpolate(x, scale_factor=0.5, mode="bilinear")
        mixed: Tensor = self.mix(x.movedim(1, -1)).movedim(-1, 1)
        return mixed
