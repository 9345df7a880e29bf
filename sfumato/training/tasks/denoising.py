"""Training of a denoiser, with its text tower, on pictures or latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sfumato.conditioners.base import Conditioner
from sfumato.core.random import Noise
from sfumato.core.types import Inputs
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.objective import Objective
from sfumato.diffusion.schedules import Flow, ScheduleConfig
from sfumato.nets.autoencoder import DiagonalGaussian
from sfumato.nets.dit import DiTConfig
from sfumato.nets.text import TextTransformerConfig
from sfumato.nets.unet import UNetConfig
from sfumato.systems.codec import Codec
from sfumato.systems.options import SampleOptions
from sfumato.systems.stage import Stage
from sfumato.training.batches import Batch
from sfumato.training.task import Loss, Memory, Moment, Phase

__all__ = ["Denoising", "DenoisingConfig"]

Posterior = Literal["sample", "mean"]


@dataclass(frozen=True, kw_only=True)
class DenoisingConfig:
    """A denoiser on pictures or latents, optionally told a text.

    Attributes:
        net: its channels must be those of the latents, or 3.
        text: tower trained together with the net; `vocab_size` is an upper bound. None = unconditional.
        autoencoder: folder of a trained first stage, or of a run that trained one; None = pixels.
        posterior: whether latents are samples of the autoencoder's posterior or its means.
        cache: encode every picture once, before training, if the data are not augmented.
        schedule: noise over time.
        prediction: a parameterization: eps, x0, v, flow or edm.
        learned_var: the net has twice the channels and learns a variance.
        objective: times, weights and the rest of the loss.
        dropout: share of captions that are replaced by the empty one, for classifier-free guidance.
        sampling: how previews and the finished system sample unless told otherwise.
        prompts: of the preview; picture i has seed i. Empty = captions of the data.
    """

    kind: Literal["denoising"] = "denoising"
    net: DiTConfig | UNetConfig = field(default_factory=DiTConfig)
    text: TextTransformerConfig | None = None
    autoencoder: Path | None = None
    posterior: Posterior = "sample"
    cache: bool = True
    schedule: ScheduleConfig = field(default_factory=Flow)
    prediction: str = "flow"
    learned_var: bool = False
    objective: Objective = field(default_factory=Objective)
    dropout: float = 0.1
    sampling: SampleOptions = field(default_factory=SampleOptions)
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; allowed: a share in [0, 1), such as 0.1")


@runtime_checkable
class Remembering(Protocol):
    """A time sampler that learns from the losses."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class Denoising:
    """One phase, "denoiser": the objective at random noise levels, with captions dropped at random.

    Args:
        stage: its net and its conditioner's tower are trained, its codec encodes pictures that come without
            moments.
        objective: times, weights and the rest of the loss.
        dropout: share of captions replaced by the empty one (Ho & Salimans 2022, arXiv:2207.12598).
        posterior: see DenoisingConfig.
        modules: what is trained and averaged.
        draw: the preview's pictures from averaged modules.
    """

    def __init__(
        self,
        stage: Stage,
        objective: Objective,
        *,
        dropout: float,
        posterior: Posterior,
        modules: Mapping[str, nn.Module],
        draw: Callable[[Mapping[str, nn.Module]], Tensor],
    ) -> None:
        self.denoiser: Denoiser = stage.denoiser
        self.conditioner: Conditioner = stage.conditioner
        self.codec: Codec = stage.codec
        self.objective = objective
        self.dropout = dropout
        self.posterior = posterior
        self.modules = modules
        self.phases = {"denoiser": Phase(tuple(modules))}
        self.averaged = tuple(modules)
        times = objective.times
        self.memories: dict[str, Memory] = {"times": times} if isinstance(times, Remembering) else {}
        self._draw = draw

    def losses(self, batch: Batch, noise: Noise, moment: Moment) -> Iterator[Loss]:
        """See Task."""
        x0 = self.clean(batch, noise)
        inputs = Inputs(n=len(batch), text=batch.text)
        cond = self.conditioner(inputs, noise)
        keep = noise.uniform(torch.empty(len(batch))) >= self.dropout
        cond = cond.select(keep.to(x0.device), self.conditioner.null(inputs, cond))
        losses = self.objective(self.denoiser, x0, cond, noise)
        yield Loss("denoiser", losses.loss.mean(), {name: v.mean() for name, v in losses.metrics.items()})

    def clean(self, batch: Batch, noise: Noise) -> Tensor:
        """What is to be denoised, (B, C, h, w): pictures, or latents from moments or from the codec."""
        sampled = self.posterior == "sample"
        if batch.moments is not None:
            posterior = DiagonalGaussian(*batch.moments.chunk(2, dim=1))
            return posterior.sample(noise(posterior.mean)) if sampled else posterior.mean
        with torch.no_grad():
            return self.codec.encode(batch.pictures, noise if sampled else None)

    def preview(self, averaged: Mapping[str, nn.Module]) -> Tensor:
        """Pictures for the prompts by the averaged net and tower."""
        return self._draw(averaged)
