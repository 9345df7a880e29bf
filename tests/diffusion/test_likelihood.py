"""The variational bound: closed forms, and the bound of a denoiser that is exact."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from sfumato.core.random import Noise
from sfumato.core.types import Denoised, Level
from sfumato.diffusion.grid import SPACINGS, repaint
from sfumato.diffusion.likelihood import (
    Gaussian,
    bits_per_dim,
    discretized_log_likelihood,
    normal_kl,
    prior_bits,
    training_transitions,
    transitions,
    vb_bits,
)
from sfumato.diffusion.schedules import VE, Cosine, Discrete, Flow

SCHEDULE = Discrete(formula="cosine", steps=200)
GRIDS = {
    "discrete": SPACINGS["respaced"](SCHEDULE, 20),
    "flow": SPACINGS["trailing"](Flow(), 12),
    "ve": SPACINGS["karras"](VE(), 12),
    "cosine": SPACINGS["trailing"](Cosine(), 12),
}


def test_kl_is_torchs():
    p, q = (Gaussian(torch.randn(50), torch.randn(50)) for _ in range(2))
    normals = [Normal(g.mean, (0.5 * g.log_var).exp()) for g in (p, q)]
    torch.testing.assert_close(normal_kl(p, q), kl_divergence(*normals), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("log_var", [-12.0, -6.0, -2.0, 0.0])
def test_probabilities_of_the_256_values_sum_to_one(log_var):
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    p = discretized_log_likelihood(x, Gaussian(torch.full_like(x, 0.13), torch.full_like(x, log_var))).exp()
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-9)
    exact = Normal(0.13, math.exp(log_var / 2))
    inner = exact.cdf(x + 1 / 255) - exact.cdf(x - 1 / 255)
    # 5e-4 is the error of the tanh approximation of the normal distribution function.
    torch.testing.assert_close(p[1:-1], inner[1:-1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", GRIDS)
def test_posterior_is_bayes_rule_on_every_schedule(name):
    """q(x_s | x_t, x0) from the joint of x_s and x_t given x0, by conditioning a two-dimensional Gaussian."""
    grid = GRIDS[name]
    steps = transitions(grid)
    for i in range(len(grid) - 1):
        now, after = grid.points[i], grid.points[i + 1]
        ratio, variance_s, variance_t = now.alpha / after.alpha, after.sigma**2, now.sigma**2
        gain = ratio * variance_s / variance_t
        assert float(steps.on_x[i]) == pytest.approx(gain, rel=1e-9, abs=1e-12)
        assert float(steps.on_x0[i]) == pytest.approx(after.alpha - gain * now.alpha, rel=1e-6)
        # The variance of x_s left once x_t is known; a difference of nearly equal numbers in this form.
        left = variance_s - gain * ratio * variance_s
        assert float(steps.log_small[i].exp()) == pytest.approx(left, rel=1e-6, abs=1e-12)
    assert steps.last.tolist() == [False] * (len(grid) - 1) + [True]
    assert (float(steps.on_x0[-1]), float(steps.on_x[-1])) == pytest.approx((1.0, 0.0))
    assert float(steps.log_small[-1]) == float(steps.log_small[-2])


def test_learned_range_interpolates_and_large_is_small_at_the_last_step():
    steps, x = transitions(GRIDS["discrete"]), torch.randn(2, 3, 4)
    for i in (3, len(GRIDS["discrete"]) - 1):
        step = steps.at(i)
        small = step.posterior(x, x).log_var
        torch.testing.assert_close(step.posterior(x, x, torch.full_like(x, -1.0)).log_var, small.expand_as(x))
        top = step.posterior(x, x, torch.ones_like(x)).log_var
        torch.testing.assert_close(top, step.log_large.float().expand_as(x))
        large = step.posterior(x, x, variance="large").log_var
        assert float(large) == pytest.approx(float(small if step.last else step.log_large))


def test_training_transitions_are_the_full_walk_by_index():
    whole = transitions(SPACINGS["respaced"](SCHEDULE, SCHEDULE.steps))
    table = training_transitions(SCHEDULE)
    t = torch.tensor([0, 7, 199])
    for ours, theirs in zip(table.at(t), whole.at(SCHEDULE.steps - 1 - t), strict=True):
        assert torch.equal(ours, theirs)
    assert training_transitions(SCHEDULE) is table


def test_a_step_per_sample_equals_one_at_a_time():
    table, t = training_transitions(SCHEDULE), torch.tensor([0, 50, 199])
    x0, x_t, guess = (torch.rand(3, 2, 4) * 2 - 1 for _ in range(3))
    rows = table.at(t)
    together = vb_bits(rows.posterior(x0, x_t), rows.posterior(guess, x_t), x0, rows.last)
    for i in range(3):
        step, one = table.at(int(t[i])), slice(i, i + 1)
        true, model = step.posterior(x0[one], x_t[one]), step.posterior(guess[one], x_t[one])
        torch.testing.assert_close(vb_bits(true, model, x0[one], step.last)[0], together[i])


def test_prior_vanishes_where_nothing_of_the_picture_is_left():
    x0 = torch.rand(2, 3, 4, dtype=torch.float64)
    assert prior_bits(x0, Flow()(torch.tensor(1.0))).tolist() == [0.0, 0.0]
    level = SCHEDULE(torch.tensor(60))
    exact = kl_divergence(Normal(level.alpha * x0, level.sigma), Normal(0.0, 1.0)).mean(
        dim=(1, 2)
    ) / math.log(2)
    torch.testing.assert_close(prior_bits(x0, level), exact)


def test_bound_of_a_known_picture():
    """A denoiser that knows x0 pays nothing but the decoder's term, and a wrong one pays more."""
    x0 = torch.randint(256, (2, 3, 8, 8)).double() / 127.5 - 1
    grid = GRIDS["discrete"]

    def oracle(shift: float):
        def denoise(x_t: torch.Tensor, level: Level) -> Denoised:
            guess = x0 + shift
            return Denoised(guess, (x_t - level.alpha * guess) / level.sigma)

        return denoise

    exact, wrong = (bits_per_dim(oracle(s), grid, x0, Noise([1, 2])) for s in (0.0, 0.1))
    assert exact.terms.shape == (2, len(grid))
    assert float(exact.terms[:, :-1].abs().max()) < 1e-9
    assert float(exact.x0_mse.max()) == 0
    assert float(exact.eps_mse.max()) < 1e-20
    torch.testing.assert_close(wrong.x0_mse, torch.full_like(wrong.x0_mse, 0.01))
    assert (wrong.terms > exact.terms).all()
    torch.testing.assert_close(exact.total, exact.terms.sum(1) + exact.prior)
    assert (wrong.total > exact.total).all()


