"""The loop: history, projection, observation, cancellation, jumps, and what an external score does."""

from __future__ import annotations

import inspect
from functools import partial

import pytest
import torch

from sfumato.core.random import Noise
from sfumato.core.types import Denoised
from sfumato.diffusion import (
    SAMPLERS,
    SCHEDULES,
    SPACINGS,
    VE,
    Cancelled,
    Flow,
    Grid,
    Run,
    integrate,
    repaint,
)
from sfumato.diffusion.grid import Point
from sfumato.diffusion.sampling import HISTORY, fold

LINEAR = SCHEDULES["linear"]()
SOLVERS = [
    name for name in SAMPLERS if name != "lcm"
]  # which draws from the data, with any network but its own


def test_all_samplers_are_registered():
    expected = "ddim ddpm deis dpm2 dpmpp_2m dpmpp_2m_sde dpmpp_3m_sde dpmpp_sde edm euler euler_ancestral"
    assert sorted(SAMPLERS) == [*expected.split(), "flow_sde", "heun", "lcm", "lms", "plms", "unipc"]
    with pytest.raises(ValueError, match="unknown sampler 'dpmpp2m'; did you mean 'dpmpp_2m'"):
        SAMPLERS["dpmpp2m"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_knobs_are_keywords_with_defaults(name):
    """The command line and the forms are made from these signatures."""
    run, x, i, *knobs = inspect.signature(SAMPLERS[name]).parameters.values()
    assert [run.name, x.name, i.name] == ["run", "x", "i"]
    assert all(k.kind is k.KEYWORD_ONLY and k.default is not k.empty for k in knobs)


@pytest.fixture
def start() -> torch.Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("schedule", [LINEAR, Flow(), VE()], ids=str)
def test_few_steps(name, steps, schedule, gaussian, start):
    """One step to no noise is x0 itself; so few steps must work too."""
    grid = SPACINGS["trailing"](schedule, steps)
    run = Run(gaussian.denoise, grid, torch.randn_like)
    x = start * grid.points[0].sigma
    end = integrate(SAMPLERS[name], run, x)
    assert end.isfinite().all()
    if steps == 1 and (name != "dpm2" or not grid.from_pure_noise):  # dpm2 takes a midpoint there
        assert torch.allclose(end, gaussian.denoise(x, grid.level(0)).x0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_dtype_and_shape_are_kept(name, gaussian):
    """float32 in, float32 out, for any number of axes."""
    grid = SPACINGS["trailing"](LINEAR, 4)

    def denoise(x, level):
        d = gaussian.denoise(x.movedim(1, -1).reshape(-1, 3).double(), level)
        back = (v.reshape(2, 4, 5, 3).movedim(-1, 1).float() for v in (d.x0, d.eps))
        return Denoised(*back)

    end = integrate(SAMPLERS[name], Run(denoise, grid, Noise([0, 1])), torch.randn(2, 3, 4, 5))
    assert end.shape == (2, 3, 4, 5)
    assert end.dtype == torch.float32


def test_history_records_evaluations_and_is_bounded(gaussian, start):
    grid = SPACINGS["trailing"](LINEAR, 10)
    run = Run(gaussian.denoise, grid, torch.randn_like)
    lengths = []
    integrate(SAMPLERS["heun"], run, start, observe=lambda i, x, d: lengths.append(len(run.history)))
    assert lengths == [1, 2, 3, 4, 5] + [HISTORY] * 5  # second stages are not recorded
    assert run.history[-1].point == grid.points[9]


def test_project_and_observe(gaussian, start):
    grid = SPACINGS["trailing"](LINEAR, 5)
    seen, projected = [], []

    def project(x, i):
        projected.append(i)
        return torch.cat([torch.full_like(x[:1], float(i)), x[1:]])

    def observe(i, x, denoised):
        seen.append(i)
        assert (x[0] == i + 1).all()
        assert denoised.x0.shape == x.shape

    end = integrate(
        SAMPLERS["ddim"],
        Run(gaussian.denoise, grid, torch.randn_like),
        start,
        project=project,
        observe=observe,
    )
    assert projected == [1, 2, 3, 4, 5]
    assert seen == [0, 1, 2, 3, 4]
    assert (end[0] == 5).all()


def test_cancel(gaussian, start):
    calls = []

    def denoise(x, level):
        calls.append(level)
        return gaussian.denoise(x, level)

    def stop(i, x, denoised):
        if i == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        integrate(
            SAMPLERS["ddim"],
            Run(denoise, SPACINGS["trailing"](LINEAR, 9), torch.randn_like),
            start,
            observe=stop,
        )
    assert len(calls) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value, gaussian, start):
    def denoise(x, level):
        d = gaussian.denoise(x, level)
        return Denoised(d.x0 * value, d.eps) if level.t == 499 else d

    run = Run(denoise, SPACINGS["trailing"](LINEAR, 4), torch.randn_like)
    with pytest.raises(ValueError, match="not finite after step 3 of 4"):
        integrate(SAMPLERS["ddim"], run, start)


def test_large_is_not_infinite(gaussian):
    """Values whose sum overflows float32 are finite all the same."""
    grid = SPACINGS["karras"](VE(), 2)
    x = torch.full((4, 3), 3e38)
    end = integrate(lambda run, x, i: x, Run(gaussian.denoise, grid, torch.randn_like), x)
    assert end.sum().isinf()
    assert torch.equal(end, x)


def test_no_gradients_are_kept(gaussian, start):
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)

    def denoise(x, level):
        d = gaussian.denoise(x, level)
        return Denoised(d.x0 * weight, d.eps * weight)

    end = integrate(
        SAMPLERS["dpmpp_2m"], Run(denoise, SPACINGS["trailing"](LINEAR, 3), torch.randn_like), start
    )
    assert not end.requires_grad


