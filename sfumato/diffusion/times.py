"""Time samplers: at which noise levels a batch is trained. A draw depends on each sample's own seed alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor, distributed

from sfumato.core.random import Noise
from sfumato.diffusion.schedules import Discrete, NoiseSchedule

__all__ = ["LogNormal", "LogitNormal", "LossSecondMoment", "TimeSampler", "Times", "TimesConfig", "Uniform"]


class Times(NamedTuple):
    """Times of a batch in the schedule's own unit, and the factor that keeps the loss unbiased."""

    t: Tensor
    """(B,) float64 on the CPU; on a discrete schedule whole indices, except from LogNormal."""
    importance: Tensor
    """(B,) float64; 1 unless the sampler prefers some times without changing what is minimised."""


class TimeSampler(Protocol):
    """Draws one time per seed."""

    def sample(self, schedule: NoiseSchedule, noise: Noise) -> Times:
        """Times for len(noise.seeds) samples."""
        ...

    def observe(self, t: Tensor, loss: Tensor) -> None:
        """Told the times (B,) and the losses (B,) before importance weights; most samplers do not care."""
        ...


class _Stateless:
    def observe(self, t: Tensor, loss: Tensor) -> None:
        """See TimeSampler; nothing is learned."""


@dataclass(frozen=True)
class Uniform(_Stateless):
    """Every index of a discrete schedule, or every time of a continuous one, is equally likely."""

    kind: Literal["uniform"] = "uniform"

    def sample(self, schedule: NoiseSchedule, noise: Noise) -> Times:
        """See TimeSampler."""
        return _unweighted(_time(schedule, noise.uniform(_column(noise))))


@dataclass(frozen=True)
class LogitNormal(_Stateless):
    """Position sigmoid(mean + std z) in the schedule's span, z ~ N(0, 1): the middle times more often.

    Esser et al. 2024 (arXiv:2403.03206), sec. 3.1, for the flow schedule; larger means are noisier.
    """

    mean: float = 0.0
    std: float = 1.0
    kind: Literal["logit_normal"] = "logit_normal"

    def __post_init__(self) -> None:
        _check_std(self.std)

    def sample(self, schedule: NoiseSchedule, noise: Noise) -> Times:
        """See TimeSampler."""
        return _unweighted(_time(schedule, torch.sigmoid(self.mean + self.std * noise(_column(noise)))))


@dataclass(frozen=True)
class LogNormal(_Stateless):
    """ln(sigma / alpha) ~ N(mean, std^2) on any schedule.

    On a discrete one the indices are fractional, and within its table. Karras et al. 2022 (arXiv:2206.00364),
    table 1: P_mean -1.2, P_std 1.2; EDM2 -0.4 and 1.0 on latents.
    """

    mean: float = -1.2
    std: float = 1.2
    kind: Literal["log_normal"] = "log_normal"

    def __post_init__(self) -> None:
        _check_std(self.std)

    def sample(self, schedule: NoiseSchedule, noise: Noise) -> Times:
        """See TimeSampler."""
        return _unweighted(schedule.time_of(torch.exp(self.mean + self.std * noise(_column(noise)))))


@dataclass
class LossSecondMoment:
    """Index t with probability proportional to sqrt(E[loss_t^2]), mixed with the uniform one.

    Losses are reweighted, so that what is minimised stays the same. Until every index has `history` losses,
    all are equally likely. For training on the bound alone, whose terms differ by orders of magnitude: Nichol
    & Dhariwal 2021 (arXiv:2102.09672), sec. 3.3. It has state, which a checkpoint keeps; the times of a
    resumed run therefore continue.

    Attributes:
        steps: those of the discrete schedule.
        history: losses kept per index.
        uniform: share of the uniform distribution.
    """

    steps: int = 1000
    history: int = 10
    uniform: float = 0.001
    kind: Literal["loss_second_moment"] = "loss_second_moment"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.history < 1 or not 0 <= self.uniform <= 1:
            raise ValueError(
                f"steps {self.steps}, history {self.history}, uniform {self.uniform}: "
                "need at least 1, at least 1, and a share in [0, 1]"
            )
        self._losses = torch.zeros(self.steps, self.history, dtype=torch.float64)
        self._counts = torch.zeros(self.steps, dtype=torch.int64)

    def weights(self) -> Tensor:
        """Unnormalised probabilities before warm-up (ones), probabilities after it; (steps,) float64."""
        if bool((self._counts < self.history).any()):
            return torch.ones(self.steps, dtype=torch.float64)
        weights = self._losses.square().mean(dim=1).sqrt()
        return weights / weights.sum() * (1 - self.uniform) + self.uniform / self.steps

    def sample(self, schedule: NoiseSchedule, noise: Noise) -> Times:
        """See TimeSampler; ValueError unless the schedule is discrete and has `steps` steps."""
        if not isinstance(schedule, Discrete) or schedule.steps != self.steps:
            raise ValueError(
                f"loss_second_moment with steps={self.steps} needs a discrete schedule of as many steps"
            )
        p = self.weights() / self.weights().sum()
        edges = p.cumsum(0)
        u = noise.uniform(_column(noise)) * edges[-1]
        index = torch.searchsorted(edges, u, right=True).clamp_max(self.steps - 1)
        return Times(index.double(), 1 / (self.steps * p[index]))

    def observe(self, t: Tensor, loss: Tensor) -> None:
        """Remember the losses of all ranks, which therefore agree on the weights."""
        for index, value in _gathered(t, loss).tolist():
            row, count = self._losses[int(index)], int(self._counts[int(index)])
            if count == self.history:
                row[:-1] = row[1:].clone()
            row[min(count, self.history - 1)] = value
            self._counts[int(index)] = min(count + 1, self.history)

    def state_dict(self) -> dict[str, Tensor]:
        """losses (steps, history) and counts (steps,)."""
        return {"losses": self._losses.clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises: ValueError if the state is of another number of steps or another history."""
        if state["losses"].shape != self._losses.shape:
            expected, got = tuple(self._losses.shape), tuple(state["losses"].shape)
            raise ValueError(f"loss history of shape {got} does not fit steps and history {expected}")
        self._losses, self._counts = state["losses"].clone(), state["counts"].clone()


TimesConfig = Annotated[Uniform | LogitNormal | LogNormal | LossSecondMoment, Field(discriminator="kind")]


def _column(noise: Noise) -> Tensor:
    return torch.empty(len(noise.seeds), dtype=torch.float64)


def _time(schedule: NoiseSchedule, fraction: Tensor) -> Tensor:
    """The time at a fraction in [0, 1] of the span; each index of a discrete schedule has an equal part."""
    if isinstance(schedule, Discrete):
        return (fraction * schedule.steps).floor().clamp_max(schedule.steps - 1)
    low, high = schedule.span
    return low + (high - low) * fraction


def _unweighted(t: Tensor) -> Times:
    return Times(t, torch.ones_like(t))


def _check_std(std: float) -> None:
    if not std > 0:
        raise ValueError(f"std {std} of the time distribution must be positive")


def _gathered(t: Tensor, loss: Tensor) -> Tensor:
    """(t, loss) of every rank in rank order, (N, 2) on the CPU; ranks may hold different numbers of them.

    They pass as objects, for which torch chooses a device that the backend serves: the CPU if it can.
    """
    rows = torch.stack([t.detach().cpu().double(), loss.detach().cpu().double()], dim=1)
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    parts: list[Tensor] = [rows] * distributed.get_world_size()
    distributed.all_gather_object(parts, rows)
    return torch.cat(parts)
