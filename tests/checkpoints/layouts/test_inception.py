"""FID's Inception from a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sfumato.checkpoints.layouts.inception import read_inception
from sfumato.nets.inception import InceptionV3


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return InceptionV3().state_dict()


def test_a_file_as_pytorch_fid_keeps_it(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """It was converted before torch counted batches, so it has no such numbers."""
    file = tmp_path / "pt_inception.pth"
    torch.save({n: v for n, v in state.items() if not n.endswith("num_batches_tracked")}, file)
    net = read_inception(file)
    assert not net.training
    for name, v in net.state_dict().items():
        assert torch.equal(v, state[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc.weight": torch.zeros(1000, 2048)}, "1000 classes, as torchvision's Inception; FID needs"),
        ({"AuxLogits.fc.weight": torch.zeros(1)}, "unexpected tensor 'AuxLogits.fc.weight'"),
        ({"fc.weight": None}, "no layer 'fc'"),
        ({"Mixed_6a.branch3x3.conv.weight": None}, "'Mixed_6a.branch3x3.conv.weight' is missing"),
        ({"fc.bias": torch.full((1008,), torch.nan)}, "NaN"),
    ],
)
def test_another_file(state: dict[str, torch.Tensor], tmp_path: Path, change: dict, message: str) -> None:
    file = tmp_path / "other.pth"
    torch.save({n: v for n, v in {**state, **change}.items() if v is not None}, file)
    with pytest.raises(ValueError, match=message):
        read_inception(file)
