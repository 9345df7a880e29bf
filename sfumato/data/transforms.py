"""Preparations of a training picture: a view and a random stream -> a view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from torch import Tensor

from sfumato.core import image as pictures

__all__ = ["CenterCrop", "Chain", "Flip", "RandomCrop", "Resize", "Shift", "Transform", "View"]


@dataclass(frozen=True)
class View:
    """A picture on its way into a batch.

    Attributes:
        image: (3, H, W) uint8.
        crop: (top, left) rows and columns cut off before it, in pixels of the resized picture; the crop
            coordinates of SDXL (Podell et al. 2023, arXiv:2307.01952, section 2.2).
        whole: (height, width) of the resized picture that it was cut from; None if nothing was cut.
        target: (height, width) that crops give instead of their own size: that of the picture's bucket.
    """

    image: Tensor
    crop: tuple[int, int] = (0, 0)
    whole: tuple[int, int] | None = None
    target: tuple[int, int] | None = None


Transform = Callable[[View, Random], View]
"""Random choices come from `Random.random()` alone, the one method that Python promises never to change."""


@dataclass(frozen=True)
class Chain:
    """One preparation after the other."""

    steps: tuple[Transform, ...] = ()

    def __call__(self, view: View, rng: Random) -> View:
        for step in self.steps:
            view = step(view, rng)
        return view


@dataclass(frozen=True)
class Resize:
    """To (height, width) without regard to the proportions."""

    size: tuple[int, int]

    def __call__(self, view: View, rng: Random) -> View:
        resized = pictures.resize(pictures.to_pil(view.image), self.size)
        return View(pictures.from_pil(resized), target=view.target)


@dataclass(frozen=True)
class CenterCrop:
    """The middle, after resizing to cover `size`: a side, or (height, width). Small pictures are enlarged.

    The same as `core.image.center_crop`.
    """

    size: int | tuple[int, int]

    def __call__(self, view: View, rng: Random) -> View:
        height, width = size = _size(self.size, view)
        larger = pictures.from_pil(pictures.cover(pictures.to_pil(view.image), size))
        return _cut(view, larger, size, (larger.shape[1] - height) // 2, (larger.shape[2] - width) // 2)


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

    def __call__(self, view: View, rng: Random) -> View:
        height, width = size = _size(self.size, view)
        part = self.smallest + (1 - self.smallest) * rng.random()
        room = (round(height / part), round(width / part))
        larger = pictures.from_pil(pictures.cover(pictures.to_pil(view.image), room))
        top = int(rng.random() * (larger.shape[1] - height + 1))
        left = int(rng.random() * (larger.shape[2] - width + 1))
        return _cut(view, larger, size, top, left)


@dataclass(frozen=True)
class Flip:
    """Left and right exchanged with probability `p`; not for captions that tell them apart.

    The crop becomes that of the exchanged picture.
    """

    p: float = 0.5

    def __call__(self, view: View, rng: Random) -> View:
        if rng.random() >= self.p:
            return view
        width = view.image.shape[2]
        left = (view.whole[1] if view.whole else width) - view.crop[1] - width
        return replace(view, image=view.image.flip(2), crop=(view.crop[0], left))


@dataclass(frozen=True)
class Shift:
    """Moved by up to `pixels` in both directions, uniformly; what comes in from outside is `background`.

    Its crop stays what it was.
    """

    pixels: int
    background: int = 255

    def __post_init__(self) -> None:
        if self.pixels < 0:
            raise ValueError(f"a shift of {self.pixels} pixels is not allowed: use 0 or more")

    def __call__(self, view: View, rng: Random) -> View:
        image = view.image
        down, right = (int(rng.random() * (2 * self.pixels + 1)) - self.pixels for _ in range(2))
        height, width = image.shape[1:]
        moved = image.new_full(image.shape, self.background)
        if abs(down) < height and abs(right) < width:
            rows, columns = _overlap(down, height), _overlap(right, width)
            moved[:, rows[1], columns[1]] = image[:, rows[0], columns[0]]
        return replace(view, image=moved)


def _size(own: int | tuple[int, int], view: View) -> tuple[int, int]:
    return view.target or ((own, own) if isinstance(own, int) else own)


def _cut(view: View, larger: Tensor, size: tuple[int, int], top: int, left: int) -> View:
    image = larger[:, top : top + size[0], left : left + size[1]].contiguous()
    return View(image, (top, left), (larger.shape[1], larger.shape[2]), view.target)


def _overlap(by: int, length: int) -> tuple[slice, slice]:
    """Where the visible part comes from, and where it goes."""
    start, stop = max(0, -by), length - max(0, by)
    return slice(start, stop), slice(start + by, stop + by)