@pytest.mark.parametrize("schedule", [LINEAR, Flow(), VE()], ids=str)
def test_a_jump_diffuses(schedule, gaussian, moments_after):
    """Down one level and up again by a jump: the marginal of the noisier level, exactly."""
    grid = SPACINGS["trailing"](schedule, 6)
    back = Grid(
        schedule, *(v[torch.tensor([4, 2])] for v in (grid.t, grid.alpha, grid.sigma)), jumps=frozenset({0})
    )
    mean, covariance = moments_after(gaussian.denoise, back, "ddim", {}, gaussian.moments(grid.points[4]))
    expected = gaussian.moments(grid.points[2])
    assert torch.allclose(mean, expected[0])
    assert torch.allclose(covariance, expected[1])


@pytest.mark.parametrize("name", SOLVERS)
def test_repaint_walk(name, gaussian, moments_after):
    """Jumps restart every sampler's history, and the end is the data: 12 %, as for 100 steps of order 1."""
    plain = SPACINGS["trailing"](LINEAR, 100)
    grid = repaint(plain, 20, 2)
    mean, covariance = moments_after(gaussian.denoise, grid, name, {}, gaussian.moments(grid.points[0]))
    assert torch.allclose(mean, gaussian.mean, atol=1e-10)
    assert (covariance - gaussian.covariance).norm() / gaussian.covariance.norm() < 0.12


# An external score. With data N(mean, C) and y = x_0 + noise of covariance R, grad_x log p(y | x_t) has a
# closed form, and guided samples must come from the posterior N(mean', C').


def observed(gaussian):
    """Posterior mean and covariance, and the denoiser of the prior with the exact grad of the likelihood."""
    eye = torch.eye(3, dtype=torch.float64)
    y, spread = torch.tensor([1.0, 0.2, -0.3], dtype=torch.float64), 0.4 * eye
    gain = gaussian.covariance @ torch.linalg.inv(gaussian.covariance + spread)
    posterior = gaussian.mean + gain @ (y - gaussian.mean), gaussian.covariance - gain @ gaussian.covariance

    def denoise(x, level):
        prior = gaussian.denoise(x, level)
        alpha, sigma = float(level.alpha), float(level.sigma)
        total = alpha**2 * gaussian.covariance + sigma**2 * eye
        slope = alpha * gaussian.covariance @ torch.linalg.inv(total)  # of E[x_0 | x_t] in x_t
        left = gaussian.covariance - alpha * slope @ gaussian.covariance  # Cov[x_0 | x_t]
        grad = (y - prior.x0) @ torch.linalg.inv(left + spread) @ slope
        return Denoised(prior.x0, prior.eps, grad=grad)

    return posterior, denoise


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("schedule", [LINEAR, Flow(), VE()], ids=str)
def test_external_score_samples_the_posterior(name, schedule, gaussian, moments_after):
    """Mean to 8 % of its shift and covariance to 12 %, the errors of order 1 at 200 steps.

    The start is the posterior's own level; ddpm shifts its mean by variance * grad, all others fold grad into
    eps.
    """
    (mean, covariance), denoise = observed(gaussian)
    grid = SPACINGS["karras" if schedule.kind == "ve" else "trailing"](schedule, 200)
    first = grid.points[0]
    eye = torch.eye(3, dtype=torch.float64)
    at_start = first.alpha * mean, first.alpha**2 * covariance + first.sigma**2 * eye
    result = moments_after(denoise, grid, name, {}, at_start)
    assert (result[0] - mean).norm() < 0.08 * (mean - gaussian.mean).norm()
    assert (result[1] - covariance).norm() < 0.12 * covariance.norm()


def test_fold():
    point = Point(0.6, 0.8)
    d = Denoised(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([0.5]), torch.tensor([3.0]))
    folded = fold(d, point)
    assert folded.eps.tolist() == pytest.approx([2 - 0.8 * 3])
    assert folded.x0.tolist() == pytest.approx([1 + 0.64 / 0.6 * 3])
    x_t = 0.6 * d.x0 + 0.8 * d.eps
    assert torch.allclose(0.6 * folded.x0 + 0.8 * folded.eps, x_t)
    assert folded.var is d.var
    assert folded.grad is None
    assert fold(folded, point) is folded
    pure = fold(d, Point(0.0, 1.0))
    assert (pure.x0 is d.x0, pure.eps is d.eps, pure.grad) == (True, True, None)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_observer_of_a_jump_sees_no_stale_evaluation(name, gaussian, start):
    grid = repaint(SPACINGS["trailing"](LINEAR, 6), 2, 2)
    run, seen = Run(gaussian.denoise, grid, torch.randn_like), []
    integrate(partial(SAMPLERS[name]), run, start, observe=lambda i, x, d: seen.append(d is None))
    assert [i for i, none in enumerate(seen) if none] == sorted(grid.jumps)
