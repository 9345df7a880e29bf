"""Shares, entropies and memory, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sfumato.data.scenes.captions import Caption, Phrase
from sfumato.data.scenes.graph import Object, Scene
from sfumato.data.scenes.sampling import draw_scenes
from sfumato.evaluation.scenes.reader import Reading
from sfumato.evaluation.scenes.scores import diversity, memorized, score, training_keys

CIRCLE = Object("circle", "red", "small", "solid", 0.2, 0.5)
ASKED = Caption("", (Phrase(1, "red", "circle"),))
LARGE = Caption("", (Phrase(1, "red", "circle", "large"),))


def shown(*objects, background="white"):
    return Reading(Scene(background, objects))


def test_shares_and_their_intervals():
    captions = [ASKED] * 3 + [LARGE]
    readings = [shown(CIRCLE), shown(replace(CIRCLE, color="blue")), Reading(None, "object"), shown(CIRCLE)]
    truth = [Scene("white", (CIRCLE,))] * 3 + [Scene("white", (replace(CIRCLE, size="large"),))]
    found = score(captions, readings, truth)
    assert {name: (p.hits, p.total) for name, p in found.facts.items()} == {
        "valid": (3, 4),
        "color": (2, 4),
        "shape": (3, 4),
        "size": (0, 1),
        "object": (1, 4),
        "count": (3, 4),
        "joint": (1, 4),
    }
    assert {level: (p.hits, p.total) for level, p in found.difficulty.items()} == {2: (1, 3), 3: (0, 1)}
    assert found.faults == {"object": 1}
    # Wilson's interval of 3 in 4 by its formula, z = 1.96.
    assert found.facts["valid"].low == pytest.approx(0.3006, abs=1e-3)
    assert found.facts["valid"].high == pytest.approx(0.9544, abs=1e-3)


@pytest.mark.parametrize("pictures", [0, 2])
def test_a_picture_for_each_caption(pictures):
    with pytest.raises(ValueError, match=rf"{pictures} pictures for \d captions; a score needs one each"):
        score([ASKED] * (pictures // 2), [shown(CIRCLE)] * pictures, [])


def test_invalid_pictures_are_scored_by_the_nearest_scene():
    blurred = Reading(None, "object", Scene("white", (replace(CIRCLE, shape="ring"),)))
    truth = [Scene("white", (replace(CIRCLE, color=color),)) for color in ("red", "blue")]
    found = score([ASKED, ASKED], [blurred, shown(CIRCLE)], truth)
    hits = {name: (found.facts[name].hits, share.hits) for name, share in found.nearest.items()}
    assert hits == {
        "valid": (1, 2),
        "color": (1, 2),
        "shape": (1, 1),
        "object": (1, 1),
        "count": (1, 2),
        "joint": (1, 1),
    }
    # The caption of either is held against the other's scene: the blue one is wrong, the red one right.
    assert {name: share.hits for name, share in found.chance.items()} == {
        "valid": 2,
        "color": 1,
        "shape": 2,
        "object": 1,
        "count": 2,
        "joint": 1,
    }


def test_entropies_of_what_is_free():
    truth = [
        Scene(b, (replace(CIRCLE, x=x),))
        for b, x in zip(("white", "gray") * 2, (0.2, 0.2, 0.8, 0.8), strict=True)
    ]
    always = [shown(replace(CIRCLE, size="large"), background="gray")] * 4
    found = diversity([ASKED] * 4, always, truth)
    assert {name: (d.pictures, d.bits, d.true_bits) for name, d in found.items()} == {
        "background": (4, 0.0, 1.0),
        "graph": (4, 0.0, 1.0),
        "place": (4, 0.0, 1.0),
        "size": (4, 0.0, 0.0),
        "texture": (4, 0.0, 0.0),
    }
    same = diversity([ASKED] * 4, [Reading(scene) for scene in truth], truth)
    assert all(d.bits == d.true_bits for d in same.values())


def test_what_is_bound_or_invalid_is_not_diverse():
    truth = [Scene("white", (CIRCLE,))] * 2
    bound = replace(LARGE, background="white")
    found = diversity([bound, ASKED], [shown(CIRCLE), Reading(None, "count")], truth)
    assert {name: d.pictures for name, d in found.items()} == {"graph": 1, "place": 1, "texture": 1}


def test_scenes_of_training_are_known_again():
    known = training_keys(200, seed=7)
    trained = draw_scenes("train", 50, first=100, seed=7).unpack()
    assert memorized(trained, known).share == 1
    assert memorized(draw_scenes("seen", 200, seed=7).unpack(), known).share < 0.05
    moved = [replace(s, objects=tuple(replace(o, x=o.x + 0.1) for o in s.objects)) for s in trained]
    assert memorized(moved, known).share < 0.1
    turned = [replace(s, objects=s.objects[::-1]) for s in trained]
    assert memorized(turned, known).share == 1
    assert memorized([], known) is None
