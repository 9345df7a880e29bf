"""EDM's churn against its published algorithm, and what the knobs refuse."""

from __future__ import annotations

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

from sfumato.core.random import Noise
from sfumato.diffusion import SAMPLERS, SCHEDULES, SPACINGS, VE, Flow, Run, integrate
from sfumato.diffusion.grid import Point

STEPS = 12


def published(denoise, sigmas, x, noise, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """Algorithm 2 of Karras et al. 2022 (arXiv:2206.00364) as published; denoise(x, sigma) -> x0."""
    n = len(sigmas) - 1
    for now, after in pairwise(sigmas):
        gamma = min(s_churn / n, math.sqrt(2) - 1) if s_tmin <= now <= s_tmax else 0.0
        raised = now * (1 + gamma)
        if gamma > 0:
            x = x + math.sqrt(raised**2 - now**2) * s_noise * noise(x)
        slope = (x - denoise(x, raised)) / raised
        moved = x + (after - raised) * slope
        if after > 0:
            other = (moved - denoise(moved, after)) / after
            moved = x + (after - raised) * (slope + other) / 2
        x = moved
    return x


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"s_churn": 5.0},
        {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003},
        {"s_churn": 1e3},
    ],
)
def test_edm_is_algorithm_2(knobs, gaussian):
    schedule = VE()
    grid = SPACINGS["karras"](schedule, STEPS)

    def denoise(x, sigma):
        ratio = torch.tensor(sigma, dtype=torch.float64)
        return gaussian.denoise(x, schedule(schedule.time_of(ratio))).x0

    x = 80 * torch.randn(2, 3, dtype=torch.float64)
    expected = published(denoise, grid.sigma.tolist(), x, Noise([0, 1]), **knobs)
    result = integrate(partial(SAMPLERS["edm"], **knobs), Run(gaussian.denoise, grid, Noise([0, 1])), x)
    assert torch.allclose(result, expected, rtol=1e-10, atol=1e-10)


def test_edm_in_preserving_coordinates_is_the_same_walk(gaussian):
    """Below the table's last level, churn on a VP schedule is churn in x / alpha."""
    schedule = SCHEDULES["linear"]()
    grid = SPACINGS["karras"](schedule, STEPS, sigma_max=20.0)
    ratios = [p.ratio for p in grid.points]

    def denoise(y, ratio):
        level = schedule(schedule.time_of(torch.tensor(ratio, dtype=torch.float64)))
        return gaussian.denoise(y * level.alpha, level).x0

    y = 20 * torch.randn(2, 3, dtype=torch.float64)
    expected = published(denoise, ratios, y, Noise([0, 1]), s_churn=3.0)
    run = Run(gaussian.denoise, grid, Noise([0, 1]))
    result = integrate(partial(SAMPLERS["edm"], s_churn=3.0), run, y * grid.points[0].alpha)
    assert torch.allclose(result, expected, rtol=1e-9, atol=1e-9)


def test_churn_stays_on_the_table(gaussian):
    """At the last level of a table there is nothing noisier: that step is Heun's, the walk goes on."""
    grid = SPACINGS["trailing"](SCHEDULES["scaled_linear"](), 6)
    x = torch.randn(2, 3, dtype=torch.float64)
    levels = []

    def denoise(x, level):
        levels.append(Point.of(level).ratio)
        return gaussian.denoise(x, level)

    integrate(partial(SAMPLERS["edm"], s_churn=2.0), Run(denoise, grid, Noise([0, 1])), x)
    assert levels[0] == pytest.approx(grid.points[0].ratio)
    assert levels[2] == pytest.approx(grid.points[1].ratio * (1 + 2.0 / 6))


@pytest.mark.parametrize(
    ("sampler", "knobs", "message"),
    [
        ("lms", {"order": 5}, "allowed: 1 to 4"),
        ("deis", {"order": 0}, "allowed: 1 to 3"),
        ("unipc", {"order": 4}, "allowed: 1 to 3"),
        ("unipc", {"variant": "bh3"}, "allowed: bh1, bh2"),
        ("dpmpp_2m_sde", {"solver": "euler"}, "allowed: midpoint, heun"),
        ("ddpm", {"variance": "learned"}, "allowed: small, large"),
    ],
)
def test_wrong_knobs(sampler, knobs, message, gaussian):
    run = Run(gaussian.denoise, SPACINGS["trailing"](Flow(), 3), torch.randn_like)
    with pytest.raises(ValueError, match=message) as error:
        integrate(partial(SAMPLERS[sampler], **knobs), run, torch.zeros(2, 3, dtype=torch.float64))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sampler", "calls"),
    [("euler", 6), ("heun", 11), ("dpm2", 11), ("plms", 7), ("dpmpp_2m", 6), ("unipc", 6), ("dpmpp_sde", 11)],
)
def test_network_calls(sampler, calls, gaussian):
    """Evaluations of 6 steps: two per step but the last, one per step, and the second one of PLMS' start."""
    seen = []

    def denoise(x, level):
        seen.append(level)
        return gaussian.denoise(x, level)

    grid = SPACINGS["trailing"](SCHEDULES["linear"](), 6)
    integrate(SAMPLERS[sampler], Run(denoise, grid, torch.randn_like), torch.zeros(2, 3, dtype=torch.float64))
    assert len(seen) == calls
    assert not any(level.t.isnan() for level in seen)


def test_unipc_does_not_correct_a_sample_that_was_projected(gaussian):
    """With a projection that changes every sample, steps start from what was projected."""
    grid, known = SPACINGS["trailing"](SCHEDULES["linear"](), 6), 5.0
    run, starts = Run(gaussian.denoise, grid, torch.randn_like), []

    def project(x, i):
        if run.correction is not None:
            starts.append(run.correction.start.clone())
        return torch.cat([torch.full_like(x[:, :1], known), x[:, 1:]], dim=1)

    integrate(SAMPLERS["unipc"], run, torch.randn(2, 3, dtype=torch.float64), project=project)
    assert all((s[:, 0] == known).all() for s in starts[1:])
