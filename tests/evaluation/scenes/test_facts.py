"""Facts, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sfumato.data.scenes.captions import Caption, Phrase, describe
from sfumato.data.scenes.graph import COLORS, SHAPES, Object, Scene
from sfumato.data.scenes.sampling import draw_scenes
from sfumato.evaluation.scenes.facts import FACTS, judge

RED_CIRCLE = Object("circle", "red", "small", "solid", 0.2, 0.5)
BLUE_SQUARE = Object("square", "blue", "large", "striped", 0.8, 0.5)
BLUE_CIRCLE, RED_SQUARE = replace(RED_CIRCLE, color="blue"), replace(BLUE_SQUARE, color="red")
TWO = Caption("", (Phrase(1, "red", "circle"), Phrase(1, "blue", "square")))
LEFT = replace(TWO, relation="left of")
ALL = {"valid", "color", "shape", "object", "binding", "count", "joint"}


def false(caption, *objects, background="white"):
    """The facts that do not hold."""
    facts = judge(caption, Scene(background, objects))
    assert set(facts) <= set(FACTS)
    return {name for name, holds in facts.items() if not holds}


def test_all_that_is_said_and_nothing_else_is_asked():
    assert judge(TWO, Scene("gray", (BLUE_SQUARE, RED_CIRCLE))) == dict.fromkeys(ALL, True)
    one = Caption("", (Phrase(1, None, "circle", "small"),), background="gray")
    asked = {"valid", "shape", "size", "object", "count", "background", "joint"}
    assert set(judge(one, Scene("gray", (RED_CIRCLE,)))) == asked
    assert false(one, RED_CIRCLE, background="beige") == {"background", "joint"}


def test_an_invalid_picture_holds_nothing():
    facts = judge(LEFT, None)
    assert not any(facts.values())
    assert set(facts) == (ALL - {"binding"}) | {"relation"}


def test_colors_exchanged_are_wrong_in_binding_alone():
    assert false(TWO, BLUE_CIRCLE, RED_SQUARE) == {"object", "binding", "joint"}


def test_a_wrong_color_is_no_question_of_binding():
    facts = judge(TWO, Scene("white", (RED_CIRCLE, replace(BLUE_SQUARE, color="green"))))
    assert {name for name, holds in facts.items() if not holds} == {"color", "object", "joint"}
    assert "binding" not in facts


def test_a_missing_and_a_surplus_object():
    assert false(TWO, RED_CIRCLE) == {"color", "shape", "object", "count", "joint"}
    assert false(TWO, RED_CIRCLE, BLUE_SQUARE, BLUE_CIRCLE) == {"count", "joint"}


def test_relations_need_their_objects():
    assert false(LEFT, RED_CIRCLE, BLUE_SQUARE) == set()
    swapped = replace(RED_CIRCLE, x=0.9), replace(BLUE_SQUARE, x=0.3)
    assert false(LEFT, *swapped) == {"relation", "joint"}
    assert false(LEFT, replace(RED_CIRCLE, y=-0.5), BLUE_SQUARE) == {"relation", "joint"}
    assert "relation" in false(LEFT, BLUE_CIRCLE, RED_SQUARE)


def test_groups_need_as_many():
    three = Caption("", (Phrase(3, "red", "circle"),))
    assert false(three, RED_CIRCLE, RED_CIRCLE, RED_CIRCLE) == set()
    assert false(three, RED_CIRCLE, RED_CIRCLE) == {"color", "shape", "object", "count", "joint"}
    assert false(three, RED_CIRCLE, RED_CIRCLE, BLUE_CIRCLE) == {"color", "object", "joint"}


def test_vague_phrases_leave_room_for_exact_ones():
    """The circle that fits both phrases must be kept for the one that nothing else fits."""
    vague = Caption("", (Phrase(1, None, "circle"), Phrase(1, "red", "circle")))
    assert false(vague, RED_CIRCLE, BLUE_CIRCLE) == set()
    assert false(vague, BLUE_CIRCLE, RED_CIRCLE) == set()


def test_one_assignment_must_do_for_all_facts():
    """Two red circles: the one that stands left must be the small one."""
    small_left = Caption(
        "", (Phrase(1, "red", "circle", "small"), Phrase(1, "red", "circle")), relation="left of"
    )
    large = replace(RED_CIRCLE, size="large", x=0.8)
    assert false(small_left, RED_CIRCLE, large) == set()
    assert false(small_left, replace(RED_CIRCLE, x=0.9), large) == {"relation", "joint"}


CHANGES = {
    "color": lambda v: list(COLORS)[(list(COLORS).index(v) + 3) % 8],
    "shape": lambda v: SHAPES[(SHAPES.index(v) + 1) % 6],
    "size": {"small": "large", "large": "small"}.get,
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_changed_object_fails_the_fact_if_it_was_said(name):
    """On captions of every kind; an attribute of one kind of object alone, so that no other can stand in."""
    scenes = draw_scenes("seen", 300)
    said = unsaid = 0
    for scene, caption in zip(scenes.unpack(), describe(scenes, "seen"), strict=True):
        if len(caption.phrases) > 1:
            continue
        first, *others = scene.objects
        changed = replace(first, **{name: CHANGES[name](getattr(first, name))})
        facts = judge(caption, Scene(scene.background, (changed, *others)))
        if name in caption.phrases[0].said:
            said += 1
            assert {fact for fact, holds in facts.items() if not holds} == {name, "object", "joint"}
        else:
            unsaid += 1
            assert facts["joint"]
    assert min(said, unsaid) > 5
