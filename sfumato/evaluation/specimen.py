"""A stage with pictures to examine it by: their latents, what is told of them, and its answers to noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, Inputs, Level, expand
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.parameterization import PARAMETERIZATIONS, target
from sfumato.diffusion.schedules import Discrete
from sfumato.systems.stage import Stage

__all__ = ["Noisy", "Specimen", "answer_errors", "level_at", "misfits"]


class Noisy(NamedTuple):
    """Some latents at a level: x_t = alpha x0 + sigma eps, each (B, C, h, w)."""

    x_t: Tensor
    x0: Tensor
    eps: Tensor
    level: Level


@dataclass(frozen=True)
class Specimen:
    """A stage and N pictures.

    Attributes:
        images: (N, 3, H, W) in [-1, 1], on the stage's device.
        clean: (N, C, h, w) what the codec makes of them.
        text: captions; None if the stage is told none.
        label: (N,) classes; None likewise.
        batch: that go through a network at a time.
    """

    stage: Stage
    images: Tensor
    clean: Tensor
    text: tuple[str, ...] | None
    label: Tensor | None
    batch: int

    def __len__(self) -> int:
        return len(self.images)

    @property
    def spread(self) -> float:
        """Root mean square of the latents about their mean."""
        return float(self.clean.double().std(correction=0))

    def rows(self) -> list[slice]:
        """The batches, as rows."""
        return [slice(i, min(i + self.batch, len(self))) for i in range(0, len(self), self.batch)]

    def told(self, rows: slice) -> Conditioning:
        """What the network is told of these pictures."""
        return self._conditioning(rows)[0]

    def null(self, rows: slice) -> Conditioning:
        """What it is told instead without guidance."""
        return self._conditioning(rows)[1]

    def noisy(self, rows: slice, level: Level, draw: int = 0) -> Noisy:
        """These latents at a level; a picture's noise depends on its row and `draw` alone."""
        x0 = self.clean[rows]
        eps = Noise(range(rows.start, rows.stop)).fork(f"examination/{draw}")(x0)
        return Noisy(expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * eps, x0, eps, level)

    def otherwise(self, *, text: Sequence[str] | None = None, label: Tensor | None = None) -> Specimen:
        """The same pictures, of which something else is told."""
        return replace(
            self,
            text=self.text if text is None else tuple(text),
            label=label if label is not None else self.label,
        )

    def _conditioning(self, rows: slice) -> tuple[Conditioning, Conditioning]:
        label = None if self.label is None else self.label[rows]
        text = None if self.text is None else self.text[rows]
        inputs = Inputs(n=rows.stop - rows.start, text=text, label=label)
        cond = self.stage.conditioner(inputs, Noise(range(rows.start, rows.stop)))
        null = self.stage.conditioner.null(inputs, cond)
        return cond.to(self.stage.device), null.to(self.stage.device)


def level_at(denoiser: Denoiser, ratio: float) -> Level:
    """The level of the schedule that is nearest to sigma / alpha = ratio."""
    schedule = denoiser.schedule
    t = schedule.time_of(torch.tensor(ratio, dtype=torch.float64)).clamp(*schedule.span)
    return schedule(t.round() if isinstance(schedule, Discrete) else t)


def answer_errors(specimen: Specimen, ratios: Sequence[float], draws: int = 2) -> Tensor:
    """Squared error of the network's output relative to its target, averaged over levels: (N,) float64."""
    denoiser = specimen.stage.denoiser
    found = []
    for rows in specimen.rows():
        cond, total = specimen.told(rows), torch.zeros(rows.stop - rows.start, dtype=torch.float64)
        for ratio in ratios:
            for draw in range(draws):
                noisy = specimen.noisy(rows, level_at(denoiser, ratio), draw)
                goal = target(denoiser.parameterization, noisy.level, noisy.x0, noisy.eps)
                out = denoiser.raw(noisy.x_t, noisy.level, cond).prediction
                error = (out - goal).double().square().flatten(1).mean(1) / goal.double().square().mean()
                total += error.cpu() / (len(ratios) * draws)
        found.append(total)
    return torch.cat(found)


def misfits(specimen: Specimen, ratios: Sequence[float]) -> dict[str, float]:
    """By parameterization, how far the output is from what it asks for; 1 is what a net of zeros gets."""
    denoiser = specimen.stage.denoiser
    found: dict[str, list[float]] = {}
    for ratio in ratios:
        level = level_at(denoiser, ratio)
        for name, parameterization in PARAMETERIZATIONS.items():
            asked = denoiser
            if float(parameterization(level).inp) != float(denoiser.parameterization(level).inp):
                try:
                    asked = replace(denoiser, parameterization=parameterization)
                except ValueError:  # not defined on this schedule
                    continue
            error = power = 0.0
            for rows in specimen.rows():
                noisy = specimen.noisy(rows, level)
                goal = target(parameterization, level, noisy.x0, noisy.eps).double()
                out = asked.raw(noisy.x_t, level, specimen.told(rows)).prediction.double()
                error, power = error + float((out - goal).square().sum()), power + float(goal.square().sum())
            found.setdefault(name, []).append(error / power)
    return {name: sum(values) / len(values) for name, values in found.items()}
