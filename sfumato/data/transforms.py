"""Preparations of a training picture: (3, H, W) uint8 and a random stream -> (3, H', W') uint8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from torch import Tensor

from sfumato.core import image as pictures

__all__ = ["CenterCrop", "Chain", "Flip", "RandomCrop", "Resize", "Shift", "Transform"]

Transform = Callable[[Tensor, Random], Tensor]
"""Random choices come from `Random.random()` alone, the one method that Python promises never to change."""


@dataclass(frozen=True)
class Chain:
    """One preparation after the other."""

    steps: tuple[Transform, ...] = ()

    def __call__(self, image: Tensor, rng: Random) -> Tensor:
        for step in self.steps:
            image = step(image, rng)
        return image


@dataclass(frozen=True)
class Resize:
    """To (height, width) without regard to the proportions."""

    size: tuple[int, int]

    def __call__(self, image: Tensor, rng: Random) -> Tensor:
        return pictures.from_pil(pictures.resize(pictures.to_pil(image), self.size))


@dataclass(frozen=True)
class CenterCrop:
    """The middle, after resizing to cover `size`: a side, or (height, width). Small pictures are enlarged."""

    size: int | tuple[int, int]

    def __call__(self, image: Tensor, rng: Random) -> Tensor:
        return pictures.from_pil(pictures.center_crop(pictures.to_pil(image), self.size))


@dataclass(frozen=True)
class RandomCrop:
    """Any part, after resizing to cover `size` with room to spare.

    Attributes:
        size: a side, or (height, width).
        smallest: the crop takes between this part and all of the shorter side, uniformly; in (0, 1].
    """

    size: int | tuple[int, int]
    smallest: float = 0.8

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= 1:
            raise ValueError(f"the smallest crop must be a part of the side in (0, 1], not {self.smallest}")

    def __call__(self, image: Tensor, rng: Random) -> Tensor:
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        part = self.smallest + (1 - self.smallest) * rng.random()
        room = (round(height / part), round(width / part))
        larger = pictures.from_pil(pictures.cover(pictures.to_pil(image), room))
        top = int(rng.random() * (larger.shape[1] - height + 1))
        left = int(rng.random() * (larger.shape[2] - width + 1))
        return larger[:, top : top + height, left : left + width].contiguous()


@dataclass(frozen=True)
class Flip:
    """Left and right exchanged with probability `p`; not for captions that tell them apart."""

    p: float = 0.5

    def __call__(self, image: Tensor, rng: Random) -> Tensor:
        return image.flip(2) if rng.random() < self.p else image


@dataclass(frozen=True)
class Shift:
    """Moved by up to `pixels` in both directions, uniformly; what comes in from outside is `background`."""

    pixels: int
    background: int = 255

    def __post_init__(self) -> None:
        if self.pixels < 0:
            raise ValueError(f"a shift of {self.pixels} pixels is not allowed: use 0 or more")

    def __call__(self, image: Tensor, rng: Random) -> Tensor:
        down, right = (int(rng.random() * (2 * self.pixels + 1)) - self.pixels for _ in range(2))
        height, width = image.shape[1:]
        moved = image.new_full(image.shape, self.background)
        if abs(down) < height and abs(right) < width:
            rows, columns = _overlap(down, height), _overlap(right, width)
            moved[:, rows[1], columns[1]] = image[:, rows[0], columns[0]]
        return moved


def _overlap(by: int, length: int) -> tuple[slice, slice]:
    """Where the visible part comes from, and where it goes."""
    start, stop = max(0, -by), length - max(0, by)
    return slice(start, stop), slice(start + by, stop + by)
