"""PatchGAN discriminator of the autoencoder stage."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["Discriminator", "DiscriminatorConfig"]


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Shape of the pix2pix discriminator; `layers` stride-2 convolutions, widths doubling up to 8x."""

    image_channels: int = 3
    channels: int = 64
    layers: int = 3


class Discriminator(nn.Module):
    """Image (B, 3, H, W) -> one real/fake logit per overlapping patch (B, 1, h, w).

    4x4 convolutions with padding 1, BatchNorm, LeakyReLU 0.2 (Isola et al. 2017, arXiv:1611.07004).
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.channels
        layers: list[nn.Module] = [nn.Conv2d(config.image_channels, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        for i in range(1, config.layers + 1):
            wider = config.channels * min(2**i, 8)
            stride = 2 if i < config.layers else 1
            layers += [
                nn.Conv2d(width, wider, 4, stride, 1, bias=False),
                nn.BatchNorm2d(wider),
                nn.LeakyReLU(0.2, True),
            ]
            width = wider
        self.net = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))
        self.apply(_initialize)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.net(image)
        return logits


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
