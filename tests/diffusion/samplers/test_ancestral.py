"""DDPM's variances, DDIM's eta, and how the two are related."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from sfumato.core.random import Noise
from sfumato.core.types import Denoised
from sfumato.diffusion import SAMPLERS, SCHEDULES, SPACINGS, VE, Flow, Run, integrate
from sfumato.diffusion.samplers.ancestral import Variances

LINEAR = SCHEDULES["linear"]()
FAMILIES = [LINEAR, Flow(), VE(), SCHEDULES["linear"](zero_snr=True)]


def reference_tables(grid):
    """betas and posterior variances of the respaced process, clean -> noisy, by Ho et al. 2020, eq. 7."""
    bar = (grid.alpha[:-1] ** 2).flip(0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    betas = 1 - bar / before
    return betas, betas * (1 - before) / (1 - bar)


def test_variances_are_the_papers():
    grid = SPACINGS["respaced"](LINEAR, 25)
    betas, posterior = reference_tables(grid)
    for i in range(len(grid)):
        v = Variances.of(grid, i)
        entry = len(grid) - 1 - i
        assert v.large == pytest.approx(float(betas[entry]), rel=1e-9)
        assert v.small == pytest.approx(float(posterior[entry]), rel=1e-9, abs=1e-18)
        # the posterior's log-variance is clipped: entry 0 := entry 1
        assert v.floor == pytest.approx(float(posterior[max(entry, 1)]), rel=1e-9)


def test_learned_variance_interpolates_the_logarithm():
    grid = SPACINGS["respaced"](LINEAR, 25)
    v = Variances.of(grid, 3)
    coordinate = torch.tensor([-1.0, 1.0, 0.0, 3.0], dtype=torch.float64)
    chosen = v.choose(Denoised(coordinate, coordinate, var=coordinate), "small")
    mean = (v.small * v.large) ** 0.5
    assert chosen.tolist() == pytest.approx([v.small, v.large, mean, v.large**2 / v.small])
    last = Variances.of(grid, 24)
    chosen = last.choose(Denoised(coordinate, coordinate, var=coordinate), "small")
    assert chosen[:2].tolist() == pytest.approx([Variances.of(grid, 23).small, last.large])


def test_fixed_variances_of_the_last_step():
    """Small is 0 there, large the clipped posterior (better for the likelihood, says the reference)."""
    grid = SPACINGS["respaced"](LINEAR, 25)
    plain = Denoised(torch.zeros(1), torch.zeros(1))
    last = Variances.of(grid, 24)
    assert last.choose(plain, "small") == 0
    assert last.choose(plain, "large") == Variances.of(grid, 23).small
    with pytest.raises(ValueError, match="'medium'; allowed: small, large"):
        last.choose(plain, "medium")


def run_of(gaussian, grid, seeds=(0, 1)):
    return Run(gaussian.denoise, grid, Noise(seeds))


@pytest.mark.parametrize("schedule", FAMILIES, ids=str)
def test_ddim_with_eta_1_is_ddpm_and_euler_ancestral(schedule, gaussian):
    """The same draws give the same sample, on every kind of schedule."""
    grid = SPACINGS["trailing"](schedule, 12)
    x = grid.points[0].sigma * torch.randn(2, 3, dtype=torch.float64)
    ends = [
        integrate(partial(SAMPLERS[name], **knobs), run_of(gaussian, grid), x)
        for name, knobs in (("ddpm", {}), ("ddim", {"eta": 1.0}), ("euler_ancestral", {}))
    ]
    assert torch.allclose(ends[0], ends[1], rtol=1e-9, atol=1e-9)
    assert torch.equal(ends[1], ends[2])


def test_eta_0_draws_no_noise(gaussian):
    def refuse(like):
        raise AssertionError("noise was drawn")

    grid = SPACINGS["trailing"](LINEAR, 5)
    x = torch.randn(2, 3, dtype=torch.float64)
    for name in ("ddim", "euler", "heun", "edm", "dpmpp_2m", "unipc", "deis", "lms", "plms", "dpm2"):
        integrate(SAMPLERS[name], Run(gaussian.denoise, grid, refuse), x)
    for name in ("euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"):
        integrate(partial(SAMPLERS[name], eta=0.0), Run(gaussian.denoise, grid, refuse), x)


@pytest.mark.parametrize(
    "name", ["ddpm", "ddim", "euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"]
)
def test_the_last_step_is_noiseless(name, gaussian):
    """n - 1 draws for n steps to sigma = 0 (the two-stage one draws twice a step); n if the end has noise."""
    knobs = {"eta": 1.0} if name == "ddim" else {}
    per_step = 2 if name == "dpmpp_sde" else 1
    for clean_end, expected in ((True, 5), (False, 6)):
        draws = []

        def noise(like, draws=draws):
            draws.append(like)
            return torch.zeros_like(like)

        grid = SPACINGS["trailing"](LINEAR, 6, clean_end=clean_end)
        x = torch.randn(2, 3, dtype=torch.float64)
        integrate(partial(SAMPLERS[name], **knobs), Run(gaussian.denoise, grid, noise), x)
        assert len(draws) == expected * per_step


def test_noise_scale(gaussian):
    """s_noise scales what is added, exactly."""
    grid = SPACINGS["trailing"](LINEAR, 2)
    x = torch.randn(2, 3, dtype=torch.float64)
    for name in ("euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"):
        steps = [partial(SAMPLERS[name], s_noise=s)(run_of(gaussian, grid), x, 0) for s in (0.0, 1.0, 2.0)]
        if name == "dpmpp_sde":  # its second stage sees the noise of the first
            assert not torch.allclose(steps[1], steps[0])
        else:
            assert torch.allclose(steps[2] - steps[0], 2 * (steps[1] - steps[0]))


@pytest.mark.parametrize("name", ["ddim", "euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_negative_eta(name, gaussian):
    grid = SPACINGS["trailing"](LINEAR, 4)
    with pytest.raises(ValueError, match=r"eta=-0\.5: it must not be negative; 0 = deterministic"):
        integrate(
            partial(SAMPLERS[name], eta=-0.5), run_of(gaussian, grid), torch.zeros(2, 3, dtype=torch.float64)
        )


def test_score_shifts_the_ddpm_mean_by_its_variance():
    """Dhariwal & Nichol 2021, algorithm 1: mean + Sigma grad, on the first and the last step."""
    grid = SPACINGS["respaced"](LINEAR, 10)
    x = torch.randn(2, 3, dtype=torch.float64)
    x0, eps, grad, var = (torch.randn(2, 3, dtype=torch.float64) for _ in range(4))
    silent = Run(lambda x, level: Denoised(x0, eps, var), grid, torch.zeros_like)
    guided = Run(lambda x, level: Denoised(x0, eps, var, grad), grid, torch.zeros_like)
    for i in (0, 9):
        shift = SAMPLERS["ddpm"](guided, x, i) - SAMPLERS["ddpm"](silent, x, i)
        expected = Variances.of(grid, i).choose(Denoised(x0, eps, var), "small") * grad
        assert torch.allclose(shift, expected)
