"""Score guidance: gradients, and the posterior that a Gaussian classifier implies."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from sfumato.core.types import Conditioning, Denoised, Level
from sfumato.diffusion.constraints import Static, thresholded
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.grid import SPACINGS
from sfumato.diffusion.guidance import CFG
from sfumato.diffusion.parameterization import eps
from sfumato.diffusion.sampling import SAMPLERS, Run, integrate
from sfumato.diffusion.schedules import Discrete
from sfumato.diffusion.score import ScoreGuidance, class_log_prob, gradient, score_guided, similarity

SCHEDULE = Discrete(steps=1000)
LEVEL = SCHEDULE(torch.tensor(500))
NONE = Conditioning()


def quadratic(x_t: torch.Tensor, level: Level) -> torch.Tensor:
    """-|x|^2 / 2 per sample, whose gradient is -x."""
    return -0.5 * x_t.square().flatten(1).sum(1)


def zero_net(x: torch.Tensor, t: torch.Tensor, cond: Conditioning) -> torch.Tensor:
    return torch.zeros_like(x)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_gradient_inside_any_grad_mode(context):
    weight = nn.Parameter(torch.tensor(2.0))
    with context():
        x = torch.randn(3, 2, 4)
        grad = gradient(lambda x_t, level: weight * quadratic(x_t, level), x, LEVEL)
        torch.testing.assert_close(grad, -2 * x)
    assert weight.grad is None


def test_gradient_refuses_anything_but_one_number_per_sample():
    with pytest.raises(ValueError, match=r"shape \(3, 2\); it must be one number per sample, \(3,\)"):
        gradient(lambda x_t, level: x_t, torch.randn(3, 2), LEVEL)


def test_class_log_prob_is_the_softmax_of_the_label_at_the_network_time():
    seen = []

    def classifier(x, t):
        seen.append(t)
        return x.flatten(1)

    x, label = torch.randn(2, 5), torch.tensor([1, 4])
    ours = class_log_prob(classifier, label)(x, LEVEL)
    torch.testing.assert_close(ours, torch.log(torch.softmax(x, 1)[range(2), label]))
    assert seen[0].tolist() == [500.0, 500.0]


def test_similarity_grows_along_its_gradient():
    encoder, wanted, x = (lambda x, t: x.flatten(1)), torch.randn(2, 6), torch.randn(2, 6)
    log_prob = similarity(encoder, wanted, temperature=10.0)
    assert torch.allclose(log_prob(wanted, LEVEL), torch.tensor(10.0))
    moved = x + 1e-2 * gradient(log_prob, x, LEVEL)
    assert (log_prob(moved, LEVEL) > log_prob(x, LEVEL)).all()


def test_score_is_scaled_added_to_an_inner_one_and_kept_by_thresholds():
    inner = ScoreGuidance(quadratic, scale=2.0)
    denoiser = Denoiser(zero_net, SCHEDULE, eps)
    x = torch.randn(2, 3, 4, 4)
    fn = ScoreGuidance(quadratic, scale=3.0, inner=inner).bind(denoiser, NONE, NONE)
    torch.testing.assert_close(fn(x, LEVEL).grad, -5 * x)
    bounded = thresholded(fn, Static())(x, LEVEL)
    torch.testing.assert_close(bounded.grad, -5 * x)
    assert bounded.x0.abs().max() <= 1
    assert ScoreGuidance(quadratic, scale=0.0).bind(denoiser, NONE, NONE)(x, LEVEL).grad is None


def test_inner_guidance_is_applied():
    net = lambda x, t, cond: cond.pooled[:, :, None].expand_as(x)  # noqa: E731
    denoiser, x = Denoiser(net, SCHEDULE, eps), torch.randn(2, 3, 4)
    cond, null = Conditioning(pooled=torch.ones(2, 3)), Conditioning(pooled=torch.zeros(2, 3))
    fn = ScoreGuidance(quadratic, inner=CFG(4.0)).bind(denoiser, cond, null)
    torch.testing.assert_close(fn(x, LEVEL).eps, torch.full_like(x, 4.0))


@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 400), ("ddpm", 400), ("heun", 60)])
def test_a_gaussian_classifier_gives_the_product_of_the_gaussians(sampler, steps):
    """Prior N(m, s^2), likelihood of x_0 N(y; x_0, r^2): the walk must end at the posterior's mean.

    grad_x log p(y | x_t) is exact: y given x_t is normal around E[x_0 | x_t].
    """
    m, s, y, r = 0.5, 0.8, -1.0, 0.6

    def prior(x: torch.Tensor, level: Level) -> Denoised:
        total = level.alpha**2 * s**2 + level.sigma**2
        x0 = m + level.alpha * s**2 / total * (x - level.alpha * m)
        return Denoised(x0, (x - level.alpha * x0) / level.sigma)

    def log_prob(x: torch.Tensor, level: Level) -> torch.Tensor:
        total = level.alpha**2 * s**2 + level.sigma**2
        variance = s**2 * level.sigma**2 / total + r**2
        return -0.5 * (y - prior(x, level).x0).square().sum(1) / variance

    grid = SPACINGS["linspace"](SCHEDULE, steps)
    run = Run(score_guided(prior, partial(gradient, log_prob)), grid, torch.randn_like)
    start = torch.randn(4000, 1, dtype=torch.float64)
    end = integrate(SAMPLERS[sampler], run, start)
    precision = 1 / s**2 + 1 / r**2
    # Standard error of 4000 samples is 0.008; the walks themselves are within 0.01 at these numbers of steps.
    assert float(end.mean()) == pytest.approx((m / s**2 + y / r**2) / precision, abs=0.03)
    assert float(end.std()) == pytest.approx(precision**-0.5, abs=0.03)
    plain = integrate(SAMPLERS[sampler], Run(prior, grid, torch.randn_like), start)
    assert float(plain.mean()) == pytest.approx(m, abs=0.05)
