"""Scenes as pictures: shapes by their distance to the edge, smooth at any size, drawn many at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from sfumato.data.scenes.graph import BACKGROUNDS, COLORS, INK, RADII, Scenes

__all__ = ["PIXELS", "coverage", "ink", "palette", "render", "window"]

Array = NDArray[np.float32]
PIXELS = (32, 64, 128)
"""Sides at which scenes are drawn and read."""
CHUNK = 256  # pictures drawn at a time, which bounds the memory
STRIPE, STRIPE_INK = 0.8, 0.28  # period in radii; ink begins this share of it away from the middle of a band
DOT, DOT_PITCH = 0.25, 0.76  # radius of the dots and their distance, in radii
SIN36, COS36 = 0.5877852522924731, 0.8090169943749475


def render(scenes: Scenes, size: int = 64) -> NDArray[np.uint8]:
    """(N, size, size, 3) pictures.

    A pixel at distance d outside of an edge is covered by 1/2 - d, within 0 and 1: the area under a straight
    edge through it, to a few percent.

    Raises: ValueError if the size is none of PIXELS.
    """
    if size not in PIXELS:
        raise ValueError(f"scenes of {size} pixels: allowed are {', '.join(map(str, PIXELS))}")
    parts = [_render(scenes[i : i + CHUNK], size) for i in range(0, len(scenes), CHUNK)]
    return np.concatenate(parts) if parts else np.zeros((0, size, size, 3), np.uint8)


def palette() -> tuple[Array, Array, Array]:
    """Colors of objects (8, 3), of backgrounds (4, 3) and of ink (3,), 0 to 255."""
    tables = list(COLORS.values()), list(BACKGROUNDS.values()), INK
    colors, grounds, black = (np.array(table, np.float32) for table in tables)
    return colors, grounds, black


def window(size: int) -> int:
    """Side in pixels of a square, centered within half a pixel of an object, that holds all of it."""
    return 2 * int(np.ceil(RADII[-1] * 1.1 * size + 1))


def coverage(shape: NDArray[np.int8], dx: Array, dy: Array, radius: Array) -> Array:
    """Share of each pixel that a shape covers.

    Args:
        shape: (M,) index in SHAPES.
        dx, dy: (M, H, W) from the shape's center to the pixel's, in pixels; y downward.
        radius: (M,) in pixels.
    """
    covered = np.empty(dx.shape, np.float32)
    for number, distance in enumerate(DISTANCES):
        rows = np.flatnonzero(shape == number)
        if len(rows):
            unit = radius[rows, None, None]
            covered[rows] = 0.5 - distance(dx[rows] / unit, dy[rows] / unit) * unit
    return covered.clip(0, 1)


def ink(texture: NDArray[np.int8], dx: Array, dy: Array, radius: Array) -> Array:
    """Share of each pixel's covered part that is ink; arguments as of `coverage`, with TEXTURES."""
    inked = np.zeros(dx.shape, np.float32)
    for number, distance in ((1, _stripes), (2, _dots)):
        rows = np.flatnonzero(texture == number)
        if len(rows):
            unit = radius[rows, None, None]
            inked[rows] = (0.5 - distance(dx[rows] / unit, dy[rows] / unit) * unit).clip(0, 1)
    return inked


def _render(scenes: Scenes, size: int) -> NDArray[np.uint8]:
    colors, grounds, black = palette()
    half = window(size) // 2
    side = size + 2 * half
    ground = grounds[scenes.background]  # (N, 3)
    canvas = np.repeat(
        ground, side * side, axis=0
    )  # (N * side * side, 3), with room for windows that stick out
    reach = np.arange(-half, half)
    for k in range(int(scenes.count.max(initial=0))):  # in turn, for windows of one picture may overlap
        rows = np.flatnonzero(scenes.count > k)
        x, y = scenes.x[rows, k] * size, scenes.y[rows, k] * size
        left, top = np.rint(x).astype(int), np.rint(y).astype(int)
        dx = ((left - x)[:, None, None] + (reach + 0.5)).astype(np.float32)
        dy = ((top - y)[:, None, None] + (reach + 0.5)[:, None]).astype(np.float32)
        dx, dy = np.broadcast_arrays(dx, dy)
        radius = (np.asarray(RADII)[scenes.size[rows, k]] * size).astype(np.float32)
        covered = coverage(scenes.shape[rows, k], dx, dy, radius)[..., None]
        inked = ink(scenes.texture[rows, k], dx, dy, radius)[..., None]
        color = colors[scenes.color[rows, k]][:, None, None]
        at = (rows * side + top + half)[:, None] + reach  # (n, window) rows of the canvas
        at = at[:, :, None] * side + (left[:, None] + reach + half)[:, None]
        canvas[at] += covered * (color - ground[rows][:, None, None] + inked * (black - color))
    pictures = canvas.reshape(len(scenes), side, side, 3)[:, half:-half, half:-half]
    return np.rint(pictures).clip(0, 255).astype(np.uint8)


# Distances to the edge, negative inside, for radius 1. All shapes lie within 1.1 of their center.


def _circle(x: Array, y: Array) -> Array:
    return np.asarray(np.hypot(x, y) - 0.9)


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.74)


def _triangle(x: Array, y: Array) -> Array:
    return np.asarray(np.maximum(y, np.float32(0.8660254) * np.abs(x) - 0.5 * y) - np.float32(0.54))


def _star(x: Array, y: Array) -> Array:
    """Five tips at 1.08, notches at 0.46; the plane is folded onto one edge, from the tip at angle 0."""
    fifth = np.float32(2 * np.pi / 5)
    angle = np.abs(np.mod(np.arctan2(x, -y) + fifth / 2, fifth) - fifth / 2)
    far = np.hypot(x, y)
    along, across = far * np.cos(angle), far * np.sin(angle)
    edge = (0.46 * COS36 - 1.08, 0.46 * SIN36)
    length = math.hypot(*edge)
    return np.asarray((along - 1.08) * (edge[1] / length) - across * (edge[0] / length))


def _cross(x: Array, y: Array) -> Array:
    low, high = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
    return np.maximum(high - np.float32(0.97), low - np.float32(0.34))


def _ring(x: Array, y: Array) -> Array:
    far = np.hypot(x, y)
    return np.maximum(far - np.float32(0.97), np.float32(0.45) - far)


def _stripes(x: Array, y: Array) -> Array:
    away = np.abs(np.mod(y / STRIPE + 0.5, 1) - 0.5)  # of a period, from the middle of a band of color
    return np.asarray((STRIPE_INK - away) * STRIPE, np.float32)


def _dots(x: Array, y: Array) -> Array:
    x, y = (v - DOT_PITCH * np.rint(v / DOT_PITCH) for v in (x, y))
    return np.asarray(np.hypot(x, y) - DOT, np.float32)


DISTANCES: tuple[Callable[[Array, Array], Array], ...] = (_circle, _square, _triangle, _star, _cross, _ring)
"""In the order of SHAPES."""
