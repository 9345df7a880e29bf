"""The denoising loss: exact denoisers cost nothing, randomness is per seed, the bound trains the variance."""

from __future__ import annotations

import pytest
import torch

from sfumato.core.config import from_json, to_json
from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, expand
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.objective import Objective
from sfumato.diffusion.parameterization import PARAMETERIZATIONS
from sfumato.diffusion.schedules import VE, Cosine, Discrete, Flow
from sfumato.diffusion.times import LogitNormal, LogNormal, LossSecondMoment, Uniform
from sfumato.diffusion.weights import P2, EDMWeight, MinSNR, Simple, Uncertainty

NONE = Conditioning()
CASES = [
    ("eps", Discrete(steps=50)),
    ("x0", Cosine()),
    ("v", Discrete(steps=50, zero_snr=True)),
    ("flow", Flow(shift=3.0)),
    ("edm", VE()),
]


class Constant:
    """A network that says one number per sample and channel, and keeps what it was given."""

    def __init__(self, *output: torch.Tensor) -> None:
        self.output, self.seen = output, []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        self.seen.append((x, t))
        return torch.cat([o.expand(x.shape) for o in self.output], dim=1)


def oracle(kind: str, schedule: object, x0: torch.Tensor, error: float = 0.0) -> Denoiser:
    """A denoiser whose net knows x0 and is wrong about F by `error`."""
    p = PARAMETERIZATIONS[kind]

    def net(scaled: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        level = schedule(t / getattr(schedule, "multiplier", 1.0) if kind != "flow" else unshift(t, schedule))
        skip, out, inp = (expand(c, scaled) for c in p(level))
        return (x0 - skip * scaled / inp) / out + error

    return Denoiser(net, schedule, p)


def unshift(t: torch.Tensor, schedule: Flow) -> torch.Tensor:
    """Flow embeds the shifted time; its schedule takes the one before the shift."""
    return t / (schedule.shift - (schedule.shift - 1) * t)


@pytest.mark.parametrize(("kind", "schedule"), CASES)
def test_an_exact_denoiser_costs_nothing_and_a_wrong_output_its_square(kind, schedule):
    x0 = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    exact = Objective()(oracle(kind, schedule, x0), x0, NONE, Noise(range(6)))
    assert float(exact.loss.max()) < 1e-12
    wrong = Objective()(oracle(kind, schedule, x0, 0.5), x0, NONE, Noise(range(6)))
    torch.testing.assert_close(wrong.loss, torch.full((6,), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("weight", [MinSNR(), P2(), EDMWeight()])
def test_the_weight_multiplies_the_loss(weight):
    schedule, x0, times = Discrete(steps=50), torch.randn(6, 3, 4, 4), Uniform()
    denoiser = Denoiser(Constant(torch.zeros(1)), schedule, PARAMETERIZATIONS["v"])
    plain = Objective(times=times)(denoiser, x0, NONE, Noise(range(6)))
    ours = Objective(times=times, weight=weight)(denoiser, x0, NONE, Noise(range(6)))
    level = schedule(times.sample(schedule, Noise(range(6))).t)
    torch.testing.assert_close(ours.loss, plain.loss * weight(level, denoiser.parameterization).float())
    torch.testing.assert_close(ours.metrics["mse"], plain.loss)


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_time_and_noise_of_a_sample_depend_on_its_own_seed(offset):
    net = Constant(torch.zeros(1))
    denoiser = Denoiser(net, Flow(), PARAMETERIZATIONS["flow"])
    x0 = torch.randn(3, 2, 4, 4)
    objective = Objective(times=LogitNormal(), offset_noise=offset)
    together = objective(denoiser, x0, NONE, Noise([11, 12, 13]))
    alone = objective(denoiser, x0[1:2], NONE, Noise([12]))
    assert torch.equal(net.seen[0][0][1], net.seen[1][0][0])
    assert float(net.seen[0][1][1]) == float(net.seen[1][1][0])
    torch.testing.assert_close(together.loss[1], alone.loss[0], rtol=1e-6, atol=0)
    assert float(together.loss[0]) != float(together.loss[1])


def test_offset_noise_is_constant_per_channel_and_part_of_the_target():
    x0 = torch.zeros(2, 600, 4, 4)
    seen = {}
    for offset in (0.0, 0.5):
        net = Constant(torch.zeros(1))
        denoiser = Denoiser(net, VE(sigma_min=1.0, sigma_max=1.0001), PARAMETERIZATIONS["eps"])
        loss = Objective(offset_noise=offset)(denoiser, x0, NONE, Noise([1, 2])).loss
        seen[offset] = net.seen[0][0]
        # The network says 0 and the target is the noise: the loss is the noise's mean square.
        torch.testing.assert_close(loss, seen[offset].square().mean(dim=(1, 2, 3)), rtol=1e-3, atol=0)
    shift = seen[0.5] - seen[0.0]
    assert float(shift.std(dim=(2, 3)).max()) < 1e-5
    # 1200 channels: the standard error of the deviation is 0.01.
    assert float(shift[:, :, 0, 0].std()) == pytest.approx(0.5, abs=0.04)


def test_the_bound_trains_the_variance_alone():
    """Its gradient in the mean channels is zero: the hybrid loss has there the gradient of the plain one."""
    x0 = torch.rand(4, 3, 4, 4) * 2 - 1
    schedule, grads = Discrete(steps=50), {}
    for vlb in (0.0, 10.0):
        mean, var = (torch.full((4, 3, 4, 4), v, requires_grad=True) for v in (0.1, 0.2))
        denoiser = Denoiser(Constant(mean, var), schedule, PARAMETERIZATIONS["eps"], learned_var=True)
        losses = Objective(vlb=vlb)(denoiser, x0, NONE, Noise(range(4)))
        losses.loss.sum().backward()
        grads[vlb] = (mean.grad, var.grad)
        assert ("vb" in losses.metrics) == (vlb > 0)
    assert torch.equal(grads[0.0][0], grads[10.0][0])
    assert float(grads[0.0][1].abs().max()) == 0
    assert float(grads[10.0][1].abs().min()) > 0


def test_the_bound_is_weighted_by_the_number_of_steps():
    x0, mean, var = torch.rand(4, 3, 4, 4), torch.zeros(1), torch.zeros(1)
    denoiser = Denoiser(Constant(mean, var), Discrete(steps=50), PARAMETERIZATIONS["eps"], learned_var=True)
    losses = Objective(vlb=0.01)(denoiser, x0, NONE, Noise(range(4)))
    torch.testing.assert_close(losses.loss, losses.metrics["mse"] + 0.5 * losses.metrics["vb"])


@pytest.mark.parametrize(("schedule", "learned"), [(Discrete(steps=50), False), (Flow(), True)])
def test_the_bound_asks_for_a_learned_variance_on_a_table(schedule, learned):
    net = Constant(*[torch.zeros(1)] * (1 + learned))
    denoiser = Denoiser(net, schedule, PARAMETERIZATIONS["v"], learned_var=learned)
    with pytest.raises(ValueError, match=r"vlb 0.001 needs learned_var=True and a discrete schedule"):
        Objective(vlb=0.001)(denoiser, torch.zeros(2, 3, 4, 4), NONE, Noise([0, 1]))


def test_learned_uncertainty_divides_the_weighted_loss():
    denoiser = Denoiser(Constant(torch.zeros(1)), VE(), PARAMETERIZATIONS["edm"])
    x0, objective = torch.randn(4, 3, 4, 4), Objective(times=LogNormal(), weight=EDMWeight())
    u = torch.tensor([0.5, -1.0, 0.0, 2.0], requires_grad=True)
    plain = objective(denoiser, x0, NONE, Noise(range(4)))
    ours = objective(denoiser, x0, NONE, Noise(range(4)), uncertainty=lambda level: u)
    torch.testing.assert_close(ours.loss, plain.loss / u.exp() + u)
    (grad,) = torch.autograd.grad(ours.loss.sum(), u)
    torch.testing.assert_close(grad, 1 - plain.loss / u.exp())
    neutral = objective(denoiser, x0, NONE, Noise(range(4)), uncertainty=Uncertainty())
    torch.testing.assert_close(neutral.loss, plain.loss)


def test_the_importance_sampler_is_told_the_losses_and_its_weights_are_applied():
    schedule, times = Discrete(steps=4, start=0.01, end=0.3), LossSecondMoment(4, history=1, uniform=0.0)
    denoiser = Denoiser(Constant(torch.zeros(1)), schedule, PARAMETERIZATIONS["eps"])
    objective, x0 = Objective(times=times), torch.randn(40, 2)
    objective(denoiser, x0, NONE, Noise(range(40)))
    p = times.weights()
    assert float((p - 0.25).abs().max()) > 0.01
    drawn = times.sample(schedule, Noise(range(40)))
    losses = objective(denoiser, x0, NONE, Noise(range(40)))
    torch.testing.assert_close(drawn.importance, 1 / (4 * p[drawn.t.long()]))
    torch.testing.assert_close(losses.loss, losses.metrics["mse"] * drawn.importance.float())


def test_gradients_reach_the_network_and_metrics_carry_none():
    layer = torch.nn.Conv2d(3, 3, 1)
    denoiser = Denoiser(lambda x, t, cond: layer(x), Flow(), PARAMETERIZATIONS["flow"])
    losses = Objective()(denoiser, torch.randn(2, 3, 4, 4), NONE, Noise([0, 1]))
    losses.loss.mean().backward()
    assert float(layer.weight.grad.abs().min()) > 0
    assert not losses.metrics["mse"].requires_grad


@pytest.mark.parametrize(
    "objective",
    [
        Objective(),
        Objective(times=LogNormal(-0.4, 1.0), weight=EDMWeight(0.5)),
        Objective(times=LossSecondMoment(4000), weight=Simple(), vlb=0.001, offset_noise=0.05),
        Objective(times=LogitNormal(), weight=MinSNR(5.0)),
    ],
)
def test_objectives_survive_json(objective):
    assert from_json(Objective, to_json(objective)) == objective


def test_negative_weights_are_refused():
    with pytest.raises(ValueError, match=r"vlb -1.0"):
        Objective(vlb=-1.0)
