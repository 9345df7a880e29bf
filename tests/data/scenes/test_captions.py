"""The grammar: what is said is true, bound, and said in phrasings of the right kind."""

from __future__ import annotations

import re
from functools import cache

import pytest

from sfumato.data.scenes.captions import Caption, Phrase, describe, write
from sfumato.data.scenes.graph import BACKGROUNDS, COLORS, RELATIONS, SHAPES, TEXTURES
from sfumato.data.scenes.sampling import draw_scenes
from sfumato.data.scenes.splits import HELD_PAIRS, HELD_RELATIONS, SPLITS
from sfumato.evaluation.scenes.facts import judge

HELD_OUT = re.compile(
    r"that (is|are) (small|large|solid|striped|dotted|"
    + "|".join(COLORS)
    + r")( and \w+)*( and| on| (to the )?(left|right)| above| over| below| under|$)"
    r"|^there is a picture of|^(to the )?(left of|right of|above|over|below|under) .* there is "
)
DICE = [i / 16 for i in range(16)]


@cache
def cases(split, count=400):
    scenes = draw_scenes(split, count)
    return list(zip(scenes.unpack(), describe(scenes, split), strict=True))


@pytest.mark.parametrize("split", SPLITS)
def test_captions_are_true_of_their_scenes(split):
    for scene, caption in cases(split):
        assert all(judge(caption, scene).values()), (scene, caption)


@pytest.mark.parametrize("split", SPLITS)
def test_captions_say_what_they_bind_and_nothing_more(split):
    """A reader of words alone: each value occurs in the text exactly if some phrase binds it."""
    for _, caption in cases(split):
        words = re.sub("crosses", "cross", caption.text).split()
        words = [word.removesuffix("s") if word.removesuffix("s") in SHAPES else word for word in words]
        said = [getattr(p, name) for p in caption.phrases for name in p.said] + [caption.background]
        for value in (*COLORS, *SHAPES, "small", "large", *TEXTURES, *BACKGROUNDS):
            assert words.count(value) == said.count(value), caption
        numbers = [("two", "three", "four")[p.count - 2] for p in caption.phrases if p.count > 1]
        assert sorted(w for w in words if w in ("two", "three", "four")) == sorted(numbers)


@pytest.mark.parametrize("split", SPLITS)
def test_phrasings_are_held_out_where_they_shall_be(split):
    found = [bool(HELD_OUT.search(caption.text)) for _, caption in cases(split)]
    assert all(found) if split == "phrasings" else not any(found)


def test_held_out_phrasings_have_no_new_words():
    known = {word for _, caption in cases("train", 3000) for word in caption.text.split()}
    assert {word for _, caption in cases("phrasings") for word in caption.text.split()} <= known


def test_a_caption_binds_what_its_split_is_about():
    for _, caption in cases("combinations"):
        assert any((p.color, p.shape) in HELD_PAIRS for p in caption.phrases)
    for _, caption in cases("relations"):
        a, b = (p.shape for p in caption.phrases)
        inverse = RELATIONS[(1, 0, 3, 2)[RELATIONS.index(caption.relation)]]
        assert {(a, caption.relation, b), (b, inverse, a)} & set(HELD_RELATIONS)


def test_a_caption_depends_on_its_number_alone():
    whole = cases("train", 20)
    scenes = draw_scenes("train", 5, first=7)
    assert describe(scenes, "train", first=7) == [caption for _, caption in whole[7:12]]


def test_difficulty_counts_bound_facts():
    red, two = Phrase(1, "red", "circle"), Phrase(2, None, "star", "small")
    assert Caption("", (red,)).difficulty == 2
    assert Caption("", (two,)).difficulty == 3
    assert Caption("", (red, two), background="white").difficulty == 6
    assert Caption("", (red, red), relation="above").difficulty == 5


def test_every_phrasing_of_a_relation_says_the_same():
    caption = Caption("", (Phrase(1, "red", "circle"), Phrase(1, "blue", "star")), relation="left of")
    texts = {write(caption, [a, b, c, 0.9, 0.9, 0.9, 0, 0]) for a in DICE for b in (0, 0.9) for c in (0, 0.9)}
    assert len(texts) == 16
    forward = re.compile(r"red circle (is )?(to the )?left of a blue star$")
    back = re.compile(r"blue star (is )?(to the )?right of a red circle$")
    assert all(bool(forward.search(text)) != bool(back.search(text)) for text in texts)


@pytest.mark.parametrize(
    ("phrase", "dice", "text"),
    [
        (Phrase(1, "orange", "ring"), [0, 0, 0, 0, 0.9, 0, 0, 0], "an orange ring"),
        (Phrase(1, "orange", "ring"), [0, 0, 0, 0, 0.3, 0, 0, 0], "one orange ring"),
        (
            Phrase(2, "red", "cross", "large", "dotted"),
            [0, 0, 0, 0, 0.9, 0, 0, 0],
            "two large dotted red crosses",
        ),
        (Phrase(3, "red", None), [0, 0, 0, 0, 0.1, 0, 0, 0], "three shapes in red"),
        (Phrase(4, None, "star"), [0.8, 0, 0, 0, 0.9, 0, 0, 0], "there are four stars"),
        (Phrase(1, None, "star"), [0.9, 0, 0, 0, 0.9, 0, 0, 0], "a picture of a star"),
    ],
)
def test_phrases(phrase, dice, text):
    assert write(Caption("", (phrase,)), dice) == text
