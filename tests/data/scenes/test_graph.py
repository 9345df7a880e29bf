"""Words, arrays and single scenes; relations."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from sfumato.data.scenes.graph import (
    BACKGROUNDS,
    COLORS,
    INK,
    INVERSE,
    RELATIONS,
    Object,
    Scene,
    gather,
    relation_of,
)
from sfumato.data.scenes.sampling import draw_scenes


def test_no_two_colors_of_a_picture_are_close():
    paints = [*COLORS.values(), INK]
    apart = [np.linalg.norm(np.subtract(a, b)) for a, b in combinations(paints, 2)]
    apart += [np.linalg.norm(np.subtract(a, b)) for a in paints for b in BACKGROUNDS.values()]
    assert min(apart) > 90  # the reader takes what is within 45 of the background for it


def test_unpack_and_gather_are_inverse():
    scenes = draw_scenes("train", 50)
    again = gather(scenes.unpack())
    assert again.unpack() == scenes.unpack()
    assert (again.there == scenes.there).all()


def test_five_objects_are_too_many():
    item = Object("ring", "red", "small", "solid", 0.5, 0.5)
    with pytest.raises(ValueError, match="a scene has 5 objects; allowed: at most 4"):
        gather([Scene("white", (item,) * 5)])


@pytest.mark.parametrize(
    ("dx", "dy", "relation"),
    [(0.3, 0.2, "left of"), (-0.3, 0.2, "right of"), (0.1, 0.2, "above"), (0.1, -0.2, "below")],
)
def test_relations(dx, dy, relation):
    assert RELATIONS[int(relation_of(np.array(dx), np.array(dy)))] == relation
    assert INVERSE[RELATIONS.index(relation)] == int(relation_of(np.array(-dx), np.array(-dy)))
