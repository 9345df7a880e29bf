"""The kernel distance against its expectation for Gaussians, and against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sfumato.evaluation.metrics.kernel import kernel_distance, mmd2


def expectation(d: int, m2: float) -> float:
    """MMD^2 of N(0, I) and N(m, I) with |m|^2 = m2, from the moments of x . y up to the third."""
    xx, xy = 1 + 3 / d, 1 + 3 * (d + m2) / d**2
    third = m2**3 + 6 * m2**2 + 3 * m2 * d + 6 * m2
    yy = 1 + 3 * m2 / d + 3 * (d + 2 * m2 + m2**2) / d**2 + third / d**3
    return xx + yy - 2 * xy


def test_gaussians_of_known_means() -> None:
    d, shift = 6, 0.5
    values = []
    for seed in range(400):
        g = torch.Generator().manual_seed(seed)
        x, y = torch.randn(30, d, generator=g).double(), torch.randn(30, d, generator=g).double() + shift
        values.append(float(mmd2(x, y)))
    assert expectation(d, d * shift**2) > 0.5
    assert np.mean(values) == pytest.approx(expectation(d, d * shift**2), abs=3.5 * np.std(values) / 20)


def test_one_distribution_gives_zero_at_any_number_of_samples() -> None:
    """A biased estimate would be about 2 / n of the kernel's diagonal, 0.5 here."""
    x = torch.randn(8000, 4, generator=torch.Generator().manual_seed(0)).double()
    values = [float(mmd2(a, b)) for a, b in zip(x[:4000].split(10), x[4000:].split(10), strict=True)]
    assert np.mean(values) == pytest.approx(0, abs=3.5 * np.std(values) / 20)


def test_against_loops() -> None:
    x, y = torch.randn(5, 3).double(), torch.randn(4, 3).double()

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / 3 + 1) ** 3)

    within = [
        sum(k(v[i], v[j]) for i in range(len(v)) for j in range(len(v)) if i != j) / (len(v) * (len(v) - 1))
        for v in (x, y)
    ]
    across = sum(k(a, b) for a in x for b in y) / 20
    assert float(mmd2(x, y)) == pytest.approx(sum(within) - 2 * across, rel=1e-10)


def test_subsets() -> None:
    x, y = torch.randn(50, 3), torch.randn(40, 3)
    found = kernel_distance(x, y, subsets=7, size=1000)
    assert (found.subsets, found.size) == (7, 40)
    assert found == kernel_distance(x, y, subsets=7, size=1000)
    assert found != kernel_distance(x, y, subsets=7, size=1000, seed=1)
    whole = kernel_distance(x[:40], y, subsets=3, size=40)
    assert whole.mean == pytest.approx(float(mmd2(x[:40], y)), rel=1e-5)  # float32 dot products
    assert whole.std < 1e-6


def test_wrong_features() -> None:
    with pytest.raises(ValueError, match="at least 2 samples each, not 1 and 5"):
        kernel_distance(torch.randn(1, 3), torch.randn(5, 3))
    with pytest.raises(ValueError, match="3 and of 2 dimensions"):
        kernel_distance(torch.randn(5, 3), torch.randn(5, 2))
