"""Coefficients and the training target that follows from them."""

from __future__ import annotations

import pytest
import torch

from sfumato.core.types import Level, expand
from sfumato.diffusion import PARAMETERIZATIONS, SCHEDULES, VE, Cosine, Flow
from sfumato.diffusion.parameterization import edm, target

LEVELS = {
    "linear": SCHEDULES["linear"]()(torch.tensor([0, 300, 999])),
    "cosine": Cosine()(torch.tensor([0.1, 0.5, 0.99], dtype=torch.float64)),
    "ve": VE()(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)),
    "flow": Flow()(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)),
}


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, 2, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("family", LEVELS)
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_target_makes_x0_exact(name, family):
    """x0 = skip x_t + out F for the derived F; 1e-9, for alpha = 0.006 and sigma = 0.002 divide roundoff."""
    level, (clean, noise) = LEVELS[family], pair()
    x_t = expand(level.alpha, clean) * clean + expand(level.sigma, clean) * noise
    c = PARAMETERIZATIONS[name](level)
    wanted = target(PARAMETERIZATIONS[name], level, clean, noise)
    assert torch.allclose(expand(c.skip, clean) * x_t + expand(c.out, clean) * wanted, clean, atol=1e-9)
    assert all(v.shape == level.alpha.shape and v.dtype == torch.float64 for v in c)


@pytest.mark.parametrize(
    ("name", "family", "formula"),
    [
        ("eps", "linear", lambda level, x0, e: e),
        ("x0", "linear", lambda level, x0, e: x0),
        ("v", "cosine", lambda level, x0, e: expand(level.alpha, e) * e - expand(level.sigma, e) * x0),
        ("flow", "flow", lambda level, x0, e: e - x0),
        ("flow", "linear", lambda level, x0, e: e - x0),
        ("eps", "ve", lambda level, x0, e: e),
    ],
)
def test_published_targets(name, family, formula):
    level, (clean, noise) = LEVELS[family], pair()
    derived = target(PARAMETERIZATIONS[name], level, clean, noise)
    assert torch.allclose(derived, formula(level, clean, noise), atol=1e-9)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_edm_is_table_1(sigma_data):
    sigma = torch.tensor([0.01, 0.7, 50.0], dtype=torch.float64)
    level = Level(sigma.log() / 4, torch.ones_like(sigma), sigma)
    skip, out, inp = edm(sigma_data)(level)
    total = sigma**2 + sigma_data**2
    assert torch.allclose(skip, sigma_data**2 / total)
    assert torch.allclose(out, sigma * sigma_data / total.sqrt())
    assert torch.allclose(inp, 1 / total.sqrt())


def test_edm_target_has_unit_variance():
    """What the preconditioning is for: input and target have variance 1 if the data have sigma_data^2."""
    g = torch.Generator().manual_seed(0)
    clean, noise = 0.5 * torch.randn(1, 200000, generator=g), torch.randn(1, 200000, generator=g)
    for log in (-1.0, -0.2, 0.4):
        level = VE()(torch.tensor([log]))
        wanted = target(edm(0.5), level, clean, noise)
        scaled = (clean + expand(level.sigma, noise) * noise) * expand(edm(0.5)(level).inp, clean)
        assert float(wanted.var()) == pytest.approx(1, abs=0.02)
        assert float(scaled.var()) == pytest.approx(1, abs=0.02)


def test_unknown_parameterization():
    with pytest.raises(
        ValueError, match=r"unknown parameterization 'epsilon'; .*allowed: edm, eps, flow, v, velocity, x0"
    ):
        PARAMETERIZATIONS["epsilon"]


def test_target_in_half_precision_keeps_its_dtype():
    clean, noise = (v.half() for v in pair())
    assert target(PARAMETERIZATIONS["v"], LEVELS["cosine"], clean, noise).dtype == torch.float16
