"""Which of the facts that a caption binds hold in a scene that was read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import permutations

import numpy as np

from sfumato.data.scenes.captions import ATTRIBUTES, Caption, Phrase
from sfumato.data.scenes.graph import RELATIONS, Object, Scene, relation_of

__all__ = ["FACTS", "judge"]

FACTS = ("valid", *ATTRIBUTES, "object", "binding", "count", "relation", "background", "joint")


def judge(caption: Caption, scene: Scene | None) -> dict[str, bool]:
    """Fact -> whether it holds, of the facts that the caption speaks of; an invalid picture holds none.

    valid: the picture shows a scene. color, shape, size, texture: everything that the caption says of it is
    there, on whatever objects. object: there are different objects for all that are named, each with all
    that is said of it. binding: the same, asked only where two things are named and all colors and shapes
    are there, so that nothing but their combination can be wrong. count: as many objects as are named.
    relation: two objects as named stand as said. background: as said. joint: all of it at once.
    """
    facts = {"valid": scene is not None}
    for name in ATTRIBUTES:
        said = Counter(v for p in caption.phrases for v in [getattr(p, name)] * p.count if v is not None)
        if said:
            there = Counter(getattr(item, name) for item in scene.objects) if scene else Counter()
            facts[name] = said <= there
    ways = list(_assignments(caption, scene)) if scene else []
    facts["object"] = bool(ways)
    if len(caption.phrases) > 1 and facts.get("color", True) and facts.get("shape", True) and scene:
        facts["binding"] = facts["object"]
    facts["count"] = scene is not None and len(scene.objects) == caption.count
    if caption.relation is not None:
        facts["relation"] = scene is not None and _related(caption, scene)
    if caption.background is not None:
        facts["background"] = scene is not None and scene.background == caption.background
    related = caption.relation is None or any(_stands(way[0], way[1], caption.relation) for way in ways)
    facts["joint"] = facts["object"] and facts["count"] and related and facts.get("background", True)
    return facts


def _named(caption: Caption) -> list[Phrase]:
    """A phrase for each object."""
    return [phrase for phrase in caption.phrases for _ in range(phrase.count)]


def _assignments(caption: Caption, scene: Scene) -> Iterator[tuple[Object, ...]]:
    """Every way to choose an object for each one named; at most 24."""
    named = _named(caption)
    for way in permutations(scene.objects, len(named)):
        if all(phrase.fits(item) for phrase, item in zip(named, way, strict=True)):
            yield way


def _related(caption: Caption, scene: Scene) -> bool:
    first, second = caption.phrases[:2]
    assert caption.relation is not None
    return any(
        first.fits(a) and second.fits(b) and _stands(a, b, caption.relation)
        for a, b in permutations(scene.objects, 2)
    )


def _stands(a: Object, b: Object, relation: str) -> bool:
    return RELATIONS[int(relation_of(np.asarray(b.x - a.x), np.asarray(b.y - a.y)))] == relation
