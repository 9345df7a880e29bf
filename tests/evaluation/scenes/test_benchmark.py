"""The benchmark from captions to results, on systems that draw by rule."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sfumato.core.config import from_json, to_json
from sfumato.core.world import ALONE
from sfumato.data.scenes.draw import render
from sfumato.data.scenes.graph import gather
from sfumato.evaluation.scenes.benchmark import (
    Protocol,
    Result,
    cases,
    evaluate,
    refuse_other_protocol,
    sheet,
)
from sfumato.systems.config import About

SMALL = Protocol(pictures=12, train=50, steps=2)


class Painter:
    """Draws the scene that a caption was made from; `spoil` changes the picture of a seed."""

    about = About(name="painter")
    fingerprint = "0123"

    def __init__(self, protocol, spoil=lambda seed, picture: picture, size=64):
        self.size = (size, size)
        self.spoil = spoil
        self.asked = []
        self.scenes = {
            (split, case.caption.text, i): case.scene
            for split in protocol.splits
            for i, case in enumerate(
                cases(split, protocol.pictures, seed=protocol.seed, difficulty=protocol.difficulty)
            )
        }

    def generate(self, text, *, seed, batch, world, **request):
        assert world is ALONE
        self.asked.append((seed, len(text), batch, request))
        found = []
        for i, caption in enumerate(text, seed):
            scene = next(s for (_, said, row), s in self.scenes.items() if (said, row) == (caption, i))
            picture = render(gather([scene]), self.size[0])[0]
            found.append(Image.fromarray(self.spoil(i, picture)))
        return found


def test_a_perfect_painter_is_perfect_and_no_plagiarist():
    painter = Painter(SMALL)
    result, shown = evaluate(painter, SMALL, batch=5, ema=0.9, images=100)
    assert {scores.facts["joint"].share for scores in result.splits.values()} == {1.0}
    assert list(result.splits) == ["seen", "combinations", "counts", "relations", "phrasings"]
    assert all(d.bits == d.true_bits for d in result.diversity.values())
    assert result.memorized == result.memorized_by_chance
    assert result.memorized.total == 60
    assert [seed for seed, *_ in painter.asked[:3]] == [0, 5, 10]
    assert painter.asked[0][3] == {"steps": 2, "guidance": 2.0, "sampler": "euler"}
    assert (result.system, result.name, result.ema, result.images, result.size) == (
        "0123",
        "painter",
        0.9,
        100,
        64,
    )
    assert len(shown["seen"].pictures) == 12
    assert from_json(Result, to_json(result)) == result


def test_failures_are_counted_and_framed():
    def spoil(seed, picture):
        return np.full_like(picture, 255) if seed == 1 else picture[:, ::-1] if seed == 2 else picture

    result, shown = evaluate(Painter(SMALL, spoil), replace(SMALL, splits=("relations",)))
    scores = result.splits["relations"]
    assert scores.faults == {"count": 1}
    assert scores.facts["valid"].hits == 11
    assert scores.facts["joint"].hits <= 11
    picture = sheet(shown)
    frames = [tuple(picture[:, 1, 1 + i * 72].tolist()) for i in range(2)]
    assert frames == [(0, 170, 0), (0, 0, 0)]
    assert picture.shape == (3, 70, 12 * 72 - 2)
    assert result.diversity == {}


def test_captions_of_one_difficulty():
    chosen = cases("combinations", 30, difficulty=2)
    assert {case.caption.difficulty for case in chosen} == {2}
    assert all(len(case.scene.objects) == 1 for case in chosen)
    assert cases("combinations", 10, difficulty=2) == chosen[:10]
    with pytest.raises(ValueError, match=r"the split 'combinations' has 0 captions of difficulty 1 among"):
        cases("combinations", 3, difficulty=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pictures": 0}, "pictures is 0"),
        ({"splits": ()}, r"splits \(none\): name at least one"),
        ({"splits": ("seen", "seen")}, "each once"),
        ({"splits": ("train",)}, "unknown split 'train'"),
        ({"difficulty": 0}, "difficulty is 0; allowed: 1 to 10"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_protocols_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**settings)


def test_systems_that_cannot_be_scored():
    painter = Painter(SMALL)
    painter.size = (48, 64)
    with pytest.raises(
        ValueError, match="this system makes pictures of 64x48; scenes are read at sides of 32"
    ):
        evaluate(painter, SMALL)
    painter.size = None
    with pytest.raises(ValueError, match="this system makes no pictures"):
        evaluate(painter, SMALL)


def test_other_protocols_are_not_compared():
    result, _ = evaluate(Painter(SMALL), replace(SMALL, splits=("seen",)))
    refuse_other_protocol({"a": result, "b": replace(result, system="other")})
    other = replace(result, protocol=replace(result.protocol, steps=3))
    with pytest.raises(
        ValueError, match="a and b cannot be compared: steps is 2 in the one and 3 in the other"
    ):
        refuse_other_protocol({"a": result, "b": other})
