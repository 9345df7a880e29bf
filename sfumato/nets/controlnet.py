"""ControlNet: a copy of a U-Net's descending half that reads a picture and adds to what the U-Net hands on.

Zhang et al. 2023 (arXiv:2302.05543).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.types import Conditioning, KeysValues
from sfumato.nets.attention import token_readers
from sfumato.nets.blocks import dtype_of, zeroed
from sfumato.nets.unet import Encoded, Encoder, UNet, UNetConfig, skip_widths

__all__ = ["ControlNet", "ControlNetConfig", "ControlUse", "Controlled", "Residuals", "fresh_control"]


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
        if hint.shape[-2:] != x.shape[-2:]:
            f = self.config.factor
            (h, w), (height, width) = hint.shape[-2:], x.shape[-2:]
            raise ValueError(
                f"the hint is {w * f}x{h * f} pixels; this ControlNet needs {width * f}x{height * f} here"
            )
        encoded = self.encoder(x[:, : self.config.encoder.in_channels], t, cond, hint)
        added = [conv(h) for conv, h in zip(self.zero, (*encoded.skips, encoded.h), strict=True)]
        if self.config.pooled:
            added = [h.mean(dim=(2, 3), keepdim=True) for h in added]
        return Residuals(tuple(added[:-1]), added[-1])


@dataclass(frozen=True, kw_only=True)
class ControlUse:
    """How a ControlNet acts.

    Attributes:
        scale: factor on what it adds.
        start, stop: part of the walk in which it acts, from 0 = noise to 1 = clean.
        guess: coarse features count more, and what guidance leaves behind is not controlled, so that the
            picture steers without a text (a scale of guidance of 3 to 5 is usual).

    Raises: ValueError if the part of the walk is empty or outside of it.
    """

    scale: float = 1.0
    start: float = 0.0
    stop: float = 1.0
    guess: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(
                f"control from {self.start:g} to {self.stop:g} of the walk; allowed: 0 <= start < stop <= 1"
            )

    def weights(self, count: int) -> Tensor:
        """Factors on the residuals from the full resolution to the middle, (count,)."""
        return self.scale * (torch.logspace(-1, 0, count) if self.guess else torch.ones(count))


class Controlled(nn.Module):
    """A U-Net with ControlNets; called as the U-Net is, with their pictures side by side in `cond.hint`.

    `cond.control` (B, n), where it is given, says how much each of them acts on each row.
    """

    def __init__(self, unet: UNet, branches: Sequence[ControlNet], uses: Sequence[ControlUse] = ()) -> None:
        super().__init__()
        self.unet, self.branches = unet, nn.ModuleList(branches)
        self.uses = tuple(uses) or (ControlUse(),) * len(branches)
        self.config = unet.config
        self.times: Tensor | None = None
        for branch in branches:
            _check(unet.config, branch.config)

    @property
    def nets(self) -> list[ControlNet]:
        """The ControlNets."""
        return [net for net in self.branches if isinstance(net, ControlNet)]

    @property
    def guesses(self) -> tuple[bool, ...]:
        """Whether each leaves alone what guidance leaves behind, as those do that pool."""
        return tuple(use.guess or net.config.pooled for use, net in zip(self.uses, self.nets, strict=True))

    def plan(self, times: Tensor) -> Controlled:
        """The same for a walk over these times, of which start and stop are fractions; see `Net`."""
        planned = copy.copy(self)
        planned.times = times[:-1].float().unique().flip(0)  # the walk ends at the last
        return planned

    def prepare(self, cond: Conditioning) -> Conditioning:
        """Keys and values for the U-Net and then for every ControlNet; the hint becomes its features.

        Raises: ValueError if the hint does not hold one picture for each ControlNet.
        """
        if cond.kv is not None:
            return cond
        channels = [branch.config.hint_channels for branch in self.nets]
        if cond.hint is None or cond.hint.shape[1] != sum(channels):
            found = "none" if cond.hint is None else f"a hint of {cond.hint.shape[1]} channels"
            raise ValueError(
                f"{len(channels)} ControlNets read pictures of {', '.join(map(str, channels))} channels side "
                f"by side, and there is {found}; give one picture for each"
            )
        pictures = cond.hint.split(channels, dim=1)
        hints = [branch.hint(one) for branch, one in zip(self.nets, pictures, strict=True)]
        kv = tuple(self.unet.prepare(cond).kv or ())
        for branch in self.nets:
            kv += branch.keys_values(cond)
        return replace(cond, kv=kv, hint=torch.cat(hints, dim=1))

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """As UNet.forward. Raises: ValueError as it and `prepare` do."""
        cond = self.prepare(cond)
        assert cond.kv is not None
        assert cond.hint is not None
        first = self.unet.num_readers
        h, skips, context = self.unet.encoded(x, t, replace(cond, kv=cond.kv[:first]))
        hints = cond.hint.chunk(len(self.uses), dim=1)
        for i, (branch, use) in enumerate(zip(self.nets, self.uses, strict=True)):
            last = first + len(token_readers(branch))
            rows = self._acting(t, use) * (1.0 if cond.control is None else cond.control[:, i])
            if rows.any():
                own = replace(cond, kv=cond.kv[first:last])
                added = branch.residuals(x, t, own, hints[i])
                guessed = replace(use, guess=use.guess and not branch.config.pooled)
                weights = guessed.weights(len(skips) + 1).to(rows)[:, None] * rows
                by_row = [w.to(h.dtype)[:, None, None, None] for w in weights]
                skips = tuple(s + w * a for s, w, a in zip(skips, by_row, added.skips, strict=False))
                h = h + by_row[-1] * added.middle
            first = last
        return self.unet.decode(Encoded(h, skips, context))

    def _acting(self, t: Tensor, use: ControlUse) -> Tensor:
        """1 for the rows (B,) whose step is in the part of the walk, else 0."""
        if self.times is None or (use.start, use.stop) == (0, 1):
            return torch.ones(len(t), device=t.device)
        steps = len(self.times)
        step = (self.times.to(t.device) >= t.float()[:, None]).sum(1) - 1
        step = step.double()
        return ((step / steps >= use.start) & ((step + 1) / steps <= use.stop)).float()


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


def _check(unet: UNetConfig, control: ControlNetConfig) -> None:
    """Raises: ValueError in one line if a ControlNet is for another base."""
    own = control.encoder
    pairs = {
        "tokens of width": (own.token_dim, unet.token_dim),
        "levels of widths": (_widths(own), _widths(unet)),
        "a vector of width": (own.embedding.dim, unet.embedding.dim),
    }
    for name, (made, found) in pairs.items():
        if made != found:
            raise ValueError(
                f"this ControlNet is for another base, a U-Net with {name} {made}; this one has {found}"
            )


def _widths(config: UNetConfig) -> tuple[int, ...]:
    return tuple(level.channels for level in config.levels for _ in range(level.blocks))
