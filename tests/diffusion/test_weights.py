"""Weights: the published formula for each parameterization, and what the learned one converges to."""

from __future__ import annotations

import pytest
import torch

from sfumato.core.config import from_json, to_json
from sfumato.core.types import Level
from sfumato.diffusion.parameterization import PARAMETERIZATIONS, edm, target
from sfumato.diffusion.schedules import VE, Discrete, Flow
from sfumato.diffusion.weights import P2, EDMWeight, MinSNR, Sigmoid, Simple, Uncertainty, WeightConfig

VP = Discrete()(torch.tensor([0.0, 10.0, 100.0, 300.0, 700.0, 999.0]))
SIGMAS = VE()(torch.log(torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0], dtype=torch.float64)) / 4)
FLOW = Flow()(torch.tensor([0.01, 0.3, 0.5, 0.9], dtype=torch.float64))


def snr(level: Level) -> torch.Tensor:
    return (level.alpha / level.sigma).square()


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_for_eps_x0_and_v(gamma):
    s = snr(VP)
    expected = {"eps": s.clamp_max(gamma) / s, "x0": s.clamp_max(gamma), "v": s.clamp_max(gamma) / (s + 1)}
    for kind, weight in expected.items():
        torch.testing.assert_close(MinSNR(gamma)(VP, PARAMETERIZATIONS[kind]), weight)


def test_p2_on_eps_is_the_paper_s_and_gamma_zero_is_simple():
    eps = PARAMETERIZATIONS["eps"]
    torch.testing.assert_close(P2(1.0, 1.0)(VP, eps), 1 / (1 + snr(VP)))
    torch.testing.assert_close(P2(0.5, 2.0)(VP, eps), (2 + snr(VP)).pow(-0.5))
    torch.testing.assert_close(P2(0.0)(VP, eps), Simple()(VP, eps))


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_weight_is_one_for_its_own_parameterization(sigma_data):
    torch.testing.assert_close(EDMWeight(sigma_data)(SIGMAS, edm(sigma_data)), torch.ones_like(SIGMAS.sigma))
    published = (SIGMAS.sigma**2 + sigma_data**2) / (SIGMAS.sigma * sigma_data) ** 2
    torch.testing.assert_close(EDMWeight(sigma_data)(SIGMAS, PARAMETERIZATIONS["x0"]), published)


def test_sigmoid_on_eps():
    torch.testing.assert_close(Sigmoid(2.0)(VP, PARAMETERIZATIONS["eps"]), torch.sigmoid(2.0 - snr(VP).log()))


@pytest.mark.parametrize("weight", [MinSNR(), P2(), EDMWeight(), Sigmoid(1.0)])
@pytest.mark.parametrize("level", [VP, FLOW])
def test_one_rule_means_the_same_loss_for_every_parameterization(weight, level):
    """The same wrong x0, seen as an error of each network's own output, must cost the same."""
    rows = len(level.t)
    x0, eps, error = (torch.randn(rows, 8, dtype=torch.float64) for _ in range(3))
    costs = []
    for kind in ("eps", "x0", "v", "flow", "edm"):
        if kind == "v" and level is FLOW:
            continue  # v is for variance-preserving levels
        p = PARAMETERIZATIONS[kind]
        alpha, sigma = level.alpha[:, None], level.sigma[:, None]
        wrong = x0 + error
        wrong_eps = (alpha * x0 + sigma * eps - alpha * wrong) / sigma
        output, goal = target(p, level, wrong, wrong_eps), target(p, level, x0, eps)
        costs.append(weight(level, p) * (output - goal).square().mean(1))
    for cost in costs[1:]:
        # float64, but errors of F are differences of numbers up to alpha / sigma = 100 times larger
        torch.testing.assert_close(cost, costs[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("weight", [Simple(), MinSNR(3.0), P2(0.5, 2.0), EDMWeight(0.7), Sigmoid(-1.0)])
def test_weights_survive_json(weight):
    assert from_json(WeightConfig, to_json(weight)) == weight


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MinSNR(0.0), "gamma 0.0"),
        (lambda: P2(-1.0), "gamma -1.0"),
        (lambda: P2(1.0, 0.0), "k 0.0"),
        (lambda: EDMWeight(0.0), "sigma_data 0.0"),
    ],
)
def test_values_out_of_range_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_uncertainty_starts_neutral_and_learns_the_logarithm_of_the_loss():
    """The least of loss / exp(u) + u is at u = ln(loss), level by level."""
    net = Uncertainty(64)
    level = Flow()(torch.linspace(0.05, 0.95, 40, dtype=torch.float64))
    loss = (0.1 + 3 * level.sigma).float()
    assert torch.equal(net(level), torch.zeros(40))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for _ in range(300):
        u = net(level)
        optimizer.zero_grad()
        (loss / u.exp() + u).mean().backward()
        optimizer.step()
    torch.testing.assert_close(net(level), loss.log(), rtol=0, atol=0.1)


def test_uncertainty_gradient():
    """d/du (loss / exp(u) + u) = 1 - loss / exp(u): 1 - loss at the start, where u = 0."""
    net, level, loss = Uncertainty(16), Flow()(torch.tensor([0.2, 0.6])), torch.tensor([3.0, 0.5])
    u = net(level)
    (grad,) = torch.autograd.grad((loss / u.exp() + u).sum(), u)
    torch.testing.assert_close(grad, 1 - loss)


def test_uncertainty_is_finite_at_both_ends_and_the_same_for_the_same_construction():
    ends = Flow()(torch.tensor([0.0, 1.0]))
    a, b = Uncertainty(), Uncertainty()
    a.out.weight.data.fill_(1.0)
    b.out.weight.data.fill_(1.0)
    assert a(ends).isfinite().all()
    assert torch.equal(a(ends), b(ends))
