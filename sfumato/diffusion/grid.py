"""Grid: the levels that a sampler walks, and the spacings that choose them from a schedule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.core.registry import Registry
from sfumato.core.types import Level
from sfumato.diffusion.schedules import NoiseSchedule

__all__ = ["SPACINGS", "Grid", "Spacing"]

Spacing = Callable[..., "Grid"]
SPACINGS: Registry[Spacing] = Registry("spacing")


@dataclass(frozen=True)
class Grid:
    """n steps over n + 1 levels, normally noisy -> clean; the last level is where the walk ends.

    Attributes:
        t: (n,) model time of each step's start.
        alpha, sigma: (n + 1,) float64; entry n is (1, 0) unless said otherwise.
        jumps: steps that diffuse forward instead of denoising (RePaint).
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    jumps: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.t)

    def level(self, i: int) -> Level:
        """Level i in 0..n; the terminal level's t is NaN, for no network is evaluated there."""
        t = self.t[i] if i < len(self.t) else torch.full((), torch.nan, dtype=self.t.dtype)
        return Level(t, self.alpha[i], self.sigma[i])

    @staticmethod
    def of(schedule: NoiseSchedule, t: Tensor, end: tuple[float, float] = (1.0, 0.0)) -> Grid:
        """The levels of `schedule` at times t (n,), followed by the terminal level `end` = (alpha, sigma)."""
        level = schedule(t)
        alpha = torch.cat([level.alpha.double(), torch.tensor([end[0]], dtype=torch.float64)])
        sigma = torch.cat([level.sigma.double(), torch.tensor([end[1]], dtype=torch.float64)])
        return Grid(t, alpha, sigma)
