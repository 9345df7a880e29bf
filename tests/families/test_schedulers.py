"""Files of schedulers that choose their levels by sigma: the times and sigmas of diffusers, and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sfumato.diffusion.guidance import CFG
from sfumato.families.schedulers import sampling_of

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy on torch tensors, in diffusers

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SPACINGS: dict[str, dict[str, Any]] = {
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "linspace": {"timestep_spacing": "linspace"},
    "trailing": {"timestep_spacing": "trailing"},
    "bounds": {"timestep_spacing": "linspace", "sigma_min": 0.1, "sigma_max": 9.0},
}
CLASSES = {
    "DPMSolverMultistepScheduler": 1.0,
    "UniPCMultistepScheduler": 1.0,
    "EulerDiscreteScheduler": 1e-2,
    "HeunDiscreteScheduler": 1e-2,
}
"""Class -> how far apart the times of exponential levels may be: the first two cut the decimals off."""


def read(scheduler: Any, steps: int) -> tuple[Any, Any]:
    """What we make of a scheduler's file, and its grid."""
    sampling = sampling_of(
        dict(scheduler.config) | {"_class_name": type(scheduler).__name__}, steps=steps, guidance=CFG()
    )
    return sampling, sampling.defaults.grid(sampling.schedule)


@pytest.mark.parametrize("option", ["use_karras_sigmas", "use_exponential_sigmas"])
@pytest.mark.parametrize("spacing", list(SPACINGS))
@pytest.mark.parametrize("name", list(CLASSES))
@pytest.mark.parametrize("steps", [7, 20, 50])
def test_levels_are_those_of_diffusers(name: str, spacing: str, option: str, steps: int) -> None:
    kind, settings = getattr(diffusers, name), {**BETAS, **SPACINGS[spacing], option: True}
    if spacing == "bounds" and name in ("DPMSolverMultistepScheduler", "HeunDiscreteScheduler"):
        scheduler = kind.from_config(settings)  # no arguments of theirs, but files keep them
    else:
        scheduler = kind(**settings)
    scheduler.set_timesteps(steps)
    sigmas, times = scheduler.sigmas, scheduler.timesteps.double()
    if name == "HeunDiscreteScheduler":  # has every level but the ends twice
        sigmas, times = torch.cat([sigmas[:1], sigmas[1::2]]), torch.cat([times[:1], times[1::2]])
    sampling, grid = read(scheduler, steps)
    ratios = torch.tensor([point.ratio for point in grid.points])
    torch.testing.assert_close(ratios, sigmas, rtol=2e-5, atol=0)  # theirs are float32
    apart = CLASSES[name] if option == "use_exponential_sigmas" else 1e-2
    torch.testing.assert_close(grid.t[:-1], times, rtol=0, atol=apart)
    unit = name.startswith(("DPM", "UniPC")) or spacing == "leading"
    assert sampling.defaults.start.scale == ("unit" if unit else "sigma")


def test_options_that_the_class_does_not_read_are_passed_over() -> None:
    scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(BETAS | {"use_karras_sigmas": True})
    scheduler.set_timesteps(5)
    _, grid = read(scheduler, 5)
    torch.testing.assert_close(grid.t[:-1], scheduler.timesteps.double())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_beta_sigmas": True}, "config has use_beta_sigmas; allowed: one of use_karras_sigmas, use_exp"),
        ({"use_lu_lambdas": True}, "config has use_lu_lambdas; allowed"),
        (
            {"use_karras_sigmas": True, "use_exponential_sigmas": True},
            "use_karras_sigmas and use_exponential",
        ),
    ],
)
def test_what_is_not_known_is_refused(settings: dict[str, bool], said: str) -> None:
    config = {"_class_name": "DPMSolverMultistepScheduler", **BETAS, **settings}
    with pytest.raises(ValueError, match=said) as error:
        sampling_of(config, steps=5, guidance=CFG())
    assert "\n" not in str(error.value)
