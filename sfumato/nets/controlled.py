"""A U-Net with what steers it by pictures: ControlNets and T2I-Adapters, several of either."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sfumato.core.types import Conditioning
from sfumato.nets.attention import token_readers
from sfumato.nets.controlnet import ControlNet, ControlNetConfig, check_size
from sfumato.nets.t2i_adapter import T2IAdapter, check_base, places
from sfumato.nets.unet import Encoded, UNet, UNetConfig

__all__ = ["ControlUse", "Controlled"]


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
            check_size("T2I-Adapter", maps[0], x, net.config.reductions[0], factor)
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
