"""The Inception score of known predictions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sfumato.evaluation.metrics.inception_score import InceptionScore, Score


def scored(logits: torch.Tensor, batch: int = 7) -> Score:
    found = InceptionScore(len(logits), logits.shape[1])
    order = torch.randperm(len(logits))
    for rows in order.split(batch):
        found.update(logits[rows], rows)
    return found.score()


def test_sure_and_even_predictions_give_the_number_of_classes() -> None:
    logits = 200.0 * torch.eye(10).repeat(3, 1)
    assert scored(logits).mean == pytest.approx(10, rel=1e-12)


def test_one_prediction_for_all_gives_one() -> None:
    assert scored(torch.randn(10).expand(20, 10)).mean == pytest.approx(1, rel=1e-12)


def test_against_the_definition_in_splits() -> None:
    logits = torch.randn(10_500, 4) * 2
    p = logits.double().softmax(1).numpy()
    parts = [p[:5000], p[5000:10_000], p[10_000:]]
    scores = [np.exp((q * (np.log(q) - np.log(q.mean(0)))).sum(1).mean()) for q in parts]
    found = scored(logits, 1000)
    assert found.splits == 3
    assert found.mean == pytest.approx(np.mean(scores), rel=1e-10)
    assert found.std == pytest.approx(np.std(scores), rel=1e-8)


def test_missing_samples() -> None:
    found = InceptionScore(3, 4)
    found.update(torch.randn(2, 4), torch.arange(2))
    with pytest.raises(ValueError, match="of 3 samples got 2"):
        found.score()
