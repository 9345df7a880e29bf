"""Single-step solvers of the probability flow: Euler, Heun, EDM's Heun with churn, DPM-Solver-2."""

from __future__ import annotations

import math

from torch import Tensor

from sfumato.core.types import Level
from sfumato.diffusion.grid import Point
from sfumato.diffusion.samplers.algebra import Frame, combine, first_order
from sfumato.diffusion.sampling import SAMPLERS, Past, Run

__all__ = ["dpm2", "edm", "euler", "heun"]


@SAMPLERS("euler")
def euler(run: Run, x: Tensor, i: int) -> Tensor:
    """Euler step, x_s = alpha_s x0 + sigma_s eps; order 1.

    Euler in sigma / alpha (Karras et al. 2022, arXiv:2206.00364) and in the time of a straight path (Liu et
    al. 2022, arXiv:2209.03003) are this same step, and so is `ddim` with eta = 0.
    """
    return first_order(run.grid.points[i + 1], run.folded(x, i))


@SAMPLERS("heun")
def heun(run: Run, x: Tensor, i: int) -> Tensor:
    """Trapezoidal rule with an Euler predictor, in the coordinates of `Frame`; order 2, two evaluations.

    The step to sigma = 0, where no network is evaluated, is Euler's. Karras et al. 2022 (arXiv:2206.00364),
    algorithm 1.
    """
    return _heun(run, x, run.grid.level(i), i)


@SAMPLERS("edm")
def edm(
    run: Run,
    x: Tensor,
    i: int,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Raise the noise level a little with fresh noise, then take a Heun step from there.

    Where s_tmin <= sigma / alpha <= s_tmax the ratio grows by the factor 1 + min(s_churn / n, sqrt(2) - 1)
    for n steps of this grid; a discrete schedule allows no more than its last level. Without churn it is
    `heun`.

    Karras et al. 2022 (arXiv:2206.00364), algorithm 2.
    """
    now, level = run.grid.points[i], run.grid.level(i)
    if s_churn > 0 and s_tmin <= now.ratio <= s_tmax and now.alpha > 0:
        gamma = min(s_churn / len(run.grid), math.sqrt(2) - 1)
        level = run.grid.level_at(now.ratio * (1 + gamma))
        raised = Point.of(level)
        scale = raised.alpha / now.alpha
        added = max(raised.sigma**2 - (scale * now.sigma) ** 2, 0.0)
        x = combine((scale, x), (math.sqrt(added) * s_noise, run.noise(x)))
    return _heun(run, x, level, i)


@SAMPLERS("dpm2")
def dpm2(run: Run, x: Tensor, i: int) -> Tensor:
    """Midpoint rule in the coordinates of `Frame`, the middle as in `Grid.middles`; order 2, two evaluations.

    DPM-Solver-2 of Lu et al. 2022 (arXiv:2206.00927) as k-diffusion takes it over into Karras' coordinates,
    where the step to sigma = 0 is Euler's.
    """
    now, after = run.grid.points[i : i + 2]
    frame, denoised = Frame(run.grid), run.folded(x, i)
    if not frame.straight and (after.sigma <= 0 or after.alpha <= 0):
        return first_order(after, denoised)
    level = run.grid.middles[i]
    middle = Point.of(level)
    halfway = frame.step(x, now, middle, frame.slope(denoised))
    return frame.step(x, now, after, frame.slope(run.between(halfway, level)))


def _heun(run: Run, x: Tensor, level: Level, i: int) -> Tensor:
    """From `level`, which is level i or above it, to level i + 1."""
    now, after = Point.of(level), run.grid.points[i + 1]
    frame, denoised = Frame(run.grid), run.between(x, level)
    run.history.append(Past(now, denoised))
    euler_step = first_order(after, denoised)
    goal = run.grid.level(i + 1)
    if after.sigma <= 0 or math.isnan(goal.t):
        return euler_step
    half = (frame.time(after) - frame.time(now)) / 2
    slopes = frame.slope(denoised), frame.slope(run.between(euler_step, goal))
    return frame.advance(x, now, after, *((half, s) for s in slopes))
