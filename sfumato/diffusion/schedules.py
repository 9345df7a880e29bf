"""Noise schedules: model time -> (alpha, sigma)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from sfumato.core.types import Level

__all__ = ["NoiseSchedule"]


class NoiseSchedule(Protocol):
    """t -> Level, in float64 on the CPU; and the inverse, for grids that are spaced in sigma / alpha."""

    def __call__(self, t: Tensor) -> Level: ...

    def time_of(self, ratio: Tensor) -> Tensor: ...
