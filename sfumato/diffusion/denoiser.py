"""A network together with its noise schedule and parameterization: x_t -> x0 and eps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sfumato.core.types import Conditioning, Denoised, Level, expand
from sfumato.diffusion.parameterization import Parameterization
from sfumato.diffusion.schedules import NoiseSchedule

__all__ = ["DenoiseFn", "Denoiser", "Net", "NetOutput", "rebuild"]

DenoiseFn = Callable[[Tensor, Level], Denoised]


class Net(Protocol):
    """A network: (B, C_in, ...), (B,), conditioning -> (B, C, ...), or (B, 2C, ...) with a learned variance.

    It may also offer `prepare(cond) -> cond`, which computes once what depends on neither x_t nor t.
    """

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor: ...


class NetOutput(NamedTuple):
    """The network's own prediction F and, with a learned variance, its second half; (B, C, ...) each."""

    prediction: Tensor
    var: Tensor | None


@dataclass(frozen=True)
class Denoiser:
    """Not an nn.Module: parameter names stay the net's own, `replace(d, net=ema)` swaps weights, and no dtype cast
    of the net can touch the schedule's tables.
    """

    net: Net
    schedule: NoiseSchedule
    parameterization: Parameterization
    learned_var: bool = False

    def prepare(self, cond: Conditioning) -> Conditioning:
        """What the net can compute from the conditioning alone, once per walk instead of once per step."""
        prepare = getattr(self.net, "prepare", None)
        return prepare(cond) if prepare is not None and cond.kv is None else cond

    def raw(self, x_t: Tensor, level: Level, cond: Conditioning) -> NetOutput:
        """The network's output F in the dtype of x_t, its variance half split off.

        Args:
            x_t: (B, C, ...) noisy sample.
            level: of shape () or (B,).
        """
        scaled = expand(self.parameterization(level).inp, x_t) * x_t
        x = scaled if cond.concat is None else torch.cat([scaled, cond.concat.to(scaled)], dim=1)
        t = level.t.to(x_t.device, torch.promote_types(torch.float32, x_t.dtype)).expand(len(x_t))
        out = self.net(x, t, cond).to(x_t.dtype)
        if not self.learned_var:
            return NetOutput(out, None)
        prediction, var = out.chunk(2, dim=1)
        return NetOutput(prediction, var)

    def __call__(self, x_t: Tensor, level: Level, cond: Conditioning) -> Denoised:
        """x0 and eps implied by the network at x_t; shapes as in `raw`.

        Both come from F by coefficients in float64, so that an eps network's eps is F itself and loses nothing at
        small sigma. At sigma = 0 the noise is not defined by x_t and x0; it is returned as zero.
        """
        out = self.raw(x_t, level, cond)
        c = self.parameterization(level)
        x0 = expand(c.skip, x_t) * x_t + expand(c.out, x_t) * out.prediction
        inverse = torch.where(level.sigma > 0, 1 / level.sigma.clamp_min(1e-300), torch.zeros_like(level.sigma))
        eps_skip, eps_out = (1 - level.alpha * c.skip) * inverse, -level.alpha * c.out * inverse
        return Denoised(x0, expand(eps_skip, x_t) * x_t + expand(eps_out, x_t) * out.prediction, out.var)


def rebuild(
    x_t: Tensor, level: Level, like: Denoised, *, x0: Tensor | None = None, eps: Tensor | None = None
) -> Denoised:
    """A Denoised with a new x0 (or a new eps) and the other one re-derived from x_t = alpha x0 + sigma eps.

    `var` and `grad` are kept from `like`. Exactly one of x0 and eps must be given.
    """
    alpha, sigma = expand(level.alpha, x_t), expand(level.sigma, x_t)
    if x0 is not None and eps is None:
        return Denoised(x0, (x_t - alpha * x0) / sigma, like.var, like.grad)
    if eps is not None and x0 is None:
        return Denoised((x_t - sigma * eps) / alpha, eps, like.var, like.grad)
    raise ValueError("rebuild takes exactly one of x0 and eps")
