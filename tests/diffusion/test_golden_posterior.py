"""p_mean_variance of guided-diffusion for every kind of mean and variance, elementwise."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sfumato.core.types import Conditioning, expand
from sfumato.diffusion.constraints import Static, constrained
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.grid import SPACINGS
from sfumato.diffusion.likelihood import transitions
from sfumato.diffusion.parameterization import PARAMETERIZATIONS
from sfumato.diffusion.samplers.ancestral import Variances
from sfumato.diffusion.schedules import Discrete

GOLDEN = Path(__file__).parents[1] / "golden" / "diffusion_math"
GIVEN = load_file(GOLDEN / "p_mean_variance_inputs.safetensors")
EXPECTED = load_file(GOLDEN / "p_mean_variance_outputs.safetensors")
# Both sides are float32; errors are relative to the largest value, since single elements of
# x0 = (x_t - sigma eps) / alpha are differences of large numbers.
TOLERANCE = 1e-6


def means(mean, step, denoiser, x, level, clip):
    """x0 and the posterior mean."""
    bound = constrained(
        lambda x_t, at: denoiser(x_t, at, Conditioning()), threshold=Static() if clip else None
    )
    if mean != "PREVIOUS_X":
        x0 = bound(x, level).x0
        return x0, step.posterior(x0, x).mean
    # A network that predicts the posterior mean itself is not one of our parameterizations: no published
    # system has one, and it would depend on two levels. Its x0 follows from the posterior's own coefficients.
    previous = denoiser.raw(x, level, Conditioning()).prediction
    x0 = expand(1 / step.on_x0, x) * previous - expand(step.on_x / step.on_x0, x) * x
    return (x0.clamp(-1, 1) if clip else x0), previous


def log_variance(kind, step, x0, x, var):
    """As the references define it for each kind."""
    if kind == "LEARNED":  # log-variance itself; no published net has it, so Denoised.var has no such form
        return var
    learned = var if kind == "LEARNED_RANGE" else None
    return step.posterior(x0, x, learned, "large" if kind == "FIXED_LARGE" else "small").log_var


@pytest.mark.parametrize(
    ("schedule", "spacing", "mean", "kind", "clip"),
    list(
        product(
            ("linear", "cosine"),
            ("full", "25"),
            ("EPSILON", "START_X", "PREVIOUS_X"),
            ("FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"),
            (False, True),
        )
    ),
)
def test_mean_variance_and_x0(schedule, spacing, mean, kind, clip):
    discrete = Discrete(formula=schedule, steps=1000)
    grid = SPACINGS["respaced"](discrete, 1000 if spacing == "full" else 25)
    rows = len(grid) - 1 - GIVEN[f"t|{spacing}"]  # step of the walk, from the reference's ascending index
    step, x, output = transitions(grid).at(rows), GIVEN["x"], GIVEN["model_output"]
    var, learned = output[:, 3:], kind.startswith("LEARNED")
    parameterization = PARAMETERIZATIONS["x0" if mean == "START_X" else "eps"]
    net_output = output if learned else output[:, :3]
    denoiser = Denoiser(lambda *_: net_output, discrete, parameterization, learned)
    x0, center = means(mean, step, denoiser, x, discrete(grid.t[rows]), clip)
    log_var = log_variance(kind, step, x0, x, var)
    variance = log_var.exp().expand_as(x).clone()
    if kind == "FIXED_SMALL":  # the variance itself, unlike its logarithm, is not clipped at the last step
        variance[step.last] = Variances.of(grid, len(grid) - 1).small
    ours = {"mean": center, "pred_xstart": x0, "log_variance": log_var.expand_as(x), "variance": variance}
    for name, value in ours.items():
        expected = EXPECTED["|".join([schedule, spacing, mean, kind, f"clip{int(clip)}", name])]
        error = (value - expected).abs().max() / expected.abs().max()
        assert error <= TOLERANCE, f"{name}: {error:.1e}"
