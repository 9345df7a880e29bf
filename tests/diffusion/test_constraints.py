"""Thresholds, blending and projection: formulas, order, and what inpainting keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sfumato.core.config import from_json, to_json
from sfumato.core.types import Denoised, Level
from sfumato.diffusion.constraints import (
    Dynamic,
    Known,
    Static,
    ThresholdConfig,
    blended,
    constrained,
    projection,
    thresholded,
)
from sfumato.diffusion.grid import SPACINGS, repaint
from sfumato.diffusion.sampling import SAMPLERS, Run, integrate
from sfumato.diffusion.schedules import Discrete

IF = load_file(Path(__file__).parents[1] / "golden" / "if_dynamic_threshold" / "thresholds.safetensors")
SCHEDULE = Discrete(steps=1000)
LEVEL = SCHEDULE(torch.tensor(400))


def consistent(x_t: torch.Tensor, level: Level, denoised: Denoised) -> None:
    """x0 and eps must still compose to x_t; float32 rounding of values near 1."""
    torch.testing.assert_close(level.alpha * denoised.x0 + level.sigma * denoised.eps, x_t, check_dtype=False)


def fixed(x0: torch.Tensor):
    """A denoiser that always says x0."""
    return lambda x, level: Denoised(
        x0, (x - level.alpha.to(x) * x0) / level.sigma.to(x), x0 * 0 + 0.3, x0 * 2
    )


@pytest.mark.parametrize(("p", "c"), [(0.95, 1.0), (0.95, 1.5), (0.99, 1.7), (0.995, 100.0)])
def test_dynamic_threshold_of_deepfloyd_if(p, c):
    ours = Dynamic(p, c)(IF["x0"])
    torch.testing.assert_close(ours, IF[f"dyn_p{p}_c{c}"], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("percentile", [0.001, 0.5, 0.9, 0.995, 1.0])
def test_dynamic_threshold_is_the_paper_s_formula(percentile):
    x0 = 3 * torch.randn(4, 3, 7, 5, dtype=torch.float64)
    x0[0] *= 0.01  # within [-1, 1]: untouched
    s = torch.quantile(x0.flatten(1).abs(), percentile, dim=1).clamp_min(1).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(Dynamic(percentile)(x0), x0.clamp(-s, s) / s)
    assert torch.equal(Dynamic(percentile)(x0)[0], x0[0])


def test_dynamic_threshold_is_per_sample():
    x0 = torch.randn(3, 2, 8, 8) * torch.tensor([1.0, 5.0, 20.0]).reshape(-1, 1, 1, 1)
    alone = torch.cat([Dynamic(0.9)(row[None]) for row in x0])
    assert torch.equal(Dynamic(0.9)(x0), alone)


def test_threshold_moves_eps_with_x0_and_keeps_the_rest():
    x, x0 = torch.randn(2, 3, 4, 4), 3 * torch.randn(2, 3, 4, 4)
    ours = thresholded(fixed(x0), Static())(x, LEVEL)
    assert torch.equal(ours.x0, x0.clamp(-1, 1))
    consistent(x, LEVEL, ours)
    assert torch.equal(ours.grad, 2 * x0)
    assert torch.equal(ours.var, torch.full_like(x0, 0.3))


def test_known_region_is_blended_before_the_threshold():
    """GLIDE's order: known content outside [-1, 1] is bounded too."""
    x, x0 = torch.randn(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    known = Known(torch.full_like(x0, 2.5), (torch.rand(2, 1, 4, 4) > 0.5).float())
    keep = known.keep.bool().expand_as(x0)
    alone = blended(fixed(x0), known)(x, LEVEL)
    assert (alone.x0[keep] == 2.5).all()
    assert (alone.x0[~keep] == 0).all()
    consistent(x, LEVEL, alone)
    both = constrained(fixed(x0), known=known, threshold=Static())(x, LEVEL)
    assert (both.x0[keep] == 1).all()
    consistent(x, LEVEL, both)
    assert torch.equal(constrained(fixed(x0))(x, LEVEL).x0, x0)


def test_blended_walk_keeps_the_known_region():
    known = Known(torch.rand(2, 3, 4, 4) * 2 - 1, (torch.rand(2, 1, 4, 4) > 0.5).float())
    fn = constrained(fixed(torch.zeros(2, 3, 4, 4)), known=known, threshold=Static())
    grid = SPACINGS["respaced"](SCHEDULE, 10)
    end = integrate(SAMPLERS["ddim"], Run(fn, grid, torch.randn_like), torch.randn(2, 3, 4, 4))
    torch.testing.assert_close(end, known.into(torch.zeros_like(end), known.x0))


@pytest.mark.parametrize("jumps", [False, True])
def test_projection_ends_with_the_known_region_exactly(jumps):
    known = Known(torch.randn(2, 3, 4, 4), (torch.rand(2, 1, 4, 4) > 0.5).float())
    grid = SPACINGS["respaced"](SCHEDULE, 12)
    grid = repaint(grid, jump_length=3, resamples=2) if jumps else grid
    run = Run(fixed(torch.zeros(2, 3, 4, 4)), grid, torch.randn_like)
    end = integrate(
        SAMPLERS["ddpm"], run, torch.randn(2, 3, 4, 4), project=projection(known, grid, run.noise)
    )
    keep = known.keep.bool().expand_as(end)
    assert torch.equal(end[keep], known.x0[keep])
    assert (end[~keep].abs() < 1).all()


def test_projection_puts_the_known_region_at_the_level():
    draws = []

    def noise(like):
        draws.append(torch.randn_like(like))
        return draws[-1]

    known = Known(torch.randn(2, 3, 4, 4), torch.ones(1, 1, 4, 4))
    grid = SPACINGS["respaced"](SCHEDULE, 12)
    project, x = projection(known, grid, noise), torch.randn(2, 3, 4, 4)
    ours = project(x, 5)
    expected = grid.points[5].alpha * known.x0 + grid.points[5].sigma * draws[0]
    torch.testing.assert_close(ours, expected)
    assert not torch.equal(project(x, 5), ours)
    project(x, len(grid))
    assert len(draws) == 2


@pytest.mark.parametrize("threshold", [Static(), Static(10.0), Dynamic(), Dynamic(0.95, 1.5)])
def test_thresholds_survive_json(threshold):
    assert from_json(ThresholdConfig, to_json(threshold)) == threshold


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Static(0.0), "limit 0.0"),
        (lambda: Dynamic(99.5), r"percentile 99.5 is outside \(0, 1\]; 99.5 % is 0.995"),
        (lambda: Dynamic(0.9, max=0.5), "max 0.5 must be at least 1"),
    ],
)
def test_values_out_of_range_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()
