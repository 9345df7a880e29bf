"""What is trained, on what: the same for every loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.nets.attention import AttentionConfig
from sfumato.nets.blocks import BlockConfig
from sfumato.nets.dit import DiTConfig
from sfumato.nets.embedding import EmbeddingConfig, TokensConfig
from sfumato.nets.unet import UNetConfig, levels

__all__ = ["LOG_EVERY", "LR", "SIZES", "Pace", "Samples", "Size"]

Pace = Callable[[], None]
LENGTH, LOG_EVERY, LR = 16, 100, 1e-4  # tokens of a text, steps between lines of the log


@dataclass(frozen=True)
class Size:
    """What is trained; the same on both sides.

    Attributes:
        batch: images of a step.
        side: of the latents, of 4 channels.
        width, mults, groups: of the U-Net; `heads` heads at every level.
        tokens: width of the text.
        dit: the DiT.
    """

    batch: int
    side: int
    width: int
    mults: tuple[int, ...]
    groups: int
    heads: int
    tokens: int
    dit: DiTConfig

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the levels of the U-Net."""
        return tuple(self.width * mult for mult in self.mults)

    def unet(self) -> UNetConfig:
        """Stable Diffusion's shape."""
        attention = AttentionConfig(kind="transformer", heads=self.heads)
        at = range(len(self.mults))
        return UNetConfig(
            in_channels=4,
            out_channels=4,
            levels=levels(self.width, self.mults, 1, attention=attention, at=at),
            middle=attention,
            embedding=EmbeddingConfig(time_dim=self.width, dim=4 * self.width),
            tokens=TokensConfig(dim=self.tokens),
            block=BlockConfig(norm_groups=self.groups),
        )


SIZES = {
    # DiT-S/4 (arXiv:2212.09748) and a U-Net of a size at which a step takes about as long.
    "full": Size(
        batch=8, side=32, width=64, mults=(1, 2, 4), groups=32, heads=4, tokens=256,
        dit=DiTConfig(patch=4, width=384, depth=12, heads=6, num_classes=1000),
    ),
    "tiny": Size(
        batch=2, side=8, width=8, mults=(1, 2), groups=4, heads=2, tokens=8,
        dit=DiTConfig(patch=4, width=16, depth=1, heads=2, num_classes=5),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Samples:
    """The same random latents, texts and classes for everybody."""

    latents: Tensor
    tokens: Tensor
    labels: Tensor
    batch: int

    @staticmethod
    def of(size: Size) -> Samples:
        """Sixteen batches."""
        g, count = torch.Generator().manual_seed(0), 16 * size.batch
        assert size.dit.num_classes is not None
        return Samples(
            torch.randn(count, 4, size.side, size.side, generator=g),
            torch.randn(count, LENGTH, size.tokens, generator=g),
            torch.randint(0, size.dit.num_classes, (count,), generator=g),
            size.batch,
        )

    def rows(self, images: int) -> Tensor:
        """Of the batch after so many images."""
        return torch.arange(images, images + self.batch) % len(self.latents)

    def endless(self) -> Iterator[Tensor]:
        """Rows of one batch after the other."""
        images = 0
        while True:
            yield self.rows(images)
            images += self.batch
