"""What the step functions share: linear combinations, checks, quadrature weights, coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

from torch import Tensor

from sfumato.core.types import Denoised
from sfumato.diffusion.grid import Grid, Point
from sfumato.diffusion.sampling import Past, Run

__all__ = [
    "Frame",
    "check_descends",
    "check_order",
    "combine",
    "exponential_moments",
    "first_order",
    "lagrange_weights",
    "look_back",
    "transfer",
]


def combine(*terms: tuple[float, Tensor]) -> Tensor:
    """Sum of coefficient * tensor; the coefficients stay floats, so nothing is copied to a device."""
    (first, x), *rest = terms
    total = first * x
    for weight, term in rest:
        total.add_(term, alpha=weight)
    return total


def first_order(after: Point, denoised: Denoised) -> Tensor:
    """alpha x0 + sigma eps at the next level: the step of order 1, from alpha = 0 and to sigma = 0 alike."""
    return combine((after.alpha, denoised.x0), (after.sigma, denoised.eps))


def transfer(x: Tensor, now: Point, after: Point, *predictions: tuple[float, Tensor]) -> Tensor:
    """sigma_s / sigma_t x_t + alpha_s times the weighted sum of x0 predictions."""
    return combine((after.sigma / now.sigma, x), *((after.alpha * weight, x0) for weight, x0 in predictions))


def look_back(run: Run, count: int) -> list[Past]:
    """At most `count` evaluations, newest first, without older ones at alpha = 0, where log-SNR is -inf."""
    newest, *older = reversed(run.history)
    return [newest, *(past for past in older[: count - 1] if past.point.alpha > 0)]


def check_descends(grid: Grid, i: int, name: str) -> tuple[Point, Point]:
    """Levels i and i + 1 of a step that adds noise; ValueError if it leads to more noise."""
    now, after = grid.points[i], grid.points[i + 1]
    if after.ratio >= now.ratio:
        raise ValueError(
            f"sampler {name!r} cannot walk from clean to noisy (step {i + 1}); invert with 'ddim', eta=0"
        )
    return now, after


def check_order(name: str, order: int, highest: int) -> None:
    """ValueError unless 1 <= order <= highest."""
    if not 1 <= order <= highest:
        raise ValueError(f"sampler {name!r} got order={order}; allowed: 1 to {highest}")


class Frame:
    """Coordinates (z, s) with z = x / scale in which the probability flow is dz/ds = slope.

    "ratio": z = x / alpha, s = sigma / alpha, slope = eps; those of Karras et al. 2022 and k-diffusion.

    "straight": z = x / (alpha + sigma), s = sigma / (alpha + sigma), slope = eps - x0; those of rectified
    flow, finite from pure noise to none. Used on schedules that begin at pure noise (`Grid.from_pure_noise`),
    where the ratio is unbounded and methods that are accurate in it fall to order 1; elsewhere the ratio is.
    """

    def __init__(self, grid: Grid) -> None:
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


def lagrange_weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """Integrals of the Lagrange polynomials over `nodes`, if the k-th power integrates to moments[k]."""
    weights = []
    for j, own in enumerate(nodes):
        basis = [1.0]  # coefficients of the basis polynomial, lowest power first
        for k, other in enumerate(nodes):
            if k != j:
                width = own - other
                basis.append(0.0)
                for power in range(len(basis) - 1, 0, -1):
                    basis[power] = (basis[power - 1] - other * basis[power]) / width
                basis[0] = -other * basis[0] / width
        weights.append(sum(map(mul, basis, moments)))
    return weights


def exponential_moments(h: float, count: int) -> list[float]:
    """The integrals of h exp(-h (1 - s)) s^k over s in [0, 1], k = 0 .. count - 1; all 1 for h = inf."""
    if (
        abs(h) < 1
    ):  # the recursion below cancels; the series h (1 / (k+1) - h / (k+1)(k+2) + ...) converges fast
        return [_series(h, k) for k in range(count)]
    moments = [-math.expm1(-h)]
    for k in range(1, count):
        moments.append(1 - k / h * moments[-1])
    return moments


def _series(h: float, k: int) -> float:
    """Summed until its terms, which shrink by more than |h| / j, change nothing."""
    term, total, j = h / (k + 1), 0.0, k + 1
    while total + term != total:
        total += term
        j += 1
        term *= -h / j
    return total
