"""The solvers that diffusers also has, on the same grid, with the same network and the same noise.

Both sides work in float64 where diffusers lets them; its Euler family casts every sample to float32 and its
sigmas are float32, so 1e-5 relative is what can be asked. The grids are aligned: our alphas_cumprod replace
its float32 table, and trailing steps that divide 1000 make its rule "previous = t - 1000 // n" the grid's own
next level. Left out are - DPMSolverSDE: its noise comes from a Brownian tree (torchsde), which cannot be
given; - sde-dpmsolver++ of order 3: the sign of its last coefficient is wrong (it tends to -1, not 0, as the
step shrinks); - dpmsolver++ of order 3: it uses half the parabola's curvature, as k-diffusion does; ours
integrates it exactly.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from sfumato.core.types import Conditioning
from sfumato.diffusion import SAMPLERS, SCHEDULES, SPACINGS, VE, Denoiser, Flow, Grid, Run, integrate
from sfumato.diffusion.parameterization import PARAMETERIZATIONS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy on torch tensors, in diffusers

STEPS = 10
SHAPE = (2, 3, 4, 4)
TOLERANCE = 1e-5
SCHEDULE = SCHEDULES["scaled_linear"]()
TRAILING = {"timestep_spacing": "trailing"}
PLAIN = {"clip_sample": False}
ZERO = {"final_sigmas_type": "zero"}


def net(x: torch.Tensor, t: torch.Tensor, cond: object = None) -> torch.Tensor:
    """A smooth nonlinear net of x and t; its weights are fixed."""
    mix = torch.linspace(-1, 1, 9, dtype=x.dtype).reshape(3, 3)
    time = (t.to(x.dtype) / 500 - 1).reshape(-1, 1, 1, 1)
    return torch.tanh(torch.einsum("dc,bchw->bdhw", mix, x) * (1 + 0.2 * time) + 0.3 * time) + 0.4 * x


class Draws:
    """The same sequence of noise for both sides, as a `noise` of ours and a `randn_tensor` of theirs."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(1)
        self._draws = [torch.randn(SHAPE, generator=g, dtype=torch.float64) for _ in range(3 * STEPS)]
        self._next: Iterator[torch.Tensor] = iter(self._draws)

    def __call__(self, like: object, **kwargs: object) -> torch.Tensor:
        return next(self._next)


def ours(name: str, knobs: dict, grid: Grid, x: torch.Tensor, parameterization: str = "eps") -> torch.Tensor:
    denoiser = Denoiser(net, grid.schedule, PARAMETERIZATIONS[parameterization])
    run = Run(lambda x, level: denoiser(x, level, Conditioning()), grid, Draws())
    return integrate(partial(SAMPLERS[name], **knobs), run, x)


def theirs(monkeypatch, scheduler, x: torch.Tensor) -> torch.Tensor:
    module = importlib.import_module(type(scheduler).__module__)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", Draws())
    for t in scheduler.timesteps:
        out = net(scheduler.scale_model_input(x, t), t.expand(len(x)))
        x = scheduler.step(out, t, x).prev_sample.double()
    return x


def build(name: str, **config: object):
    """A diffusers scheduler over our scaled-linear table, in float64."""
    diffusers = importlib.import_module("diffusers")
    scheduler = getattr(diffusers, name)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **config
    )
    scheduler.alphas_cumprod = SCHEDULE.alpha_bar.clone()
    scheduler.set_timesteps(STEPS)
    return scheduler


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def start() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# Schedulers that walk in our coordinates (variance preserving); trailing steps end at sigma = 0 or, where
# diffusers cannot, at the first entry of the table.
DPM, UNI, DEIS = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"
SDE2M = {"algorithm_type": "sde-dpmsolver++", **ZERO}
PRESERVING = {
    "ddpm-small": ("DDPMScheduler", {**PLAIN, "variance_type": "fixed_small"}, "ddpm", {}),
    "ddim": ("DDIMScheduler", PLAIN, "ddim", {}),
    "ddim-set_alpha_to_one-false": (
        "DDIMScheduler",
        {**PLAIN, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"},
        "ddim",
        {},
    ),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}, "plms", {}),
    "dpmpp_2m": (DPM, ZERO, "dpmpp_2m", {}),
    "dpmpp_2m_sde-midpoint": (DPM, SDE2M, "dpmpp_2m_sde", {}),
    "dpmpp_2m_sde-heun": (DPM, {**SDE2M, "solver_type": "heun"}, "dpmpp_2m_sde", {"solver": "heun"}),
    "deis-2": (DEIS, {"solver_order": 2, "lower_order_final": False}, "deis", {"order": 2}),
    "deis-3": (DEIS, {"solver_order": 3, "lower_order_final": False}, "deis", {"order": 3}),
} | {
    f"unipc-{order}-{kind}": (
        UNI,
        {"solver_order": order, "solver_type": kind, **end},
        "unipc",
        {"order": order, "variant": kind},
    )
    for order in (1, 2, 3)
    for kind, end in (("bh1", {"lower_order_final": False}), ("bh2", ZERO))  # its bh1 gives NaN at sigma = 0
}
ENDS_ON_TABLE = {"deis-2", "deis-3"} | {f"unipc-{order}-bh1" for order in (1, 2, 3)}


