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
from sfumato.nets.t2i_adapter import T2IAdapter, check_base, places
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
        _check_size("ControlNet", hint, x, self.config.factor, self.config.factor)
        encoded = self.encoder(x[:, : self.config.encoder.in_channels], t, cond, hint)
        added = [conv(h) for conv, h in zip(self.zero, (*encoded.skips, encoded.h), strict=True)]
        if self.config.pooled:
            added = [h.mean(dim=(2, 3), keepdim=True) for h in added]
        return Residuals(tuple(added[:-1]), added[-1])


@dataclass(frozen=True, kw_only=True)
class ControlUse:
    """How a ControlNet or T2I-Adapter acts.

    Attributes:
        scale: factor on what it adds.
        start, stop: part of the walk in which it acts, from 0 = noise to 1 = clean.
        guess: of ControlNets: coarse features count more, and what guidance leaves behind is not controlled,
            so that the picture steers without a text (a scale of guidance of 3 to 5 is usual).

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
    """A U-Net with ControlNets and T2I-Adapters; called as the U-Net is, with their pictures in `cond.hint`.

    The pictures are side by side in the channels.
    `cond.control` (B, n), where it is given, says how much each of them acts on each row.

    Raises: ValueError if one of them is for another base, or a T2I-Adapter is to guess.
    """

    def __init__(
        self, unet: UNet, branches: Sequence[ControlNet | T2IAdapter], uses: Sequence[ControlUse] = ()
    ) -> None:
        super().__init__()
        self.unet, self.branches = unet, nn.ModuleList(branches)
        self.uses = tuple(uses) or (ControlUse(),) * len(branches)
        self.config = unet.config
        self.places = places(unet.config)
        self.times: Tensor | None = None
        for branch, use in zip(branches, self.uses, strict=True):
            if isinstance(branch, ControlNet):
                _check(unet.config, branch.config)
            else:
                check_base(unet.config, branch.config)
                if use.guess:
                    raise ValueError("a T2I-Adapter has no guess mode; leave out guess")

    @property
    def nets(self) -> list[ControlNet | T2IAdapter]:
        """The ControlNets and T2I-Adapters."""
        return [net for net in self.branches if isinstance(net, ControlNet | T2IAdapter)]

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the picture that each reads."""
        return tuple(net.config.hint_channels for net in self.nets)

    @property
    def guesses(self) -> tuple[bool, ...]:
        """Whether each leaves alone what guidance leaves behind, as those do that pool."""
        return tuple(
            use.guess or (isinstance(net, ControlNet) and net.config.pooled)
            for use, net in zip(self.uses, self.nets, strict=True)
        )

    def plan(self, times: Tensor) -> Controlled:
        """The same for a walk over these times, of which start and stop are fractions; see `Net`."""
        planned = copy.copy(self)
        planned.times = times[:-1].float().unique().flip(0)  # the walk ends at the last
        return planned

    def prepare(self, cond: Conditioning) -> Conditioning:
        """Keys and values for the U-Net and then for every ControlNet; features of every picture.

        Raises: ValueError if the hint does not hold one picture for each.
        """
        if cond.kv is not None:
            return cond
        channels = self.channels
        if cond.hint is None or cond.hint.shape[1] != sum(channels):
            found = "none" if cond.hint is None else f"a hint of {cond.hint.shape[1]} channels"
            raise ValueError(
                f"{len(channels)} ControlNets or T2I-Adapters read pictures of "
                f"{', '.join(map(str, channels))} channels side by side, and there is {found}; give one "
                "picture for each"
            )
        kv, features = tuple(self.unet.prepare(cond).kv or ()), []
        for branch, picture in zip(self.nets, cond.hint.split(channels, dim=1), strict=True):
            if isinstance(branch, ControlNet):
                kv += branch.keys_values(cond)
                features.append((branch.hint(picture),))
            else:
                features.append(branch(picture))
        return replace(cond, kv=kv, features=tuple(features))

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """As UNet.forward. Raises: ValueError as it and `prepare` do."""
        cond = self.prepare(cond)
        assert cond.kv is not None
        first = self.unet.num_readers
        shares = [self._acting(t, use) for use in self.uses]
        if cond.control is not None:
            shares = [share * cond.control[:, i] for i, share in enumerate(shares)]
        added = self._maps(x, cond, shares)
        h, skips, context = self.unet.encoded(x, t, replace(cond, kv=cond.kv[:first]), added)
        for branch, use, maps, rows in zip(self.nets, self.uses, cond.features, shares, strict=True):
            last = first + len(token_readers(branch))
            if isinstance(branch, ControlNet) and rows.any():
                own = replace(cond, kv=cond.kv[first:last])
                residuals = branch.residuals(x, t, own, maps[0])
                guessed = replace(use, guess=use.guess and not branch.config.pooled)
                weights = guessed.weights(len(skips) + 1).to(rows)[:, None] * rows
                by_row = [w.to(h.dtype)[:, None, None, None] for w in weights]
                skips = tuple(s + w * a for s, w, a in zip(skips, by_row, residuals.skips, strict=False))
                h = h + by_row[-1] * residuals.middle
            first = last
        return self.unet.decode(Encoded(h, skips, context))

    def _maps(self, x: Tensor, cond: Conditioning, shares: Sequence[Tensor]) -> dict[int, Tensor]:
        """What the T2I-Adapters add, by the number of the block; each acts on a share (B,) of the rows."""
        added: dict[int, Tensor] = {}
        for net, use, maps, share in zip(self.nets, self.uses, cond.features, shares, strict=True):
            if not isinstance(net, T2IAdapter) or not share.any():
                continue
            factor = net.config.reductions[0] // self.places[0].reduction
            _check_size("T2I-Adapter", maps[0], x, net.config.reductions[0], factor)
            weight = (use.scale * share).to(maps[0].dtype)[:, None, None, None]
            for place, one in zip(self.places, maps, strict=False):
                part = weight * one
                added[place.block] = added[place.block] + part if place.block in added else part
        return added

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


def _check_size(kind: str, features: Tensor, x: Tensor, reduction: int, factor: int) -> None:
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
