"""Schedules, respacings and posterior tables against guided-diffusion, GLIDE and DiT (float64 tables)."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sfumato.diffusion.betas import FORMULAS
from sfumato.diffusion.grid import SPACINGS, Grid
from sfumato.diffusion.likelihood import transitions
from sfumato.diffusion.samplers.ancestral import Variances
from sfumato.diffusion.schedules import Discrete
from sfumato.diffusion.spacings import respaced_indices

GOLDEN = Path(__file__).parents[1] / "golden"
OPENAI = load_file(GOLDEN / "diffusion_math" / "tables.safetensors")
DIT = load_file(GOLDEN / "dit_diffusion_tables" / "outputs.safetensors")
NAMES = {"squaredcos_cap_v2": "cosine"}
# The references multiply up alphas_cumprod and we go through alpha and sigma: float64 rounding, amplified by
# the cancellation in the last betas of the cosine schedule.
RTOL = 5e-9


def entries(table, separator):
    return sorted({tuple(key.split(separator)[:2]) for key in table})


PROCESSES = [
    (OPENAI, "|", *e) for e in entries(OPENAI, "|") if e[0] in ("linear", "cosine") and e[1][0] != "T"
]
PROCESSES += [(DIT, "/", *e) for e in entries(DIT, "/")]


def walk(schedule: str, respacing: str) -> Grid:
    discrete = Discrete(formula=NAMES.get(schedule, schedule), steps=1000)
    sections = "1000" if respacing == "full" else respacing
    steps = len(respaced_indices(1000, sections))
    return SPACINGS["respaced"](discrete, steps, sections=sections)


def quantities(grid: Grid) -> dict[str, torch.Tensor]:
    """Every array of the references, by their names and in their order, clean to noisy."""
    bar, step = grid.alpha.square(), transitions(grid)
    variances = [Variances.of(grid, i) for i in range(len(grid))]
    now, after, one = bar[:-1], bar[1:], torch.ones(1, dtype=torch.float64)
    large = [v.floor if v.small == 0 else v.large for v in variances]
    table = {
        "timestep_map": grid.t[:-1],
        "betas": step.log_large.exp(),
        "log_betas": step.log_large,
        "alphas_cumprod": now,
        "alphas_cumprod_prev": after,
        "alphas_cumprod_next": torch.cat([0 * one, now[:-1]]),
        "sqrt_alphas_cumprod": grid.alpha[:-1],
        "sqrt_one_minus_alphas_cumprod": grid.sigma[:-1],
        "log_one_minus_alphas_cumprod": 2 * grid.sigma[:-1].log(),
        "sqrt_recip_alphas_cumprod": 1 / grid.alpha[:-1],
        "sqrt_recipm1_alphas_cumprod": grid.sigma[:-1] / grid.alpha[:-1],
        "posterior_mean_coef1": step.on_x0,
        "posterior_mean_coef2": step.on_x,
        "posterior_variance": torch.tensor([v.small for v in variances], dtype=torch.float64),
        "posterior_log_variance_clipped": step.log_small,
        "fixed_large_variance": torch.tensor(large, dtype=torch.float64),
    }
    return {name: value.flip(0) for name, value in table.items()}


@pytest.mark.parametrize(("table", "separator", "schedule", "respacing"), PROCESSES)
def test_every_array_of_a_respaced_process(table, separator, schedule, respacing):
    ours = quantities(walk(schedule, respacing))
    prefix = separator.join([schedule, respacing, ""])
    theirs = {key.removeprefix(prefix): value for key, value in table.items() if key.startswith(prefix)}
    assert theirs
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value.double(), rtol=RTOL, atol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("key", [k for k in OPENAI if k.split("|")[1][0] == "T" and k.endswith("betas")])
def test_betas_of_other_lengths_and_legacy_formulas(key):
    formula, steps, _ = key.split("|")
    ours = FORMULAS[formula](int(steps[1:]), None, None)
    ours = ours[:: len(ours) // len(OPENAI[key])]
    torch.testing.assert_close(ours, OPENAI[key], rtol=RTOL, atol=0)


def test_one_of_the_recorded_tables_is_what_the_paper_says():
    """Guards the goldens themselves: the linear schedule ends at alphas_cumprod 4.04e-5 (Lin et al. 2023)."""
    assert math.isclose(float(OPENAI["linear|full|alphas_cumprod"][-1]), 4.04e-5, rel_tol=1e-2)