@pytest.mark.parametrize("case", PRESERVING)
def test_variance_preserving_solvers(case, monkeypatch):
    name, config, sampler, knobs = PRESERVING[case]
    scheduler = build(name, **(TRAILING | config))
    if scheduler.config.timestep_spacing == "leading":
        grid = SPACINGS["leading"](SCHEDULE, STEPS, offset=1, clean_end=False)
    else:
        grid = SPACINGS["trailing"](SCHEDULE, STEPS, clean_end=case not in ENDS_ON_TABLE)
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = torch.tensor([p.ratio for p in grid.points], dtype=torch.float64)
    x = start()
    assert scheduler.timesteps.unique().tolist() == sorted(grid.t[:-1].tolist())
    assert relative(ours(sampler, knobs, grid, x), theirs(monkeypatch, scheduler, x)) < TOLERANCE


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_noise(eta, monkeypatch):
    scheduler = build("DDIMScheduler", **PLAIN, **TRAILING)
    monkeypatch.setattr(scheduler, "step", partial(scheduler.step, eta=eta))
    grid, x = SPACINGS["trailing"](SCHEDULE, STEPS), start()
    assert relative(ours("ddim", {"eta": eta}, grid, x), theirs(monkeypatch, scheduler, x)) < TOLERANCE


@pytest.mark.parametrize("variance", ["large", "learned"])
def test_ddpm_variances(variance, monkeypatch):
    """With leading steps, whose last index is 0: elsewhere diffusers adds "large" noise to the result."""
    kind = {"large": "fixed_large", "learned": "learned_range"}[variance]
    scheduler = build("DDPMScheduler", **PLAIN, variance_type=kind, timestep_spacing="leading")
    grid, x = SPACINGS["leading"](SCHEDULE, STEPS), start()
    if variance == "large":
        result, expected = ours("ddpm", {"variance": "large"}, grid, x), theirs(monkeypatch, scheduler, x)
        assert relative(result, expected) < TOLERANCE
        return

    def wide(x, t, cond=None):
        return torch.cat([net(x, t), torch.sin(3 * x)], dim=1)

    denoiser = Denoiser(wide, SCHEDULE, PARAMETERIZATIONS["eps"], learned_var=True)
    result = integrate(
        SAMPLERS["ddpm"], Run(lambda x, level: denoiser(x, level, Conditioning()), grid, Draws()), x
    )
    monkeypatch.setattr(importlib.import_module(type(scheduler).__module__), "randn_tensor", Draws())
    for t in scheduler.timesteps:
        x = scheduler.step(wide(x, t.expand(len(x))), t, x).prev_sample
    assert relative(result, x) < TOLERANCE


# Schedulers that walk in sigma / alpha: their x is ours divided by alpha.
EXPLODING = {
    "euler": ("EulerDiscreteScheduler", "euler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", "euler_ancestral", {}),
    "heun": ("HeunDiscreteScheduler", "heun", {}),
    "dpm2": ("KDPM2DiscreteScheduler", "dpm2", {}),
    "lms": ("LMSDiscreteScheduler", "lms", {}),
}


@pytest.mark.parametrize("case", EXPLODING)
def test_variance_exploding_solvers(case, monkeypatch):
    name, sampler, knobs = EXPLODING[case]
    scheduler = build(name, **TRAILING)
    grid, x = SPACINGS["trailing"](SCHEDULE, STEPS), start()
    expected = theirs(monkeypatch, scheduler, x / grid.points[0].alpha)
    assert relative(ours(sampler, knobs, grid, x), expected) < TOLERANCE


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_edm(name, spacing, monkeypatch):
    scheduler = getattr(importlib.import_module("diffusers"), name)(
        sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule=spacing
    )
    scheduler.set_timesteps(STEPS)
    grid = SPACINGS[spacing](VE(), STEPS)
    assert torch.allclose(scheduler.sigmas.double(), grid.sigma, rtol=2e-6)
    assert torch.allclose(scheduler.timesteps.double(), grid.t[:-1], rtol=1e-5, atol=1e-6)
    x = 80 * start()
    sampler = "euler" if "Euler" in name else "dpmpp_2m"
    assert relative(ours(sampler, {}, grid, x, "edm"), theirs(monkeypatch, scheduler, x)) < TOLERANCE


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("name", "sampler"),
    [("FlowMatchEulerDiscreteScheduler", "euler"), ("FlowMatchHeunDiscreteScheduler", "heun")],
)
def test_flow(name, sampler, shift):
    scheduler = getattr(importlib.import_module("diffusers"), name)(shift=shift)
    scheduler.set_timesteps(STEPS)
    # Heun's tables hold every level but the first twice. Its sigmas are an even part of 1000 shifted ones.
    taken = [0, *range(1, len(scheduler.sigmas), 2 if sampler == "heun" else 1)]
    sigma = scheduler.sigmas[taken].double()
    assert len(sigma) == STEPS + 1
    schedule, x = Flow(shift=shift, multiplier=1000), start()
    grid = Grid.of(schedule, schedule.time_of(sigma[:-1] / (1 - sigma[:-1])))
    expected = x
    for t in scheduler.timesteps:
        out = net(expected, t.expand(len(x)))
        expected = scheduler.step(out, t, expected).prev_sample.double()
    assert relative(ours(sampler, {}, grid, x, "flow"), expected) < TOLERANCE
