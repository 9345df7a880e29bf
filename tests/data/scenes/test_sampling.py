"""Scenes are functions of (split, seed, number), keep their distance, and never show what is held out."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from sfumato.data.scenes.graph import RADII, RELATIONS, SIZES, relation_of
from sfumato.data.scenes.sampling import draw_scenes, uniforms
from sfumato.data.scenes.splits import HELD_COUNTS, HELD_PAIRS, HELD_RELATIONS, SPLITS

OPPOSITE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))


def held_pairs(scene) -> int:
    return sum((item.color, item.shape) in HELD_PAIRS for item in scene.objects)


def held_counts(scene) -> int:
    counts = Counter(item.shape for item in scene.objects)
    return sum(counts[shape] == count for count, shape in HELD_COUNTS)


def held_relations(scene) -> int:
    """Written apart from the code that draws: both orders of every two objects."""
    found = 0
    for a, b in combinations(scene.objects, 2):
        relation = RELATIONS[int(relation_of(np.array(b.x - a.x), np.array(b.y - a.y)))]
        found += (a.shape, relation, b.shape) in HELD_RELATIONS
        found += (b.shape, OPPOSITE[relation], a.shape) in HELD_RELATIONS
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_a_scene_depends_on_its_number_alone(split):
    whole = draw_scenes(split, 30, first=4090, seed=3).unpack()
    assert draw_scenes(split, 5, first=4094, seed=3).unpack() == whole[4:9]
    assert draw_scenes(split, 1, first=4097, seed=3).unpack() == whole[7:8]
    assert draw_scenes(split, 5, first=4094, seed=4).unpack() != whole[4:9]


def test_splits_share_no_scenes():
    drawn = [scene for split in ("train", "seen", "phrasings") for scene in draw_scenes(split, 300).unpack()]
    assert len(set(drawn)) == 900


def test_training_never_shows_what_is_held_out():
    scenes = draw_scenes("train", 5000).unpack()
    assert sum(held_pairs(s) + held_counts(s) + held_relations(s) for s in scenes) == 0


@pytest.mark.parametrize(
    ("split", "shown"),
    [("combinations", held_pairs), ("counts", held_counts), ("relations", held_relations)],
)
def test_every_scene_of_a_split_shows_what_is_held_out_and_nothing_else(split, shown):
    scenes = draw_scenes(split, 300).unpack()
    others = {held_pairs, held_counts, held_relations} - {shown}
    assert all(shown(scene) for scene in scenes)
    assert not any(other(scene) for scene in scenes for other in others)


def test_objects_keep_their_distance_and_lie_inside():
    for scene in draw_scenes("train", 2000).unpack():
        circles = [(o.x, o.y, RADII[SIZES.index(o.size)] * 1.1) for o in scene.objects]
        assert all(r <= v <= 1 - r for x, y, r in circles for v in (x, y))
        for a, b in combinations(circles, 2):
            assert np.hypot(a[0] - b[0], a[1] - b[1]) >= a[2] + b[2] + 3 / 64


def test_everything_occurs_about_as_often_as_said():
    scenes = draw_scenes("seen", 4000).unpack()
    counts = Counter(len(scene.objects) for scene in scenes)
    assert sorted(counts) == [1, 2, 3, 4]
    first = [scene.objects[0] for scene in scenes]
    for name, most in (("size", 0.55), ("color", 0.2), ("shape", 0.25), ("texture", 0.75)):
        seen = Counter(getattr(item, name) for item in first)
        assert max(seen.values()) < most * len(first)
    assert not any(o.size == "small" and o.texture != "solid" for s in scenes for o in s.objects)


def test_numbers_are_computed_alike_in_bulk_and_one_by_one():
    far = np.array([5, 4000])
    assert (uniforms("a", far, 8) == np.concatenate([uniforms("a", far[i : i + 1], 8) for i in (0, 1)])).all()
    assert (uniforms("a", np.arange(6), 8)[5] == uniforms("a", far, 8)[0]).all()
    assert not (uniforms("b", far, 8) == uniforms("a", far, 8)).any()


def test_the_first_scene_is_the_same_on_every_machine():
    (scene,) = draw_scenes("train", 1).unpack()
    assert scene.objects[0].kind == ("circle", "red", "small", "solid")
    assert scene.background == "gray"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("test", 1), "unknown split 'test'"), (("train", -1), "-1 scenes from number 0")],
)
def test_what_there_is_not(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_scenes(*arguments)
    assert len(draw_scenes("train", 0)) == 0
