from __future__ import annotations

import pytest
import torch
from torch import nn

from sfumato.training.ema import Average, decay_at


def test_decay_warms_up_to_its_final_value():
    assert decay_at(0, 0.999) == pytest.approx(2 / 11)
    assert decay_at(90, 0.999) == pytest.approx(92 / 101)
    assert decay_at(10**6, 0.999) == 0.999
    assert decay_at(0, 0.1) == 0.1


def test_average_follows_the_formula_and_copies_buffers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    average = Average({"net": net}, 0.5)
    expected = net[0].weight.detach().clone()
    for n in range(4):
        with torch.no_grad():
            net[0].weight.add_(torch.randn(3, 3))
        net(torch.randn(5, 3))
        average.update()
        decay = min(0.5, (2 + n) / (11 + n))
        expected = decay * expected + (1 - decay) * net[0].weight.detach()
    torch.testing.assert_close(average.modules["net"][0].weight, expected)
    torch.testing.assert_close(average.modules["net"][1].running_mean, net[1].running_mean)
    assert int(average.modules["net"][1].num_batches_tracked) == 4


def test_average_is_frozen_and_in_evaluation_mode():
    average = Average({"net": nn.Linear(2, 2)}, 0.9)
    assert not average.modules["net"].weight.requires_grad
    assert not average.modules["net"].training


def test_state_round_trip_continues_exactly():
    torch.manual_seed(0)
    net = nn.Linear(2, 2)
    first, second = Average({"net": net}, 0.9), Average({"net": net}, 0.9)
    first.update()
    with torch.no_grad():
        net.weight.add_(1)
    first.update()
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        net.weight.mul_(2)
    first.update()
    second.update()
    assert torch.equal(first.modules["net"].weight, second.modules["net"].weight)


def test_decay_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="ema decay is 1"):
        Average({"net": nn.Linear(1, 1)}, 1.0)
