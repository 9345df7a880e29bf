"""Pictures: areas, colors, smooth edges, the same scene at every size."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.data.scenes.draw import coverage, palette, render, window
from sfumato.data.scenes.graph import COLORS, INK, RADII, SHAPES, Object, Scene, gather
from sfumato.data.scenes.sampling import draw_scenes

AREAS = {  # of radius 1: circles, (2 * 0.74)^2, a triangle of inradius 0.54, ten triangles, two bars, a ring
    "circle": np.pi * 0.9**2,
    "square": 1.48**2,
    "triangle": 3 * np.sqrt(3) * 0.54**2,
    "star": 10 * 0.5 * 1.08 * 0.46 * np.sin(np.pi / 5),
    "cross": 4 * 0.97 * 0.34 * 2 - (2 * 0.34) ** 2,
    "ring": np.pi * (0.97**2 - 0.45**2),
}


def one(shape="circle", color="red", size="large", texture="solid", x=0.5, y=0.5, background="white"):
    return Scene(background, (Object(shape, color, size, texture, x, y),))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [6.0, 19.0])
def test_a_shape_covers_its_area_wherever_it_lies(shape, radius):
    half = 24
    reach = np.arange(-half, half, dtype=np.float32) + np.float32(0.5)
    number = np.array([SHAPES.index(shape)], np.int8)
    for x, y in ((0.0, 0.0), (0.3, -0.2)):
        dx, dy = np.broadcast_arrays(reach[None, None] - np.float32(x), reach[None, :, None] - np.float32(y))
        covered = coverage(number, dx, dy, np.array([radius], np.float32))[0]
        assert covered.sum() == pytest.approx(AREAS[shape] * radius**2, rel=0.04)  # corners are rounded off
        inside = covered * (dx[0] ** 2 + dy[0] ** 2 > (1.1 * radius + 1) ** 2)
        assert inside.sum() == 0


@pytest.mark.parametrize("size", [32, 64, 128])
def test_colors_are_exact_away_from_edges(size):
    picture = render(gather([one()]), size)[0]
    assert picture.shape == (size, size, 3)
    assert tuple(picture[size // 2, size // 2]) == COLORS["red"]
    assert tuple(picture[0, 0]) == (255, 255, 255)
    edge = np.unique(picture.reshape(-1, 3), axis=0)
    assert len(edge) > 4  # smooth


def test_textures_are_of_ink():
    stripes, dots = render(gather([one(texture="striped"), one(texture="dotted")]), 128)
    radius = RADII[1] * 128
    assert tuple(stripes[64, 64]) == COLORS["red"]
    assert tuple(stripes[64 + round(0.4 * radius), 64]) == INK
    assert tuple(dots[64, 64]) == INK
    assert tuple(dots[64, 64 + round(0.38 * radius)]) == COLORS["red"]


def test_a_picture_is_the_same_alone_and_in_company_and_near_the_edge():
    scenes = draw_scenes("train", 20)
    together = render(scenes, 64)
    for i in (0, 7, 19):
        assert (render(scenes[i : i + 1], 64)[0] == together[i]).all()
    corner = render(gather([one(x=0.18, y=0.18), one(x=0.18 + 32 / 64, y=0.18 + 32 / 64)]), 64)
    assert (corner[0][:30, :30] == corner[1][32:62, 32:62]).all()


def test_sizes_show_the_same_scene():
    scenes = draw_scenes("train", 30)
    small, large = render(scenes, 64).astype(float), render(scenes, 128).astype(float)
    halved = large.reshape(30, 64, 2, 64, 2, 3).mean((2, 4))
    assert np.abs(halved - small).mean() < 0.5  # of 255; the ramps at the edges differ
    assert np.abs(np.roll(halved, 1, axis=1) - small).mean() > 2.0


def test_a_window_holds_the_largest_object():
    for size in (32, 64, 128):
        assert window(size) / 2 >= RADII[1] * 1.08 * size + 1


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="scenes of 48 pixels: allowed are 32, 64, 128"):
        render(draw_scenes("train", 1), 48)
    assert render(draw_scenes("train", 0), 32).shape == (0, 32, 32, 3)
    assert palette()[0].shape == (8, 3)
