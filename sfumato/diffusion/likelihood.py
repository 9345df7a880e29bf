"""The variational bound in bits per dimension: posteriors, KL terms, the decoder term, the prior term.

Ho et al. 2020 (arXiv:2006.11239), sec. 2 and 3.3; learned variances: Nichol & Dhariwal 2021
(arXiv:2102.09672). It holds for any levels, not for variance-preserving ones only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sfumato.core.types import Level, expand
from sfumato.diffusion.denoiser import DenoiseFn
from sfumato.diffusion.grid import Grid
from sfumato.diffusion.schedules import Discrete

__all__ = [
    "Bits",
    "Gaussian",
    "Term",
    "Transitions",
    "bits_per_dim",
    "bound_term",
    "discretized_log_likelihood",
    "normal_kl",
    "prior_bits",
    "training_transitions",
    "transitions",
    "vb_bits",
]

Variance = Literal["small", "large"]


class Gaussian(NamedTuple):
    """Mean and log-variance, each (B, C, ...) or broadcastable to it."""

    mean: Tensor
    log_var: Tensor


class Transitions(NamedTuple):
    """q(x_s | x_t, x0) = N(on_x0 x0 + on_x x_t, exp(log_small)) of one or more steps t -> s, s the cleaner.

    Each (n,) or (), float64. At the step to sigma_s = 0, whose variance is 0, log_small is that of the step
    before it.
    """

    on_x0: Tensor
    on_x: Tensor
    log_small: Tensor
    log_large: Tensor
    """ln sigma_{t|s}^2, the variance of x_t given x_s: beta_t of a variance-preserving schedule."""
    last: Tensor
    """bool: the step to sigma_s = 0, where p(x0 | x_t) is the decoder."""

    def at(self, index: int | Tensor) -> Transitions:
        """The steps at `index`: an int, or (B,) int64 for one step per sample."""
        return Transitions(*(v[index] for v in self))

    def posterior(
        self, x0: Tensor, x_t: Tensor, var: Tensor | None = None, variance: Variance = "small"
    ) -> Gaussian:
        """The Gaussian of x_s, with the log-variance of q or of a model.

        Args:
            x0: clean sample, or the model's estimate of it, (B, C, ...).
            x_t: (B, C, ...).
            var: learned-range coordinate (`Denoised.var`): -1 = small, 1 = large.
            variance: if it is not learned; "large" at the last step is "small" (the decoder's better
            likelihood).
        """
        mean = expand(self.on_x0, x0) * x0 + expand(self.on_x, x0) * x_t
        small, large = expand(self.log_small, x0), expand(self.log_large, x0)
        if var is not None:
            share = (var + 1) / 2
            return Gaussian(mean, share * large + (1 - share) * small)
        if variance == "large":
            return Gaussian(mean, torch.where(expand(self.last, x0).bool(), small, large))
        return Gaussian(mean, small)


def transitions(grid: Grid) -> Transitions:
    """All n steps of a grid without jumps, in its order, noisy to clean."""
    alpha_t, alpha_s, sigma_t, sigma_s = grid.alpha[:-1], grid.alpha[1:], grid.sigma[:-1], grid.sigma[1:]
    variance_t, variance_s = sigma_t.square(), sigma_s.square()
    forward = variance_t - (alpha_t / alpha_s).square() * variance_s
    last = sigma_s == 0
    small = forward * variance_s / variance_t
    # A grid of one step has no step before the last; its own forward variance is what remains.
    earlier = torch.cat([forward[:1], small[:-1]])
    log_small = torch.where(last, earlier, small).log()
    on_x = alpha_t / alpha_s * variance_s / variance_t
    return Transitions(forward * alpha_s / variance_t, on_x, log_small, forward.log(), last)


@lru_cache(maxsize=8)
def training_transitions(schedule: Discrete) -> Transitions:
    """The steps t -> t - 1 of a discrete schedule by index t, (steps,); t = 0 ends at the clean sample."""
    forward = transitions(Grid.of(schedule, torch.arange(schedule.steps - 1, -1, -1)))
    return Transitions(*(v.flip(0) for v in forward))


def normal_kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) of diagonal Gaussians in nats, elementwise."""
    squared = (p.mean - q.mean).square() * torch.exp(-q.log_var)
    return 0.5 * (-1 + q.log_var - p.log_var + torch.exp(p.log_var - q.log_var) + squared)


