"""LPIPS-type perceptual distance over a VGG-shaped trunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PerceptualConfig", "PerceptualNet", "Trunk"]

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


class Trunk(nn.Module):
    """VGG stages; image (B, 3, H, W) in [-1, 1] -> the last activation of every stage."""

    shift: Tensor
    scale: Tensor

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
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> list[Tensor]:
        h = (image - self.shift) / self.scale
        taps = []
        for i, stage in enumerate(self.stages):
            h = stage(h if i == 0 else F.max_pool2d(h, 2))
            taps.append(h)
        return taps


class PerceptualNet(nn.Module):
    """Distance of two images in feature space (Zhang et al. 2018, arXiv:1801.03924, eq. 1).

    Weighted squared difference of channel-unit features, averaged over space, summed over stages.
    """

    weights: nn.ParameterList

    def __init__(self, config: PerceptualConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = Trunk(config)
        # LPIPS learned these non-negative weights from human judgments; ones give the plain distance.
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(w)) for w in config.widths])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance per sample, (B,), of images (B, 3, H, W) in [-1, 1]."""
        total = x.new_zeros(len(x))
        # Two passes: the one that needs no gradient, a real picture's, then costs no backward.
        for a, b, weight in zip(self.trunk(x), self.trunk(y), self.weights, strict=True):
            total = total + ((_unit(a) - _unit(b)).square() * weight.view(1, -1, 1, 1)).sum(1).mean((1, 2))
        return total


def _unit(h: Tensor) -> Tensor:
    """Unit length over channels; 1e-10 as in the published code, added to the norm."""
    return h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10)
