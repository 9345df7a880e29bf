"""Frechet distances against closed forms and scipy's matrix root, and their extrapolation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from sfumato.evaluation.metrics.frechet import (
    GROUPS,
    Gaussian,
    Moments,
    extrapolated,
    frechet_distance,
)


def moments(features: Tensor) -> Moments:
    found = Moments(features.shape[1])
    found.update(features)
    return found


def spread(d: int, seed: int) -> Tensor:
    """A random covariance."""
    root = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T / d


def test_axis_aligned_gaussians_have_a_closed_form() -> None:
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 4.0, 0.0]).double()
    shift = torch.tensor([1.0, -2.0, 0.5]).double()
    found = frechet_distance(Gaussian(torch.zeros(3).double(), a.diag()), Gaussian(shift, b.diag()))
    assert found == pytest.approx(float(((a.sqrt() - b.sqrt()) ** 2).sum() + shift.square().sum()), abs=1e-12)


def test_general_gaussians_against_scipy() -> None:
    a, b = (Gaussian(torch.randn(12).double(), spread(12, seed)) for seed in (1, 2))
    root = scipy.linalg.sqrtm((a.cov @ b.cov).numpy()).real
    expected = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-9)


def test_fewer_samples_than_dimensions() -> None:
    """The trace of the root is the nuclear norm of the product of the data matrices, whatever their rank."""
    x, y = torch.randn(10, 40).double(), torch.randn(15, 40).double() + 1
    roots = [((v - v.mean(0)) / (len(v) - 1) ** 0.5) for v in (x, y)]
    total = (x.mean(0) - y.mean(0)).square().sum() + sum(r.square().sum() for r in roots)
    expected = total - 2 * torch.linalg.matrix_norm(roots[0] @ roots[1].T, "nuc")
    found = frechet_distance(moments(x).gaussian(), moments(y).gaussian())
    assert found == pytest.approx(float(expected), rel=1e-6)  # roots of eigenvalues that are 0 up to 1e-16
    assert frechet_distance(moments(x).gaussian(), moments(x).gaussian()) == pytest.approx(0, abs=1e-5)


def test_sums_are_numpy_moments_whatever_the_batches() -> None:
    x = (torch.randn(100, 5) * 3 + 7).double()
    found = Moments(5)
    for part in x.split(17):
        found.update(part)
    merged = moments(x[:40]) + moments(x[40:])
    for m in (found, merged, (moments(torch.cat([x, x[:9]])) - moments(x[:9]))):
        g = m.gaussian()
        assert g.n == 100
        np.testing.assert_allclose(g.mean, x.numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(g.cov, np.cov(x.numpy(), rowvar=False), rtol=1e-10)


def test_float32_features_are_summed_in_float64() -> None:
    x = torch.full((1000, 1), 1000.0) + torch.arange(1000)[:, None] % 2
    assert float(moments(x).gaussian().cov) == pytest.approx(0.25 * 1000 / 999, rel=1e-9)


def test_wrong_features() -> None:
    with pytest.raises(ValueError, match="not finite"):
        moments(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(ValueError, match="covariance of 1 samples does not exist"):
        moments(torch.ones(1, 2)).gaussian()
    with pytest.raises(ValueError, match="3 and of 2 dimensions"):
        frechet_distance(moments(torch.randn(9, 3)).gaussian(), moments(torch.randn(9, 2)).gaussian())


def dealt(x: Tensor) -> list[Moments]:
    return [moments(x[i::GROUPS]) for i in range(GROUPS)]


def test_extrapolation_removes_the_bias_and_its_interval_holds_the_truth() -> None:
    """FID of N samples of N(0.3, 1) in 8 dimensions against N(0, 1) itself: 8 * 0.3^2 plus a bias over N."""
    d, n, truth = 8, 100, 8 * 0.3**2
    reference = Gaussian(torch.zeros(d).double(), torch.eye(d).double())
    plain, values, held = [], [], 0
    for seed in range(200):
        x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double() + 0.3
        plain.append(frechet_distance(reference, moments(x).gaussian()))
        found = extrapolated(dealt(x), reference)
        values.append(found.value)
        held += found.low <= truth <= found.high
    error = np.std(values) / 200**0.5
    assert np.mean(plain) - truth > 0.15  # what is to be removed
    assert abs(np.mean(values) - truth) < 3 * error + 0.01  # 0.01: of second order in 1/N
    assert 0.88 <= held / 200 <= 0.99


def test_extrapolation_is_the_line_through_its_points() -> None:
    x = torch.randn(50, 3).double()
    reference = Gaussian(torch.zeros(3).double(), torch.eye(3).double())
    found = extrapolated(dealt(x), reference)
    whole = frechet_distance(reference, moments(x).gaussian())
    rest = [moments(x[[i for i in range(50) if i % GROUPS != g]]) for g in range(GROUPS)]
    part = np.mean([frechet_distance(reference, m.gaussian()) for m in rest])
    slope, value = np.polyfit([1 / 50, 1 / 45], [whole, part], 1)
    assert found.value == pytest.approx(value, rel=1e-9)
    assert found.slope == pytest.approx(slope, rel=1e-9)


def test_extrapolation_of_too_few_samples() -> None:
    with pytest.raises(ValueError, match="give at least 20"):
        extrapolated(dealt(torch.randn(19, 3)), moments(torch.randn(9, 3)).gaussian())
