"""ControlNet: a copy of a U-Net's descending half that reads a picture and adds to what the U-Net hands on.

Zhang et al. 2023 (arXiv:2302.05543).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.types import Conditioning, KeysValues
from sfumato.nets.attention import token_readers
from sfumato.nets.blocks import dtype_of, zeroed
from sfumato.nets.unet import Encoder, UNet, UNetConfig, skip_widths

__all__ = ["ControlNet", "ControlNetConfig", "Residuals", "check_size", "fresh_control"]


@dataclass(frozen=True, kw_only=True)
class ControlNetConfig:
    """Shape of a ControlNet.

    Args:
        encoder: of the U-Net that it is for; what concerns the ascending half is not used.
        hint_channels: of the picture that it reads.
        hint_widths: of the convolutions before the encoder; between two of them the sides are halved, so that
            the picture is as many times larger than x.
        pooled: what it adds is the mean over all pixels (trained on shuffled pictures).
    """

    encoder: UNetConfig
    hint_channels: int = 3
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)
    pooled: bool = False

    @property
    def factor(self) -> int:
        """Sides of the picture over those of x."""
        return 2 ** (len(self.hint_widths) - 1)


class Residuals(NamedTuple):
    """What is added to a U-Net: to each of its skips, and after the middle."""

    skips: tuple[Tensor, ...]
    middle: Tensor


class Hint(nn.Module):
    """Picture -> feature map of the width and size that the encoder begins with; zero at first."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        widths, last = config.hint_widths, config.encoder.levels[0].channels
        convs = [nn.Conv2d(config.hint_channels, widths[0], 3, padding=1)]
        for a, b in pairwise(widths):
            convs += [nn.Conv2d(a, a, 3, padding=1), nn.Conv2d(a, b, 3, padding=1, stride=2)]
        self.convs = nn.ModuleList([*convs, zeroed(nn.Conv2d(widths[-1], last, 3, padding=1))])

    def forward(self, picture: Tensor) -> Tensor:
        """Picture (B, K, H, W) in [0, 1] -> (B, C, H / factor, W / factor)."""
        h = self.convs[0](picture.to(dtype_of(self)))
        for conv in list(self.convs)[1:]:
            h = conv(F.silu(h))
        return h


class ControlNet(nn.Module):
    """net(x, t, cond) -> Residuals; `cond.hint` is the picture. A fresh one adds nothing."""

    def __init__(self, config: ControlNetConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.hint = Encoder(config.encoder), Hint(config)
        widths = skip_widths(config.encoder)
        self.zero = nn.ModuleList(zeroed(nn.Conv2d(w, w, 1)) for w in (*widths, widths[-1]))
        for slot, reader in enumerate(token_readers(self)):
            reader.slot = slot

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Residuals:
        """x (B, C, h, w), t (B,) -> one residual per skip of the U-Net, and one for its middle.

        Raises: ValueError if there is no picture, or it has not the size that belongs to x.
        """
        if cond.hint is None:
            raise ValueError("a ControlNet reads cond.hint; it is None")
        return self.residuals(x, t, replace(cond, kv=self.keys_values(cond)), self.hint(cond.hint))

    def keys_values(self, cond: Conditioning) -> KeysValues:
        """Of the tokens, for its own attention."""
        if self.encoder.tokens is None:
            return ()
        tokens = self.encoder.tokens(cond, self.zero[0].weight.dtype)
        return tuple(reader.keys_values(tokens) for reader in token_readers(self))

    def residuals(self, x: Tensor, t: Tensor, cond: Conditioning, hint: Tensor) -> Residuals:
        """The same from keys and values, and from features of the picture."""
        check_size("ControlNet", hint, x, self.config.factor, self.config.factor)
        encoded = self.encoder(x[:, : self.config.encoder.in_channels], t, cond, hint)
        added = [conv(h) for conv, h in zip(self.zero, (*encoded.skips, encoded.h), strict=True)]
        if self.config.pooled:
            added = [h.mean(dim=(2, 3), keepdim=True) for h in added]
        return Residuals(tuple(added[:-1]), added[-1])


def fresh_control(unet: UNet, factor: int, channels: int = 3) -> ControlNet:
    """A ControlNet that changes nothing yet: the weights of the U-Net's descending half, and zeros.

    Args:
        factor: sides of the picture over those of x, a power of two.
        channels: of the picture.
    """
    widths = tuple(ControlNetConfig.hint_widths[: factor.bit_length()])
    control = ControlNet(ControlNetConfig(encoder=unet.config, hint_channels=channels, hint_widths=widths))
    control.encoder.load_state_dict(unet.encoder.state_dict())
    return control


def check_size(kind: str, features: Tensor, x: Tensor, reduction: int, factor: int) -> None:
    """Raises: ValueError in one line if a picture of so many times these features' sides does not fit x.

    Args:
        reduction: sides of the picture over those of the features.
        factor: sides of the picture that is needed over those of x.
    """
    (h, w), (height, width) = (
        [side * n for side in v.shape[-2:]] for v, n in ((features, reduction), (x, factor))
    )
    if (h, w) != (height, width):
        raise ValueError(f"the hint is {w}x{h} pixels; this {kind} needs {width}x{height} here")
