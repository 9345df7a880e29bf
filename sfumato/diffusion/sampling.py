"""The only sampling loop. A sampler is one step function (run, x, i, **knobs) -> x at level i + 1."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.core.registry import Registry
from sfumato.core.types import Denoised, Level
from sfumato.diffusion.denoiser import DenoiseFn
from sfumato.diffusion.grid import Grid, Point

__all__ = ["SAMPLERS", "Cancelled", "Correction", "NotFinite", "Past", "Run", "Step", "fold", "integrate"]

Step = Callable[..., Tensor]
SAMPLERS: Registry[Step] = Registry("sampler")
"""Name -> (run, x, i, **knobs) -> x at level i + 1; the knobs are keyword-only and have defaults."""
HISTORY = 6  # evaluations that a multistep solver may look back on; bounds the memory of a walk


class Cancelled(Exception):
    """Raised by an observer to stop a walk."""


class NotFinite(ValueError):
    """The sample of a walk has a number that is not finite."""


class Past(NamedTuple):
    """One evaluation of the denoiser and the level it was made at."""

    point: Point
    denoised: Denoised


class Correction(NamedTuple):
    """What a predictor-corrector solver needs of its previous step: where it began and what it predicted."""

    start: Tensor
    predicted: Tensor
    order: int


@dataclass
class Run:
    """Everything that one walk needs.

    Attributes:
        denoise: x_t and a level -> x0 and eps.
        grid: the levels of the walk.
        noise: tensor -> N(0, I) of its shape, dtype and device.
        history: the latest evaluations at the start of a step, oldest first; a RePaint jump clears it.
        correction: the previous step of a predictor-corrector solver; a RePaint jump clears it.
    """

    denoise: DenoiseFn
    grid: Grid
    noise: Callable[[Tensor], Tensor]
    history: deque[Past] = field(default_factory=lambda: deque(maxlen=HISTORY))
    correction: Correction | None = None

    def at(self, x: Tensor, i: int) -> Denoised:
        """Denoise x at level i and record it: for ancestral samplers, which use `grad` themselves."""
        denoised = self.denoise(x, self.grid.level(i))
        self.history.append(Past(self.grid.points[i], denoised))
        return denoised

    def folded(self, x: Tensor, i: int) -> Denoised:
        """Denoise x at level i, fold `grad` into the result and record that: for ODE solvers."""
        denoised = fold(self.denoise(x, self.grid.level(i)), self.grid.points[i])
        self.history.append(Past(self.grid.points[i], denoised))
        return denoised

    def between(self, x: Tensor, level: Level) -> Denoised:
        """Denoise x at any level of shape (), `grad` folded in, without recording it: for second stages."""
        return fold(self.denoise(x, level), Point.of(level))


def fold(denoised: Denoised, point: Point) -> Denoised:
    """Move the external score into eps, eps - sigma grad, and x0 with it.

    Dhariwal & Nichol 2021 (arXiv:2105.05233), algorithm 2. At alpha = 0 x_t says nothing of y: the score is
    zero there.
    """
    if denoised.grad is None:
        return denoised
    if point.alpha <= 0:
        return Denoised(denoised.x0, denoised.eps, denoised.var)
    x0 = torch.add(denoised.x0, denoised.grad, alpha=point.sigma**2 / point.alpha)
    return Denoised(x0, torch.add(denoised.eps, denoised.grad, alpha=-point.sigma), denoised.var)


def integrate(
    step: Step,
    run: Run,
    x: Tensor,
    *,
    project: Callable[[Tensor, int], Tensor] | None = None,
    observe: Callable[[int, Tensor, Denoised | None], None] | None = None,
) -> Tensor:
    """Walk the grid from level 0 to its terminal level.

    Args:
        step: one of SAMPLERS with its knobs bound.
        x: sample at level 0, (B, C, ...).
        project: applied to the sample at level i + 1 after each step (inpainting).
        observe: called after each step with (i, x, latest Denoised); may raise Cancelled.

    Returns: the sample at the terminal level.
    Raises: ValueError naming the step as soon as the sample is no longer finite.
    """
    with torch.no_grad():
        for i in range(len(run.grid)):
            if i in run.grid.jumps:
                x = _renoise(run, x, i)
                run.history.clear()
                run.correction = None
            else:
                x = step(run, x, i)
            if project is not None:
                x = project(x, i + 1)
            if not _finite(x):
                raise NotFinite(f"the sample is not finite after step {i + 1} of {len(run.grid)}")
            if observe is not None:
                observe(i, x, run.history[-1].denoised if run.history else None)
    return x


def _finite(x: Tensor) -> bool:
    """Whether every value is finite. A finite sum says so in one operation; one that overflows does not."""
    return math.isfinite(x.sum()) or bool(torch.isfinite(x).all())


def _renoise(run: Run, x: Tensor, i: int) -> Tensor:
    """Diffuse from level i to the noisier level i + 1: x_t = a x_s + sqrt(sigma_t^2 - a^2 sigma_s^2) z."""
    now, up = run.grid.points[i], run.grid.points[i + 1]
    ratio = up.alpha / now.alpha
    variance = up.sigma**2 - (ratio * now.sigma) ** 2
    return torch.add(ratio * x, run.noise(x), alpha=max(variance, 0.0) ** 0.5)
