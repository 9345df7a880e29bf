"""How a stage is sampled, as JSON data, so that a picture can carry the options it was made with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import sfumato.diffusion.samplers
import sfumato.diffusion.spacings  # noqa: F401 (fills SPACINGS)
from sfumato.core.registry import unknown
from sfumato.diffusion.constraints import ThresholdConfig
from sfumato.diffusion.grid import SPACINGS, Grid
from sfumato.diffusion.guidance import CFG, GuidanceConfig
from sfumato.diffusion.sampling import SAMPLERS, Step
from sfumato.diffusion.schedules import Discrete, NoiseSchedule
from sfumato.systems.start import FromNoise, Start

if TYPE_CHECKING:
    from sfumato.diffusion.guidance import Guidance
else:
    Guidance = GuidanceConfig  # what JSON can say; in Python any guidance will do

__all__ = ["Knob", "SampleOptions"]

Knob = bool | int | float | str | None


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Everything about one walk but its inputs and its seeds.

    Attributes:
        sampler, knobs: a name in SAMPLERS and its keyword arguments (eta, variance, ...).
        steps: network evaluations, or half of them for second-order samplers.
        spacing, spacing_knobs: a name in SPACINGS and its keyword arguments (offset, rho, ...).
        window: the part of the walk, as fractions of its steps.
        guidance: how strongly cond is preferred to null.
        threshold: bound on x0.
        start: where the walk begins.
        candidates: embeddings that a prior draws for each picture; the one nearest to its text stays.
        tile: side in pixels of the overlapping tiles in which the result is decoded; None = all at once.

    Raises: ValueError in one line naming the value, what is allowed and the fix.
    """

    sampler: str = "ddim"
    knobs: Mapping[str, Knob] = field(default_factory=dict)
    steps: int = 50
    spacing: str = "trailing"
    spacing_knobs: Mapping[str, Knob] = field(default_factory=dict)
    window: tuple[float, float] = (0.0, 1.0)
    guidance: Guidance = CFG()
    threshold: ThresholdConfig = None
    start: Start = FromNoise()
    candidates: int = 1
    tile: int | None = None

    def __post_init__(self) -> None:
        _check_knobs("sampler", self.sampler, SAMPLERS[self.sampler], self.knobs, skip=3)
        _check_knobs("spacing", self.spacing, SPACINGS[self.spacing], self.spacing_knobs, skip=2)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps is {self.steps!r}; allowed: a whole number of at least 1; try 20")
        if self.candidates < 1:
            raise ValueError(f"candidates is {self.candidates}; allowed: at least 1")
        low, high = self.window
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"window is ({low:g}, {high:g}); allowed: 0 <= start < stop <= 1; the whole walk is 0 1"
            )

    def step(self) -> Step:
        """The sampler's step function with its knobs bound."""
        return partial(SAMPLERS[self.sampler], **self.knobs) if self.knobs else SAMPLERS[self.sampler]

    def grid(self, schedule: NoiseSchedule, strength: float = 1.0) -> Grid:
        """The levels to walk.

        Args:
            strength: the part of the walk, at its clean end, within which all the steps are; fewer of them
                where a table of levels would have to be walked in more than half its length.

        Raises: ValueError if the spacing does not fit the schedule, or for a strength outside (0, 1].
        """
        if not 0 < strength <= 1:
            raise ValueError(
                f"strength {strength:g} is outside (0, 1]; 1 = repaint all, 0.5 = half of the walk"
            )
        whole = asked = round(self.steps / strength)
        if isinstance(schedule, Discrete):
            whole = max(min(whole, schedule.steps // 2), self.steps)
        grid = SPACINGS[self.spacing](schedule, whole, **self.spacing_knobs)
        grid = grid if self.window == (0.0, 1.0) else grid.window(*self.window)
        part = self.steps / whole if whole == asked else strength
        return grid.window(1 - part, 1) if part < 1 else grid


def _check_knobs(kind: str, name: str, function: object, knobs: Mapping[str, Knob], skip: int) -> None:
    assert callable(function)
    allowed = list(inspect.signature(function).parameters)[skip:]
    for knob in knobs:
        if knob not in allowed:
            raise ValueError(unknown(f"knob of {kind} {name!r}", knob, allowed or ["none"]))
