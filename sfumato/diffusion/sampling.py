"""The only sampling loop. A sampler is one step function (run, x, i, **knobs) -> x at level i + 1."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.core.registry import Registry
from sfumato.core.types import Denoised, Level, expand
from sfumato.diffusion.denoiser import DenoiseFn
from sfumato.diffusion.grid import Grid

__all__ = ["SAMPLERS", "Cancelled", "Past", "Run", "Step", "integrate"]

Step = Callable[..., Tensor]
SAMPLERS: Registry[Step] = Registry("sampler")
HISTORY = 6  # evaluations that a multistep solver may look back on; bounds the memory of a walk


class Cancelled(Exception):
    """Raised by an observer to stop a walk."""


class Past(NamedTuple):
    """One evaluation of the denoiser at a grid level."""

    level: Level
    denoised: Denoised


@dataclass
class Run:
    """Everything that one walk needs; `at` evaluates the denoiser at a grid level and records it."""

    denoise: DenoiseFn
    grid: Grid
    noise: Callable[[Tensor], Tensor]
    history: deque[Past] = field(default_factory=lambda: deque(maxlen=HISTORY))

    def at(self, x: Tensor, i: int) -> Denoised:
        """Denoise x at level i of the grid; history[-1] is then this evaluation."""
        level = self.grid.level(i)
        denoised = self.denoise(x, level)
        self.history.append(Past(level, denoised))
        return denoised


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
            else:
                x = step(run, x, i)
            if project is not None:
                x = project(x, i + 1)
            if not torch.isfinite(x).all():
                raise ValueError(f"the sample is not finite after step {i + 1} of {len(run.grid)}")
            if observe is not None:
                observe(i, x, run.history[-1].denoised if run.history else None)
    return x


def _renoise(run: Run, x: Tensor, i: int) -> Tensor:
    """Forward diffusion from level i to the noisier level i + 1: x_t = a x_s + sqrt(sigma_t^2 - a^2 sigma_s^2) z."""
    now, up = run.grid.level(i), run.grid.level(i + 1)
    ratio = up.alpha / now.alpha
    std = (up.sigma**2 - (ratio * now.sigma) ** 2).clamp_min(0).sqrt()
    return expand(ratio, x) * x + expand(std, x) * run.noise(x)
