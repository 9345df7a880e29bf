"""Training losses, their gradients, bound terms and the importance sampler of guided-diffusion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sfumato.core.types import Conditioning, expand
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.likelihood import (
    Gaussian,
    discretized_log_likelihood,
    prior_bits,
    training_transitions,
    vb_bits,
)
from sfumato.diffusion.objective import Losses, Objective
from sfumato.diffusion.parameterization import PARAMETERIZATIONS
from sfumato.diffusion.schedules import Discrete
from sfumato.diffusion.times import LossSecondMoment

GOLDEN = Path(__file__).parents[1] / "golden" / "diffusion_math"
GIVEN = load_file(GOLDEN / "losses_inputs.safetensors")
EXPECTED = load_file(GOLDEN / "losses_outputs.safetensors")
MOMENTS = load_file(GOLDEN / "loss_second_moment.safetensors")
KINDS = sorted({key.rsplit("|", 1)[0] for key in EXPECTED if key.count("|") >= 4})
TOLERANCE = 1e-6  # of a tensor's largest value; both sides are float32


class Given:
    """Noise that draws the recorded times and the recorded noise."""

    def __init__(self, t: torch.Tensor, steps: int) -> None:
        self.seeds, self.t, self.steps = tuple(range(len(t))), t, steps

    def uniform(self, like: torch.Tensor) -> torch.Tensor:
        return ((self.t + 0.5) / self.steps).to(like)

    def __call__(self, like: torch.Tensor) -> torch.Tensor:
        return GIVEN["noise"].to(like)


class Case:
    """schedule, mean, variance and loss type of a recorded loss, in our terms."""

    def __init__(self, kind: str, output: torch.Tensor | None = None) -> None:
        parts = kind.split("|")
        self.long = "T4000" in parts
        schedule, mean, self.var, self.loss = [p for p in parts if p != "T4000"]
        self.steps, self.t = (4000, GIVEN["t4000"]) if self.long else (1000, GIVEN["t"])
        self.learned = self.var == "LEARNED_RANGE"
        output = GIVEN["model_output"] if output is None else output
        net_output = output if self.learned else output[:, :3]
        self.denoiser = Denoiser(
            lambda *_: net_output,
            Discrete(formula=schedule, steps=self.steps),
            PARAMETERIZATIONS[{"EPSILON": "eps", "START_X": "x0"}[mean]],
            self.learned,
        )

    def objective(self) -> Losses:
        """MSE and RESCALED_MSE coincide at 1000 steps; RESCALED is vlb = 0.001 at any number."""
        objective = Objective(vlb=0.001 if self.learned else 0.0)
        return objective(self.denoiser, GIVEN["x_start"], Conditioning(), Given(self.t, self.steps))

    def bound(self) -> torch.Tensor:
        """KL and RESCALED_KL: the bound alone, the mean not detached."""
        x0, schedule = GIVEN["x_start"], self.denoiser.schedule
        level, step = schedule(self.t), training_transitions(schedule).at(self.t)
        x_t = expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * GIVEN["noise"]
        denoised = self.denoiser(x_t, level, Conditioning())
        variance = "large" if self.var == "FIXED_LARGE" else "small"
        model = step.posterior(denoised.x0, x_t, denoised.var, variance)
        bits = vb_bits(step.posterior(x0, x_t), model, x0, step.last)
        return bits * (self.steps if self.loss == "RESCALED_KL" else 1)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_their_parts(kind):
    case = Case(kind)
    if case.loss in ("KL", "RESCALED_KL"):
        assert relative(case.bound(), EXPECTED[f"{kind}|loss"]) <= TOLERANCE
        return
    losses = case.objective()
    assert relative(losses.loss, EXPECTED[f"{kind}|loss"]) <= TOLERANCE
    assert relative(losses.metrics["mse"], EXPECTED[f"{kind}|mse"]) <= TOLERANCE
    assert ("vb" in losses.metrics) == case.learned
    if case.learned:  # the reference reports it with its weight
        assert relative(losses.metrics["vb"] * case.steps / 1000, EXPECTED[f"{kind}|vb"]) <= TOLERANCE


def test_gradient_of_the_hybrid_loss():
    """In the mean channels it is that of the squared error alone: the bound sees a detached mean."""
    output = GIVEN["model_output"].clone().requires_grad_()
    losses = Case("cosine|EPSILON|LEARNED_RANGE|MSE", output).objective()
    (grad,) = torch.autograd.grad(losses.loss.sum(), output)
    assert relative(grad, EXPECTED["hybrid_grad_wrt_model_output"]) <= TOLERANCE
    mean = GIVEN["model_output"][:, :3].clone().requires_grad_()
    plain = Case("cosine|EPSILON|FIXED_SMALL|MSE", torch.cat([mean, mean], dim=1)).objective()
    (alone,) = torch.autograd.grad(plain.loss.sum(), mean)
    torch.testing.assert_close(grad[:, :3], alone, rtol=0, atol=0)
    vb_only = EXPECTED["hybrid_vb_only_grad"]
    assert float(vb_only[:, :3].abs().max()) == 0
    assert relative(grad[:, 3:], vb_only[:, 3:]) <= TOLERANCE


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_forward_process_and_prior(schedule):
    discrete, x0 = Discrete(formula=schedule, steps=1000), GIVEN["x_start"]
    level, step = discrete(GIVEN["t"]), training_transitions(discrete).at(GIVEN["t"])
    x_t = expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * GIVEN["noise"]
    assert relative(x_t, EXPECTED[f"{schedule}|q_sample"]) <= TOLERANCE
    assert relative(step.posterior(x0, x_t).mean, EXPECTED[f"{schedule}|q_posterior_mean"]) <= TOLERANCE
    prior = prior_bits(x0, discrete(torch.tensor(999)))
    assert relative(prior, EXPECTED[f"{schedule}|prior_bpd"]) <= TOLERANCE


def test_discretized_likelihood():
    gaussian = Gaussian(GIVEN["dgll_means"], 2 * GIVEN["dgll_log_scales"])
    ours = discretized_log_likelihood(GIVEN["x_start"], gaussian)
    assert relative(ours, EXPECTED["discretized_gaussian_log_likelihood"]) <= TOLERANCE


def test_importance_sampler_follows_the_recorded_losses():
    sampler = LossSecondMoment(steps=20)
    t, loss = MOMENTS["t"], MOMENTS["loss"]
    done = 0
    for count in (0, 199, 200, 260):
        sampler.observe(t[done:count], loss[done:count])
        done = count
        expected = MOMENTS["weights_at_0" if count == 0 else f"weights_after_{count}"]
        torch.testing.assert_close(sampler.weights(), expected, rtol=1e-12, atol=0)
