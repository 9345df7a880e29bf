"""Which scenes training never shows: combinations, counts, relations and phrasings that are held out."""

from __future__ import annotations

from itertools import combinations
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sfumato.data.scenes.graph import COLORS, INVERSE, MOST, RELATIONS, SHAPES, Scenes, relation_of

__all__ = [
    "HELD_COUNTS",
    "HELD_PAIRS",
    "HELD_RELATIONS",
    "SPLITS",
    "Split",
    "clear",
    "fits",
    "related",
    "wanted",
]

Split = Literal["train", "seen", "combinations", "counts", "relations", "phrasings"]
"""train: to learn from. seen: new scenes of the same kind. The others: each shows one thing held out from
training, in every scene: a pair of color and shape, a number of one shape, two shapes in a relation, or a
phrasing of the caption; and nothing else that is held out.
"""
SPLITS: tuple[Split, ...] = get_args(Split)

HELD_PAIRS = (
    *(("red", "star"), ("orange", "cross"), ("yellow", "ring"), ("green", "circle")),
    *(("cyan", "square"), ("blue", "triangle"), ("purple", "star"), ("pink", "cross")),
)
"""Colors and shapes of one object: each color once, each shape once or twice."""
HELD_COUNTS = ((2, "cross"), (3, "star"), (4, "circle"))
"""How many of a shape a picture holds."""
HELD_RELATIONS = (
    *(("triangle", "left of", "circle"), ("square", "above", "star")),
    *(("ring", "left of", "cross"), ("circle", "above", "ring")),
)
"""Two shapes and how the first stands to the second."""
LEAD = 0.08  # of the picture's side


def fits(scenes: Scenes, split: Split) -> NDArray[np.bool_]:
    """(N,) whether each scene, its places aside, may be in a split."""
    pairs, counts = _held_pairs(scenes).any(1), _held_counts(scenes)
    if split == "combinations":
        return pairs & ~counts
    if split == "counts":
        return counts & ~pairs
    if split == "relations":
        return ~pairs & ~counts & (scenes.count == 2) & _relatable(scenes)
    return ~pairs & ~counts


def related(scenes: Scenes, split: Split) -> NDArray[np.bool_]:
    """(N,) whether the places of each scene may be in a split: no relation that is held out, or just that."""
    table = _relation_table()
    shown = np.zeros(len(scenes), bool)
    for a, b in combinations(range(MOST), 2):
        gaps = scenes.x[:, b] - scenes.x[:, a], scenes.y[:, b] - scenes.y[:, a]
        held = table[scenes.shape[:, a], relation_of(*gaps), scenes.shape[:, b]]
        shown |= held & (scenes.count > b)
    return shown & clear(scenes) if split == "relations" else ~shown


def clear(scenes: Scenes) -> NDArray[np.bool_]:
    """(N,) whether the first two objects stand in a relation that can be stated: one axis leads by LEAD."""
    dx, dy = (np.abs(v[:, 1] - v[:, 0]) for v in (scenes.x, scenes.y))
    found: NDArray[np.bool_] = np.abs(dx - dy) >= LEAD
    return found


def wanted(split: Split) -> frozenset[str]:
    """What a caption of a split always says, so that the thing held out is bound by it."""
    said: dict[Split, frozenset[str]] = {
        "combinations": frozenset({"shape", "color"}),
        "counts": frozenset({"shape"}),
        "relations": frozenset({"shape", "relation"}),
    }
    return said.get(split, frozenset())


def _held_pairs(scenes: Scenes) -> NDArray[np.bool_]:
    """(N, MOST)."""
    table = np.zeros((len(COLORS), len(SHAPES)), bool)
    for color, shape in HELD_PAIRS:
        table[tuple(COLORS).index(color), SHAPES.index(shape)] = True
    found: NDArray[np.bool_] = table[scenes.color, scenes.shape] & scenes.there
    return found


def _held_counts(scenes: Scenes) -> NDArray[np.bool_]:
    """(N,)."""
    held = np.zeros(len(scenes), bool)
    for count, shape in HELD_COUNTS:
        held |= ((scenes.shape == SHAPES.index(shape)) & scenes.there).sum(1) == count
    return held


def _relatable(scenes: Scenes) -> NDArray[np.bool_]:
    """(N,) whether the first two objects are of shapes for which some relation is held out."""
    some = np.asarray(_relation_table().any(1))  # (shape, shape)
    found: NDArray[np.bool_] = some[scenes.shape[:, 0], scenes.shape[:, 1]]
    return found


def _relation_table() -> NDArray[np.bool_]:
    """(shape, relation, shape), a relation and its inverse alike."""
    table = np.zeros((len(SHAPES), len(RELATIONS), len(SHAPES)), bool)
    for first, relation, second in HELD_RELATIONS:
        a, r, b = SHAPES.index(first), RELATIONS.index(relation), SHAPES.index(second)
        table[a, r, b] = table[b, INVERSE[r], a] = True
    return table
