from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from sfumato.training.ema import Average, PowerAverage, decay_at, gamma_of, sigma_rel_of


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


@pytest.mark.parametrize("gamma", [0.0, 0.5, 6.94, 16.97, 300.0])
def test_sigma_rel_is_the_deviation_of_the_profile(gamma):
    """Against numerical integration of t^gamma on [0, 1], and the cubic's root as its inverse."""
    t = (np.arange(200_000) + 0.5) / 200_000
    profile = t**gamma / np.sum(t**gamma)
    mean = np.sum(profile * t)
    deviation = np.sqrt(np.sum(profile * (t - mean) ** 2))
    assert sigma_rel_of(gamma) == pytest.approx(deviation, rel=1e-4)
    # Near gamma 0 the width hardly depends on gamma, so its inverse loses half the digits there.
    assert gamma_of(sigma_rel_of(gamma)) == pytest.approx(gamma, rel=1e-9, abs=1e-9)


def test_published_exponents():
    """The paper: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.3])
def test_widths_without_an_exponent_are_refused(width):
    with pytest.raises(ValueError, match=f"sigma_rel is {width}; it must be above 0 and at most 0.2886"):
        gamma_of(width)


def test_power_average_weighs_each_step_by_the_integral_of_its_profile():
    """Steps of different sizes; the initialization counts nothing, buffers are copied."""
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).double()
    average = PowerAverage({"net": net}, 0.1)
    ends, weights = [0, 3, 4, 9, 11, 20], []
    for before, after in pairwise(ends):
        with torch.no_grad():
            net[0].weight.copy_(torch.randn(2, 2))
        net(torch.randn(5, 2).double())
        weights.append(net[0].weight.detach().clone())
        average.update(before, after)
    power = average.gamma + 1
    expected = sum(
        w * (b**power - a**power) / 20**power for w, (a, b) in zip(weights, pairwise(ends), strict=True)
    )
    torch.testing.assert_close(average.modules["net"][0].weight, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(average.modules["net"][1].running_var, net[1].running_var)
