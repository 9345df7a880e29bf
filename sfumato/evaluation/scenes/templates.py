"""Every look of an object at every position within a pixel, drawn once for each size of picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sfumato.data.scenes.draw import coverage, ink, window
from sfumato.data.scenes.graph import RADII, SHAPES, SIZES, TEXTURES

__all__ = ["Templates", "templates"]

Array = NDArray[np.float32]
OFFSETS = (-0.5, -0.25, 0.0, 0.25, 0.5)  # of the center from the middle of the window, in pixels


@dataclass(frozen=True)
class Templates:
    """K looks within a window of P x P pixels.

    Attributes:
        color, ink: (P * P, K) shares of each pixel that are color and ink.
        color2, both, ink2: (K,) their inner products.
        shape, size, texture: (K,) indices of what each shows.
        x, y: (K,) of the center, in pixels from the middle of the window.
    """

    color: Array
    ink: Array
    color2: Array
    both: Array
    ink2: Array
    shape: NDArray[np.int8]
    size: NDArray[np.int8]
    texture: NDArray[np.int8]
    x: Array
    y: Array


@lru_cache(maxsize=3)
def templates(size: int) -> Templates:
    """The looks in pictures of `size` pixels."""
    looks = [
        (shape, scale, texture, x, y)
        for shape in range(len(SHAPES))
        for scale in range(len(SIZES))
        for texture in range(len(TEXTURES) if scale else 1)
        for x in OFFSETS
        for y in OFFSETS
    ]
    columns = np.array(looks).T
    shape, scale, texture = (column.astype(np.int8) for column in columns[:3])
    x, y = (column.astype(np.float32) for column in columns[3:])
    half = window(size) // 2
    reach = np.arange(-half, half, dtype=np.float32) + np.float32(0.5)
    dx, dy = np.broadcast_arrays(reach - x[:, None, None], reach[:, None] - y[:, None, None])
    radius = (np.asarray(RADII)[scale] * size).astype(np.float32)
    covered = coverage(shape, dx, dy, radius)
    inked = covered * ink(texture, dx, dy, radius)
    color, black = (part.reshape(len(looks), -1) for part in (covered - inked, inked))
    return Templates(
        color=np.ascontiguousarray(color.T),
        ink=np.ascontiguousarray(black.T),
        color2=np.einsum("kp,kp->k", color, color),
        both=np.einsum("kp,kp->k", color, black),
        ink2=np.einsum("kp,kp->k", black, black),
        shape=shape,
        size=scale,
        texture=texture,
        x=x,
        y=y,
    )
