"""Tensors elsewhere than on the CPU: torch's meta device refuses to mix with it, as a GPU does."""

from __future__ import annotations

import pytest
import torch

from sfumato.core.random import Noise
from sfumato.core.types import Conditioning
from sfumato.diffusion.constraints import Dynamic, Known, constrained, projection
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.grid import SPACINGS
from sfumato.diffusion.guidance import CFG, AutoGuidance
from sfumato.diffusion.likelihood import bits_per_dim
from sfumato.diffusion.objective import Objective
from sfumato.diffusion.parameterization import v
from sfumato.diffusion.schedules import Discrete
from sfumato.diffusion.score import ScoreGuidance, class_log_prob
from sfumato.diffusion.times import LogNormal, Uniform
from sfumato.diffusion.weights import MinSNR, Uncertainty

SCHEDULE = Discrete(steps=50)
COND = Conditioning(pooled=torch.ones(2, 3, device="meta"))
X = torch.zeros(2, 3, 4, 4, device="meta")
LABEL = torch.tensor([1, 2])  # on the CPU, as a user would give it


def net(x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
    return torch.cat([x, x], dim=1) * cond.pooled[:, :1, None, None] + t[:, None, None, None]


DENOISER = Denoiser(net, SCHEDULE, v, learned_var=True)


@pytest.mark.parametrize("t", [20.0, [3.0, 40.0]])
@pytest.mark.parametrize(
    "guidance",
    [
        CFG(3.0),
        CFG(3.0, channels=2, rescale=0.7, interval=(0.1, 0.6)),
        AutoGuidance(DENOISER, 2.0, (0.1, 0.6)),
        ScoreGuidance(class_log_prob(lambda x, t: x.flatten(1), LABEL), 2.0),
    ],
)
def test_guidance_and_constraints(guidance, t):
    known = Known(X, torch.ones(1, 1, 4, 4))
    fn = constrained(
        guidance.bind(DENOISER, COND, COND.map(torch.clone)), known=known, threshold=Dynamic(0.9)
    )
    denoised = fn(X, SCHEDULE(torch.tensor(t)))
    assert denoised.x0.is_meta
    assert denoised.eps.is_meta
    assert projection(known, SPACINGS["respaced"](SCHEDULE, 5), Noise([1, 2]))(X, 2).is_meta


@pytest.mark.parametrize(("times", "vlb"), [(Uniform(), 0.001), (LogNormal(), 0.0)])
def test_objective(times, vlb):
    objective = Objective(times=times, weight=MinSNR(), vlb=vlb, offset_noise=0.1)
    losses = objective(DENOISER, X, COND, Noise([1, 2]), uncertainty=Uncertainty().to("meta"))
    assert losses.loss.is_meta


def test_bound():
    grid = SPACINGS["respaced"](SCHEDULE, 3)
    assert bits_per_dim(lambda x, level: DENOISER(x, level, COND), grid, X, Noise([1, 2])).total.is_meta
