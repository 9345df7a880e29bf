from __future__ import annotations

import pytest
import torch
from torch import nn

from sfumato.conditioners.base import Unconditional
from sfumato.core.types import Conditioning, expand
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.parameterization import PARAMETERIZATIONS
from sfumato.diffusion.schedules import Flow
from sfumato.systems.options import SampleOptions
from sfumato.systems.stage import Stage


class Attractor(nn.Module):
    """The exact flow network of data that is one constant: every walk ends there.

    The constant is `level` plus, if the net is told one, the mean of the low-resolution picture.
    """

    def __init__(self, level: float = 0.25) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(level))
        self.evaluations = 0

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        self.evaluations += 1
        target = self.level.expand(len(x), 1, 1, 1)
        if cond.concat is not None:
            x, picture = x[:, :3], x[:, 3:]
            target = target + picture.mean((1, 2, 3), keepdim=True)
        return (x - target) / expand(t, x).clamp_min(1e-6)


@pytest.fixture
def attractor_stage():
    """Make a stage on pixels around an Attractor."""

    def make(name="base", *, level=0.25, side=8, conditioner=None, **changes):
        return Stage(
            name=name,
            denoiser=Denoiser(Attractor(level), Flow(), PARAMETERIZATIONS["flow"]),
            conditioner=conditioner or Unconditional(),
            shape=(3, side, side),
            defaults=SampleOptions(sampler="euler", steps=4),
            **changes,
        )

    return make
