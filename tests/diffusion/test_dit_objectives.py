"""The objectives that a DiT is trained with go with its options: each gives every weight a gradient."""

from __future__ import annotations

import pytest
import torch

from sfumato.core.random import Noise
from sfumato.core.types import Conditioning
from sfumato.diffusion import PARAMETERIZATIONS, Denoiser, Discrete, Flow
from sfumato.diffusion.objective import Objective
from sfumato.diffusion.times import LogitNormal
from sfumato.nets.dit import DiT, DiTConfig

WAYS = {
    "eps": (Discrete(), "eps", False, Objective()),
    "eps, learned sigma": (Discrete(), "eps", True, Objective(vlb=0.001)),
    "velocity": (Flow(towards_data=True, multiplier=1000.0), "velocity", False, Objective()),
    "flow, logit-normal": (Flow(multiplier=1000.0), "flow", False, Objective(times=LogitNormal())),
    "v": (Discrete(zero_snr=True), "v", False, Objective()),
}
OPTIONS = {
    "plain": {},
    "all": {"qk_norm": True, "rope": True, "swiglu": True, "shared_modulation": True, "registers": 2},
    "in-context": {"block": "in_context", "rope": True},
    "cross": {"block": "cross", "registers": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("schedule", "prediction", "learned", "objective"), WAYS.values(), ids=WAYS)
def test_every_objective_trains_every_kind_of_dit(schedule, prediction, learned, objective, options):
    config = DiTConfig(width=32, depth=1, heads=2, num_classes=4, out_channels=8 if learned else 4, **options)
    net = DiT(config)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    denoiser = Denoiser(net, schedule, PARAMETERIZATIONS[prediction], learned_var=learned)
    x0, cond = torch.randn(4, 4, 8, 8), Conditioning(label=torch.tensor([0, 1, 3, 4]))
    losses = objective(denoiser, x0, cond, Noise(range(4)))
    assert losses.loss.shape == (4,)
    assert losses.loss.isfinite().all()
    losses.loss.mean().backward()
    unused = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert unused == []
