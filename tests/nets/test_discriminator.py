"""The PatchGAN against its published size and receptive field."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from sfumato.nets.discriminator import Discriminator, DiscriminatorConfig


@pytest.mark.parametrize(("layers", "parameters"), [(3, 2_765_633), (2, 663_361)])
def test_published_parameters(layers: int, parameters: int) -> None:
    net = Discriminator(DiscriminatorConfig(layers=layers))
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize(("layers", "field", "logits"), [(3, 70, 30), (2, 34, 62)])
def test_each_logit_sees_a_patch(layers: int, field: int, logits: int) -> None:
    """A logit in the middle depends on 70 x 70 pixels with three strided layers, as pix2pix says."""
    net = Discriminator(
        DiscriminatorConfig(channels=4, layers=layers)
    ).eval()  # eval: no statistics of the batch
    image = torch.randn(1, 3, 256, 256, requires_grad=True)
    out = net(image)
    assert out.shape == (1, 1, logits, logits)
    out[0, 0, logits // 2, logits // 2].backward()
    seen = image.grad[0].abs().sum(0) > 0
    assert int(seen.any(0).sum()) == int(seen.any(1).sum()) == field


def test_initialization() -> None:
    net = Discriminator(DiscriminatorConfig())
    convolutions = torch.cat([m.weight.flatten() for m in net.modules() if isinstance(m, nn.Conv2d)])
    gains = torch.cat([m.weight for m in net.modules() if isinstance(m, nn.BatchNorm2d)])
    # A deviation s estimated from n draws errs by s / sqrt(2 n): 1e-5 for 2.7M weights, 5e-4 for 896 gains.
    assert abs(float(convolutions.detach().std()) - 0.02) < 1e-4
    assert abs(float(gains.detach().mean()) - 1.0) < 0.005
    assert abs(float(gains.detach().std()) - 0.02) < 0.003


def test_no_bias_before_a_norm() -> None:
    layers = list(Discriminator(DiscriminatorConfig()).net)
    before = [a for a, b in pairwise(layers) if isinstance(b, nn.BatchNorm2d)]
    assert before
    assert all(layer.bias is None for layer in before)
