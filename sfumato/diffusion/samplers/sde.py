"""Solvers of the reverse-time SDE in log-SNR, which add noise at every step: DPM-Solver++ for the SDE.

eta scales the noise: 1 is the reverse diffusion, 0 the probability flow. With h the growth of log-SNR over a
step and H = (1 + eta) h, a constant x0 gives x_s = sigma_s / sigma_t exp(-eta h) x_t + alpha_s (1 - exp(-H))
x0 + noise of standard deviation sigma_s sqrt(1 - exp(-2 eta h)). At alpha = 0 h is infinite and the same
formula holds.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sfumato.diffusion.grid import Point
from sfumato.diffusion.samplers.algebra import (
    check_descends,
    combine,
    exponential_moments,
    first_order,
    lagrange_weights,
    look_back,
)
from sfumato.diffusion.sampling import SAMPLERS, Run

__all__ = ["dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde"]


class Transition(NamedTuple):
    """Coefficients of one step: of x, of x0, of N(0, I), and what the integrals of higher order need."""

    decay: float
    gain: float
    std: float
    growth: float  # h
    total: float  # H = (1 + eta) h

    @staticmethod
    def between(now: Point, after: Point, eta: float) -> Transition:
        """The step from `now` to `after`, which has sigma > 0."""
        if eta < 0:
            raise ValueError(f"eta={eta}: it must not be negative; 0 = deterministic")
        h = after.log_snr - now.log_snr
        extra = eta * h if eta > 0 else 0.0  # 0 * inf
        decay = after.sigma / now.sigma * math.exp(-extra)
        std = after.sigma * math.sqrt(-math.expm1(-2 * extra))
        return Transition(decay, after.alpha * -math.expm1(-h - extra), std, h, h + extra)


@SAMPLERS("dpmpp_2m_sde")
def dpmpp_2m_sde(
    run: Run,
    x: Tensor,
    i: int,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver: Literal["midpoint", "heun"] = "midpoint",
) -> Tensor:
    """DPM-Solver++(2M) for the SDE: one evaluation per step, x0 extrapolated from the last two.

    Args:
        eta: amount of noise, 0 gives `dpmpp_2m` (order 2).
        s_noise: scale of the noise that is added.
        solver: weight of the extrapolation, by the midpoint rule or by its exact integral.

    Lu et al. 2022 (arXiv:2211.01095); k-diffusion's sample_dpmpp_2m_sde. Order 1 first and to sigma = 0.

    Raises: ValueError if the grid ascends at i, eta is negative or the solver unknown.
    """
    if solver not in ("midpoint", "heun"):
        raise ValueError(f"dpmpp_2m_sde solver {solver!r}; allowed: midpoint, heun")
    now, after = check_descends(run.grid, i, "dpmpp_2m_sde")
    denoised = run.folded(x, i)
    if after.sigma <= 0:
        return first_order(after, denoised)
    step, (_, *older) = Transition.between(now, after, eta), look_back(run, 2)
    x = combine((step.decay, x), (step.gain, denoised.x0))
    for past in older:
        weight = step.gain / 2 if solver == "midpoint" else after.alpha - step.gain / step.total
        weight *= step.growth / (now.log_snr - past.point.log_snr)
        x = combine((1.0, x), (weight, denoised.x0), (-weight, past.denoised.x0))
    return _with_noise(run, x, step.std * s_noise)


@SAMPLERS("dpmpp_3m_sde")
def dpmpp_3m_sde(run: Run, x: Tensor, i: int, *, eta: float = 1.0, s_noise: float = 1.0) -> Tensor:
    """The same with the exact integral of the parabola through the last three x0; order 3 with eta = 0.

    k-diffusion's sample_dpmpp_3m_sde, but for two things: that one takes half of the parabola's curvature,
    which leaves order 2; and a step over twice as long as the one before is of order 1, for extrapolating so
    far amplifies differences (with leading steps, the step to index 1: the covariance is off by 90 %).

    Lu et al. 2022 (arXiv:2211.01095), multistep of order 3. Orders 1 and 2 first, order 1 to sigma = 0.

    Raises: ValueError if the grid ascends at i or eta is negative.
    """
    now, after = check_descends(run.grid, i, "dpmpp_3m_sde")
    denoised = run.folded(x, i)
    if after.sigma <= 0:
        return first_order(after, denoised)
    step, past = Transition.between(now, after, eta), look_back(run, 3)
    if len(past) > 1 and step.growth > 2 * (now.log_snr - past[1].point.log_snr):
        past = past[:1]
    nodes = [0.0, *((p.point.log_snr - now.log_snr) / step.growth for p in past[1:])]
    weights = lagrange_weights(nodes, exponential_moments(step.total, len(nodes)))
    terms = ((after.alpha * w, p.denoised.x0) for w, p in zip(weights, past, strict=True))
    return _with_noise(run, combine((step.decay, x), *terms), step.std * s_noise)


@SAMPLERS("dpmpp_sde")
def dpmpp_sde(run: Run, x: Tensor, i: int, *, eta: float = 1.0, s_noise: float = 1.0) -> Tensor:
    """DPM-Solver++(S) for the SDE: x0 is evaluated again in the middle of the step; order 2 with eta = 0.

    The noise of the first half reaches the end of the step as the SDE carries it there, so that both stages
    follow one Brownian path (k-diffusion samples that from a tree). From alpha = 0 and to sigma = 0 one
    stage.

    Lu et al. 2022 (arXiv:2211.01095), algorithm 1; k-diffusion's sample_dpmpp_sde.

    Raises: ValueError if the grid ascends at i or eta is negative.
    """
    now, after = check_descends(run.grid, i, "dpmpp_sde")
    denoised = run.folded(x, i)
    if after.sigma <= 0:
        return first_order(after, denoised)
    whole = Transition.between(now, after, eta)
    if now.alpha <= 0:
        return _with_noise(run, combine((whole.decay, x), (whole.gain, denoised.x0)), whole.std * s_noise)
    level = run.grid.log_middles[i]
    middle = Point.of(level)
    first, second = Transition.between(now, middle, eta), Transition.between(middle, after, eta)
    fresh = [run.noise(x) for _ in range(2)] if eta > 0 else []
    halfway = combine(
        (first.decay, x), (first.gain, denoised.x0), *((first.std * s_noise, z) for z in fresh[:1])
    )
    x = combine((whole.decay, x), (whole.gain, run.between(halfway, level).x0))
    scales = (second.decay * first.std * s_noise, second.std * s_noise)
    return combine((1.0, x), *zip(scales, fresh, strict=False))


def _with_noise(run: Run, x: Tensor, std: float) -> Tensor:
    return torch.add(x, run.noise(x), alpha=std) if std > 0 else x
