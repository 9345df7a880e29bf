"""The perceptual distance against its formula, and its trunk against VGG-16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sfumato.nets.perceptual import PerceptualConfig, PerceptualNet, SqueezeConfig, SqueezePerceptualNet

TINY = PerceptualConfig(widths=(4, 6), convs=(1, 2))


@pytest.fixture
def net() -> PerceptualNet:
    net = PerceptualNet(TINY)
    for weight in net.weights:
        nn.init.uniform_(weight)
    return net


def test_default_trunk_is_vgg16() -> None:
    """13 convolutions with 14,714,688 parameters; LPIPS compares 1472 channels of five stages."""
    with torch.device("meta"):
        net = PerceptualNet(PerceptualConfig())
        taps = net.trunk(torch.empty(1, 3, 64, 64))
    assert sum(p.numel() for p in net.trunk.parameters()) == 14_714_688
    assert sum(isinstance(m, nn.Conv2d) for m in net.modules()) == 13
    assert [(t.shape[1], t.shape[2]) for t in taps] == [(64, 64), (128, 32), (256, 16), (512, 8), (512, 4)]
    assert sum(w.numel() for w in net.weights) == 1472


def test_equal_pictures_have_no_distance(net: PerceptualNet) -> None:
    x = torch.rand(3, 3, 16, 16) * 2 - 1
    assert torch.equal(net(x, x), torch.zeros(3))


def test_distance_is_its_formula(net: PerceptualNet) -> None:
    x, y = torch.rand(2, 2, 3, 8, 8) * 2 - 1
    want = torch.zeros(2)
    for a, b, weight in zip(net.trunk(x), net.trunk(y), net.weights, strict=True):
        difference = F.normalize(a, dim=1) - F.normalize(b, dim=1)
        want += (difference.square() * weight[:, None, None]).sum(1).mean((1, 2))
    distance = net(x, y)
    assert (distance > 0).all()
    torch.testing.assert_close(distance, want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(net(y, x), distance, rtol=1e-5, atol=1e-7)


def test_rows_are_independent(net: PerceptualNet) -> None:
    x, y = torch.rand(2, 2, 3, 8, 8)
    torch.testing.assert_close(net(x[1:], y[1:]), net(x, y)[1:], rtol=1e-5, atol=1e-7)


def test_input_normalization(net: PerceptualNet) -> None:
    """The published constants are ImageNet's mean and deviation on [0, 1], carried to [-1, 1]."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(net.trunk.shift.flatten(), 2 * mean - 1, rtol=0, atol=1e-6)
    torch.testing.assert_close(net.trunk.scale.flatten(), 2 * std, rtol=0, atol=1e-6)


def test_gradient_reaches_the_picture_of_a_frozen_net(net: PerceptualNet) -> None:
    net.requires_grad_(False)
    x = torch.rand(1, 3, 8, 8, requires_grad=True)
    net(x, torch.rand(1, 3, 8, 8)).sum().backward()
    assert x.grad.any()
    assert torch.isfinite(x.grad).all()


def test_a_pixel_without_any_activation_passes_no_gradient(net: PerceptualNet) -> None:
    """The root of 0 has an infinite slope, which would turn all that is trained into NaN."""
    for parameter in net.trunk.parameters():
        nn.init.constant_(parameter, -1.0)
    x = torch.rand(1, 3, 8, 8, requires_grad=True)
    net(x, torch.zeros(1, 3, 8, 8)).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_squeezenet_has_seven_taps_and_keeps_windows_that_the_border_cuts() -> None:
    with torch.device("meta"):
        net = SqueezePerceptualNet(SqueezeConfig())
        taps = net.trunk(torch.empty(1, 3, 64, 64))
    assert [t.shape[1] for t in taps] == list(net.config.widths) == [64, 128, 256, 384, 384, 512, 512]
    # (64 - 3) / 2 + 1 = 31; then ceil((31 - 3) / 2) + 1 = 15, 7 and 3.
    assert [t.shape[2] for t in taps] == [31, 15, 7, 3, 3, 3, 3]


def test_wrong_configuration() -> None:
    with pytest.raises(ValueError, match="2 widths for 1 stages"):
        PerceptualConfig(widths=(4, 6), convs=(1,))
    with pytest.raises(ValueError, match="1 fire modules; SqueezeNet has 8"):
        SqueezeConfig(fires=((4, 4),))
