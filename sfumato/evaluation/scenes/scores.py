"""Figures over many pictures: facts with their intervals, diversity, and memory of the training scenes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sfumato.data.scenes.captions import Caption
from sfumato.data.scenes.graph import Scene
from sfumato.data.scenes.sampling import draw_scenes
from sfumato.evaluation.measures import Proportion
from sfumato.evaluation.scenes.facts import FACTS, judge
from sfumato.evaluation.scenes.reader import Reading

__all__ = ["Diversity", "SplitScores", "diversity", "memorized", "score", "training_keys"]

CELLS = 32  # a side of the grid in which places count as equal when scenes are compared
COARSE = 4  # a side of the grid in which the entropy of places is measured
Key = tuple[object, ...]


@dataclass(frozen=True)
class SplitScores:
    """What the pictures of one split show.

    Attributes:
        facts: name of FACTS -> share of the pictures whose captions speak of it in which it holds.
        nearest: the same of `Reading.nearest`, for systems that draw few valid pictures yet.
        chance: the same of true scenes under the caption of the next picture: what ignoring captions gives.
        difficulty: number of bound facts -> share in which all hold.
        faults: why pictures were invalid -> how many.
    """

    facts: Mapping[str, Proportion]
    nearest: Mapping[str, Proportion]
    chance: Mapping[str, Proportion]
    difficulty: Mapping[int, Proportion]
    faults: Mapping[str, int]


@dataclass(frozen=True)
class Diversity:
    """How much the pictures vary in what their captions leave free, and how much the scenes do.

    Attributes:
        pictures: valid ones whose captions leave it free.
        bits: entropy of what they show.
        true_bits: entropy of the scenes from which the same captions were made, by the same estimate.
    """

    pictures: int
    bits: float
    true_bits: float


def score(captions: Sequence[Caption], readings: Sequence[Reading], truth: Sequence[Scene]) -> SplitScores:
    """Shares with Wilson intervals; each picture counts once for a fact.

    Args:
        truth: the scenes from which the captions were made.

    Raises: ValueError in one line if there are no pictures, or not one for each caption.
    """
    if not captions or len(captions) != len(readings):
        raise ValueError(
            f"{len(readings)} pictures for {len(captions)} captions; a score needs one each, and at least one"
        )
    facts = [judge(caption, reading.scene) for caption, reading in zip(captions, readings, strict=True)]
    return SplitScores(
        _shares(facts),
        _shares([judge(c, reading.nearest) for c, reading in zip(captions, readings, strict=True)]),
        _shares([judge(c, scene) for c, scene in zip(captions, (*truth[1:], truth[0]), strict=True)]),
        _by_difficulty(captions, [holds["joint"] for holds in facts]),
        dict(sorted(Counter(reading.fault for reading in readings if reading.fault).items())),
    )


def _shares(judged: Sequence[Mapping[str, bool]]) -> dict[str, Proportion]:
    """Of each fact, among the pictures that were judged by it."""
    columns = {name: [holds[name] for holds in judged if name in holds] for name in FACTS}
    return {name: Proportion.of(sum(column), len(column)) for name, column in columns.items() if column}


def _by_difficulty(captions: Sequence[Caption], right: Sequence[bool]) -> dict[int, Proportion]:
    levels = sorted({caption.difficulty for caption in captions})
    held = {n: [r for c, r in zip(captions, right, strict=True) if c.difficulty == n] for n in levels}
    return {n: Proportion.of(sum(column), len(column)) for n, column in held.items()}


def diversity(
    captions: Sequence[Caption], readings: Sequence[Reading], truth: Sequence[Scene]
) -> dict[str, Diversity]:
    """Entropies of what is free, by name; those of objects over pictures of one object alone.

    "graph" is everything but the places; its entropy is bounded by the number of pictures, for both.
    """
    rows: dict[str, list[tuple[object, object]]] = {}
    for caption, reading, scene in zip(captions, readings, truth, strict=True):
        if reading.scene is None:
            continue
        shown, real = _free(caption, reading.scene), _free(caption, scene)
        for name in shown.keys() & real.keys():
            rows.setdefault(name, []).append((shown[name], real[name]))
    return {
        name: Diversity(len(pairs), *(_entropy(column) for column in zip(*pairs, strict=True)))
        for name, pairs in sorted(rows.items())
    }


def training_keys(count: int, seed: int = 0) -> frozenset[Key]:
    """What the first scenes of training look like, to recognize them."""
    return frozenset(_key(scene) for scene in draw_scenes("train", count, seed=seed).unpack())


def memorized(scenes: Iterable[Scene], known: frozenset[Key]) -> Proportion | None:
    """Share of scenes that are those of training, places within 1/CELLS of the side; None if there are none.

    Compare with the same share of scenes that were never drawn for training: a few coincide by chance.
    """
    found = [_key(scene) in known for scene in scenes]
    return Proportion.of(sum(found), len(found)) if found else None


def _key(scene: Scene) -> Key:
    items = sorted((*item.kind, int(item.x * CELLS), int(item.y * CELLS)) for item in scene.objects)
    return scene.background, *items


def _free(caption: Caption, scene: Scene) -> dict[str, object]:
    """What a caption leaves open, and what a scene makes of it."""
    values: dict[str, object] = {"graph": _graph(scene)}
    if caption.background is None:
        values["background"] = scene.background
    if caption.count == len(scene.objects) == 1:
        (item,), (phrase,) = scene.objects, caption.phrases
        values["place"] = int(item.x * COARSE), int(item.y * COARSE)
        free = {"color", "shape", "size", "texture"} - set(phrase.said)
        values |= {name: getattr(item, name) for name in free}
    return values


def _graph(scene: Scene) -> Key:
    return scene.background, *sorted(item.kind for item in scene.objects)


def _entropy(values: Iterable[object]) -> float:
    """Bits of the distribution of values, as they occur."""
    counts = Counter(values)
    total = counts.total()
    return sum(n / total * math.log2(total / n) for n in counts.values())
