"""FID's Inception: numbers that torch-fidelity's network gives for weights made by a formula."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfumato.evaluation.preparation import tf_bilinear
from sfumato.nets.inception import InceptionV3

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/inception_fid.json").read_text("utf-8"))


def filled(name: str, shape: torch.Size) -> Tensor:
    """Values that look random and keep activations of order one; the same on every machine."""
    k = torch.arange(math.prod(shape), dtype=torch.float64)
    v = ((torch.sin(k * 12.9898 + zlib.crc32(name.encode()) % 1000) * 43758.5453).frac() * 1.2).reshape(shape)
    if name.endswith("running_var"):
        v = 1 + 0.3 * v
    elif name.endswith("bn.weight"):
        v = 1 + 0.1 * v
    elif len(shape) > 1:
        v = v * ((3 if len(shape) == 4 else 2) / math.prod(shape[1:])) ** 0.5
    else:
        v = 0.1 * v
    return v.float()


def picture() -> Tensor:
    k = torch.arange(2 * 3 * 70 * 90, dtype=torch.float64)
    waves = torch.sin(k * 0.013) + torch.sin(k * k * 0.0000171 + 1)
    return (waves * 63 + 127).round().to(torch.uint8).reshape(2, 3, 70, 90)


def compare(found: Tensor, golden: dict[str, object]) -> None:
    some = found[:, :: found.shape[1] // 8].flatten()
    torch.testing.assert_close(some, torch.tensor(golden["some"]), atol=2e-5, rtol=2e-5)
    assert float(found.double().norm()) == pytest.approx(golden["norm"], rel=1e-5)


def test_features_are_those_of_torch_fidelity() -> None:
    net = InceptionV3().eval()
    state = net.state_dict()
    assert sum(p.numel() for p in net.parameters()) == GOLDEN["parameters"] == 23_850_960
    assert len(state) == GOLDEN["tensors"]
    net.load_state_dict({n: filled(n, v.shape) if v.is_floating_point() else v for n, v in state.items()})
    resized = tf_bilinear(picture(), (299, 299))
    torch.testing.assert_close(resized[0, 0, 100, 95:103], torch.tensor(GOLDEN["resized"]["row"]))
    with torch.no_grad():
        found = net((resized - 128) / 128)
    compare(found.pool, GOLDEN["pool"])
    compare(found.logits, GOLDEN["logits"])
    compare(found.spatial, GOLDEN["spatial"])
