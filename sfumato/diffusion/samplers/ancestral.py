"""Samplers that draw x_s from a Gaussian around the posterior mean: ddpm, ddim and Euler ancestral."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from sfumato.core.types import Denoised
from sfumato.diffusion.grid import Grid, Point
from sfumato.diffusion.samplers.algebra import check_descends, combine
from sfumato.diffusion.sampling import SAMPLERS, Run

__all__ = ["Variances", "ddim", "ddpm", "euler_ancestral", "lcm"]


@SAMPLERS("ddpm")
def ddpm(run: Run, x: Tensor, i: int, *, variance: Literal["small", "large"] = "small") -> Tensor:
    """Ancestral step x_t -> x_s from the DDPM posterior.

    mean = alpha_s v / sigma_t^2 x0 + (alpha_t / alpha_s) sigma_s^2 / sigma_t^2 x_t, v = sigma_t^2 - (alpha_t
    / alpha_s)^2 sigma_s^2

    An external score shifts the mean by variance * grad.

    Args:
        x: noisy sample at level i, (B, C, ...).
        variance: "small" = v sigma_s^2 / sigma_t^2, "large" = v; ignored where the network learned it.

    Returns: sample at level i + 1; noiseless if that has sigma = 0.
    Raises: ValueError if the grid ascends at i, or `variance` is unknown.

    Ho et al. 2020, algorithm 2 (arXiv:2006.11239); learned range: Nichol & Dhariwal 2021, eq. 15
    (arXiv:2102.09672).
    """
    now, after = check_descends(run.grid, i, "ddpm")
    denoised = run.at(x, i)
    variances = Variances.of(run.grid, i)
    spread = variances.choose(denoised, variance)
    ratio = now.alpha / after.alpha
    mean = combine(
        (after.alpha * variances.large / now.sigma**2, denoised.x0),
        (ratio * (after.sigma / now.sigma) ** 2, x),
    )
    if denoised.grad is not None:
        mean = mean + spread * denoised.grad
    if after.sigma <= 0:
        return mean
    return mean + (spread.sqrt() if isinstance(spread, Tensor) else math.sqrt(spread)) * run.noise(x)


@SAMPLERS("ddim")
def ddim(run: Run, x: Tensor, i: int, *, eta: float = 0.0) -> Tensor:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - tau^2) eps + tau z.

    tau = eta sigma_s / sigma_t sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2), at most sigma_s. eta = 0 is
    deterministic (order 1) and also walks a reversed grid (inversion); eta = 1 is `ddpm` with "small".

    Raises: ValueError if eta is negative, or positive where the grid ascends.

    Song et al. 2021 (arXiv:2010.02502), eq. 12 and 16, for any (alpha, sigma).
    """
    return _denoise_and_renoise(run, x, i, eta, 1.0)


@SAMPLERS("euler_ancestral")
def euler_ancestral(run: Run, x: Tensor, i: int, *, eta: float = 1.0, s_noise: float = 1.0) -> Tensor:
    """Euler step to below the next noise level, then noise up to it; s_noise scales that noise.

    k-diffusion's ancestral step: the rule of `ddim` with this eta (Song et al. 2021, arXiv:2010.02502).
    """
    return _denoise_and_renoise(run, x, i, eta, s_noise)


@SAMPLERS("lcm")
def lcm(run: Run, x: Tensor, i: int, *, scaling: float = 10.0) -> Tensor:
    """x_s = alpha_s f + sigma_s z, f = (d^2 x_t + tau sqrt(tau^2 + d^2) x0) / (tau^2 + d^2), tau = scaling t.

    For networks distilled to consistency over the indices t of a discrete schedule, with d = 0.5. For any
    other network the steps do not converge to the data, whatever their number: there is no order.

    Luo et al. 2023 (arXiv:2310.04378), algorithm 3; f is that of Song et al. 2023 (arXiv:2303.01469), eq. 5.
    """
    after, denoised = run.grid.points[i + 1], run.folded(x, i)
    tau, d = scaling * float(run.grid.level(i).t), 0.5
    total = tau**2 + d**2
    clean = combine((d**2 / total, x), (tau / math.sqrt(total), denoised.x0))
    return clean if after.sigma <= 0 else combine((after.alpha, clean), (after.sigma, run.noise(x)))


class Variances:
    """Variances of the reverse step i: `small` is the posterior's, `large` the forward step's.

    `floor` replaces a `small` of 0 in logarithms: that of the step before, which is how the reference clips
    the posterior's log-variance (entry 0 := entry 1).
    """

    def __init__(self, small: float, large: float, floor: float) -> None:
        self.small, self.large, self.floor = small, large, floor

    @staticmethod
    def of(grid: Grid, i: int) -> Variances:
        """Variances of the step from level i to level i + 1."""
        small, large = _posterior(*grid.points[i : i + 2])
        if small > 0:
            return Variances(small, large, small)
        return Variances(small, large, _posterior(*grid.points[i - 1 : i + 1])[0] if i > 0 else 1e-20)

    def choose(self, denoised: Denoised, variance: str) -> float | Tensor:
        """The variance: interpolated in the logarithm if it was learned, else the one that is named."""
        if denoised.var is not None:
            low, high = math.log(self.floor), math.log(self.large)
            return torch.exp((denoised.var + 1) * ((high - low) / 2) + low)
        if variance not in ("small", "large"):
            raise ValueError(f"ddpm variance {variance!r}; allowed: small, large")
        if variance == "small":
            return self.small
        return self.large if self.small > 0 else self.floor


def _posterior(now: Point, after: Point) -> tuple[float, float]:
    """Variance of q(x_s | x_t, x_0) and of q(x_t | x_s)."""
    large = now.sigma**2 - (now.alpha / after.alpha * after.sigma) ** 2
    return large * (after.sigma / now.sigma) ** 2, large


def _denoise_and_renoise(run: Run, x: Tensor, i: int, eta: float, s_noise: float) -> Tensor:
    now, after = run.grid.points[i], run.grid.points[i + 1]
    denoised = run.folded(x, i)
    tau = 0.0
    if eta != 0:
        if eta < 0:
            raise ValueError(f"eta={eta}: it must not be negative; 0 = deterministic")
        check_descends(run.grid, i, "ddim with eta > 0")
        tau = min(eta * math.sqrt(_posterior(now, after)[0]), after.sigma)
    x = combine((after.alpha, denoised.x0), (math.sqrt(after.sigma**2 - tau**2), denoised.eps))
    return torch.add(x, run.noise(x), alpha=tau * s_noise) if tau > 0 else x
