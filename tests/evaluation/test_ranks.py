"""Two processes give what one gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from sfumato.evaluation.metrics.frechet import Moments
from sfumato.evaluation.metrics.inception_score import InceptionScore
from sfumato.evaluation.ranks import all_rows, all_sum, rank, world


def gathered(features: Tensor, position: Tensor) -> tuple[Tensor, Tensor, float]:
    moments, score = Moments(4), InceptionScore(11, 4)
    moments.update(features)
    score.update(features, position)
    return all_rows(features, position), moments.reduced().gaussian().cov, score.score().mean


def share(index: int, features: Tensor, folder: Path) -> None:
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", store, rank=index, world_size=2)
    assert (rank(), world()) == (index, 2)
    rows = torch.tensor([0, 1, 2, 6, 7, 8, 9] if index == 0 else [3, 4, 5, 10])
    torch.save(gathered(features[rows], rows), folder / f"{index}.pt")
    assert all_sum(torch.tensor(index + 1)).item() == 3
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes(tmp_path: Path) -> None:
    features = torch.randn(11, 4)
    expected = gathered(features, torch.arange(11))
    context = mp.get_context("fork")
    started = [context.Process(target=share, args=(i, features, tmp_path)) for i in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        assert process.exitcode == 0
    for i in range(2):
        rows, cov, score = torch.load(tmp_path / f"{i}.pt")
        assert torch.equal(rows, features)
        torch.testing.assert_close(cov, expected[1])
        assert score == pytest.approx(expected[2], rel=1e-12)


def test_one_process() -> None:
    assert (rank(), world()) == (0, 1)
    rows, order = torch.randn(5, 2), torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(all_rows(rows, order), rows[order.argsort()])
