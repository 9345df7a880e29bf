"""The denoising loss: times, noise, the derived target, weights, and the bound for learned variances."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, Level, expand
from sfumato.diffusion.denoiser import Denoiser, NetOutput
from sfumato.diffusion.likelihood import training_transitions, vb_bits
from sfumato.diffusion.parameterization import target
from sfumato.diffusion.schedules import Discrete
from sfumato.diffusion.times import TimesConfig, Uniform
from sfumato.diffusion.weights import Simple, WeightConfig

__all__ = ["Losses", "Objective"]


class Losses(NamedTuple):
    """What one batch costs."""

    loss: Tensor
    """(B,): minimise its mean."""
    metrics: dict[str, Tensor]
    """Detached parts, (B,) each: "mse" of the network's output, "vb" in bits per dimension, "uncertainty"."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """weight(t) * mean((F - F*)^2) + vlb * T * vb(t), at times drawn by `times`.

    F is the network's output and F* the target that its parameterization implies. vb is a term of the
    variational bound in bits per dimension; in it the prediction is detached, so that it trains the variance
    alone: L_hybrid of Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 16, for vlb = 0.001.

    Attributes:
        times: a sampler with state (LossSecondMoment) needs its state_dict in the checkpoint.
        vlb: weight of the bound, which is a sum over the T steps of a discrete schedule; for learned
        variances only.
        offset_noise: standard deviation of a constant added to the noise per sample and channel, which
            teaches very dark and bright pictures; 0.05 to 0.1.
    """

    times: TimesConfig = field(default_factory=Uniform)
    weight: WeightConfig = field(default_factory=Simple)
    vlb: float = 0.0
    offset_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.vlb < 0 or self.offset_noise < 0:
            raise ValueError(
                f"vlb {self.vlb} and offset_noise {self.offset_noise} must not be negative; 0 = off"
            )

    def __call__(
        self,
        denoiser: Denoiser,
        x0: Tensor,
        cond: Conditioning,
        noise: Noise,
        *,
        uncertainty: Callable[[Level], Tensor] | None = None,
    ) -> Losses:
        """The loss of a batch; a sample's time and noise depend on its own seed alone.

        Args:
            denoiser: the net to train with its schedule and parameterization.
            x0: (B, C, ...) clean samples.
            cond: what the network is told, dropout included.
            noise: one seed per sample.
            uncertainty: learned log-variance u(level) -> (B,) of the weighted squared error, see
            `weights.Uncertainty`.

        Raises: ValueError if vlb is set and the net learns no variance or the schedule is not discrete.
        """
        t, importance = self.times.sample(denoiser.schedule, noise)
        level = denoiser.schedule(t)
        eps = self._noise(x0, noise)
        x_t = expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * eps
        out = denoiser.raw(x_t, level, cond)
        goal = target(denoiser.parameterization, level, x0, eps)
        mse = (out.prediction - goal).square().flatten(1).mean(dim=1)
        metrics = {"mse": mse}
        loss = self.weight(level, denoiser.parameterization).to(mse) * mse
        if uncertainty is not None:
            u = metrics["uncertainty"] = uncertainty(level)
            loss = loss / u.exp() + u
        if self.vlb:
            vb = metrics["vb"] = self._bound(denoiser, out, x0, x_t, t)
            assert isinstance(denoiser.schedule, Discrete)
            loss = loss + self.vlb * denoiser.schedule.steps * vb
        self.times.observe(t, loss.detach())
        return Losses(loss * importance.to(loss), {k: v.detach() for k, v in metrics.items()})

    def _noise(self, x0: Tensor, noise: Noise) -> Tensor:
        eps = noise(x0)
        if not self.offset_noise:
            return eps
        if x0.ndim < 3:
            raise ValueError(
                f"offset_noise {self.offset_noise} is a constant per channel of a picture, and these are "
                f"vectors of shape {tuple(x0.shape)}; set it to 0"
            )
        offset = noise(torch.empty(x0.shape[:2], dtype=x0.dtype, device=x0.device))
        return eps + self.offset_noise * offset.reshape(offset.shape + (1,) * (x0.ndim - 2))

    def _bound(self, denoiser: Denoiser, out: NetOutput, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The bound's term at t with the prediction detached, (B,)."""
        if out.var is None or not isinstance(denoiser.schedule, Discrete):
            raise ValueError(
                f"vlb {self.vlb} needs learned_var=True and a discrete schedule; set it to 0 otherwise"
            )
        c = denoiser.parameterization(denoiser.schedule(t))
        estimate = expand(c.skip, x_t) * x_t + expand(c.out, x_t) * out.prediction.detach()
        step = training_transitions(denoiser.schedule).at(t.long())
        return vb_bits(step.posterior(x0, x_t), step.posterior(estimate, x_t, out.var), x0, step.last)
