"""Holes that a denoiser learns to fill, and the weights that it begins with."""

from __future__ import annotations

import torch

from sfumato.core.random import Noise
from sfumato.training.jobs.base import FIRST, _widened
from sfumato.training.jobs.told import holes_in


def test_holes_are_boxes_or_everything_and_depend_on_the_sample_alone():
    x = torch.zeros(400, 3, 12, 20)
    mask = holes_in(x, Noise(range(400)))
    assert mask.shape == (400, 1, 12, 20)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    rows, columns = mask.amax(3)[:, 0], mask.amax(2)[:, 0]
    assert torch.equal(mask[:, 0], rows[:, :, None] * columns[:, None])
    assert all(int((v[:, 1:] != v[:, :-1]).sum(1).max()) <= 2 for v in (rows, columns))
    whole = mask.mean((1, 2, 3)) == 1
    assert 0.18 < whole.float().mean() < 0.32  # a quarter of 400
    covered = mask[~whole].mean((0, 1))
    assert covered.min() > 0
    assert 0.05 < mask[~whole].mean() < 0.3  # the mean of |u - v|^2 for two sides is 1/9
    assert torch.equal(holes_in(x[:1], Noise([7])), mask[7:8])


def test_new_channels_begin_at_zero():
    v, like = torch.randn(4, 3, 3, 3), torch.empty(4, 7, 3, 3)
    wide = _widened(v, like)
    assert torch.equal(wide[:, :3], v)
    assert not wide[:, 3:].any()
    assert FIRST.endswith("weight")
