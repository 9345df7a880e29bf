"""What a Denoiser makes of a network's output, and what the network gets to see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sfumato.core.types import Conditioning, Denoised, Level, expand
from sfumato.diffusion import PARAMETERIZATIONS, SCHEDULES, VE, Cosine, Denoiser, Flow
from sfumato.diffusion.denoiser import rebuild
from sfumato.diffusion.parameterization import target

FAMILIES = {
    "linear": (SCHEDULES["linear"](), [0, 400, 999]),
    "cosine": (Cosine(), [0.01, 0.5, 0.99]),
    "ve": (VE(), [-1.5, 0.0, 1.0]),
    "flow": (Flow(), [0.01, 0.5, 0.99]),
}


def pair(dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 2, 4, 4, generator=g, dtype=dtype) for _ in range(2))


def noised(level: Level, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return expand(level.alpha, clean) * clean + expand(level.sigma, clean) * noise


class Recorder:
    """A network that returns what it is told and keeps what it was given."""

    def __init__(self, out: torch.Tensor) -> None:
        self.out = out

    def __call__(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        self.x, self.t, self.cond = x, t, cond
        return self.out


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_output_gives_exact_x0_and_eps(family, name, batched):
    """1e-8, for at alpha = 0.006 or sigma = 0.002 the coefficients divide by that."""
    schedule, times = FAMILIES[family]
    clean, noise = pair()
    if name == "eps" and family in ("cosine", "flow"):
        schedule = replace(schedule, end=0.99)
    denoiser = Denoiser(Recorder(clean), schedule, PARAMETERIZATIONS[name])
    for t in [torch.tensor(times)] if batched else torch.tensor(times):
        level = schedule(t)
        denoiser.net.out = target(denoiser.parameterization, level, clean, noise)
        result = denoiser(noised(level, clean, noise), level, Conditioning())
        assert torch.allclose(result.x0, clean, atol=1e-8)
        assert torch.allclose(result.eps, noise, atol=1e-8)
        assert result.var is None
        assert result.grad is None


def test_eps_network_keeps_its_eps_in_single_precision():
    """eps is F itself, not (x - alpha x0) / sigma, which loses digits at small sigma."""
    schedule, (clean, noise) = SCHEDULES["linear"](), pair(torch.float32)
    level = schedule(torch.tensor(0))
    denoiser = Denoiser(Recorder(noise), schedule, PARAMETERIZATIONS["eps"])
    assert torch.allclose(denoiser(noised(level, clean, noise), level, Conditioning()).eps, noise, rtol=1e-6)


def test_level_per_row_is_level_per_sample():
    schedule, (clean, noise) = SCHEDULES["cosine"](), pair()

    def net(x, t, cond):
        return torch.tanh(x) * (1 + t.to(x).reshape(-1, 1, 1, 1) / 1000)

    denoiser = Denoiser(net, schedule, PARAMETERIZATIONS["v"])
    level = schedule(torch.tensor([10, 500, 900]))
    x = noised(level, clean, noise)
    together = denoiser(x, level, Conditioning())
    for i in range(3):
        alone = denoiser(x[i : i + 1], Level(*(v[i] for v in level)), Conditioning())
        assert torch.allclose(alone.x0, together.x0[i : i + 1], rtol=1e-12, atol=1e-12)
        assert torch.allclose(alone.eps, together.eps[i : i + 1], rtol=1e-12, atol=1e-12)


def test_what_the_network_sees():
    schedule, (x, extra) = VE(), pair(torch.float32)
    net = Recorder(x)
    cond = Conditioning(concat=extra.double(), label=torch.arange(3))
    level = schedule(torch.tensor(0.25))
    Denoiser(net, schedule, PARAMETERIZATIONS["edm"])(x, level, cond)
    inp = float((level.sigma**2 + 0.25).rsqrt())
    assert net.x.shape == (3, 4, 4, 4)
    assert torch.allclose(net.x[:, :2], inp * x)  # only x_t is scaled
    assert torch.equal(net.x[:, 2:], extra)
    assert net.x.dtype == net.t.dtype == torch.float32
    assert net.t.tolist() == [0.25] * 3
    assert net.cond is cond


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_time_is_at_least_single_precision(dtype):
    """bfloat16 would round index 999 to 1000."""
    schedule, x = SCHEDULES["linear"](), torch.zeros(2, 1, 2, 2, dtype=dtype)
    net = Recorder(torch.zeros(2, 1, 2, 2))
    result = Denoiser(net, schedule, PARAMETERIZATIONS["eps"])(x, schedule(torch.tensor(999)), Conditioning())
    assert net.t.tolist() == [999, 999]
    assert net.x.dtype == result.x0.dtype == result.eps.dtype == dtype


def test_learned_variance_is_the_second_half():
    schedule, (clean, noise) = SCHEDULES["linear"](), pair()
    level = schedule(torch.tensor(500))
    denoiser = Denoiser(
        Recorder(torch.cat([noise, clean], 1)), schedule, PARAMETERIZATIONS["eps"], learned_var=True
    )
    x = noised(level, clean, noise)
    result = denoiser(x, level, Conditioning())
    assert torch.allclose(result.eps, noise, atol=1e-12)
    assert torch.equal(result.var, clean)
    raw = denoiser.raw(x, level, Conditioning())
    assert torch.equal(raw.prediction, noise)
    assert torch.equal(raw.var, clean)


@pytest.mark.parametrize("batched", [True, False])
def test_no_noise_has_no_eps(batched):
    """At sigma = 0 x0 is x_t whatever an x0 or eps network says, and eps is zero, not NaN."""
    clean, _ = pair()
    sigma = torch.zeros(3 if batched else (), dtype=torch.float64)
    level = Level(sigma, torch.ones_like(sigma), sigma)
    denoiser = Denoiser(Recorder(clean), Flow(), PARAMETERIZATIONS["flow"])
    result = denoiser(clean, level, Conditioning())
    assert torch.equal(result.x0, clean)
    assert torch.equal(result.eps, torch.zeros_like(clean))


@pytest.mark.parametrize("name", ["v", "x0", "flow", "edm"])
@pytest.mark.parametrize("schedule", [Flow(), Cosine(), SCHEDULES["linear"](zero_snr=True)], ids=str)
def test_pure_noise(schedule, name):
    """At alpha = 0 x_t is the noise: eps is x_t and x0 is finite."""
    _, noise = pair()
    level = schedule(torch.tensor(schedule.span[1]))
    result = Denoiser(Recorder(torch.ones_like(noise)), schedule, PARAMETERIZATIONS[name])(
        noise, level, Conditioning()
    )
    assert torch.allclose(result.eps, noise)
    assert result.x0.isfinite().all()


@pytest.mark.parametrize("schedule", [Flow(), Cosine(), SCHEDULES["linear"](zero_snr=True)], ids=str)
def test_eps_is_refused_where_the_schedule_reaches_pure_noise(schedule):
    with pytest.raises(ValueError, match=r"reaches alpha = 0.*use v, x0 or flow, or a schedule with end < 1"):
        Denoiser(Recorder(torch.zeros(1)), schedule, PARAMETERIZATIONS["eps"])


def test_preparation_happens_once_and_only_if_the_net_offers_it():
    class Prepared(Recorder):
        calls = 0

        def prepare(self, cond: Conditioning) -> Conditioning:
            self.calls += 1
            return replace(cond, kv=((cond.tokens, cond.tokens),))

    cond = Conditioning(tokens=torch.ones(1, 2, 3))
    net = Prepared(torch.zeros(1))
    denoiser = Denoiser(net, Flow(), PARAMETERIZATIONS["flow"])
    ready = denoiser.prepare(cond)
    assert ready.kv is not None
    assert denoiser.prepare(ready) is ready
    assert net.calls == 1
    plain = Denoiser(Recorder(torch.zeros(1)), Flow(), PARAMETERIZATIONS["flow"])
    assert plain.prepare(cond) is cond


@pytest.mark.parametrize("which", ["x0", "eps"])
def test_rebuild(which):
    schedule, (clean, noise) = SCHEDULES["cosine"](), pair()
    level = schedule(torch.tensor(400))
    like = Denoised(clean, noise, var=clean * 2, grad=noise * 3)
    x = noised(level, clean, noise)
    result = rebuild(x, level, like, **{which: {"x0": clean, "eps": noise}[which]})
    assert torch.allclose(result.x0, clean, atol=1e-12)
    assert torch.allclose(result.eps, noise, atol=1e-12)
    assert result.var is like.var
    assert result.grad is like.grad
    with pytest.raises(ValueError, match="exactly one"):
        rebuild(x, level, like)
    with pytest.raises(ValueError, match="exactly one"):
        rebuild(x, level, like, x0=clean, eps=noise)
