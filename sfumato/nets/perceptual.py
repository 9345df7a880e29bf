"""Perceptual distances of the LPIPS kind, over a trunk of VGG's or SqueezeNet's shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "FeatureDistance",
    "PerceptualConfig",
    "PerceptualNet",
    "SqueezeConfig",
    "SqueezePerceptualNet",
    "SqueezeTrunk",
    "Trunk",
]

# Input normalization of the published LPIPS on [-1, 1] images.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


@dataclass(frozen=True, kw_only=True)
class PerceptualConfig:
    """Trunk shape; the defaults are VGG-16, whose five taps LPIPS compares.

    `widths[i]` channels and `convs[i]` 3x3 convolutions in stage i, a 2x2 max-pool between stages.
    """

    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    convs: tuple[int, ...] = (2, 2, 3, 3, 3)

    def __post_init__(self) -> None:
        if len(self.widths) != len(self.convs):
            raise ValueError(f"{len(self.widths)} widths for {len(self.convs)} stages of convs")


@dataclass(frozen=True, kw_only=True)
class SqueezeConfig:
    """Trunk shape; the defaults are SqueezeNet 1.1, whose seven taps LPIPS compares.

    Attributes:
        stem: channels of the first convolution.
        fires: (channels between, channels of each of the two halves that come out) of the eight fire modules.
    """

    stem: int = 64
    fires: tuple[tuple[int, int], ...] = (
        *((16, 64), (16, 64), (32, 128), (32, 128)),
        *((48, 192), (48, 192), (64, 256), (64, 256)),
    )

    def __post_init__(self) -> None:
        if len(self.fires) != len(self.places):
            raise ValueError(f"{len(self.fires)} fire modules; SqueezeNet has {len(self.places)}")

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """(stage, place in it) of each fire module; stage 0 is the stem, and every stage ends in a tap."""
        return (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (4, 0), (5, 0), (6, 0)

    @property
    def pooled(self) -> tuple[int, ...]:
        """The stages that begin with a pool."""
        return 1, 2, 3

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each tap."""
        last = {stage: 2 * out for (stage, _), (_, out) in zip(self.places, self.fires, strict=True)}
        return self.stem, *last.values()


class Normalized(nn.Module):
    """Base of the trunks: the published shift and scale of pictures in [-1, 1]."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))

    def normalized(self, image: Tensor) -> Tensor:
        """What the first convolution sees."""
        return (image - self.shift) / self.scale


class Trunk(Normalized):
    """VGG stages; image (B, 3, H, W) in [-1, 1] -> the last activation of every stage."""

    def __init__(self, config: PerceptualConfig) -> None:
        super().__init__()
        self.stages = nn.ModuleList()
        cin = 3
        for width, convs in zip(config.widths, config.convs, strict=True):
            stage = nn.Sequential()
            for _ in range(convs):
                stage += nn.Sequential(nn.Conv2d(cin, width, 3, padding=1), nn.ReLU())
                cin = width
            self.stages.append(stage)

    def forward(self, image: Tensor) -> list[Tensor]:
        h = self.normalized(image)
        taps = []
        for i, stage in enumerate(self.stages):
            h = stage(h if i == 0 else F.max_pool2d(h, 2))
            taps.append(h)
        return taps


class Fire(nn.Module):
    """1x1 convolution to few channels, then 1x1 and 3x3 ones side by side (arXiv:1602.07360)."""

    def __init__(self, cin: int, between: int, out: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(cin, between, 1)
        self.expand1 = nn.Conv2d(between, out, 1)
        self.expand3 = nn.Conv2d(between, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.expand1(h), self.expand3(h)], dim=1))


class SqueezeTrunk(Normalized):
    """SqueezeNet 1.1; image (B, 3, H, W) in [-1, 1] -> seven activations.

    Nothing is padded but the 3x3 convolutions of fire modules; pools of 3x3 at stride 2 keep a window that
    the border cuts.
    """

    def __init__(self, config: SqueezeConfig) -> None:
        super().__init__()
        self.pooled = config.pooled
        stages = [nn.Sequential(nn.Conv2d(3, config.stem, 3, stride=2), nn.ReLU())]
        cin = config.stem
        for (stage, place), (between, out) in zip(config.places, config.fires, strict=True):
            if place == 0:
                stages.append(nn.Sequential())
            stages[stage].append(Fire(cin, between, out))
            cin = 2 * out
        self.stages = nn.ModuleList(stages)

    def forward(self, image: Tensor) -> list[Tensor]:
        h = self.normalized(image)
        taps = []
        for i, stage in enumerate(self.stages):
            h = stage(F.max_pool2d(h, 3, 2, ceil_mode=True) if i in self.pooled else h)
            taps.append(h)
        return taps


class FeatureDistance(nn.Module):
    """Distance of two images in feature space (Zhang et al. 2018, arXiv:1801.03924, eq. 1).

    Weighted squared difference of channel-unit features, averaged over space, summed over taps.

    Args:
        trunk: image -> taps.
        widths: channels of each tap.
    """

    weights: nn.ParameterList

    def __init__(self, trunk: nn.Module, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.trunk = trunk
        # LPIPS learned these non-negative weights from human judgments; ones give the plain distance.
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(w)) for w in widths])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance per sample, (B,), of images (B, 3, H, W) in [-1, 1]."""
        total = x.new_zeros(len(x))
        # Two passes: the one that needs no gradient, a real picture's, then costs no backward.
        for a, b, weight in zip(self.trunk(x), self.trunk(y), self.weights, strict=True):
            total = total + ((_unit(a) - _unit(b)).square() * weight.view(1, -1, 1, 1)).sum(1).mean((1, 2))
        return total


class PerceptualNet(FeatureDistance):
    """Distance over a trunk of VGG's shape: LPIPS with the published weights, or a small stand-in for it."""

    def __init__(self, config: PerceptualConfig) -> None:
        super().__init__(Trunk(config), config.widths)
        self.config = config


class SqueezePerceptualNet(FeatureDistance):
    """Distance over SqueezeNet: LPIPS with a trunk of 0.7M parameters instead of 14.7M."""

    def __init__(self, config: SqueezeConfig) -> None:
        super().__init__(SqueezeTrunk(config), config.widths)
        self.config = config


def _unit(h: Tensor) -> Tensor:
    """Unit length over channels; 1e-10 as in the published code, added to the norm.

    Where all channels are 0 the root has no gradient: its floor lets none pass instead of NaN.
    """
    squared = h.square().sum(1, keepdim=True).clamp_min(torch.finfo(h.dtype).tiny)
    return h / (squared.sqrt() + 1e-10)
