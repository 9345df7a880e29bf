"""The reverse SDE of a straight path with a free amount of noise, as SiT draws with it."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from sfumato.core.types import Denoised
from sfumato.diffusion.grid import Point
from sfumato.diffusion.samplers.algebra import check_descends, combine
from sfumato.diffusion.sampling import SAMPLERS, Run

__all__ = ["flow_sde"]

Diffusion = Literal["sigma", "constant", "sbdm", "decreasing", "bump"]


@SAMPLERS("flow_sde")
def flow_sde(
    run: Run,
    x: Tensor,
    i: int,
    *,
    diffusion: Diffusion = "sigma",
    scale: float = 1.0,
    solver: Literal["euler", "heun"] = "euler",
    last_step: Literal["x0", "mean"] = "x0",
) -> Tensor:
    """Step of dz = (x0 - eps - w eps / s) dr + sqrt(2 w) dW with r = 1 - s from noise to data.

    z and s are the straight coordinates x / (alpha + sigma) and sigma / (alpha + sigma), so that any schedule
    can be walked; -eps / s is the score of z. The step to sigma = 0 adds no noise.

    Args:
        diffusion: w(s) = s (SiT's sigma and linear), 1 (constant), s / (1 - s) (SBDM, infinite at pure
            noise), (cos(pi r) + 1)^2 / 4 (decreasing) or sin^2(pi r) (bump, SiT's increasing-decreasing).
        scale: factor of w; 0 = the probability flow.
        solver: Euler-Maruyama, order 1 with one evaluation, or Heun after the noise, with two.
        last_step: what comes at sigma = 0: x0, which is SiT's Euler and Tweedie; or the drift without noise,
            x0 - w eps, SiT's default Mean. Give it a short step, by `linspace` with last=0.04.

    Ma et al. 2024 (arXiv:2401.08740), eq. 4 and section 2.3.

    Raises: ValueError if the grid ascends at i, or a knob is out of range.
    """
    now, after = check_descends(run.grid, i, "flow_sde")
    if scale < 0 or solver not in ("euler", "heun") or last_step not in ("x0", "mean"):
        raise ValueError(
            f"flow_sde with scale {scale:g}, solver {solver!r}, last_step {last_step!r}; "
            "allowed: scale >= 0; euler, heun; x0, mean"
        )
    length, w = now.tau - after.tau, scale * _amount(diffusion, now.tau)
    spread = math.sqrt(2 * w * length)
    z = x / (now.alpha + now.sigma)
    if after.sigma <= 0:
        w = w if last_step == "mean" else 0.0
        return combine((after.alpha, z), (after.alpha * length, _drift(run.folded(x, i), now, w)))
    if solver == "euler":
        drift = _drift(run.folded(x, i), now, w)
        z = combine((1.0, z), (length, drift), *([(spread, run.noise(x))] if spread else []))
        return z * (after.alpha + after.sigma)
    if spread:
        z = combine((1.0, z), (spread, run.noise(x)))
    first = _drift(run.folded(z * (now.alpha + now.sigma), i), now, w)
    ahead = combine((1.0, z), (length, first)) * (after.alpha + after.sigma)
    second = _drift(run.between(ahead, run.grid.level(i + 1)), after, scale * _amount(diffusion, after.tau))
    return combine((1.0, z), (length / 2, first), (length / 2, second)) * (after.alpha + after.sigma)


def _drift(denoised: Denoised, point: Point, w: float) -> Tensor:
    return combine((1.0, denoised.x0), (-1 - w / point.tau, denoised.eps))


def _amount(diffusion: str, s: float) -> float:
    """w(s). Raises: ValueError for an unknown name, or where it is infinite."""
    if diffusion == "sigma":
        return s
    if diffusion == "constant":
        return 1.0
    if diffusion == "decreasing":
        return (math.cos(math.pi * (1 - s)) + 1) ** 2 / 4
    if diffusion == "bump":
        return math.sin(math.pi * s) ** 2
    if diffusion != "sbdm":
        raise ValueError(
            f"flow_sde diffusion {diffusion!r}; allowed: sigma, constant, sbdm, decreasing, bump"
        )
    if s >= 1:
        raise ValueError(
            "flow_sde diffusion 'sbdm' is infinite at pure noise; use 'sigma', or a schedule with end < 1"
        )
    return s / (1 - s)
