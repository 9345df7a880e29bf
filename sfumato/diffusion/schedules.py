"""Noise schedules: a time t -> (alpha, sigma), and back; frozen dataclasses that serialise to JSON.

A schedule has a time of its own (an index, ln(sigma)/4, u in [0, 1]); `Level.t` is what the network embeds,
which is that time unless the schedule says otherwise (`rescale_timesteps`, `multiplier`, `shift`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Annotated, Literal, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor

from sfumato.core.registry import Registry
from sfumato.core.types import Level
from sfumato.diffusion.betas import FORMULAS, zero_terminal_snr

__all__ = ["SCHEDULES", "VE", "Cosine", "Discrete", "Flow", "NoiseSchedule", "ScheduleConfig", "Table"]


class NoiseSchedule(Protocol):
    """Time -> Level and back; everything float64 on the CPU, whatever the device of the arguments."""

    @property
    def span(self) -> tuple[float, float]:
        """The cleanest and the noisiest time."""
        ...

    def __call__(self, t: Tensor) -> Level:
        """The level at time t, () or (B,)."""
        ...

    def time_of(self, ratio: Tensor) -> Tensor:
        """The time at which sigma / alpha equals `ratio` in [0, inf]; the inverse of `__call__`."""
        ...


class Table(NamedTuple):
    """Levels of a discrete schedule by index, each (steps,) float64."""

    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor
    """ln(alpha / sigma), descending; -inf where alpha = 0."""


@dataclass(frozen=True, kw_only=True)
class Discrete:
    """A variance-preserving table of `steps` levels; t is the index, 0 the cleanest.

    Between two entries the log-SNR is linear in t (k-diffusion's rule). If the last entry has alpha = 0,
    where log-SNR is infinite, alpha / sigma is linear in the last interval instead.

    Attributes:
        formula: how the betas arise, one of `betas.FORMULAS`, or "betas" / "alphas_cumprod" for the table in
            `values`.
        start, end: first and last beta of the formulas that have them; None = the formula's own.
        values: the table, for "betas" and "alphas_cumprod" only.
        zero_snr: shift and scale sqrt(alphas_cumprod) so that the last entry is 0 (Lin et al. 2023,
            arXiv:2305.08891).
        rescale_timesteps: the network embeds t * 1000 / steps (improved-diffusion, IF).

    Raises: ValueError if the formula is unknown or the table is not strictly decreasing.
    """

    kind: Literal["discrete"] = "discrete"
    formula: str = "linear"
    steps: int = 1000
    start: float | None = None
    end: float | None = None
    values: tuple[float, ...] = ()
    zero_snr: bool = False
    rescale_timesteps: bool = False

    def __post_init__(self) -> None:
        if self.formula in ("betas", "alphas_cumprod"):
            if len(self.values) != self.steps or not self.values:
                raise ValueError(
                    f"a table of {len(self.values)} {self.formula} with steps={self.steps}: they must agree"
                )
        elif self.values:
            raise ValueError(
                f"formula {self.formula!r} takes no values; use formula='betas' or 'alphas_cumprod'"
            )
        else:
            FORMULAS[self.formula]
        if self.steps < 1:
            raise ValueError(f"steps={self.steps}: a schedule needs at least 1")
        _check_table(self.alpha_bar)

    @cached_property
    def alpha_bar(self) -> Tensor:
        """alphas_cumprod = alpha^2, (steps,) float64."""
        if self.formula == "alphas_cumprod":
            table = torch.tensor(self.values, dtype=torch.float64)
        elif self.formula == "betas":
            table = torch.cumprod(1 - torch.tensor(self.values, dtype=torch.float64), 0)
        else:
            table = torch.cumprod(1 - FORMULAS[self.formula](self.steps, self.start, self.end), 0)
        return zero_terminal_snr(table) if self.zero_snr else table

    @cached_property
    def table(self) -> Table:
        """alpha, sigma and log-SNR by index."""
        bar = self.alpha_bar
        return Table(bar.sqrt(), (1 - bar).sqrt(), 0.5 * (bar.log() - torch.log1p(-bar)))

    @cached_property
    def reaches_noise(self) -> bool:
        """Whether the last entry has alpha = 0."""
        return float(self.alpha_bar[-1]) == 0

    @property
    def span(self) -> tuple[float, float]:
        """Index 0 and index steps - 1."""
        return 0.0, float(self.steps - 1)

    def __call__(self, t: Tensor) -> Level:
        """The level at index t, integral or not; ValueError outside [0, steps - 1]."""
        t = _time_within(t, self.steps - 1)
        low, table = t.long(), self.table
        weight = t - low
        if not bool(weight.any()):
            alpha, sigma = table.alpha[low], table.sigma[low]
        else:
            before, after = table.log_snr[low], table.log_snr[(low + 1).clamp_max(self.steps - 1)]
            log_snr = torch.lerp(before, after, weight)
            if self.reaches_noise:
                log_snr = torch.where(after.isinf(), before + torch.log1p(-weight), log_snr)
            alpha, sigma = torch.sigmoid(2 * log_snr).sqrt(), torch.sigmoid(-2 * log_snr).sqrt()
        return Level(t * 1000 / self.steps if self.rescale_timesteps else t, alpha, sigma)

    def time_of(self, ratio: Tensor) -> Tensor:
        """The (fractional) index of sigma / alpha; ratios outside the table give its nearest end."""
        log_ratio, rising = _double(ratio).log(), -self.table.log_snr
        if self.steps == 1:
            return torch.zeros_like(log_ratio)
        low = (torch.searchsorted(rising, log_ratio.contiguous(), right=True) - 1).clamp(0, self.steps - 2)
        before, after = rising[low], rising[low + 1]
        linear = (log_ratio - before) / (after - before)
        return low + torch.where(after.isinf(), -torch.expm1(before - log_ratio), linear).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Continuous cosine schedule, alpha^2 + sigma^2 = 1.

    sigma / alpha = tan(pi/2 (u + offset) / (1 + offset)).

    Attributes:
        offset: 0.008 is what Imagen uses, so that sigma does not vanish at u = 0.
        end: the noisiest time of the grids, at most 1. alpha(1) = 0, where eps says nothing of x0: nets that
            predict eps need an end below 1.
        multiplier: the network embeds multiplier * u.

    Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17; continuous time: Saharia et al. 2022
    (arXiv:2205.11487).
    """

    kind: Literal["continuous_cosine"] = "continuous_cosine"
    offset: float = 0.0
    end: float = 1.0
    multiplier: float = 1.0

    def __post_init__(self) -> None:
        _check_end(self.end)
        if self.offset < 0:
            raise ValueError(f"offset={self.offset}: it must not be negative")

    @property
    def span(self) -> tuple[float, float]:
        """0 and `end`."""
        return 0.0, self.end

    def __call__(self, t: Tensor) -> Level:
        """The level at time u; ValueError outside [0, 1]."""
        u = _time_within(t, 1)
        # Sines of both angles: exact zeros at both ends, which cos(pi / 2) is not.
        alpha = torch.sin(math.pi / 2 * (1 - u) / (1 + self.offset))
        sigma = torch.sin(math.pi / 2 * (u + self.offset) / (1 + self.offset))
        return Level(u * self.multiplier, alpha, sigma)

    def time_of(self, ratio: Tensor) -> Tensor:
        """u in [0, 1]; smaller ratios than the one at u = 0 give 0."""
        return (torch.atan(_double(ratio)) * (2 / math.pi) * (1 + self.offset) - self.offset).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class VE:
    """Variance-exploding schedule: alpha = 1, t = ln(sigma) / 4, which is what EDM networks embed.

    sigma_min and sigma_max bound the grids, not the times that may be asked for: training draws sigma outside
        them.
    Karras et al. 2022 (arXiv:2206.00364), table 1.
    """

    kind: Literal["ve"] = "ve"
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sigma_min={self.sigma_min}, sigma_max={self.sigma_max}: need 0 < min < max < inf"
            )

    @property
    def span(self) -> tuple[float, float]:
        """ln(sigma) / 4 of sigma_min and sigma_max."""
        return math.log(self.sigma_min) / 4, math.log(self.sigma_max) / 4

    def __call__(self, t: Tensor) -> Level:
        """The level at t = ln(sigma) / 4."""
        t = _double(t)
        return Level(t, torch.ones_like(t), torch.exp(4 * t))

    def time_of(self, ratio: Tensor) -> Tensor:
        """ln(ratio) / 4."""
        return _double(ratio).log() / 4


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Straight path of rectified flow: alpha = 1 - t', sigma = t'.

    t' = shift t / (1 + (shift - 1) t) for t in [0, 1].

    Attributes:
        shift: above 1 moves the levels towards noise, for large pictures (Esser et al. 2024,
            arXiv:2403.03206, eq. 23).
        end: the noisiest time of the grids, at most 1; nets that predict eps need an end below 1.
        multiplier: the network embeds multiplier * t' (1000 for SD3 and FLUX).
        towards_data: the network embeds multiplier * (1 - t') (SiT, with multiplier 1).

    Liu et al. 2022 (arXiv:2209.03003).
    """

    kind: Literal["flow"] = "flow"
    shift: float = 1.0
    end: float = 1.0
    multiplier: float = 1.0
    towards_data: bool = False

    def __post_init__(self) -> None:
        _check_end(self.end)
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift={self.shift}: it must be positive; 1 = none")

    @property
    def span(self) -> tuple[float, float]:
        """0 and `end`."""
        return 0.0, self.end

    def __call__(self, t: Tensor) -> Level:
        """The level at time t before the shift; ValueError outside [0, 1]."""
        t = _time_within(t, 1)
        below = 1 + (self.shift - 1) * t
        sigma = self.shift * t / below
        alpha = (1 - t) / below
        return Level((alpha if self.towards_data else sigma) * self.multiplier, alpha, sigma)

    def time_of(self, ratio: Tensor) -> Tensor:
        """t in [0, 1] before the shift: sigma / alpha = shift t / (1 - t)."""
        return 1 / (1 + self.shift / _double(ratio))


ScheduleConfig = Annotated[Discrete | Cosine | VE | Flow, Field(discriminator="kind")]


def _from_values(
    formula: str, values: Tensor | tuple[float, ...], *, rescale_timesteps: bool = False
) -> Discrete:
    table = tuple(torch.as_tensor(values, dtype=torch.float64).tolist())
    return Discrete(formula=formula, steps=len(table), values=table, rescale_timesteps=rescale_timesteps)


SCHEDULES: Registry[partial[Discrete] | type[Cosine | VE | Flow]] = Registry("schedule")
"""Name -> constructor: the formulas (steps=, start=, end=, zero_snr=), "betas" and "alphas_cumprod" (a
table), and the continuous schedules."""
for _name in FORMULAS:
    SCHEDULES(_name)(partial(Discrete, formula=_name))
for _name in ("betas", "alphas_cumprod"):
    SCHEDULES(_name)(partial(_from_values, _name))
SCHEDULES("continuous_cosine")(Cosine)
SCHEDULES("ve")(VE)
SCHEDULES("flow")(Flow)


def _double(v: Tensor) -> Tensor:
    return v.detach().to("cpu", torch.float64)


def _time_within(t: Tensor, last: int) -> Tensor:
    t = _double(t)
    inside = (t >= 0) & (t <= last)
    if not bool(inside.all()):
        raise ValueError(f"time {float(t[~inside][0]):g} is outside this schedule; allowed: 0 to {last}")
    return t


def _check_end(end: float) -> None:
    if not 0 < end <= 1:
        raise ValueError(f"end={end}: it must be in (0, 1]; 1 = pure noise")


def _check_table(bar: Tensor) -> None:
    falling = bool((bar[1:] < bar[:-1]).all())
    if not (
        falling and 0 < float(bar[0]) < 1 and float(bar[-1]) >= 0 and (len(bar) > 1 or float(bar[-1]) > 0)
    ):
        raise ValueError(
            "alphas_cumprod must fall strictly from below 1 to at least 0 (every beta in (0, 1])"
        )
