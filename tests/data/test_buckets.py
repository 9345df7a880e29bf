"""Aspect-ratio buckets."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.data.buckets import BucketOrder, assign, bucket_sizes

# Podell et al. 2023 (arXiv:2307.01952), appendix I: (height, width) of half the table, the other half turned.
SDXL = """512 2048, 512 1984, 512 1920, 512 1856, 576 1792, 576 1728, 576 1664, 640 1600, 640 1536, 704 1472,
704 1408, 704 1344, 768 1344, 768 1280, 832 1216, 832 1152, 896 1152, 896 1088, 960 1088, 960 1024,
1024 1024"""

shapes = st.lists(
    st.one_of(st.none(), st.tuples(st.integers(1, 400), st.integers(1, 400))), min_size=1, max_size=40
)


def test_the_sizes_of_sdxl():
    half = {tuple(map(int, pair.split())) for pair in SDXL.split(",")}
    assert set(bucket_sizes(1024, 64)) == half | {(w, h) for h, w in half}


@given(st.integers(1, 24), st.sampled_from([1, 8, 64]))
def test_sizes_have_nearly_the_area_of_the_square(units, factor):
    side = units * factor
    table = bucket_sizes(side, factor)
    assert (side, side) in table
    assert {(w, h) for h, w in table} == set(table)
    ratios = [w / h for h, w in table]
    assert ratios == sorted(set(ratios))
    for height, width in table:
        assert height % factor == width % factor == 0
        assert 0.9 * side * side <= height * width <= side * side
        assert 1 / 4 <= width / height <= 4


@pytest.mark.parametrize(("side", "factor"), [(64, 24), (64, 0), (64, 128)])
def test_factors_that_do_not_fit(side, factor):
    with pytest.raises(
        ValueError, match=f"buckets of {factor} do not fit the size {side}; give a divisor of"
    ):
        bucket_sizes(side, factor)


def test_pictures_go_to_the_nearest_proportions():
    table = bucket_sizes(64, 8)
    chosen = [table[i] for i in assign([(100, 100), (10, 1000), (300, 301), (70, 90), (90, 70), None], table)]
    assert chosen == [(64, 64), (32, 128), (64, 64), (56, 72), (72, 56), (64, 64)]


@given(st.tuples(st.integers(1, 3000), st.integers(1, 3000)))
def test_a_picture_and_its_turned_twin_go_to_twin_buckets(size):
    table = bucket_sizes(1024, 64)
    one, turned = assign([size, size[::-1]], table)
    distance = [abs(np.log(w / h) - np.log(size[1] / size[0])) for h, w in table]
    assert distance[one] == pytest.approx(min(distance), abs=1e-9)
    if np.sort(distance)[1] - min(distance) > 1e-8:  # not halfway between two
        assert table[one] == table[turned][::-1]


@given(shapes, st.integers(1, 7), st.integers(0, 2**40), st.integers(0, 60))
def test_batches_have_one_size_and_are_a_pure_function_of_the_position(sizes, batch, seed, step):
    table = bucket_sizes(64, 16)
    order = BucketOrder(sizes, table, batch, seed=seed)
    draws = order.take(step * batch, batch)
    assert len({draw.size for draw in draws}) == 1
    assert all(order.sizes[draw.index] == draw.size for draw in draws)
    assert [draw.position for draw in draws] == list(range(step * batch, (step + 1) * batch))
    fresh = BucketOrder(sizes, table, batch, seed=seed)
    half = batch // 2  # two processes with a part of the step each
    assert fresh.take(step * batch + half, batch - half) == draws[half:]
    assert fresh.take(step * batch, half) == draws[:half]


@given(shapes, st.integers(1, 5), st.integers(0, 2**40))
def test_nothing_is_dropped_and_nothing_favored(sizes, batch, seed):
    """After `batch` epochs, each of as many draws as there are pictures, every picture came `batch` times."""
    order = BucketOrder(sizes, bucket_sizes(64, 16), batch, seed=seed)
    count = len(sizes)
    drawn = Counter(draw.index for draw in order.take(0, batch * count))
    assert drawn == Counter({row: batch for row in range(count)})


def test_a_remainder_begins_the_next_epoch():
    sizes = [(10, 10)] * 5 + [(10, 40)] * 4
    order = BucketOrder(sizes, bucket_sizes(64, 16), 2, seed=1)
    assert order.pictures == {(64, 64): 5, (32, 128): 4}
    first = Counter(draw.index for draw in order.take(0, 8))  # 2 + 2 batches; one square is left over
    assert max(first.values()) == 1
    left = set(range(5)) - set(first)
    square = [draw for draw in order.take(8, 10) if draw.size == (64, 64)]
    assert len(left) == 1
    assert len(square) == 6
    assert left < {draw.index for draw in square}


def test_batches_of_all_buckets_are_mixed():
    order = BucketOrder([(10, 10)] * 64 + [(10, 40)] * 64, bucket_sizes(64, 16), 4, seed=2)
    kinds = [order[position].size for position in range(0, 128, 4)]
    assert Counter(kinds) == {(64, 64): 16, (32, 128): 16}
    assert sum(a != b for a, b in pairwise(kinds)) > 8
    assert [d.index for d in order.take(0, 128)] != [d.index for d in order.take(128, 128)]


def test_a_bucket_that_cannot_fill_a_batch_is_dissolved():
    sizes = [(10, 10)] * 9 + [(10, 40)] * 3 + [(10, 25)] * 3
    table = bucket_sizes(64, 16)
    assert BucketOrder(sizes, table, 3).pictures == {(64, 64): 9, (48, 80): 3, (32, 128): 3}
    assert BucketOrder(sizes, table, 6).pictures == {(64, 64): 9, (32, 128): 6}
    assert BucketOrder(sizes, table, 10).pictures == {(64, 64): 15}
    assert BucketOrder([(1, 1), (1, 1), (1, 4)], table, 64).pictures == {(64, 64): 3}


def test_the_order_never_changes():
    """Frozen: a resumed run, on another machine or with another numpy, must go on where it stopped."""
    order = BucketOrder([(10, 10), (10, 40), (40, 10)] * 4, bucket_sizes(64, 16), 2, seed=3)
    assert [d.index for d in order.take(10, 8)] == [1, 10, 7, 10, 2, 11, 3, 0]
