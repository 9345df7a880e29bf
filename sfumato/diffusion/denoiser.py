"""A network together with its noise schedule and parameterization: x_t -> x0 and eps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sfumato.core.types import Conditioning, Denoised, Level, expand
from sfumato.diffusion.grid import Grid
from sfumato.diffusion.parameterization import Parameterization
from sfumato.diffusion.schedules import NoiseSchedule

__all__ = ["DenoiseFn", "Denoiser", "Net", "NetOutput", "model_time", "rebuild"]

DenoiseFn = Callable[[Tensor, Level], Denoised]


class Net(Protocol):
    """A network: (B, C_in, ...), (B,), conditioning -> (B, C, ...), or (B, 2C, ...) with a learned variance.

    It must not change its arguments. It may also offer `prepare(cond) -> cond`, which computes once what
    depends on neither x_t nor t, and `plan(times) -> Net`, the net for a walk over these times: the last is
    where it ends, NaN if that is no time of the schedule.
    """

    def __call__(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor: ...


class NetOutput(NamedTuple):
    """The network's own prediction F and, with a learned variance, its second half; (B, C, ...) each."""

    prediction: Tensor
    var: Tensor | None


@dataclass(frozen=True)
class Denoiser:
    """A net, and what its output means.

    Not an nn.Module: parameter names stay the net's own, `replace(d, net=ema)` swaps weights, and no dtype
    cast of the net can touch the schedule's tables.

    Raises: ValueError if the parameterization is undefined at the schedule's noisiest level.
    """

    net: Net
    schedule: NoiseSchedule
    parameterization: Parameterization
    learned_var: bool = False

    def __post_init__(self) -> None:
        noisiest = self.schedule(torch.tensor(self.schedule.span[1], dtype=torch.float64))
        if not all(bool(c.isfinite().all()) for c in self.parameterization(noisiest)):
            raise ValueError(
                "the schedule reaches alpha = 0, where this parameterization (eps?) is undefined; "
                "use v, x0 or flow, or a schedule with end < 1"
            )

    def prepare(self, cond: Conditioning) -> Conditioning:
        """What the net can compute from the conditioning alone, once per walk instead of once per step."""
        prepare = getattr(self.net, "prepare", None)
        return prepare(cond) if prepare is not None and cond.kv is None else cond

    def planned(self, grid: Grid) -> Denoiser:
        """The denoiser for one walk, whose net may compute ahead what depends on its times alone."""
        plan = getattr(self.net, "plan", None)
        return self if plan is None else replace(self, net=plan(grid.t))

    def raw(self, x_t: Tensor, level: Level, cond: Conditioning) -> NetOutput:
        """The network's output F in the dtype of x_t, its variance half split off.

        Args:
            x_t: (B, C, ...) noisy sample.
            level: of shape () or (B,).
            cond: batch B; its `concat`, if any, is appended to the scaled x_t.
        """
        return self._evaluate(x_t, level, cond, self.parameterization(level).inp)

    def __call__(self, x_t: Tensor, level: Level, cond: Conditioning) -> Denoised:
        """x0 and eps implied by the network at x_t; shapes as in `raw`.

        Both come from F by coefficients in float64, so that an eps network's eps is F itself and loses
        nothing at small sigma. At sigma = 0 the noise is not defined by x_t and x0; it is returned as zero.
        """
        skip, out, inp = self.parameterization(level)
        prediction, var = self._evaluate(x_t, level, cond, inp)
        eps_skip, eps_out = _noise_weights(level, skip, out)
        x0 = _weighted(skip, x_t, out, prediction)
        return Denoised(x0, _weighted(eps_skip, x_t, eps_out, prediction), var)

    def _evaluate(self, x_t: Tensor, level: Level, cond: Conditioning, inp: Tensor) -> NetOutput:
        x = _scaled(inp, x_t)
        if cond.concat is not None:
            x = torch.cat([x, cond.concat.to(x)], dim=1)
        out = self.net(x, model_time(x_t, level), cond).to(x_t.dtype)
        if not self.learned_var:
            return NetOutput(out, None)
        prediction, var = out.chunk(2, dim=1)
        return NetOutput(prediction, var)


def model_time(x_t: Tensor, level: Level) -> Tensor:
    """Level.t as a network takes it: (B,) on the device of x_t, float32, or wider where x_t is."""
    dtype = torch.promote_types(torch.float32, x_t.dtype)
    if level.t.ndim:
        return level.t.to(x_t.device, dtype)
    return torch.full((len(x_t),), float(level.t), dtype=dtype, device=x_t.device)


def _scaled(inp: Tensor, x: Tensor) -> Tensor:
    """inp x for inp of shape () or (B,)."""
    if inp.ndim:
        return expand(inp, x) * x
    factor = float(inp)
    return x if factor == 1 else factor * x


def _noise_weights(level: Level, skip: Tensor, out: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Weights of x_t and F in eps = (x_t - alpha x0) / sigma; 0 at sigma = 0."""
    if level.sigma.ndim == 0:
        alpha, sigma = float(level.alpha), float(level.sigma)
        return ((1 - alpha * float(skip)) / sigma, -alpha * float(out) / sigma) if sigma > 0 else (0.0, 0.0)
    inverse = torch.where(level.sigma > 0, 1 / level.sigma.clamp_min(1e-300), torch.zeros_like(level.sigma))
    return (1 - level.alpha * skip) * inverse, -level.alpha * out * inverse


def _weighted(a: Tensor | float, x: Tensor, b: Tensor | float, y: Tensor) -> Tensor:
    """a x + b y for weights of shape () or (B,); () as plain numbers, which no device has to wait for."""
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim + b.ndim:
        return expand(a, x) * x + expand(b, y) * y
    a, b = float(a), float(b)
    if a == 0:  # x0 of an x0 network, eps of an eps network
        return y if b == 1 else b * y
    return (a * x).add_(y, alpha=b)


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
