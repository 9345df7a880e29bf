"""Weights of the denoising loss over noise levels, and a learned one.

A weighting is a factor on mean((F - F*)^2), where F is what the network predicts and F* the derived target.
Since an error dF of F is an error out * dF of x0 and alpha * out / sigma * dF of eps (`out` as in
parameterization.py), with snr = (alpha / sigma)^2:

    loss on x0 = out^2 * loss on F,    loss on eps = snr * out^2 * loss on F

    out^2 is   eps: 1 / snr    x0: 1    v: sigma^2 = 1 / (snr + 1)    flow: (sigma / (alpha + sigma))^2
               edm: (sigma sigma_data)^2 / (sigma^2 + sigma_data^2)

so that every published rule is one line below and is right for all parameterizations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from sfumato.core.types import Level
from sfumato.diffusion.parameterization import Parameterization

__all__ = ["P2", "EDMWeight", "MinSNR", "Sigmoid", "Simple", "Uncertainty", "WeightConfig", "Weighting"]


class Weighting(Protocol):
    """The factor on the loss of F at a level."""

    def __call__(self, level: Level, parameterization: Parameterization) -> Tensor:
        """(B,) float64, finite where the parameterization is defined."""
        ...


@dataclass(frozen=True)
class Simple:
    """1: the plain loss on whatever the network predicts.

    L_simple of Ho et al. 2020 (arXiv:2006.11239) for eps; for edm the weight of Karras et al. 2022, for flow
    the one of rectified flow.
    """

    kind: Literal["simple"] = "simple"

    def __call__(self, level: Level, parameterization: Parameterization) -> Tensor:
        return torch.ones_like(level.sigma)


@dataclass(frozen=True)
class MinSNR:
    """min(snr, gamma) on x0: eps min(snr, gamma) / snr, x0 min(snr, gamma), v min(snr, gamma) / (snr + 1).

    Hang et al. 2023 (arXiv:2303.09556), sec. 3.4.
    """

    gamma: float = 5.0
    kind: Literal["min_snr"] = "min_snr"

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma {self.gamma} of min_snr must be positive; 5 is usual")

    def __call__(self, level: Level, parameterization: Parameterization) -> Tensor:
        return _snr(level).clamp_max(self.gamma) * parameterization(level).out.square()


@dataclass(frozen=True)
class P2:
    """1 / (k + snr)^gamma on eps: less weight on the nearly clean levels.

    Choi et al. 2022 (arXiv:2204.00227), eq. 8; gamma 0 is the plain loss on eps.
    """

    gamma: float = 1.0
    k: float = 1.0
    kind: Literal["p2"] = "p2"

    def __post_init__(self) -> None:
        if self.gamma < 0 or not self.k > 0:
            raise ValueError(f"p2 weight with gamma {self.gamma}, k {self.k}: need gamma >= 0 and k > 0")

    def __call__(self, level: Level, parameterization: Parameterization) -> Tensor:
        snr = _snr(level)
        return snr * parameterization(level).out.square() * (self.k + snr).pow(-self.gamma)


@dataclass(frozen=True)
class EDMWeight:
    """(r^2 + sigma_data^2) / (r sigma_data)^2 on x0, r = sigma / alpha: 1 for the edm parameterization.

    Karras et al. 2022 (arXiv:2206.00364), table 1.
    """

    sigma_data: float = 0.5
    kind: Literal["edm"] = "edm"

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise ValueError(
                f"sigma_data {self.sigma_data} must be positive; it is the standard deviation of the data"
            )

    def __call__(self, level: Level, parameterization: Parameterization) -> Tensor:
        return (_snr(level) + self.sigma_data**-2) * parameterization(level).out.square()


@dataclass(frozen=True)
class Sigmoid:
    """sigmoid(bias - ln snr) on eps, for times drawn uniformly in ln snr.

    Another density of times is not divided out. Kingma & Gao 2023 (arXiv:2303.00848), sec. 4.
    """

    bias: float = 0.0
    kind: Literal["sigmoid"] = "sigmoid"

    def __call__(self, level: Level, parameterization: Parameterization) -> Tensor:
        snr = _snr(level)
        return snr * parameterization(level).out.square() * torch.sigmoid(self.bias - snr.log())


WeightConfig = Annotated[Simple | MinSNR | P2 | EDMWeight | Sigmoid, Field(discriminator="kind")]


class Uncertainty(nn.Module):
    """u(level), the learned log-variance of the loss: loss -> loss / exp(u) + u, least at u = ln loss.

    Every level then counts the same, whatever its loss. Random Fourier features of ln(sigma / alpha) / 4 and
    one linear layer, zero at first so that training starts unweighted. It is trained with the net and not
    needed to sample. Kendall et al. 2018 (arXiv:1705.07115); Karras et al. 2024 (arXiv:2312.02696), eq. 14
    and app. B.

    Args:
        features: number of Fourier features.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, features: int = 128) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(features, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(features, generator=generator))
        self.out = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, level: Level) -> Tensor:
        """u of a level of shape (B,), (B,) on the module's device."""
        ratio = (level.sigma / level.alpha).clamp(1e-4, 1e4)
        position = (ratio.log() / 4).to(self.frequencies)
        features = torch.cos(position[:, None] * self.frequencies + self.phases) * math.sqrt(2)
        u: Tensor = self.out(features)[:, 0] / math.sqrt(self.out.in_features)
        return u


def _snr(level: Level) -> Tensor:
    return (level.alpha / level.sigma).square()
