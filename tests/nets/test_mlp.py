from __future__ import annotations

import pytest
import torch

from sfumato.core.types import Conditioning
from sfumato.nets.mlp import MLP, MLPConfig

CONFIG = MLPConfig(in_channels=5, out_channels=10, width=8, depth=2, num_classes=3, pooled_dim=4)


def told(n: int = 3) -> Conditioning:
    return Conditioning(label=torch.arange(n) % 4, pooled=torch.randn(n, 4))


def test_a_fresh_net_predicts_zero_and_every_block_is_the_identity():
    net = MLP(CONFIG)
    x, t = torch.randn(3, 5), torch.rand(3)
    assert torch.equal(net(x, t, told()), torch.zeros(3, 10))
    h = torch.randn(3, 8)
    assert torch.equal(net.blocks[0](h, torch.randn(3, 8)), h)


@pytest.mark.parametrize("what", ["x", "t", "label", "pooled"])
def test_the_prediction_depends_on_everything_it_is_told_row_by_row(what):
    net = MLP(CONFIG)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.5)
    inputs = {"x": torch.randn(3, 5), "t": torch.rand(3) * 9, **dict(told().items())}

    def predict():
        return net(inputs["x"], inputs["t"], Conditioning(label=inputs["label"], pooled=inputs["pooled"]))

    before = predict()
    inputs[what] = inputs[what].clone()
    inputs[what][1] = 2 if what == "label" else inputs[what][1] + 1
    after = predict()
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1])


def test_what_it_cannot_work_with_is_named():
    net = MLP(CONFIG)
    with pytest.raises(ValueError, match=r"this MLP needs cond\.pooled"):
        net(torch.randn(1, 5), torch.rand(1), Conditioning(label=torch.zeros(1, dtype=torch.long)))
    with pytest.raises(ValueError, match=r"denoises vectors \(B, D\); x has shape \(1, 5, 2, 2\)"):
        net(torch.randn(1, 5, 2, 2), torch.rand(1), told(1))
