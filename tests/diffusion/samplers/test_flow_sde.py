"""SiT's SDE against a loop in SiT's own terms: time from noise to data, velocity, score, diffusion."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from sfumato.core.types import Conditioning
from sfumato.diffusion import PARAMETERIZATIONS, SAMPLERS, SPACINGS, Denoiser, Flow, Grid, Run, integrate

STEPS, LAST = 10, 0.04
FORMS = {
    "sigma": lambda t: 1 - t,
    "constant": lambda t: 1.0,
    "decreasing": lambda t: 0.25 * (math.cos(math.pi * t) + 1) ** 2,
    "bump": lambda t: math.sin(math.pi * t) ** 2,
}


def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Anything smooth that depends on both; t (B,) runs from noise to data."""
    return torch.tanh(0.7 * x + t[:, None]) - 0.3 * x


def reference(
    x: torch.Tensor, noises: list[torch.Tensor], form: str, solver: str, scale: float
) -> torch.Tensor:
    def drift(x: torch.Tensor, t: float) -> torch.Tensor:
        v = velocity(x, torch.full((len(x),), t, dtype=x.dtype))
        score = (t * v - x) / (1 - t)
        return v + scale * FORMS[form](t) * score

    times = torch.linspace(0, 1 - LAST, STEPS, dtype=torch.float64).tolist()
    dt = times[1] - times[0]
    for t, z in zip(times[:-1], noises, strict=False):
        kick = math.sqrt(2 * scale * FORMS[form](t) * dt) * z
        if solver == "euler":
            x = x + drift(x, t) * dt + kick
        else:
            x = x + kick
            first = drift(x, t)
            x = x + 0.5 * dt * (first + drift(x + dt * first, t + dt))
    return x + drift(x, times[-1]) * LAST


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("form", FORMS)
def test_walk_is_sit_s(form, solver):
    """1e-12: both in float64, by different algebra."""
    schedule = Flow(towards_data=True)
    denoiser = Denoiser(lambda x, t, cond: velocity(x, t), schedule, PARAMETERIZATIONS["velocity"])
    grid = SPACINGS["linspace"](schedule, STEPS, last=LAST)
    x = torch.randn(3, 5, dtype=torch.float64)
    noises = [torch.randn(3, 5, dtype=torch.float64) for _ in range(STEPS)]
    left = iter(noises)
    step = partial(SAMPLERS["flow_sde"], diffusion=form, solver=solver, scale=0.6, last_step="mean")
    run = Run(lambda x, level: denoiser(x, level, Conditioning()), grid, lambda like: next(left))
    expected = reference(x, noises, form, solver, 0.6)
    torch.testing.assert_close(integrate(step, run, x), expected, rtol=1e-12, atol=1e-12)


def test_ode_is_euler_in_sit_s_time():
    """SiT's fixed-step ODE: the network sees 0, 1/n, ... and x moves by v / n."""
    schedule, seen = Flow(towards_data=True), []

    def net(x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        seen.append(float(t[0]))
        return velocity(x, t)

    denoiser = Denoiser(net, schedule, PARAMETERIZATIONS["velocity"])
    grid = SPACINGS["linspace"](schedule, 8)
    x = torch.randn(3, 5, dtype=torch.float64)
    run = Run(lambda x, level: denoiser(x, level, Conditioning()), grid, torch.randn_like)
    end, expected = integrate(SAMPLERS["euler"], run, x), x
    for i in range(8):
        expected = expected + velocity(expected, torch.full((3,), i / 8, dtype=torch.float64)) / 8
    torch.testing.assert_close(end, expected, rtol=1e-12, atol=1e-12)
    assert seen == pytest.approx([i / 8 for i in range(8)])


def test_sbdm_needs_a_schedule_below_pure_noise():
    def walk(grid: Grid) -> torch.Tensor:
        denoiser = Denoiser(lambda x, t, cond: velocity(x, t), Flow(), PARAMETERIZATIONS["flow"])
        run = Run(lambda x, level: denoiser(x, level, Conditioning()), grid, torch.randn_like)
        return integrate(partial(SAMPLERS["flow_sde"], diffusion="sbdm"), run, torch.randn(2, 3))

    with pytest.raises(
        ValueError, match="'sbdm' is infinite at pure noise; use 'sigma', or a schedule with end"
    ):
        walk(SPACINGS["linspace"](Flow(), 4))
    assert walk(SPACINGS["linspace"](Flow(end=0.95), 4)).isfinite().all()


@pytest.mark.parametrize(
    "knobs", [{"scale": -1.0}, {"solver": "rk4"}, {"last_step": "none"}, {"diffusion": "all"}]
)
def test_wrong_knobs_are_one_clear_line(knobs):
    grid = SPACINGS["linspace"](Flow(), 4)
    run = Run(lambda x, level: pytest.fail("evaluated"), grid, torch.randn_like)
    with pytest.raises(ValueError, match="allowed"):
        SAMPLERS["flow_sde"](run, torch.randn(2, 3), 0, **knobs)


def test_last_time_must_be_inside():
    with pytest.raises(ValueError, match=r"last=1\.5 is not inside this schedule; allowed: 0 to 1"):
        SPACINGS["linspace"](Flow(), 4, last=1.5)
