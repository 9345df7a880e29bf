"""What the network predicts, as three coefficients: x0 = skip * x_t + out * F(inp * x_t, t, cond).

The training target is derived from the coefficients (`target`), never written a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato.core.registry import Registry
from sfumato.core.types import Level, expand

__all__ = [
    "PARAMETERIZATIONS",
    "Coefficients",
    "Parameterization",
    "edm",
    "eps",
    "flow",
    "target",
    "v",
    "velocity",
    "x0",
]


class Coefficients(NamedTuple):
    """skip, out and inp of one level, each of the level's shape, float64."""

    skip: Tensor
    out: Tensor
    inp: Tensor


Parameterization = Callable[[Level], Coefficients]
PARAMETERIZATIONS: Registry[Parameterization] = Registry("parameterization")


@PARAMETERIZATIONS("eps")
def eps(level: Level) -> Coefficients:
    """F = eps, the noise (Ho et al. 2020, arXiv:2006.11239, eq. 12); undefined where alpha = 0."""
    return Coefficients(level.alpha.reciprocal(), -level.sigma / level.alpha, torch.ones_like(level.alpha))


@PARAMETERIZATIONS("x0")
def x0(level: Level) -> Coefficients:
    """F = x0, the clean sample."""
    one = torch.ones_like(level.alpha)
    return Coefficients(torch.zeros_like(one), one, one)


@PARAMETERIZATIONS("v")
def v(level: Level) -> Coefficients:
    """F = alpha eps - sigma x0 (Salimans & Ho 2022, arXiv:2202.00512, app. D), for alpha^2 + sigma^2 = 1."""
    return Coefficients(level.alpha, -level.sigma, torch.ones_like(level.alpha))


@PARAMETERIZATIONS("flow")
def flow(level: Level) -> Coefficients:
    """F = eps - x0, the velocity of the straight path (Liu et al. 2022, arXiv:2209.03003).

    x0 = (x_t - sigma F) / (alpha + sigma), which holds at any level; on a flow schedule alpha + sigma = 1.
    """
    total = level.alpha + level.sigma
    return Coefficients(total.reciprocal(), -level.sigma / total, torch.ones_like(total))


@PARAMETERIZATIONS("velocity")
def velocity(level: Level) -> Coefficients:
    """F = x0 - eps: `flow` towards the data, as SiT has it (Ma et al. 2024, arXiv:2401.08740)."""
    skip, out, inp = flow(level)
    return Coefficients(skip, -out, inp)


def edm(sigma_data: float = 0.5) -> Parameterization:
    """Preconditioning of Karras et al. 2022 (arXiv:2206.00364), table 1, for levels with alpha = 1."""

    def coefficients(level: Level) -> Coefficients:
        total = level.sigma.square() + sigma_data**2
        root = total.rsqrt()
        return Coefficients(sigma_data**2 / total, level.sigma * sigma_data * root, root)

    return coefficients


PARAMETERIZATIONS("edm")(edm())


def target(parameterization: Parameterization, level: Level, clean: Tensor, noise: Tensor) -> Tensor:
    """The F that makes x0 = skip x_t + out F exact for x_t = alpha clean + sigma noise.

    F = (1 - skip alpha) / out * clean - skip sigma / out * noise, with coefficients in float64.

    Args:
        level: of shape () or (B,).
        clean, noise: (B, C, ...).
    """
    c = parameterization(level)
    return (
        expand((1 - c.skip * level.alpha) / c.out, clean) * clean
        + expand(-c.skip * level.sigma / c.out, clean) * noise
    )
