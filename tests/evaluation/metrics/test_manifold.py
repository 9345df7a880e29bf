"""Neighborhood metrics against brute force and against their distribution-free expectations."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.evaluation.metrics import manifold as module
from sfumato.evaluation.metrics.manifold import copies, manifold


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 16)


def distances(x: Tensor, y: Tensor) -> np.ndarray:
    return np.linalg.norm(x.numpy()[:, None] - y.numpy()[None], axis=2)


def radii(x: Tensor, k: int) -> np.ndarray:
    return np.sort(distances(x, x), axis=1)[:, k]


def test_against_brute_force() -> None:
    real, fake = torch.randn(60, 3).double() + 5, 0.7 * torch.randn(41, 3).double() + 5.4
    near = distances(fake, real)
    found = manifold(real, fake)
    assert found.precision == (near <= radii(real, 3)).any(1).mean()
    assert found.recall == (radii(fake, 3) >= near.T).any(1).mean()
    assert found.density == pytest.approx((near <= radii(real, 5)).sum() / 5 / 41, abs=1e-12)
    assert found.coverage == (near.min(0) <= radii(real, 5)).mean()
    assert len({found.precision, found.recall, found.coverage}) == 3


def test_samples_of_one_distribution_have_density_one_and_a_known_coverage() -> None:
    """Naeem et al. 2020, section 3.3: neither depends on the distribution or its dimension."""
    n, m, k = 40, 30, 5
    found = [manifold(torch.randn(n, 2) ** 3, torch.randn(m, 2) ** 3) for _ in range(300)]
    density, coverage = (np.array([getattr(f, name) for f in found]) for name in ("density", "coverage"))
    expected = 1 - prod((n - i) / (n + m - i) for i in range(1, k + 1))
    assert density.mean() == pytest.approx(1, abs=3.5 * density.std() / 300**0.5)
    assert coverage.mean() == pytest.approx(expected, abs=3.5 * coverage.std() / 300**0.5)


def test_equal_and_distant_sets() -> None:
    x = torch.randn(30, 4)
    same, far = manifold(x, x), manifold(x, x + 100)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


def test_too_few_samples_or_other_features() -> None:
    with pytest.raises(ValueError, match="not 5 and 9"):
        manifold(torch.randn(5, 2), torch.randn(9, 2))
    with pytest.raises(ValueError, match="2 and of 3 dimensions"):
        manifold(torch.randn(9, 2), torch.randn(9, 3))


def test_copies_are_found_and_new_samples_are_not() -> None:
    training = torch.randn(200, 16) + 50
    noise = 0.02 * torch.randn(10, 16)
    fake = torch.cat([training[40:50], training[60:70] + noise, torch.randn(20, 16) + 50])
    found = copies(training, fake)
    assert found.share == 0.5
    assert found.nearest[:20].tolist() == [*range(40, 50), *range(60, 70)]
    assert found.distance[:10].eq(0).all()
    np.testing.assert_allclose(found.distance[10:20], noise.norm(dim=1), rtol=1e-3)
    every = np.sort(distances(fake, training), axis=1)[:, :50]
    np.testing.assert_allclose(found.calibrated, every[:, 0] / (0.5 * every.mean(1)), rtol=1e-4, atol=1e-6)


def test_copies_without_training_pictures() -> None:
    with pytest.raises(ValueError, match="at least 2 training pictures, not 1"):
        copies(torch.randn(1, 2), torch.randn(9, 2))
