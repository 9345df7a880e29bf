"""What the step functions share: linear combinations, checks, and the coordinates that ODE solvers work in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.core.types import Denoised, Level
from sfumato.diffusion.grid import Grid, Point

__all__ = ["Frame", "check_descends", "check_order", "combine", "lagrange_weights", "straight_to"]


def combine(*terms: tuple[float, Tensor]) -> Tensor:
    """Sum of coefficient * tensor; the coefficients stay floats, so nothing is copied to a device."""
    (first, x), *rest = terms
    total = first * x
    for weight, term in rest:
        total = torch.add(total, term, alpha=weight)
    return total


def straight_to(after: Point, denoised: Denoised) -> Tensor:
    """The first-order step: alpha x0 + sigma eps at the next level, right from alpha = 0 and to sigma = 0 alike."""
    return combine((after.alpha, denoised.x0), (after.sigma, denoised.eps))


def check_descends(grid: Grid, i: int, name: str) -> tuple[Point, Point]:
    """Levels i and i + 1 of a step that adds noise; ValueError if it leads to more noise."""
    now, after = grid.points[i], grid.points[i + 1]
    if after.ratio >= now.ratio:
        raise ValueError(f"sampler {name!r} cannot walk from clean to noisy (step {i + 1}); invert with 'ddim', eta=0")
    return now, after


def check_order(name: str, order: int, highest: int) -> None:
    """ValueError unless 1 <= order <= highest."""
    if not 1 <= order <= highest:
        raise ValueError(f"sampler {name!r} got order={order}; allowed: 1 to {highest}")


class Frame:
    """Coordinates (z, s) with z = x / scale in which the probability flow is dz/ds = slope.

    "ratio": z = x / alpha, s = sigma / alpha, slope = eps; the coordinates of Karras et al. 2022 and k-diffusion.
    "straight": z = x / (alpha + sigma), s = sigma / (alpha + sigma), slope = eps - x0; those of rectified flow, finite
    from pure noise to none. Solvers use them on schedules that reach alpha = 0, where the ratio is infinite (and where
    methods that are smooth in the ratio would fall to first order), else the ratio.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.straight = grid.from_pure_noise

    def time(self, point: Point) -> float:
        """s of a level."""
        return point.tau if self.straight else point.ratio

    def slope(self, denoised: Denoised) -> Tensor:
        """dz/ds at an evaluation."""
        return denoised.eps - denoised.x0 if self.straight else denoised.eps

    def advance(self, x: Tensor, now: Point, after: Point, *slopes: tuple[float, Tensor]) -> Tensor:
        """x at `after` when z changes by the sum of weight * slope."""
        scale, next_scale = (p.alpha + p.sigma if self.straight else p.alpha for p in (now, after))
        return combine((next_scale / scale, x), *((next_scale * weight, slope) for weight, slope in slopes))

    def step(self, x: Tensor, now: Point, after: Point, slope: Tensor) -> Tensor:
        """x at `after` with one slope for the whole step."""
        return self.advance(x, now, after, (self.time(after) - self.time(now), slope))

    def middle(self, now: Point, after: Point) -> Level:
        """The level halfway: the mean of s if straight, the geometric mean of the ratios if not."""
        if self.straight:
            tau = (now.tau + after.tau) / 2
            return self.grid.level_at(tau / (1 - tau))
        return self.grid.level_at((now.ratio * after.ratio) ** 0.5)


def lagrange_weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Integrals of the Lagrange basis polynomials over `nodes`, whose k-th power integrates to moments[k]."""
    weights = []
    for j, own in enumerate(nodes):
        coefficients = [1.0]  # of the basis polynomial, lowest power first
        for k, other in enumerate(nodes):
            if k != j:
                shifted = [0.0, *coefficients]
                scaled = [*(-other * c for c in coefficients), 0.0]
                coefficients = [(a + b) / (own - other) for a, b in zip(shifted, scaled, strict=True)]
        weights.append(sum(c * m for c, m in zip(coefficients, moments, strict=False)))
    return weights
