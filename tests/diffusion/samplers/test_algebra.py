"""Quadrature weights, exponential moments and the coordinates of the ODE solvers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.core.types import Denoised
from sfumato.diffusion import SCHEDULES, SPACINGS, Flow, Run
from sfumato.diffusion.grid import Point
from sfumato.diffusion.samplers.algebra import (
    Frame,
    check_order,
    combine,
    exponential_moments,
    first_order,
    lagrange_weights,
    look_back,
    transfer,
)
from sfumato.diffusion.sampling import Past


@pytest.mark.parametrize("h", [1e-6, 1e-3, 0.1, 0.999, 1.0, 3.0, 30.0, 1e4, -0.5, -4.0])
def test_exponential_moments(h):
    """Against Simpson's rule with 20,000 intervals; 1e-9 relative is its accuracy for h up to 30."""
    s = torch.linspace(0, 1, 20001, dtype=torch.float64)
    weights = torch.full_like(s, 2.0)
    weights[1::2] = 4.0
    weights[0] = weights[-1] = 1.0
    for k, moment in enumerate(exponential_moments(h, 4)):
        if h < 100:
            expected = float((weights * h * torch.exp(-h * (1 - s)) * s**k).sum() / 60000)
            assert moment == pytest.approx(expected, rel=1e-9)
        assert k == 0 or h < 100 or moment == pytest.approx(1, abs=4 / h)


def test_moments_of_an_infinite_step():
    assert exponential_moments(math.inf, 3) == [1, 1, 1]


@given(st.lists(st.integers(-30, 10), min_size=1, max_size=4, unique=True))
def test_lagrange_weights_integrate_polynomials(points):
    """Weights over k nodes are exact for powers below k, here over [0, 1] and with the exponential weight."""
    nodes = [p / 10 for p in points]
    for moments in ([1 / (k + 1) for k in range(4)], exponential_moments(0.7, 4)):
        weights = lagrange_weights(nodes, moments[: len(nodes)])
        for power in range(len(nodes)):
            total = sum(w * n**power for w, n in zip(weights, nodes, strict=True))
            assert total == pytest.approx(moments[power], rel=1e-6, abs=1e-9)


def test_even_steps_give_adams_bashforth():
    """The tables of a textbook."""
    for order, expected in ((1, [1]), (2, [3 / 2, -1 / 2]), (3, [23 / 12, -16 / 12, 5 / 12])):
        weights = lagrange_weights([-k for k in range(order)], [1 / (k + 1) for k in range(order)])
        assert weights == pytest.approx(expected)


def test_combine():
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    assert combine((2.0, x)).tolist() == [2, 4]
    assert combine((2.0, x), (0.5, y), (-1.0, x)).tolist() == [6, 12]
    assert combine((2.0, x.half()), (0.5, y.half())).dtype == torch.float16
    assert x.tolist() == [1, 2]


def test_first_order_steps_agree():
    """alpha x0 + sigma eps is both the exponential step in x0 and Euler's in either frame."""
    now, after = Point(0.6, 0.8), Point(0.9, 0.3)
    x, x0 = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    denoised = Denoised(x0, (x - 0.6 * x0) / 0.8)
    step = first_order(after, denoised)
    assert torch.allclose(step, transfer(x, now, after, (1 - now.alpha * 0.3 / 0.8 / 0.9, x0)))
    for schedule in (SCHEDULES["linear"](), Flow()):
        frame = Frame(SPACINGS["trailing"](schedule, 4))
        assert frame.straight == isinstance(schedule, Flow)
        assert torch.allclose(frame.step(x, now, after, frame.slope(denoised)), step)


def test_look_back_skips_pure_noise():
    grid = SPACINGS["trailing"](Flow(), 4)
    run = Run(lambda x, level: Denoised(x, x), grid, torch.randn_like)
    for i in range(3):
        run.at(torch.zeros(1), i)
    assert [p.point for p in look_back(run, 4)] == [grid.points[2], grid.points[1]]
    assert [p.point for p in look_back(run, 1)] == [grid.points[2]]
    run.history.clear()
    run.history.append(Past(grid.points[0], Denoised(torch.zeros(1), torch.zeros(1))))
    assert [p.point for p in look_back(run, 3)] == [grid.points[0]]


@pytest.mark.parametrize("order", [0, 5])
def test_order_out_of_range(order):
    with pytest.raises(ValueError, match=f"sampler 'lms' got order={order}; allowed: 1 to 4"):
        check_order("lms", order, 4)


@pytest.mark.parametrize("steps", [5, 6])
@pytest.mark.parametrize("schedule", [SCHEDULES["linear"](), Flow()], ids=str)
def test_middles(steps, schedule):
    """Geometric mean of the ratios, or mean of tau on schedules from pure noise; each on the schedule."""
    grid = SPACINGS["trailing"](schedule, steps)
    for i, (now, after) in enumerate(zip(grid.points, grid.points[1:], strict=False)):
        middle, by_log = Point.of(grid.middles[i]), Point.of(grid.log_middles[i])
        if 0 < now.ratio * after.ratio < math.inf:
            assert by_log.log_snr == pytest.approx((now.log_snr + after.log_snr) / 2)
        if grid.from_pure_noise:
            assert middle.tau == pytest.approx((now.tau + after.tau) / 2)
        else:
            assert grid.middles[i] is grid.log_middles[i]
        t = schedule.time_of(torch.tensor(middle.ratio, dtype=torch.float64))
        assert float(grid.middles[i].t) == pytest.approx(float(schedule(t).t), rel=1e-9)
