"""What unCLIP has besides prior and U-Nets: a null embedding, projections, a net for the last step alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sfumato.core.types import Conditioning
from sfumato.nets.embedding import (
    EmbedderConfig,
    EmbeddingConfig,
    Feature,
    Tokens,
    TokensConfig,
    VectorEmbedder,
)
from sfumato.nets.unet import UNet, UNetConfig

__all__ = [
    "LastStep",
    "LastStepConfig",
    "NullImage",
    "NullImageConfig",
    "Projections",
    "ProjectionsConfig",
    "told_both",
]


@dataclass(frozen=True, kw_only=True)
class NullImageConfig:
    """`dim` is that of the image embeddings."""

    dim: int


class NullImage(nn.Module):
    """The learned vector that stands for no image embedding."""

    def __init__(self, config: NullImageConfig) -> None:
        super().__init__()
        self.config = config
        self.vector = nn.Parameter(torch.zeros(config.dim))

    def forward(self, n: int) -> Tensor:
        """(n, dim)."""
        return self.vector.expand(n, -1)


@dataclass(frozen=True, kw_only=True)
class ProjectionsConfig:
    """Widths: of CLIP's embeddings and states, of the U-Net's time embedding, and of its tokens."""

    dim: int = 768
    embed: int = 1280
    width: int = 1536
    image_tokens: int = 4

    @property
    def tokens(self) -> TokensConfig:
        """The tokens of the U-Net."""
        return TokensConfig(
            dim=self.dim,
            width=self.width,
            norm=True,
            image_tokens=self.image_tokens,
            image_dim=self.dim,
            masked=True,
        )


def told_both(embedding: EmbeddingConfig, image: int, text: int) -> EmbeddingConfig:
    """The same with image and text embeddings, of these widths, added to that of time."""
    extras = tuple(
        EmbedderConfig(kind="linear", features=(feature,))
        for feature in (Feature(field="image_embed", dim=image), Feature(field="pooled", dim=text))
    )
    return EmbeddingConfig(time_dim=embedding.time_dim, dim=embedding.dim, extras=extras)


class Projections(nn.Module):
    """The layers of unCLIP's decoder that diffusers keeps apart from its U-Net.

    Names below `extras` and `tokens` are those of a U-Net's own, so that the two can be put together.
    """

    def __init__(self, config: ProjectionsConfig) -> None:
        super().__init__()
        c = self.config = config
        added = told_both(EmbeddingConfig(time_dim=1, dim=c.embed), c.dim, c.dim).extras
        self.extras = nn.ModuleList(VectorEmbedder(e, c.embed, "silu") for e in added)
        self.tokens = Tokens(c.tokens)
        self.null = NullImage(NullImageConfig(dim=c.dim))

    def forward(self, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """What is added to the embedding of time (B, embed), and the tokens (B, image_tokens + L, width)."""
        added: Tensor = sum(extra(cond) for extra in self.extras)
        return added, self.tokens(cond, self.null.vector.dtype)


@dataclass(frozen=True, kw_only=True)
class LastStepConfig:
    """Shape of both U-Nets."""

    net: UNetConfig

    @property
    def factor(self) -> int:
        """Both sides of x must be multiples of this."""
        return self.net.factor


class LastStep(nn.Module):
    """Two U-Nets: `last` for the evaluation at the cleanest time of a walk, `first` for all others.

    Karlo's super-resolution, whose last net was tuned for sharp pictures.
    """

    def __init__(self, config: LastStepConfig) -> None:
        super().__init__()
        self.config = config
        self.first, self.last = UNet(config.net), UNet(config.net)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """As `first`, for who evaluates it outside a walk."""
        return self.first(x, t, cond)

    def plan(self, times: Tensor) -> Callable[[Tensor, Tensor, Conditioning], Tensor]:
        """The net for a walk over these times, of which the last is where it ends; see `Net`."""
        cleanest = float(times[:-1].min())

        def net(x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            return (self.last if float(t[0]) <= cleanest else self.first)(x, t, cond)

        return net
