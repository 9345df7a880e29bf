"""Grid: the levels that a sampler walks; parts of a walk, its reverse, RePaint jumps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.core.registry import Registry
from sfumato.core.types import Level
from sfumato.diffusion.schedules import NoiseSchedule

__all__ = ["SPACINGS", "Grid", "Point", "Spacing", "repaint"]

Spacing = Callable[..., "Grid"]
SPACINGS: Registry[Spacing] = Registry("spacing")
"""Name -> (schedule, steps, **knobs) -> Grid."""


class Point(NamedTuple):
    """A level as two plain floats, for sampler arithmetic: no tensor op, no copy to a device."""

    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha, the noise level in variance-exploding coordinates; inf where alpha = 0."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf

    @property
    def log_snr(self) -> float:
        """ln(alpha / sigma); -inf where alpha = 0, inf where sigma = 0."""
        if self.alpha <= 0:
            return -math.inf
        return math.log(self.alpha / self.sigma) if self.sigma > 0 else math.inf

    @property
    def tau(self) -> float:
        """sigma / (alpha + sigma) in [0, 1]: the time of the straight path that passes through this level."""
        return self.sigma / (self.alpha + self.sigma)

    @staticmethod
    def of(level: Level) -> Point:
        """The point of a level of shape ()."""
        return Point(float(level.alpha), float(level.sigma))


@dataclass(frozen=True, eq=False)
class Grid:
    """n steps over n + 1 levels, normally noisy -> clean; the last level is where the walk ends.

    Attributes:
        schedule: what the levels were taken from; gives the levels between them.
        t: (n + 1,) what the network embeds at each level; NaN for a last level that is not on the schedule.
        alpha, sigma: (n + 1,) float64 on the CPU; the last level is (1, 0) unless said otherwise.
        jumps: steps that diffuse forward instead of denoising (RePaint).
    """

    schedule: NoiseSchedule
    t: Tensor
    alpha: Tensor
    sigma: Tensor
    jumps: frozenset[int] = frozenset()

    def __len__(self) -> int:
        return len(self.t) - 1

    def level(self, i: int) -> Level:
        """Level i in 0..n, each of shape ()."""
        return self._levels[i]

    @cached_property
    def _levels(self) -> tuple[Level, ...]:
        return _unbind(Level(self.t, self.alpha, self.sigma))

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """alpha and sigma of the n + 1 levels as floats."""
        return tuple(Point(a, s) for a, s in zip(self.alpha.tolist(), self.sigma.tolist(), strict=True))

    @cached_property
    def middles(self) -> tuple[Level, ...]:
        """The schedule's level in the middle of each step, n of shape (), in the coordinate that suits it.

        By sigma / (alpha + sigma) on schedules that begin at pure noise, else as in `log_middles`.
        """
        if not self.from_pure_noise:
            return self.log_middles
        tau = self.sigma / (self.alpha + self.sigma)
        tau = (tau[:-1] + tau[1:]) / 2
        return _unbind(self.schedule(self.schedule.time_of(tau / (1 - tau))))

    @cached_property
    def log_middles(self) -> tuple[Level, ...]:
        """The schedule's level in the middle of each step by log-SNR; no meaning next to an infinite one."""
        ratio = self.sigma / self.alpha
        middle = (ratio[:-1] * ratio[1:]).sqrt()
        middle = torch.where(middle.isfinite() & (middle > 0), middle, torch.ones_like(middle))
        return _unbind(self.schedule(self.schedule.time_of(middle)))

    @cached_property
    def from_pure_noise(self) -> bool:
        """Whether the schedule begins at pure noise, for practical purposes: alpha < 1e-3.

        True of flow, zero terminal SNR and cosine; there sigma / alpha is infinite or falls by orders of
        magnitude within the first step. A property of the schedule, not of this grid: a part of a walk
        is solved like the whole.
        """
        return float(self.schedule(torch.tensor(self.schedule.span[1], dtype=torch.float64)).alpha) < 1e-3

    def level_at(self, ratio: float) -> Level:
        """The schedule's level, of shape (), with this sigma / alpha.

        A discrete schedule clamps it to its table; take alpha and sigma from the level, not from `ratio`.
        """
        return self.schedule(self.schedule.time_of(torch.tensor(ratio, dtype=torch.float64)))

    @staticmethod
    def of(schedule: NoiseSchedule, t: Tensor, end: tuple[float, float] | Level = (1.0, 0.0)) -> Grid:
        """The levels of `schedule` at its times t (n,), followed by the terminal level `end`.

        Raises: ValueError if the levels are not strictly ordered from noisy to clean.
        """
        if not isinstance(end, Level):
            end = _off_schedule(*end)
        levels = schedule(t)
        t, alpha, sigma = (torch.cat([v, e.reshape(1)]) for v, e in zip(levels, end, strict=True))
        grid = Grid(schedule, t, alpha, sigma)
        ratios = [p.ratio for p in grid.points]
        for i, (now, after) in enumerate(pairwise(ratios)):
            if not after < now:
                raise ValueError(
                    f"levels {i} and {i + 1} of the grid have sigma/alpha {now:g} and {after:g}: it must fall"
                )
        return grid

    def window(self, start: float, stop: float) -> Grid:
        """The part between two fractions of the steps: img2img of strength s is window(1 - s, 1).

        A fraction that falls inside a step is moved to the step's end, so window(0, f) and window(f, 1)
        always join; 50 steps at strength 0.75 leave 37.

        Raises: ValueError if the fractions are not 0 <= start < stop <= 1, or no step lies between them.
        """
        if not 0 <= start < stop <= 1:
            raise ValueError(f"window ({start:g}, {stop:g}): need 0 <= start < stop <= 1")
        # The slack keeps 0.8 * 50 at 40 where 1 - 0.2 is not exactly 0.8.
        first, last = (math.ceil(f * len(self) - 1e-6) for f in (start, stop))
        if first >= last:
            raise ValueError(
                f"window ({start:g}, {stop:g}) holds none of {len(self)} steps; widen it or take more steps"
            )
        part = slice(first, last + 1)
        jumps = frozenset(j - first for j in self.jumps if first <= j < last)
        return Grid(self.schedule, self.t[part], self.alpha[part], self.sigma[part], jumps)

    def reversed(self, end: tuple[float, float] | None = (0.0, 1.0)) -> Grid:
        """The same levels clean -> noisy, for inversion, from the cleanest level that has any noise.

        Args:
            end: terminal level beyond the noisiest one, by default pure noise as in guided-diffusion's
                ddim_reverse_sample; None ends at the noisiest level itself, from where this grid leads back.

        Raises: ValueError for a grid with jumps or of a single noisy level that has nowhere to go.
        """
        if self.jumps:
            raise ValueError(
                "a grid with RePaint jumps cannot be reversed; reverse the grid it was made from"
            )
        noisy = len(self.t) if self.points[-1].sigma > 0 else len(self)
        levels = Level(*(v[:noisy].flip(0) for v in (self.t, self.alpha, self.sigma)))
        if end is not None and Point(*end).ratio > self.points[0].ratio:
            beyond = _off_schedule(*end)
            levels = Level(*(torch.cat([v, e.reshape(1)]) for v, e in zip(levels, beyond, strict=True)))
        if len(levels.t) < 2:
            raise ValueError("cannot reverse a grid of one noisy level; take more steps")
        return Grid(self.schedule, *levels)


