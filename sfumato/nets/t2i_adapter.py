"""T2I-Adapter: feature maps of a picture that are added to a U-Net's descending half, alike at every step.

Mou et al. 2023 (arXiv:2302.08453).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.nets.blocks import dtype_of
from sfumato.nets.unet import UNetConfig

__all__ = ["Place", "T2IAdapter", "T2IAdapterConfig", "check_base", "places"]


@dataclass(frozen=True, kw_only=True)
class T2IAdapterConfig:
    """Shape of a T2I-Adapter.

    Args:
        hint_channels: of the picture that it reads; 1 = gray.
        unshuffle: sides of the squares of pixels that become channels first.
        widths: of the feature maps, from the finest.
        blocks: residual blocks before each of them.
        kind: "full" and "light" halve the sides from each map to the next, "xl" before the third alone. The
            blocks of "light" have a quarter of the width.
    """

    hint_channels: int = 3
    unshuffle: int = 8
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    blocks: int = 2
    kind: Literal["full", "xl", "light"] = "full"

    @property
    def inputs(self) -> tuple[int, ...]:
        """Width of what the blocks of each map begin with."""
        first = self.hint_channels * self.unshuffle**2 if self.kind == "light" else self.widths[0]
        return (first, *self.widths[:-1])

    @property
    def reductions(self) -> tuple[int, ...]:
        """Sides of the picture over those of each map."""
        halved = [i == 2 if self.kind == "xl" else i > 0 for i in range(len(self.widths))]
        return tuple(self.unshuffle * 2**count for count in accumulate(halved))


class PlainBlock(nn.Module):
    """A residual block of two convolutions without norms."""

    def __init__(self, width: int, second: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, second, padding=second // 2)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = h + self.conv2(F.relu(self.conv1(h)))
        return out


class FeatureLevel(nn.Module):
    """From one feature map to the next."""

    def __init__(self, config: T2IAdapterConfig, i: int) -> None:
        super().__init__()
        cin, width, light = config.inputs[i], config.widths[i], config.kind == "light"
        self.halves = i > 0 and config.reductions[i] > config.reductions[i - 1]
        inner = width // 4 if light else width
        self.conv_in = nn.Conv2d(cin, inner, 1) if light or cin != width else None
        self.blocks = nn.Sequential(*(PlainBlock(inner, 3 if light else 1) for _ in range(config.blocks)))
        self.conv_out = nn.Conv2d(inner, width, 1) if light else None

    def forward(self, h: Tensor) -> Tensor:
        h = F.avg_pool2d(h, 2, ceil_mode=True) if self.halves else h
        h = h if self.conv_in is None else self.conv_in(h)
        h = self.blocks(h)
        return h if self.conv_out is None else self.conv_out(h)


class T2IAdapter(nn.Module):
    """adapter(hint) -> feature maps; they depend on neither x_t nor t."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        c = self.config = config
        wide = c.hint_channels * c.unshuffle**2
        self.conv_in = None if c.kind == "light" else nn.Conv2d(wide, c.widths[0], 3, padding=1)
        self.levels = nn.ModuleList(FeatureLevel(c, i) for i in range(len(c.widths)))

    def forward(self, hint: Tensor) -> tuple[Tensor, ...]:
        """hint (B, hint_channels, H, W) in [0, 1] -> maps (B, width, H / reduction, W / reduction).

        Raises: ValueError if the picture has other channels, or sides that are no multiples of `unshuffle`.
        """
        c, (channels, height, width) = self.config, hint.shape[1:]
        if channels != c.hint_channels or height % c.unshuffle or width % c.unshuffle:
            raise ValueError(
                f"the hint is {width}x{height} pixels of {channels} channels; this T2I-Adapter reads "
                f"{c.hint_channels}, and sides that are multiples of {c.unshuffle}"
            )
        h = F.pixel_unshuffle(hint.to(dtype_of(self)), c.unshuffle)
        h = h if self.conv_in is None else self.conv_in(h)
        maps = []
        for level in self.levels:
            h = level(h)
            maps.append(h)
        return tuple(maps)


class Place(NamedTuple):
    """Where a feature map is added to a U-Net.

    Attributes:
        block: number of the block behind which it is, of the encoder's blocks and then those of the middle.
        width: of what is there.
        reduction: sides of x over those of what is there.
    """

    block: int
    width: int
    reduction: int


def places(unet: UNetConfig) -> tuple[Place, ...]:
    """One place for each level, and the middle.

    It is behind the last block of a level, so that the skip has it, too. On a level without attention that is
    not the last one it is behind the change of resolution, which is what the adapters of SDXL were made for.
    """
    found, count = [], 0
    for i, level in enumerate(unet.levels):
        count += level.blocks
        within = level.attention is not None or i + 1 == len(unet.levels)
        found.append(Place(count - within, level.channels, 2 ** (i + (not within))))
        count += 1  # the change of resolution; none behind the last level, where the middle begins
    return (*found, Place(count, unet.levels[-1].channels, unet.factor))


def check_base(unet: UNetConfig, adapter: T2IAdapterConfig) -> None:
    """Raises: ValueError in one line if an adapter's maps do not fit a U-Net's places."""
    at, sides = places(unet), adapter.reductions
    takes = [(p.width, p.reduction * sides[0]) for p in at][: len(sides)]
    makes = [(width, side * at[0].reduction) for width, side in zip(adapter.widths, sides, strict=True)]
    if makes != takes:
        raise ValueError(
            f"this T2I-Adapter is for another base, a U-Net that takes maps of widths {adapter.widths} which "
            f"are smaller by {_steps(sides)}; this one takes {tuple(p.width for p in at)}, smaller by "
            f"{_steps([p.reduction for p in at])}"
        )


def _steps(sides: tuple[int, ...] | list[int]) -> str:
    return ", ".join(f"{side / sides[0]:g}" for side in sides)
