from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from sfumato.core.chart import COLORS, Curve, chart, short, ticks


def rgb(color):
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def drawn_in(image, color, slack):
    """(H, W) bool, where a pixel below the legend is near a color."""
    near = (np.abs(np.asarray(image, np.int16) - rgb(color)) < slack).all(axis=2)
    near[:55] = False
    return near


def columns_of(image, color, slack=40):
    """x of every pixel near a color."""
    return set(np.flatnonzero(drawn_in(image, color, slack).any(axis=0)).tolist())


def lowest_row(image, color, x, slack=60):
    return int(np.flatnonzero(drawn_in(image, color, slack)[:, x]).max())


def test_a_falling_curve_falls_from_left_to_right():
    image = chart([Curve("loss", [0, 50, 100], [1.0, 0.5, 0.1])], size=(480, 320))
    assert image.size == (480, 320)
    assert image.getpixel((2, 2)) == (255, 255, 255)
    drawn = sorted(columns_of(image, COLORS[0]))
    assert drawn[-1] - drawn[0] > 350  # all of the axis
    assert lowest_row(image, COLORS[0], drawn[5]) < lowest_row(image, COLORS[0], drawn[-5])


def test_curves_have_colors_of_their_own_and_dashes_leave_gaps():
    x = list(range(0, 101, 10))
    solid, dashed = Curve("a", x, [1.0] * 11), Curve("b", [0, 100], [2.0, 2.0], dashed=True)
    image = chart([solid, dashed], scale="linear", size=(480, 320))
    first, second = columns_of(image, COLORS[0]), columns_of(image, COLORS[1])
    assert len(second) < 0.75 * len(first)
    assert max(second) - min(second) > 350


@pytest.mark.parametrize(
    ("scale", "share"),
    [("linear", 0.9 / 9.9), ("log", 0.5)],  # of the way from 0.1 to 10, a value of 1 is so high
)
def test_scales_place_values_where_they_belong(scale, share):
    image = chart([Curve("a", [0, 50, 100], [0.1, 1.0, 10.0])], scale=scale, size=(480, 320))
    left, right = min(columns_of(image, COLORS[0])), max(columns_of(image, COLORS[0]))
    rows = [lowest_row(image, COLORS[0], x) for x in (left + 1, (left + right) // 2, right - 1)]
    assert (rows[0] - rows[1]) / (rows[0] - rows[2]) == pytest.approx(share, abs=0.04)


def test_values_that_are_not_finite_leave_a_gap():
    y = [1.0, 1.0, math.nan, 1.0, 1.0]
    image = chart([Curve("a", [0, 25, 50, 75, 100], y)], scale="linear", size=(480, 320))
    drawn = sorted(columns_of(image, COLORS[0]))
    assert max(b - a for a, b in pairwise(drawn)) > 120


def test_one_point_is_a_dot():
    image = chart([Curve("a", [7], [0.5])], size=(480, 320))
    assert 3 <= len(columns_of(image, COLORS[0])) <= 9


@pytest.mark.parametrize(
    ("low", "high", "scale", "expected"),
    [
        (0, 50_000, "linear", [0, 10_000, 20_000, 30_000, 40_000, 50_000]),
        (0.53, 1.84, "linear", [0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8]),
        (-0.3, 0.3, "linear", [-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3]),
        (0.015, 2.5, "log", [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]),
        (0.55, 0.95, "log", [0.6, 0.7, 0.8, 0.9]),
        (1e-6, 2, "log", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1]),
    ],
)
def test_ticks_are_round(low, high, scale, expected):
    assert ticks(low, high, scale) == pytest.approx(expected)


def test_ticks_of_a_narrow_or_a_wide_log_axis_are_few_and_at_least_two():
    assert len(ticks(1.01, 1.04, "log")) >= 2
    assert 2 <= len(ticks(1e-30, 1e30, "log")) <= 8


@pytest.mark.parametrize(
    ("value", "text"), [(200_000, "200k"), (1_250_000, "1.25M"), (0.002, "0.002"), (0, "0"), (-1500, "-1.5k")]
)
def test_short_numbers(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("y", "scale", "said"),
    [
        ([], None, "no finite value"),
        ([math.nan], None, "no finite value"),
        ([0.0, 1.0], "log", "choose the linear"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(y, scale, said):
    with pytest.raises(ValueError, match=said):
        chart([Curve("a", list(range(len(y))), y)], scale=scale)