def repaint(grid: Grid, jump_length: int = 10, resamples: int = 10) -> Grid:
    """Go back `jump_length` levels, `resamples` - 1 times, at every jump_length-th level from the clean end.

    One jump is one step of forward diffusion, which has the distribution of jump_length single ones.
    Lugmayr et al. 2022 (arXiv:2201.09865), section 4.2 and appendix; its defaults are 10 and 10 at 250 steps.

    Raises: ValueError for a jump_length or resamples below 1, or a grid that has jumps already.
    """
    if jump_length < 1 or resamples < 1 or grid.jumps:
        raise ValueError(
            f"repaint({jump_length=}, {resamples=}): both must be at least 1, on a grid without jumps"
        )
    n = len(grid)
    left = {n - 1 - k: resamples - 1 for k in range(0, n - jump_length, jump_length)}
    walk, jumps, i = [0], set(), 0
    while i < n:
        if left.get(i, 0) > 0:
            left[i] -= 1
            jumps.add(len(walk) - 1)
            i -= jump_length
        else:
            i += 1
        walk.append(i)
    order = torch.tensor(walk)
    return replace(
        grid, t=grid.t[order], alpha=grid.alpha[order], sigma=grid.sigma[order], jumps=frozenset(jumps)
    )


def _unbind(levels: Level) -> tuple[Level, ...]:
    return tuple(Level(*row) for row in zip(*(v.unbind() for v in levels), strict=True))


def _off_schedule(alpha: float, sigma: float) -> Level:
    return Level(*(torch.tensor(v, dtype=torch.float64) for v in (math.nan, alpha, sigma)))
