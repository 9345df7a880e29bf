"""Formulas for the betas of discrete schedules, and the zero-terminal-SNR rescale."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.core.registry import Registry

__all__ = ["FORMULAS", "Formula", "zero_terminal_snr"]

Formula = Callable[[int, float | None, float | None], Tensor]
FORMULAS: Registry[Formula] = Registry("beta formula")
"""Name -> (steps, start, end) -> betas (steps,) float64; start and end None = the formula's own."""


@FORMULAS("linear")
def linear(steps: int, start: float | None, end: float | None) -> Tensor:
    """Linear from 1e-4 s to 2e-2 s with s = 1000 / steps; a start or end that is given is not scaled.

    Ho et al. 2020 (arXiv:2006.11239); s: Nichol & Dhariwal 2021 (arXiv:2102.09672).
    """
    scale = 1000 / steps
    return _line(steps, scale * 1e-4 if start is None else start, scale * 2e-2 if end is None else end)


@FORMULAS("scaled_linear")
def scaled_linear(steps: int, start: float | None, end: float | None) -> Tensor:
    """Linear in sqrt(beta), by default 0.00085 to 0.012: latent diffusion, whose code calls it "linear"."""
    return _line(steps, math.sqrt(_or(start, 0.00085)), math.sqrt(_or(end, 0.012))).square()


@FORMULAS("cosine")
def cosine(steps: int, start: float | None, end: float | None) -> Tensor:
    """squaredcos_cap_v2: 1 - f((i+1)/T) / f(i/T), f(u) = cos^2(pi/2 (u + 0.008) / 1.008), at most 0.999.

    Nichol & Dhariwal 2021 (arXiv:2102.09672), eq. 17. It has no start and no end.
    """
    _takes_none("cosine", start, end)
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - bar[1:] / bar[:-1]).clamp_max(0.999)


@FORMULAS("sigmoid")
def sigmoid(steps: int, start: float | None, end: float | None) -> Tensor:
    """From start to end along sigmoid(linspace(-6, 6)), by default 1e-4 to 2e-2 (the name in diffusers)."""
    first, last = _or(start, 1e-4), _or(end, 2e-2)
    return torch.sigmoid(_line(steps, -6, 6)) * (last - first) + first


@FORMULAS("quad")
def quad(steps: int, start: float | None, end: float | None) -> Tensor:
    """Linear in sqrt(beta), by default 1e-4 to 2e-2: the legacy name of DDPM, GLIDE and Karlo."""
    return scaled_linear(steps, _or(start, 1e-4), _or(end, 2e-2))


@FORMULAS("const")
def const(steps: int, start: float | None, end: float | None) -> Tensor:
    """`end` throughout, by default 2e-2."""
    return torch.full((steps,), _or(end, 2e-2), dtype=torch.float64)


@FORMULAS("warmup10")
def warmup10(steps: int, start: float | None, end: float | None) -> Tensor:
    """Linear over the first tenth, then `end`."""
    return _warmup(steps, start, end, 0.1)


@FORMULAS("warmup50")
def warmup50(steps: int, start: float | None, end: float | None) -> Tensor:
    """Linear over the first half, then `end`."""
    return _warmup(steps, start, end, 0.5)


@FORMULAS("jsd")
def jsd(steps: int, start: float | None, end: float | None) -> Tensor:
    """1 / (T - i) (Sohl-Dickstein et al. 2015, arXiv:1503.03585): alphas_cumprod falls linearly to 0."""
    _takes_none("jsd", start, end)
    return 1 / torch.arange(steps, 0, -1, dtype=torch.float64)


def zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Shift and scale sqrt(alphas_cumprod), (T,), so that its first entry stays and its last becomes 0.

    Lin et al. 2023 (arXiv:2305.08891), algorithm 1.
    """
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()


def _warmup(steps: int, start: float | None, end: float | None, fraction: float) -> Tensor:
    betas, rise = const(steps, start, end), int(steps * fraction)
    betas[:rise] = _line(rise, _or(start, 1e-4), _or(end, 2e-2))
    return betas


def _line(steps: int, first: float, last: float) -> Tensor:
    return torch.linspace(first, last, steps, dtype=torch.float64)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _takes_none(name: str, start: float | None, end: float | None) -> None:
    if start is not None or end is not None:
        raise ValueError(f"beta formula {name!r} has no start and no end; got start={start}, end={end}")
