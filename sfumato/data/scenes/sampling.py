"""Scenes by number: scene i of a split is a pure function of (split, seed, i), drawn in bulk."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from sfumato.core.registry import unknown
from sfumato.data.scenes.graph import BACKGROUNDS, COLORS, MOST, RADII, SHAPES, SIZES, TEXTURES, Scenes
from sfumato.data.scenes.splits import SPLITS, Split, fits, related

__all__ = ["draw_scenes", "uniforms"]

BLOCK = 4096  # scenes drawn at a time
ROUNDS = 4000  # never reached: the rarest scenes are found in about 200
KINDS = (0.3, 0.35, 0.2, 0.1, 0.05)  # one; two; two to four alike; two or three alike and another; a list
TRIES = 8  # places tried for an object before all are placed anew
SPARSE = 16  # numbers are computed one by one if they lie this far apart
REACH = 1.1  # largest shape, in units of its radius
GAP, MARGIN = 3.5 / 64, 1.5 / 64  # of background between objects, and around them


def draw_scenes(split: Split, count: int, *, seed: int = 0, first: int = 0) -> Scenes:
    """Scenes `first` to `first + count - 1` of a split.

    Everything is drawn independently and evenly (`KINDS` has the shares of the kinds) until the scene fits
    the split, then the places until no two objects come near each other and the relations fit it too.

    Raises: ValueError in one line for an unknown split or a negative number.
    """
    if split not in SPLITS:
        raise ValueError(unknown("split", split, list(SPLITS)))
    if count < 0 or first < 0:
        raise ValueError(f"{count} scenes from number {first}: neither may be negative")
    parts = []
    for start in range(first, first + count, BLOCK):
        parts.append(_block(split, seed, start, min(BLOCK, first + count - start)))
    columns = [vars(part).values() for part in parts or [_block(split, seed, 0, 1)[:0]]]
    return Scenes(*(np.concatenate(column) for column in zip(*columns, strict=True)))


def uniforms(name: str, rows: NDArray[np.int64], width: int) -> NDArray[np.float64]:
    """(N, width) numbers in [0, 1), a function of `name` and the row's number. Width: a multiple of 4."""
    # Philox counts in steps of four words, so that any row can be computed without those before it; its raw
    # bits are the same in every release of numpy.
    key = int.from_bytes(hashlib.sha256(f"scenes/{name}".encode()).digest()[:16], "little")
    first, span = int(rows[0]), int(rows[-1] - rows[0]) + 1
    if span <= SPARSE * len(rows):
        words = np.random.Philox(key=key, counter=first * width // 4).random_raw(span * width)
        words = words.reshape(span, width)[rows - first]
    else:
        each = (np.random.Philox(key=key, counter=int(row) * width // 4) for row in rows)
        words = np.stack([bits.random_raw(width) for bits in each])
    return np.asarray((words >> 11) * 2.0**-53)


def _block(split: Split, seed: int, first: int, count: int) -> Scenes:
    scenes = _blank(count)
    for stage, draw, right in (("graph", _graphs, fits), ("places", _places, _apart_and_related)):
        rows = np.arange(count)
        for attempt in range(ROUNDS):
            drawn = draw(f"{split}/{seed}/{stage}/{attempt}", first + rows, scenes[rows])
            _put(scenes, rows, drawn)
            rows = rows[~right(drawn, split)]
            if not len(rows):
                break
        assert not len(rows), f"{split} scenes cannot be found"
    return scenes


def _blank(count: int) -> Scenes:
    def numbers() -> NDArray[np.int8]:
        return np.zeros((count, MOST), np.int8)

    few, places = np.zeros(count, np.int8), np.zeros((count, MOST))
    return Scenes(few, few.copy(), numbers(), numbers(), numbers(), numbers(), places, places.copy())


def _put(scenes: Scenes, rows: NDArray[np.int64], values: Scenes) -> None:
    for name, column in vars(scenes).items():
        column[rows] = getattr(values, name)


def _graphs(name: str, rows: NDArray[np.int64], old: Scenes) -> Scenes:
    """Everything but the places."""
    u = uniforms(name, rows, 16)
    kind = np.searchsorted(np.cumsum(KINDS), u[:, 0], side="right").clip(max=len(KINDS) - 1)
    few = 2 + (u[:, 1] * 2).astype(int)  # 2 or 3
    many = 2 + (u[:, 1] * 3).astype(int)  # 2, 3 or 4
    total = np.choose(kind, [1, 2, many, few + 1, few + 1])
    place = np.arange(MOST)
    alike = np.choose(kind, [1, 1, many, few, 1])[:, None]  # objects at the front that are of one kind
    slot = np.where(place < alike, 0, place)
    pairs = len(COLORS) * len(SHAPES)
    color, shape = np.divmod(_distinct(u[:, 2:6], pairs), len(SHAPES))
    size = (u[:, 6:10] * len(SIZES)).astype(int)
    texture = (u[:, 10:14] * len(TEXTURES)).astype(int) * size  # only large objects have one
    shape, color, size, texture = (
        np.take_along_axis(v, slot, 1).astype(np.int8) for v in (shape, color, size, texture)
    )
    ground = (u[:, 14] * len(BACKGROUNDS)).astype(np.int8)
    return Scenes(total.astype(np.int8), ground, shape, color, size, texture, old.x, old.y)


def _distinct(u: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """(N, k) different numbers below `count` in each row: the j-th chooses among those still left."""
    chosen = np.zeros(u.shape, np.int64)
    for j in range(u.shape[1]):
        number = (u[:, j] * (count - j)).astype(np.int64)
        for earlier in np.sort(chosen[:, :j], axis=1).T:
            number += number >= earlier
        chosen[:, j] = number
    return chosen


def _places(name: str, rows: NDArray[np.int64], old: Scenes) -> Scenes:
    """Each object in turn at the first of TRIES places that is far enough from those before it, if any is."""
    u = uniforms(name, rows, 2 * TRIES * MOST).reshape(len(rows), MOST, 2, TRIES)
    radius = np.asarray(RADII)[old.size] * REACH  # (n, MOST)
    room = (radius + MARGIN)[:, :, None, None]
    xy = room + u * (1 - 2 * room)
    chosen = np.zeros((len(rows), 2, MOST))
    for k in range(MOST):
        gaps = xy[:, k, :, :, None] - chosen[:, :, None, :k]  # (n, 2, TRIES, k)
        apart = np.hypot(gaps[:, 0], gaps[:, 1]) >= (radius[:, k, None] + radius[:, :k] + GAP)[:, None]
        first = apart.all(2).argmax(1)
        chosen[:, :, k] = xy[np.arange(len(rows)), k, :, first]
    return replace(old, x=chosen[:, 0], y=chosen[:, 1])


def _apart_and_related(scenes: Scenes, split: Split) -> NDArray[np.bool_]:
    """(N,) whether objects keep their distance, and stand in relations that the split allows."""
    radius = np.asarray(RADII)[scenes.size] * REACH
    right = related(scenes, split)
    for a, b in combinations(range(MOST), 2):
        near = np.hypot(scenes.x[:, a] - scenes.x[:, b], scenes.y[:, a] - scenes.y[:, b])
        right &= (near >= radius[:, a] + radius[:, b] + GAP) | (scenes.count <= b)
    return right
