"""Every sampler on data with a closed-form denoiser: mean and covariance, order of convergence, seeds.

For Gaussian data every step is linear in x and in the noise, so the mean and covariance that a sampler
produces can be computed exactly (see `Responses` in conftest.py): what is left is the error of its
discretization, not of a sample.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from sfumato.core.random import Noise
from sfumato.core.types import Conditioning
from sfumato.diffusion import (
    PARAMETERIZATIONS,
    SAMPLERS,
    SCHEDULES,
    SPACINGS,
    VE,
    Cosine,
    Flow,
    Grid,
    Run,
    integrate,
)

# schedule, spacing, knobs of the spacing, network time -> the schedule's own
FAMILIES = {
    "linear": (SCHEDULES["linear"](), "trailing", {}, lambda t: t),
    "scaled_linear": (SCHEDULES["scaled_linear"](), "leading", {"offset": 1}, lambda t: t),
    "cosine": (SCHEDULES["cosine"](), "respaced", {}, lambda t: t),
    "zero_snr": (SCHEDULES["linear"](zero_snr=True), "trailing", {}, lambda t: t),
    "rescaled": (SCHEDULES["linear"](steps=400, rescale_timesteps=True), "linspace", {}, lambda t: t / 2.5),
    "continuous_cosine": (Cosine(), "linspace", {}, lambda t: t),
    "ve": (VE(), "karras", {}, lambda t: t),
    "flow": (Flow(multiplier=1000), "linspace", {}, lambda t: t / 1000),
    "flow_shift3": (Flow(shift=3), "linspace", {}, lambda t: t / (3 - 2 * t)),
}
PURE_NOISE = {"zero_snr", "continuous_cosine", "flow", "flow_shift3"}
FIRST_ORDER = {"ddpm", "ddim", "euler", "euler_ancestral", "flow_sde"}
SOLVERS = [name for name in SAMPLERS if name != "lcm"]  # whose steps do not converge to the data
VARIANTS = [
    *((name, {}) for name in SOLVERS),
    ("ddpm", {"variance": "large"}),
    ("ddim", {"eta": 0.5}),
    ("ddim", {"eta": 1.0}),
    ("edm", {"s_churn": 10.0}),
    ("lms", {"order": 2}),
    ("deis", {"order": 2}),
    ("unipc", {"order": 1}),
    ("unipc", {"order": 3}),
    ("unipc", {"order": 3, "variant": "bh1"}),
    ("dpmpp_2m_sde", {"solver": "heun"}),
    ("dpmpp_sde", {"eta": 0.5}),
    ("dpmpp_3m_sde", {"eta": 0.5}),
    ("flow_sde", {"solver": "heun"}),
    ("flow_sde", {"diffusion": "decreasing"}),
    ("flow_sde", {"diffusion": "bump", "last_step": "mean"}),
]


def grid_of(family: str, steps: int) -> Grid:
    schedule, spacing, knobs, _ = FAMILIES[family]
    return SPACINGS[spacing](schedule, steps, **knobs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("sampler", "knobs"), VARIANTS)
def test_mean_and_covariance(sampler, knobs, family, gaussian, moments_after):
    """100 steps from the exact start: the covariance to 12 % (order 1) or 5 % (order 2 and more), Frobenius
    norm.

    The errors shrink with the square (or first power) of the step; order 2 is mostly below 0.5 %, the largest
    figure belongs to dpmpp_2m_sde on leading steps, whose last but one is three times as long as its
    neighbor. The mean is exact, for these walks are affine and start at it.
    """
    grid = grid_of(family, 100)
    mean, covariance = moments_after(gaussian.denoise, grid, sampler, knobs, gaussian.moments(grid.points[0]))
    assert torch.allclose(mean, gaussian.mean, rtol=0, atol=1e-12)
    error = (covariance - gaussian.covariance).norm() / gaussian.covariance.norm()
    assert error < (0.12 if sampler in FIRST_ORDER else 0.05)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_parameterizations_agree(sampler, parameterization, family, gaussian, moments_after):
    """A network that predicts eps, v ... must give what the denoiser itself gives, at midpoints too.

    1e-7: x0 = (x - sigma eps) / alpha multiplies float64's 1e-16 by up to 2e4 (cosine), further steps amplify
    it.
    """
    schedule, *_, unembed = FAMILIES[family]
    if parameterization == "eps" and family in PURE_NOISE:
        with pytest.raises(ValueError, match="alpha = 0"):
            gaussian.denoiser(schedule, PARAMETERIZATIONS["eps"], unembed)
        return
    denoiser = gaussian.denoiser(schedule, PARAMETERIZATIONS[parameterization], unembed)
    grid = grid_of(family, 8)
    start = gaussian.moments(grid.points[0])
    expected = moments_after(gaussian.denoise, grid, sampler, {}, start)
    result = moments_after(lambda x, level: denoiser(x, level, Conditioning()), grid, sampler, {}, start)
    for ours, exact in zip(result, expected, strict=True):
        assert torch.allclose(ours, exact, rtol=1e-7, atol=1e-7)


# sampler, knobs, order of convergence
ORDERS = [
    ("ddim", {}, 1),
    ("euler", {}, 1),
    ("heun", {}, 2),
    ("edm", {}, 2),
    ("dpm2", {}, 2),
    ("plms", {}, 2),
    ("dpmpp_2m", {}, 2),
    ("dpmpp_sde", {"eta": 0.0}, 2),
    ("dpmpp_2m_sde", {"eta": 0.0}, 2),
    ("dpmpp_2m_sde", {"eta": 0.0, "solver": "heun"}, 2),
    ("dpmpp_3m_sde", {"eta": 0.0}, 3),
    ("flow_sde", {"scale": 0.0}, 1),
    ("flow_sde", {"scale": 0.0, "solver": "heun"}, 2),
    *(("lms", {"order": k}, k) for k in (1, 2, 3, 4)),
    *(("deis", {"order": k}, k) for k in (1, 2, 3)),
    *(("unipc", {"order": k, "variant": b}, k + 1) for k in (1, 2, 3) for b in ("bh1", "bh2")),
]


def by_log_snr(schedule, steps: int, high: float, low: float) -> Grid:
    """steps + 1 levels evenly in log-SNR, the last one on the schedule as well."""
    ratio = torch.linspace(math.log(high), math.log(low), steps + 1, dtype=torch.float64).exp()
    t = schedule.time_of(ratio)
    return Grid.of(schedule, t[:-1], schedule(t[-1]))


def by_time(schedule, steps: int, first: float, last: float) -> Grid:
    t = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    return Grid.of(schedule, t[:-1], schedule(t[-1]))


def observed_order(gaussian, sampler: str, knobs: dict, grids: list[Grid]) -> float:
    """Order from the last doubling of the number of steps, against the closed-form probability flow."""
    errors = []
    for grid in grids:
        x = grid.points[0].sigma * torch.tensor([[0.9, -1.3, 0.4]], dtype=torch.float64)
        end = integrate(partial(SAMPLERS[sampler], **knobs), Run(gaussian.denoise, grid, torch.zeros_like), x)
        errors.append(float((end - gaussian.flow(x, grid.points[0], grid.points[-1])).abs().max()))
    assert errors[0] > 1e-10, "so close to roundoff that no order can be seen"
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(("sampler", "knobs", "order"), ORDERS)
@pytest.mark.parametrize("family", ["ve", "linear"])
def test_order_of_convergence(sampler, knobs, order, family, gaussian):
    """On levels even in log-SNR, from where x0 hardly depends on x: low-order first steps do not matter."""
    schedule, high = {"ve": (VE(), 80.0), "linear": (SCHEDULES["linear"](), 150.0)}[family]
    grids = [by_log_snr(schedule, n, high, 0.05) for n in (80, 160)]
    assert observed_order(gaussian, sampler, knobs, grids) > order - 0.35


@pytest.mark.parametrize(("sampler", "knobs", "order"), ORDERS)
@pytest.mark.parametrize("schedule", [Flow(), Flow(shift=3), Cosine()], ids=str)
def test_order_in_straight_coordinates(sampler, knobs, order, schedule, gaussian):
    """On levels even in time, where the low-order first step bounds the order by 2."""
    grids = [by_time(schedule, n, 0.95, 0.1) for n in (80, 160)]
    assert observed_order(gaussian, sampler, knobs, grids) > min(order, 2) - 0.35


@pytest.mark.parametrize(("sampler", "knobs", "order"), [row for row in ORDERS if row[2] > 1])
@pytest.mark.parametrize("schedule", [Flow(), Flow(shift=3), Cosine()], ids=str)
def test_better_than_euler_from_pure_noise_to_none(sampler, knobs, order, schedule, gaussian):
    """From alpha = 0 to sigma = 0 the end steps in log-SNR are infinite, which leaves between 1 and 2."""
    grids = [SPACINGS["linspace"](schedule, n) for n in (80, 160)]
    assert observed_order(gaussian, sampler, knobs, grids) > 1.3


STOCHASTIC = [("ddpm", {}), ("ddim", {"eta": 1.0}), ("euler_ancestral", {}), ("edm", {"s_churn": 10.0})]
STOCHASTIC += [(name, {}) for name in ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "flow_sde")]


@pytest.mark.parametrize(("sampler", "knobs"), STOCHASTIC)
def test_samples_have_the_computed_moments(sampler, knobs, gaussian, moments_after):
    """2,000 seeded samples against the exact moments of the same walk: 4.5 standard errors of each entry."""
    grid, count = SPACINGS["linspace"](Flow(shift=3), 12), 2000
    start = gaussian.moments(grid.points[0])
    mean, covariance = moments_after(gaussian.denoise, grid, sampler, knobs, start)
    noise = Noise(range(count))
    x = noise(torch.zeros(count, 3, dtype=torch.float64))
    x = integrate(partial(SAMPLERS[sampler], **knobs), Run(gaussian.denoise, grid, noise), x)
    spread = covariance.diag()
    assert ((x.mean(0) - mean).abs() < 4.5 * (spread / count).sqrt()).all()
    error = (torch.outer(spread, spread) + covariance**2).div(count).sqrt()
    assert ((x.T.cov() - covariance).abs() < 4.5 * error).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_depends_on_its_seed_alone(sampler, gaussian):
    """To 1e-12: a batch may be summed in another order, nothing else."""
    grid = SPACINGS["karras"](VE(), 6)

    def walk(seeds: list[int]) -> torch.Tensor:
        noise = Noise(seeds)
        x = 80 * noise(torch.zeros(len(seeds), 3, dtype=torch.float64))
        return integrate(SAMPLERS[sampler], Run(gaussian.denoise, grid, noise), x)

    together = walk([7, 11, 13])
    assert torch.allclose(walk([11]), together[1:2], rtol=1e-12, atol=1e-12)
    assert torch.allclose(walk([13, 7]), together[[2, 0]], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "dpm2", "edm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_a_walk_join(sampler, family, gaussian):
    """Single-step solvers: two windows in turn are the whole walk; 1e-12 for vectorized midpoints."""
    grid = grid_of(family, 20)
    x = torch.randn(4, 3, dtype=torch.float64) * grid.points[0].sigma
    whole = integrate(SAMPLERS[sampler], Run(gaussian.denoise, grid, torch.randn_like), x)
    for part in (grid.window(0, 0.35), grid.window(0.35, 1)):
        x = integrate(SAMPLERS[sampler], Run(gaussian.denoise, part, torch.randn_like), x)
    assert torch.allclose(x, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "sampler", ["ddim", "euler", "heun", "dpm2", "dpmpp_2m", "unipc", "lms", "deis", "plms"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_inversion(sampler, family, gaussian):
    """Up the reversed grid and down again; 200 steps of order 1 leave 5 %."""
    grid = grid_of(family, 200)
    up = grid.reversed(end=None)
    x = torch.randn(4, 3, dtype=torch.float64)
    noisy = integrate(SAMPLERS[sampler], Run(gaussian.denoise, up, torch.randn_like), x)
    assert torch.allclose(
        noisy, gaussian.flow(x, up.points[0], up.points[-1]), rtol=0.05, atol=0.05 * up.points[-1].sigma
    )
    down = integrate(SAMPLERS[sampler], Run(gaussian.denoise, grid, torch.randn_like), noisy)
    assert torch.allclose(down, x, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("sampler", SOLVERS)
def test_reversed_grid_with_its_default_end(sampler, gaussian):
    """Deterministic samplers reach pure noise, the others say what to do instead."""
    grid = SPACINGS["trailing"](SCHEDULES["linear"](), 30).reversed()
    run, x = Run(gaussian.denoise, grid, torch.randn_like), torch.randn(2, 3, dtype=torch.float64)
    if sampler in {"ddpm", "euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "flow_sde"}:
        with pytest.raises(ValueError, match="invert with 'ddim'"):
            integrate(SAMPLERS[sampler], run, x)
    else:
        end = integrate(SAMPLERS[sampler], run, x)
        assert 0.2 < end.std() < 3
