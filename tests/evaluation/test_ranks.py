"""Two processes give what one gives. Run as a program, this file is one of the two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sfumato.evaluation.evaluate import Instruments, evaluate, open_reference
from sfumato.evaluation.features import FeatureNet
from sfumato.evaluation.pictures import Array
from sfumato.evaluation.ranks import all_rows, all_sum, rank, world

METRICS = ("fid", "fid_inf", "sfid", "kid", "is", "prdc")


def features(pixels: Tensor) -> dict[str, Tensor]:
    matrix = torch.randn(12, 12, generator=torch.Generator().manual_seed(3))
    cells = nn.functional.adaptive_avg_pool2d(pixels.float() / 64 - 2, 2).flatten(1)
    found = (cells @ matrix).tanh()
    return {"pool": found[:, :5], "spatial": found[:, 5:8], "logits": 3 * found[:, 8:]}


def measured(folder: Path) -> tuple[dict[str, float], object]:
    """Figures and pixel digests; 30 pictures in batches of 4, so that the ranks get unequal numbers."""
    net = FeatureNet("inception", Path("toy.pth"), "ab" * 32, nn.Identity(), features)
    tools = Instruments(METRICS, {"inception": net}, batch=4)
    samples = Array(np.random.default_rng(1).integers(256, size=(30, 16, 16, 3), dtype=np.uint8))
    result = evaluate(samples, open_reference(folder / "reference.npz", (16, 16), tools), tools)
    digests = [result.protocol[side]["pixels"] for side in ("samples", "reference")]  # type: ignore[index]
    return {f.name: f.value for f in result.figures}, digests


def share(index: int, folder: Path) -> None:
    store = f"file://{folder / 'store'}"
    torch.distributed.init_process_group("gloo", store, rank=index, world_size=2)
    assert (rank(), world()) == (index, 2)
    assert all_sum(torch.tensor(index + 1)).item() == 3
    rows = torch.tensor([0, 1, 2, 6, 7, 8, 9] if index == 0 else [3, 4, 5, 10])
    assert torch.equal(all_rows(rows * 2, rows), torch.arange(11) * 2)
    torch.save(measured(folder), folder / f"{index}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes(tmp_path: Path, repository: Path) -> None:
    reference = np.random.default_rng(0).integers(256, size=(41, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", reference)
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    started = [
        subprocess.Popen([sys.executable, __file__, str(i), str(tmp_path)], env=environment) for i in range(2)
    ]
    assert [process.wait(300) for process in started] == [0, 0]
    figures, digests = measured(tmp_path)
    for i in range(2):
        theirs, seen = torch.load(tmp_path / f"{i}.pt")
        assert theirs == pytest.approx(figures, rel=1e-6, abs=1e-6)
        assert seen == digests


def test_one_process() -> None:
    assert (rank(), world()) == (0, 1)
    rows, order = torch.randn(5, 2), torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(all_rows(rows, order), rows[order.argsort()])


if __name__ == "__main__":
    share(int(sys.argv[1]), Path(sys.argv[2]))
