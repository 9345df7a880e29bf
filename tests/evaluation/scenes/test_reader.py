"""The reader: exact on true scenes, sees what was changed, and takes nothing for a scene that is none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from sfumato.data.scenes.draw import render
from sfumato.data.scenes.graph import COLORS, SHAPES, Object, Scene, gather
from sfumato.data.scenes.sampling import draw_scenes
from sfumato.evaluation.scenes.components import components
from sfumato.evaluation.scenes.oracle import accuracy, exact
from sfumato.evaluation.scenes.reader import read


def picture(*objects, background="white", size=64):
    return render(gather([Scene(background, objects)]), size)


def item(shape="circle", color="red", size="large", texture="solid", x=0.3, y=0.4):
    return Object(shape, color, size, texture, x, y)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_true_scenes_are_read_exactly(size):
    scenes = draw_scenes("phrasings", 300, seed=1)
    readings = read(render(scenes, size))
    wrong = [
        scene for scene, reading in zip(scenes.unpack(), readings, strict=True) if not exact(scene, reading)
    ]
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64, 128])
def test_the_promise_of_999_in_1000(size):
    assert accuracy(10_000, size).exact.share >= 0.999


def test_every_kind_is_read_as_itself_and_not_as_another():
    kinds = [
        item(shape, color, size, texture)
        for shape in SHAPES
        for color in COLORS
        for size, texture in (
            ("small", "solid"),
            ("large", "solid"),
            ("large", "striped"),
            ("large", "dotted"),
        )
    ]
    for background in ("white", "beige", "gray", "lavender"):
        readings = read(render(gather([Scene(background, (kind,)) for kind in kinds]), 32))
        assert [r.scene and r.scene.objects[0].kind for r in readings] == [kind.kind for kind in kinds]


@pytest.mark.parametrize(
    "change", [{"color": "blue"}, {"shape": "square"}, {"size": "small"}, {"texture": "dotted"}]
)
def test_one_change_is_seen(change):
    other = item("star", "green", "small", x=0.75, y=0.7)
    before, after = item(), replace(item(), **change)
    (was,), (now,) = read(picture(before, other)), read(picture(after, other))
    assert exact(Scene("white", (before, other)), was)
    assert exact(Scene("white", (after, other)), now)
    assert not exact(Scene("white", (after, other)), was)


def test_places_are_read_within_a_third_of_a_pixel():
    scenes = draw_scenes("seen", 200)
    for scene, reading in zip(scenes.unpack(), read(render(scenes, 64)), strict=True):
        for a in scene.objects:
            near = min(np.hypot(a.x - b.x, a.y - b.y) for b in reading.scene.objects)
            assert near * 64 < 0.5


def noise(sigma):
    return np.random.default_rng(0).normal(0, sigma, (64, 64, 3))


BLOB = np.hypot(*(np.mgrid[:64, :64] - 31.5)) + 4 * np.sin(3 * np.arctan2(*(np.mgrid[:64, :64] - 31.5))) < 9


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda p: p, ""),
        (lambda p: (p + noise(5)).clip(0, 255), ""),
        (lambda p: noise(200).clip(0, 255), "background"),
        (np.zeros_like, "background"),
        (lambda p: p[:, :, :, ::-1] // 2 + 60, "background"),
        (lambda p: np.full_like(p, 255), "count"),
        (lambda p: np.where(BLOB[..., None], (215, 25, 30), 255)[None], "object"),
        (lambda p: np.where(np.arange(64)[:, None, None] % 11 == 3, 0, p), "count"),
        (lambda p: np.concatenate([p[:, :26], np.full_like(p[:, 26:], 255)], axis=1), "object"),
        (lambda p: np.where(np.mgrid[:64, :64].sum(0)[..., None] % 13 == 0, 90, p), "specks"),
    ],
)
def test_what_is_no_scene_is_invalid(damage, fault):
    harmed = np.asarray(damage(picture(item()))).reshape(1, 64, 64, 3).astype(np.uint8)
    (reading,) = read(harmed)
    assert reading.fault == fault
    assert (reading.scene is None) == bool(fault)


def test_five_objects_are_no_scene():
    many = picture(
        *[item(size="small", x=x, y=y) for x, y in ((0.2, 0.2), (0.8, 0.2), (0.2, 0.8), (0.8, 0.8))]
    )
    fifth = picture(item(size="small", x=0.5, y=0.5))
    both = np.minimum(many, fifth)
    assert [r.fault for r in read(np.concatenate([many, both]))] == ["", "count"]


def test_the_nearest_scene_of_invalid_pictures():
    """Too soft to be read in full, but colors, places, number and background can be told."""
    truth = draw_scenes("seen", 40)
    rows = render(truth, 64)
    soft = np.stack([np.asarray(Image.fromarray(row).filter(ImageFilter.GaussianBlur(2.5))) for row in rows])
    pairs = list(zip(truth.unpack(), read(soft), strict=True))
    invalid = [(scene, reading) for scene, reading in pairs if reading.scene is None]
    assert len(invalid) > 20
    same = [
        scene.background == reading.nearest.background
        and [o.color for o in by_place(scene)] == [o.color for o in by_place(reading.nearest)]
        for scene, reading in invalid
    ]
    assert np.mean(same) > 0.8
    assert all(reading.nearest == reading.scene for _, reading in pairs if reading.scene is not None)


def test_the_nearest_scene_has_at_most_four_objects():
    places = [(x, y) for x in (0.15, 0.5, 0.85) for y in (0.2, 0.8)]
    six = np.minimum.reduce([picture(item(size="small", x=x, y=y)) for x, y in places])
    (reading,) = read(six)
    assert reading.fault == "count"
    assert len(reading.nearest.objects) == 4


def by_place(scene):
    return sorted(scene.objects, key=lambda o: (round(o.x * 8), round(o.y * 8)))


def test_a_picture_is_read_alike_alone_and_in_company():
    pictures = render(draw_scenes("seen", 8), 64)
    together = read(pictures)
    assert [read(pictures[i : i + 1])[0] for i in range(8)] == together
    assert read(pictures[:0]) == []


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ((1, 48, 48, 3), "uint8"),
        ((1, 64, 64, 4), "uint8"),
        ((64, 64, 3), "uint8"),
        ((1, 64, 64, 3), "float32"),
    ],
)
def test_other_pictures_are_refused(shape, kind):
    with pytest.raises(
        ValueError, match=r"cannot read pictures .* allowed: uint8 \(N, 32, 32, 3\)"
    ) as caught:
        read(np.zeros(shape, kind))
    assert "\n" not in str(caught.value)


def test_components_are_those_of_a_flood_fill():
    mask = np.random.default_rng(1).random((6, 17, 13)) < 0.55
    labels = components(mask)
    assert ((labels > 0) == mask).all()
    for n, row, column in np.argwhere(mask)[::7]:
        stack, filled = [(row, column)], set()
        while stack:
            at = stack.pop()
            if at in filled or not (0 <= at[0] < 17 and 0 <= at[1] < 13) or not mask[n][at]:
                continue
            filled.add(at)
            stack += [(at[0] + a, at[1] + b) for a, b in ((1, 0), (-1, 0), (0, 1), (0, -1))]
        same = {tuple(place) for place in np.argwhere(labels[n] == labels[n, row, column])}
        assert same == filled
        assert not (np.delete(labels, n, 0) == labels[n, row, column]).any()


def test_damage_lowers_accuracy_and_is_told():
    good, noisy, blurred = (
        accuracy(60, 64, kind, level) for kind, level in (("none", 0), ("noise", 80), ("blur", 3))
    )
    assert good.exact.share == 1
    assert good.psnr is None
    assert max(noisy.exact.share, blurred.exact.share) < 0.5
    assert 5 < noisy.psnr < 20
    with pytest.raises(ValueError, match="unknown damage 'codec'; allowed: none, blur, noise"):
        accuracy(1, 64, "codec")


@pytest.mark.slow
def test_ten_thousand_are_read_in_time():
    """Process time of one core; 60 s are promised."""
    from time import process_time

    pictures = render(draw_scenes("seen", 10_000), 64)
    start = process_time()
    assert len(read(pictures)) == 10_000
    assert process_time() - start < 60
