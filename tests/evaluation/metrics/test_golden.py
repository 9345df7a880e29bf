"""The formulas beside those of torch-fidelity, whose numbers are recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfumato.evaluation.metrics.frechet import Gaussian, Moments, frechet_distance
from sfumato.evaluation.metrics.inception_score import InceptionScore
from sfumato.evaluation.metrics.kernel import mmd2
from sfumato.evaluation.metrics.manifold import manifold

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/metrics.json").read_text("utf-8"))


def made(n: int, phase: float) -> Tensor:
    """Features that look random, the same on every machine."""
    k = torch.arange(n * 12, dtype=torch.float64)
    values = (torch.sin(k * 12.9898 + phase) * 43758.5453).frac().reshape(n, 12)
    return (values * (1 + torch.arange(12) % 3)).float()


@pytest.fixture
def sets() -> tuple[Tensor, Tensor]:
    return made(300, 0.5) + 0.15, made(260, 7.25)


def test_frechet_distance(sets: tuple[Tensor, Tensor]) -> None:
    def gaussian(x: Tensor) -> Gaussian:
        moments = Moments(12)
        moments.update(x)
        return moments.gaussian()

    # Theirs has sums in float32.
    assert frechet_distance(*map(gaussian, sets)) == pytest.approx(GOLDEN["fid"], rel=1e-5)


def test_kernel_distance(sets: tuple[Tensor, Tensor]) -> None:
    x, y = (v.double() for v in sets)
    assert float(mmd2(x[:260], y)) == pytest.approx(GOLDEN["mmd2"], rel=1e-9)


def test_precision_and_recall(sets: tuple[Tensor, Tensor]) -> None:
    found = manifold(sets[1], sets[0])
    assert found.precision == pytest.approx(GOLDEN["precision"], abs=1e-6)
    assert found.recall == pytest.approx(GOLDEN["recall"], abs=1e-6)


def test_inception_score(sets: tuple[Tensor, Tensor]) -> None:
    score = InceptionScore(300, 12)
    score.update(sets[0], torch.arange(300))
    assert score.score().mean == pytest.approx(GOLDEN["is"], rel=1e-9)