def discretized_log_likelihood(x: Tensor, gaussian: Gaussian) -> Tensor:
    """Log-probability, in nats, of 8-bit values x in [-1, 1] under a Gaussian cut into 256 bins, elementwise.

    Bins are x +- 1/255; the outer ones reach to infinity. Probabilities are at least 1e-12. The normal
    distribution function is the tanh approximation of the DDPM code, so that published likelihoods compare.
    """
    centered, inverse = x - gaussian.mean, torch.exp(-0.5 * gaussian.log_var)
    above = _cdf(inverse * (centered + 1 / 255))
    below = _cdf(inverse * (centered - 1 / 255))
    inner = torch.where(x > 0.999, 1 - below, above - below)
    return torch.where(x < -0.999, above, inner).clamp_min(1e-12).log()


def vb_bits(true: Gaussian, model: Gaussian, x0: Tensor, last: Tensor) -> Tensor:
    """One term of the bound per sample in bits per dimension, (B,).

    KL(q(x_s | x_t, x0) || p(x_s | x_t)), and -log p(x0 | x_t) of 8-bit pictures where `last`, () or (B,), is
    true.
    """
    nats = torch.where(
        expand(last, x0).bool(), -discretized_log_likelihood(x0, model), normal_kl(true, model)
    )
    return nats.flatten(1).mean(dim=1) / math.log(2)


def prior_bits(x0: Tensor, level: Level) -> Tensor:
    """KL(q(x_T | x0) || N(0, alpha^2 + sigma^2)) in bits per dimension, (B,).

    The standard normal for variance-preserving levels. Nothing that is trained changes it.
    """
    log_var, prior = 2 * level.sigma.log(), (level.alpha.square() + level.sigma.square()).log()
    q = Gaussian(expand(level.alpha, x0) * x0, expand(log_var, x0))
    nats = normal_kl(q, Gaussian(torch.zeros_like(x0), expand(prior, x0)))
    return nats.flatten(1).mean(dim=1) / math.log(2)


class Term(NamedTuple):
    """One term of the bound of a batch."""

    bits: Tensor
    """(B,) per dimension."""
    x0_mse: Tensor
    """(B,): mean squared error of the estimated x0."""
    eps_mse: Tensor
    """(B,)."""


class Bits(NamedTuple):
    """The bound of a batch in bits per dimension; terms are by step, noisy to clean."""

    total: Tensor
    """(B,): sum of the terms and the prior."""
    prior: Tensor
    """(B,)."""
    terms: Tensor
    """(B, n)."""
    x0_mse: Tensor
    """(B, n), as of Term."""
    eps_mse: Tensor
    """(B, n)."""


@torch.no_grad()
def bound_term(
    denoise: DenoiseFn,
    schedule: Discrete,
    t: Tensor,
    x0: Tensor,
    eps: Tensor,
    *,
    variance: Variance = "small",
) -> Term:
    """An estimate of the term of the step from index t, in the bound over all steps of a schedule.

    Args:
        denoise, x0, variance: see `bits_per_dim`.
        t: (B,) int64; 0 is the decoder's term.
        eps: (B, C, ...) the noise of x_t.
    """
    return _term(denoise, schedule(t), training_transitions(schedule).at(t), x0, eps, variance)


@torch.no_grad()
def bits_per_dim(
    denoise: DenoiseFn,
    grid: Grid,
    x0: Tensor,
    noise: Callable[[Tensor], Tensor],
    *,
    variance: Variance = "small",
) -> Bits:
    """An estimate of the bound with one draw of noise per step.

    Args:
        denoise: with a static threshold for the published numbers.
        grid: all steps of training, or the respaced ones of sampling.
        x0: (B, C, ...) 8-bit pictures in [-1, 1].
        noise: called once per step.
        variance: of the model, if it is not learned.

    Raises: ValueError if the grid has jumps.
    """
    if grid.jumps:
        raise ValueError("a bound needs a grid without RePaint jumps")
    steps = transitions(grid)
    terms = [_term(denoise, grid.level(i), steps.at(i), x0, noise(x0), variance) for i in range(len(grid))]
    prior = prior_bits(x0, grid.level(0))
    vb, x0_errors, eps_errors = (torch.stack(rows, dim=1) for rows in zip(*terms, strict=True))
    return Bits(vb.sum(dim=1) + prior, prior, vb, x0_errors, eps_errors)


def _term(
    denoise: DenoiseFn, level: Level, step: Transitions, x0: Tensor, eps: Tensor, variance: Variance
) -> Term:
    x_t = expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * eps
    denoised = denoise(x_t, level)
    model = step.posterior(denoised.x0, x_t, denoised.var, variance)
    errors = ((a - b).square().flatten(1).mean(dim=1) for a, b in ((denoised.x0, x0), (denoised.eps, eps)))
    return Term(vb_bits(step.posterior(x0, x_t), model, x0, step.last), *errors)


def _cdf(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
