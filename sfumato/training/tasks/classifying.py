"""Training of a classifier of noisy pictures, which then guides a denoiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.random import Noise
from sfumato.core.types import expand
from sfumato.diffusion.denoiser import model_time
from sfumato.diffusion.schedules import Discrete, ScheduleConfig
from sfumato.diffusion.times import TimesConfig, Uniform
from sfumato.nets.classifier import NoisyClassifier, NoisyClassifierConfig
from sfumato.training.batches import Batch
from sfumato.training.task import Loss, Memory, Moment, Phase

__all__ = ["Classifying", "ClassifyingConfig", "noised"]

SHOWN = (0.0, 0.25, 0.5, 0.75)  # of the schedule: the noise of the preview's rows


@dataclass(frozen=True, kw_only=True)
class ClassifyingConfig:
    """A classifier, and the noise that it sees: the schedule must be that of the denoiser which it guides.

    Attributes:
        net: num_classes must be that of the data.
        times: at which noise it is trained.
    """

    kind: Literal["classifying"] = "classifying"
    net: NoisyClassifierConfig
    schedule: ScheduleConfig = field(default_factory=Discrete)
    times: TimesConfig = field(default_factory=Uniform)


class Classifying:
    """One phase, "classifier": cross-entropy at x_t (Dhariwal & Nichol 2021, arXiv:2105.05233, section 4).

    Args:
        config: the net and its noise.
        examples: pictures (n, 3, H, W) that the preview repeats.
    """

    def __init__(self, config: ClassifyingConfig, examples: Tensor) -> None:
        self.config, self.examples = config, examples
        self.modules: dict[str, nn.Module] = {"classifier": NoisyClassifier(config.net)}
        self.phases = {"classifier": Phase(("classifier",))}
        self.averaged = ("classifier",)
        self.memories: dict[str, Memory] = {}

    def losses(self, batch: Batch, noise: Noise, moment: Moment) -> Iterator[Loss]:
        """See Task; also the share of right answers, at all levels of noise and at the cleaner half."""
        assert batch.labels is not None
        drawn, last = self.config.times.sample(self.config.schedule, noise), self.config.schedule.span[1]
        x_t, t = noised(self.config.schedule, batch.pictures, drawn.t, noise)
        label = batch.labels.to(x_t.device)
        logits = self.modules["classifier"](x_t, t)
        loss = F.cross_entropy(logits, label, reduction="none") * drawn.importance.to(logits)
        right, clean = (logits.argmax(1) == label).float(), (drawn.t < last / 2).to(x_t.device)
        share = (right * clean).sum() / clean.sum().clamp_min(1)
        yield Loss("classifier", loss.mean(), {"right": right.mean(), "right_clean": share})

    def preview(self, averaged: Mapping[str, nn.Module]) -> Tensor:
        """The examples at some levels of noise, pale where the net is not sure of its first class."""
        net = averaged["classifier"]
        x0, rows = self.examples.to(next(net.parameters()).device), []
        for share in SHOWN:
            t = torch.full((len(x0),), round(share * self.config.schedule.span[1]), dtype=torch.float64)
            x_t, told = noised(self.config.schedule, x0, t, Noise(range(len(x0))))
            sure = net(x_t, told).softmax(1).amax(1)
            rows.append(1 - expand(sure, x0) * (1 - x_t.clamp(-1, 1)))
        return torch.cat(rows)


def noised(schedule: ScheduleConfig, x0: Tensor, t: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """x_t of x0 (B, C, H, W) at the times (B,) of the schedule, and what a net is told of them."""
    level = schedule(t)
    x_t = expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * noise(x0)
    return x_t, model_time(x_t, level)
