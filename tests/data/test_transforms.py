"""Preparations of a training picture."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.core import image as pictures
from sfumato.data.transforms import CenterCrop, Chain, Flip, RandomCrop, Resize, Shift, View

PICTURE = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_center_crop_and_resize_are_those_of_core():
    pil = pictures.to_pil(PICTURE)
    assert torch.equal(
        CenterCrop(9)(View(PICTURE), Random(0)).image, pictures.from_pil(pictures.center_crop(pil, 9))
    )
    assert torch.equal(
        Resize((7, 11))(View(PICTURE), Random(0)).image, pictures.from_pil(pictures.resize(pil, (7, 11)))
    )


def test_flip():
    assert torch.equal(Flip(1.0)(View(PICTURE), Random(0)).image, PICTURE.flip(2))
    assert torch.equal(Flip(0.0)(View(PICTURE), Random(0)).image, PICTURE)
    flipped = sum(not torch.equal(Flip()(View(PICTURE), Random(seed)).image, PICTURE) for seed in range(200))
    assert 70 < flipped < 130  # 4 standard deviations of 200 coins


@given(st.integers(0, 2**32), st.integers(0, 40))
def test_shift_moves_and_fills_with_white(seed, pixels):
    rng = Random(seed)
    down, right = (int(rng.random() * (2 * pixels + 1)) - pixels for _ in range(2))
    assert max(abs(down), abs(right)) <= pixels
    moved = Shift(pixels)(View(PICTURE), Random(seed)).image
    expected = torch.full_like(PICTURE, 255)
    for y in range(20):
        for x in range(30):
            if 0 <= y - down < 20 and 0 <= x - right < 30:
                expected[:, y, x] = PICTURE[:, y - down, x - right]
    assert torch.equal(moved, expected)


def test_shift_reaches_every_offset():
    dot = torch.full((3, 9, 9), 255, dtype=torch.uint8)
    dot[:, 4, 4] = 0
    places = {tuple((Shift(1)(View(dot), Random(s)).image[0] == 0).nonzero()[0].tolist()) for s in range(100)}
    assert places == {(y, x) for y in (3, 4, 5) for x in (3, 4, 5)}


@given(st.integers(0, 2**32), st.sampled_from([8, (8, 12), (25, 40)]), st.floats(0.05, 1.0))
def test_random_crop_has_its_size(seed, size, smallest):
    cropped = RandomCrop(size, smallest)(View(PICTURE), Random(seed)).image
    assert cropped.shape[1:] == ((size, size) if isinstance(size, int) else size)
    assert cropped.is_contiguous()


def test_random_crop_of_everything_slides_along_the_longer_side():
    whole = pictures.from_pil(pictures.cover(pictures.to_pil(PICTURE), 20))
    crops = [RandomCrop(20, 1.0)(View(PICTURE), Random(seed)).image for seed in range(40)]
    offsets = {next(x for x in range(11) if torch.equal(c, whole[:, :, x : x + 20])) for c in crops}
    assert {0, 10} <= offsets


def test_chain_is_deterministic_given_the_seed():
    chain = Chain((RandomCrop(16), Flip(), Shift(3)))
    assert torch.equal(chain(View(PICTURE), Random(1)).image, chain(View(PICTURE), Random(1)).image)
    assert not torch.equal(chain(View(PICTURE), Random(1)).image, chain(View(PICTURE), Random(2)).image)
    assert torch.equal(Chain()(View(PICTURE), Random(0)).image, PICTURE)


def test_wrong_input():
    with pytest.raises(ValueError, match=r"in \(0, 1\], not 0"):
        RandomCrop(8, 0)
    with pytest.raises(ValueError, match="-1 pixels is not allowed"):
        Shift(-1)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        CenterCrop(0)(View(PICTURE), Random(0))


@given(st.integers(0, 2**32), st.sampled_from([8, (8, 12), (25, 40)]), st.floats(0.05, 1.0), st.booleans())
def test_crops_say_where_they_lie(seed, size, smallest, middle):
    crop = CenterCrop(size) if middle else RandomCrop(size, smallest)
    view = crop(View(PICTURE), Random(seed))
    part = 1.0 if middle else smallest + (1 - smallest) * Random(seed).random()
    height, width = (size, size) if isinstance(size, int) else size
    room = (round(height / part), round(width / part))
    larger = pictures.from_pil(pictures.cover(pictures.to_pil(PICTURE), room))
    assert view.whole == tuple(larger.shape[1:])
    top, left = view.crop
    assert torch.equal(view.image, larger[:, top : top + height, left : left + width])


def test_a_flip_exchanges_the_crop_too():
    for seed in range(20):
        view = Chain((RandomCrop(9), Flip(1.0)))(View(PICTURE), Random(seed))
        plain = RandomCrop(9)(View(PICTURE), Random(seed))
        assert view.crop == (plain.crop[0], plain.whole[1] - 9 - plain.crop[1])
    assert Flip(1.0)(View(PICTURE), Random(0)).crop == (0, 0)


def test_a_bucket_overrules_the_size_of_a_crop():
    for crop in (CenterCrop(9), RandomCrop(9), Chain((Flip(), CenterCrop(9), Shift(1)))):
        assert crop(View(PICTURE, target=(12, 7)), Random(0)).image.shape == (3, 12, 7)