@pytest.mark.parametrize("steps", [10, 100])
def test_bound_of_gaussian_data_is_tight(steps):
    """With the exact mean and variance of x_s given x_t, Gaussian here, the bound is the likelihood."""
    s = 0.2
    x0 = (torch.randn(64, 400, dtype=torch.float64) * s * 127.5 + 0.5).round().clamp(
        -127, 128
    ) / 127.5 - 1 / 255
    grid = SPACINGS["respaced"](Discrete(), steps)
    table = transitions(grid)

    def denoise(x_t: torch.Tensor, level: Level) -> Denoised:
        step = table.at(grid.t.tolist().index(float(level.t)))
        total = level.alpha**2 * s**2 + level.sigma**2
        guess = level.alpha * s**2 / total * x_t
        left = s**2 * level.sigma**2 / total  # the variance of x0 given x_t
        posterior = torch.zeros(()) if step.last else step.log_small.exp()
        log_var = (posterior + step.on_x0**2 * left).log()
        share = (log_var - step.log_small) / (step.log_large - step.log_small)
        var = torch.full_like(x_t, float(2 * share - 1))
        return Denoised(guess, (x_t - level.alpha * guess) / level.sigma, var)

    bits = bits_per_dim(denoise, grid, x0, Noise(range(64)))
    exact = Gaussian(torch.zeros_like(x0), torch.full_like(x0, 2 * math.log(s)))
    expected = -discretized_log_likelihood(x0, exact).mean() / math.log(2)
    # One draw of noise per step: the terms of 25,600 dimensions have a standard error of 0.01 together. A bin
    # of 8 bits is nearly as wide as the first noise level, 0.01: that costs another hundredth of a bit.
    assert float(bits.total.mean()) == pytest.approx(float(expected), abs=0.03)
    plain = bits_per_dim(lambda x, at: replace(denoise(x, at), var=None), grid, x0, Noise(range(64)))
    assert plain.total.mean() > bits.total.mean() + 0.1


def test_bound_refuses_jumps():
    with pytest.raises(ValueError, match="without RePaint jumps"):
        bits_per_dim(
            lambda x, level: Denoised(x, x), repaint(GRIDS["discrete"], 2, 2), torch.zeros(1, 2), Noise([0])
        )
