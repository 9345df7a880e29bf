"""Sampling walks of guided-diffusion, step by step and as a whole; its networks' outputs are replayed."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sfumato.core.types import Conditioning
from sfumato.diffusion.constraints import Static, constrained
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.grid import SPACINGS
from sfumato.diffusion.guidance import CFG
from sfumato.diffusion.likelihood import transitions
from sfumato.diffusion.parameterization import eps
from sfumato.diffusion.samplers.ancestral import ddim, ddpm
from sfumato.diffusion.sampling import Run, integrate
from sfumato.diffusion.schedules import Discrete
from sfumato.diffusion.score import score_guided

RECORDED = load_file(Path(__file__).parents[1] / "golden" / "diffusion_math" / "trajectories.safetensors")
WALKS = sorted({key.rsplit("|", 1)[0] for key in RECORDED if key.endswith("|net")})
STEPS = {
    "p_sample": ddpm,
    "p_sample_classifier": ddpm,
    "ddim_eta0": ddim,
    "ddim_eta0.5": partial(ddim, eta=0.5),
    "ddim_eta1": partial(ddim, eta=1.0),
    "ddim_classifier": ddim,
    "ddim_reverse": ddim,
}
TOLERANCE = 1e-6  # of the largest value of a step: float32 rounding


class Walk:
    """One recorded walk: its grid, the function that replays the network, and the samples along the way."""

    def __init__(self, name: str) -> None:
        schedule, spacing, sampler, clip = name.split("|")
        discrete = Discrete(formula=schedule, steps=1000)
        count = len(RECORDED[f"{name}|net"])
        grid = SPACINGS["respaced"](discrete, count, sections=spacing)
        inverse = sampler == "ddim_reverse"
        self.grid = grid.reversed() if inverse else grid
        self.step, self.samples = STEPS[sampler], RECORDED[f"{name}|sample"]
        self.start = RECORDED["in|x0_for_inversion" if inverse else "in|x_T"]
        self.x0 = RECORDED.get(f"{name}|pred_xstart")  # none where the reference reports it unguided
        self.i, self.name, self.before = 0, name, self.start
        self.eta = float(sampler.partition("eta")[2] or 0)
        denoiser = Denoiser(lambda *_: RECORDED[f"{name}|net"][self.i], discrete, eps, learned_var=True)
        plain = CFG().bind(denoiser, Conditioning(), Conditioning())
        fn = constrained(plain, threshold=Static() if clip == "clip1" else None)
        grads = RECORDED.get(f"{name}|grad")
        denoise = fn if grads is None else score_guided(fn, lambda *_: grads[self.i])
        self.run = Run(denoise, self.grid, lambda _: RECORDED["in|noise"][self.i])

    def take(self, x: torch.Tensor, i: int) -> torch.Tensor:
        self.i, self.before = i, x
        return self.step(self.run, x, i)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def slack(walk: Walk, i: int) -> float:
    """What the reference's own ddim loses at a step by computing its coefficients in float32.

    1 - alphas_cumprod cancels at the clean end, 1 - alphas_cumprod - tau^2 for eta = 1 at the noisy one; its
    classifier guidance re-derives x0 as a difference of x / alpha and eps sigma / alpha. Our coefficients are
    float64, and the score is added to x0 itself.
    """
    now, after = walk.grid.points[i], walk.grid.points[i + 1]
    bar, bar_after = (torch.tensor(p.alpha**2, dtype=torch.float32) for p in (now, after))
    spread = walk.eta * ((1 - bar_after) / (1 - bar)).sqrt() * (1 - bar / bar_after).clamp_min(0).sqrt()
    rest = (1 - bar_after - spread**2).sqrt()
    tau = walk.eta * math.sqrt(transitions(walk.grid).log_small[i].exp()) if walk.eta and after.sigma else 0.0
    x, eps_ = walk.before, walk.run.history[-1].denoised.eps
    lost = abs(float(rest) - math.sqrt(after.sigma**2 - tau**2)) * float(eps_.abs().max())
    lost += abs(float(spread) - tau) * float(walk.run.noise(x).abs().max()) if after.sigma else 0.0
    if "classifier" in walk.name:
        lost += after.alpha * float(x.abs().max()) / now.alpha * 2**-22
    return lost if "ddim" in walk.name else 0.0


@pytest.mark.parametrize("name", WALKS)
def test_each_step_from_the_recorded_sample(name):
    walk = Walk(name)
    before = [walk.start, *walk.samples[:-1]]
    for i, (x, after) in enumerate(zip(before, walk.samples, strict=True)):
        sample = walk.take(x, i)
        assert relative(sample, after) <= TOLERANCE + slack(walk, i) / float(after.abs().max()), f"step {i}"
        if walk.x0 is not None:
            x0 = walk.run.history[-1].denoised.x0
            assert relative(x0, walk.x0[i]) <= TOLERANCE, f"x0 of step {i}"


@pytest.mark.parametrize("name", WALKS)
def test_the_whole_walk(name):
    walk, lost = Walk(name), []
    end = integrate(
        lambda _, x, i: walk.take(x, i),
        walk.run,
        walk.start,
        observe=lambda i, x, _: lost.append(slack(walk, i) / float(x.abs().max())),
    )
    assert relative(end, walk.samples[-1]) <= 10 * TOLERANCE + sum(lost)  # the rounding of 25 steps


def test_the_score_of_the_classifier_matters():
    """A walk that ignores Denoised.grad must not pass the test above."""
    walk = Walk("cosine|25|p_sample_classifier|clip1")
    plain = walk.run.denoise
    shifted = walk.take(walk.start, 0)
    walk.run.denoise = lambda x, level: type(d := plain(x, level))(d.x0, d.eps, d.var)
    assert relative(walk.take(walk.start, 0), shifted) > 1e-4
