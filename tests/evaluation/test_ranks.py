"""Two processes give what one gives, and fail as one does. Run as a program, this file is one of the two."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sfumato.core.world import ALONE, Echo, World, joined
from sfumato.evaluation.evaluate import Instruments, evaluate, open_reference
from sfumato.evaluation.features import FeatureNet
from sfumato.evaluation.pictures import Array

METRICS = ("fid", "fid_inf", "sfid", "kid", "is", "prdc")


def features(pixels: Tensor) -> dict[str, Tensor]:
    matrix = torch.randn(12, 12, generator=torch.Generator().manual_seed(3))
    cells = nn.functional.adaptive_avg_pool2d(pixels.float() / 64 - 2, 2).flatten(1)
    found = (cells @ matrix).tanh()
    return {"pool": found[:, :5], "spatial": found[:, 5:8], "logits": 3 * found[:, 8:]}


def measured(
    folder: Path, world: World = ALONE, number: int = 30, broken: bool = False
) -> tuple[dict[str, float], object]:
    """Figures and pixel digests; 30 pictures in batches of 4, so that the processes get unequal numbers."""
    seen = (lambda x: {name: v * np.nan for name, v in features(x).items()}) if broken else features
    net = FeatureNet("inception", Path("toy.pth"), "ab" * 32, nn.Identity(), seen)
    tools = Instruments(METRICS, {"inception": net}, batch=4)
    samples = Array(np.random.default_rng(1).integers(256, size=(number, 16, 16, 3), dtype=np.uint8))
    reference = world.agree(lambda: open_reference(folder / "reference.npz", (16, 16), tools, world=world))
    result = world.agree(lambda: evaluate(samples, reference, tools, world=world))
    digests = [result.protocol[side]["pixels"] for side in ("samples", "reference")]  # type: ignore[index]
    return {f.name: f.value for f in result.figures}, digests


def failing(folder: Path, world: World, number: int, broken: bool) -> str:
    """What this process says of an evaluation that fails; "" if another one says it."""
    try:
        measured(folder, world, number, broken)
    except ValueError as error:
        return "" if isinstance(error, Echo) else str(error)
    return "it did not fail"


def share(folder: Path) -> None:
    with joined("cpu", seconds=60) as world:
        assert world.sum(torch.tensor(world.rank + 1)).item() == 3
        rows = torch.tensor([0, 1, 2, 6, 7, 8, 9] if world.leads else [3, 4, 5, 10])
        assert torch.equal(world.rows(rows * 2, rows), torch.arange(11) * 2)
        said = [failing(folder, world, n, n == 30 and world.rank == 1) for n in (30, 4, 19)]
        torch.save((*measured(folder, world), said), folder / f"{world.rank}.pt")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo")
def test_two_processes(tmp_path: Path, in_two: Callable[..., list[tuple[int, str, str]]]) -> None:
    reference = np.random.default_rng(0).integers(256, size=(41, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", reference)
    ended = in_two(__file__, tmp_path)
    assert [code for code, *_ in ended] == [0, 0], ended
    figures, digests = measured(tmp_path)
    found = [torch.load(tmp_path / f"{i}.pt") for i in range(2)]
    for theirs, seen, _ in found:
        assert theirs == pytest.approx(figures, rel=1e-6, abs=1e-6)
        assert seen == digests
    (_, _, first), (_, _, second) = found
    assert (first[0], second[1:]) == ("", ["", ""])
    assert "not finite" in second[0]
    assert "4 pictures in batches of 4 do not occupy 2 processes" in first[1]
    assert "give at least 20" in first[2]


def test_one_process() -> None:
    rows, order = torch.randn(5, 2), torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(ALONE.rows(rows, order), rows[order.argsort()])
    assert ALONE.sum(rows) is rows


if __name__ == "__main__":
    share(Path(sys.argv[1]))
