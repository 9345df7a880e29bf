"""The order of samples: a pure function of (seed, position), and fair."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.data.order import Order


@given(st.integers(1, 60), st.integers(0, 2**63), st.integers(0, 5))
def test_an_epoch_has_every_row_once(count, seed, epoch):
    assert sorted(Order(count, seed=seed).epoch(epoch)) == list(range(count))


def test_seeds_and_epochs_differ():
    order = Order(50, seed=1)
    epochs = [tuple(order.epoch(e)) for e in range(4)] + [tuple(Order(50, seed=2).epoch(0))]
    assert len(set(epochs)) == 5


def test_the_order_never_changes():
    """Frozen: a resumed run, on another machine or with another numpy, must go on where it stopped."""
    order = Order(10, seed=3)
    assert [d.index for d in order.take(7, 6)] == [2, 0, 4, 8, 5, 3]
    assert order[0].seed == 4756333655589879217
    assert list(Order(6, seed=3, groups=list("aaaabb")).epoch(1)) == [2, 0, 1, 5, 4, 4]


@given(st.integers(1, 20), st.integers(0, 100), st.integers(1, 50))
def test_a_draw_depends_on_its_position_alone(count, position, length):
    order = Order(count, seed=5, groups=[i % 3 for i in range(count)])
    draws = order.take(position, length)
    assert [d.position for d in draws] == list(range(position, position + length))
    fresh = Order(count, seed=5, groups=[i % 3 for i in range(count)])
    assert [fresh[p] for p in reversed(range(position, position + length))] == draws[::-1]


def test_sample_seeds_are_distinct_and_fit_63_bits():
    seeds = [d.seed for d in Order(3, seed=1).take(0, 500)]
    assert len(set(seeds)) == 500
    assert 2**60 < max(seeds) < 2**63


class TestGroups:
    def test_every_group_is_drawn_equally_often(self):
        groups = ["big"] * 30 + ["small"] * 2 + ["one"]
        order = Order(33, groups=groups)
        for epoch in range(20):
            counts = Counter(groups[i] for i in order.epoch(epoch))
            assert set(counts.values()) == {11}

    def test_the_members_of_a_group_share_evenly(self):
        groups = ["big"] * 30 + ["small"] * 2 + ["one"]
        order = Order(33, groups=groups)
        counts = Counter(int(i) for e in range(60) for i in order.epoch(e))
        assert {counts[i] for i in range(32, 33)} == {660}
        assert all(abs(counts[i] - 330) <= 60 for i in (30, 31))  # 5 or 6 per epoch, a coin decides
        # Each of 30 is drawn 11/30 per epoch on average, 22 in 60 epochs; 4 binomial standard deviations.
        assert all(abs(counts[i] - 22) <= 4 * (60 * 11 / 30 * 19 / 30) ** 0.5 for i in range(30))

    def test_weights_divide_the_share_of_their_group(self):
        order = Order(4, groups=list("aabb"), weights=[3, 1, 0, 5])
        counts = Counter(int(i) for e in range(400) for i in order.epoch(e))
        assert counts[2] == 0
        assert counts[3] == 800
        assert counts[0] + counts[1] == 800
        assert abs(counts[0] - 600) < 60  # 3 standard deviations of 400 draws of 1.5 on average


class TestWeights:
    @given(
        st.lists(st.floats(0, 1e6), min_size=1, max_size=30).filter(lambda w: sum(w) > 1e-3),
        st.integers(0, 99),
    )
    def test_each_row_gets_its_share_rounded_up_or_down(self, weights, seed):
        n = len(weights)
        counts = Counter(int(i) for i in Order(n, seed=seed, weights=weights).epoch(0))
        for i, share in enumerate(np.array(weights) / sum(weights) * n):
            # The tolerance is for sums of floats at a whole number of draws.
            assert np.floor(share - 1e-9) <= counts[i] <= np.ceil(share + 1e-9)
            assert weights[i] > 0 or counts[i] == 0

    def test_draws_are_shuffled(self):
        order = Order(100, weights=[1.0] * 50 + [3.0] * 50).epoch(0)
        assert 0.2 < np.mean(np.diff(order) > 0) < 0.8


class TestWrongInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"count": 0}, "at least one row, not 0"),
            ({"count": 2, "weights": [1.0]}, "1 weights for 2 rows"),
            ({"count": 2, "groups": "abc"}, "3 groups for 2 rows"),
            ({"count": 2, "groups": [["a"], ["b"]]}, "plain values"),
            ({"count": 2, "weights": [0.0, 0.0]}, "positive sum"),
            ({"count": 2, "weights": [1.0, -1.0]}, "finite numbers >= 0"),
            ({"count": 2, "weights": [1.0, float("nan")]}, "finite numbers >= 0"),
        ],
    )
    def test_one_line(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Order(**arguments)

    def test_before_the_beginning(self):
        with pytest.raises(IndexError, match="-1"):
            Order(3)[-1]


class TestBlocks:
    BLOCKS = tuple(row // 7 for row in range(60))

    @given(st.integers(1, 12), st.integers(0, 2**40), st.integers(0, 3))
    def test_an_epoch_goes_through_a_few_blocks_at_a_time(self, mix, seed, epoch):
        rows = Order(60, seed=seed, blocks=self.BLOCKS, mix=mix).epoch(epoch)
        assert sorted(rows) == list(range(60))
        seen = [self.BLOCKS[row] for row in rows]
        spans = {block: (seen.index(block), len(seen) - seen[::-1].index(block)) for block in set(seen)}
        at_hand = [sum(first <= place < last for first, last in spans.values()) for place in range(60)]
        assert max(at_hand) <= mix

    def test_blocks_and_their_rows_are_shuffled(self):
        order = Order(60, seed=1, blocks=self.BLOCKS, mix=2)
        epochs = [list(order.epoch(number)) for number in range(2)]
        assert [self.BLOCKS[row] for row in epochs[0]] != [self.BLOCKS[row] for row in epochs[1]]
        first = [row for row in epochs[0] if self.BLOCKS[row] == 3]
        assert first != sorted(first)
        assert Order(60, seed=1, blocks=self.BLOCKS, mix=2)[70] == order[70]

    def test_all_are_mixed_unless_told_otherwise(self):
        assert list(Order(60, seed=1, blocks=self.BLOCKS).epoch(0)) == list(Order(60, seed=1).epoch(0))

    def test_shares_stay_what_they_are(self):
        groups = [row % 3 == 0 for row in range(60)]
        rows = Order(60, seed=1, groups=groups, blocks=self.BLOCKS, mix=2).epoch(0)
        assert sum(groups[row] for row in rows) == 30

    def test_wrong_input(self):
        with pytest.raises(ValueError, match="0 blocks cannot be mixed"):
            Order(60, blocks=self.BLOCKS, mix=0)
        with pytest.raises(ValueError, match="3 blocks for 60 rows"):
            Order(60, blocks=[1, 2, 3], mix=1)
