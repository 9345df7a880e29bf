"""One layer with low-rank pairs beside it: the pair, and what becomes of a linear or convolution layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sfumato.nets.tags import fused, parts_of

__all__ = ["ADAPTED", "PLAIN", "Adapted", "Attached", "Layer", "LowRank"]

Layer = nn.Linear | nn.Conv2d


class LowRank(nn.Module):
    """alpha / rank * up(down(x)): the change of one layer, zero at first because `up` is.

    Of a convolution, `down` has its kernel, stride and padding, and `up` is 1x1. The parts of a fused layer
    (q, k, v) have one pair each, as separate layers would.

    Args:
        layer: whose output is changed; its weights are not read.
        rank: inner width, of each part.
        alpha: see above.
    """

    down: Layer
    up: Layer

    def __init__(self, layer: Layer, rank: int, alpha: float) -> None:
        super().__init__()
        self.rank, self.alpha, self.parts = rank, alpha, parts_of(layer)
        inner = rank * self.parts
        if isinstance(layer, nn.Conv2d):
            self.down = nn.Conv2d(
                layer.in_channels,
                inner,
                layer.kernel_size,  # type: ignore[arg-type]
                layer.stride,  # type: ignore[arg-type]
                layer.padding,  # type: ignore[arg-type]
                layer.dilation,  # type: ignore[arg-type]
                bias=False,
                padding_mode=layer.padding_mode,
            )
            self.up = nn.Conv2d(inner, layer.out_channels, 1, groups=self.parts, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, inner, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        fused(self.down, self.parts), fused(self.up, self.parts)  # for optimizers of matrices
        nn.init.zeros_(self.up.weight)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's weight."""
        return (self.up.weight.shape[0], *self.down.weight.shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output at x, in the dtype of the pair."""
        h = self.down(x.to(self.down.weight.dtype))
        if isinstance(self.up, nn.Conv2d) or self.parts == 1:
            y = self.up(h)
        else:
            up = self.up.weight.unflatten(0, (self.parts, -1))
            h = h.unflatten(-1, (self.parts, self.rank))
            y = torch.einsum("...pr,por->...po", h, up).flatten(-2)
        return y * (self.alpha / self.rank)

    def delta(self) -> Tensor:
        """What is added to the layer's weight, in its shape."""
        down = self.down.weight.unflatten(0, (self.parts, self.rank)).flatten(2)  # (parts, rank, in * kernel)
        up = self.up.weight.flatten(1).unflatten(0, (self.parts, -1))  # (parts, out / parts, rank)
        return (up @ down).reshape(self.shape) * (self.alpha / self.rank)


class Attached(NamedTuple):
    """A pair, and the factor on what it adds."""

    pair: LowRank
    weight: float


class Adapted(nn.Module):
    """What a layer is while adapters are attached to it.

    The pairs are no submodules: they belong to their adapters, and the net's names stay its own.

    Attributes:
        attached: by name of the adapter.
        kept: the weight without them while they are merged into it, else None.
    """

    weight: Tensor
    attached: dict[str, Attached]
    kept: Tensor | None

    def changed(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output y at x, with what the adapters add to it unless they are merged."""
        if self.kept is None:
            for pair, weight in self.attached.values():
                if weight:
                    y = y + (weight * pair(x)).to(y.dtype)
        return y

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute a merged weight anew from the kept one; summed in float32 at least."""
        if self.kept is not None:
            total = self.kept.to(torch.promote_types(self.kept.dtype, torch.float32))
            for pair, weight in self.attached.values():
                if weight:
                    total = total + weight * pair.delta().to(total)
            self.weight.copy_(total)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the kept weight back."""
        if self.kept is not None:
            self.weight.copy_(self.kept)
            self.kept = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapted:
        """Move and cast the pairs together with the layer."""
        super()._apply(fn, recurse)
        for pair, _ in self.attached.values():
            pair._apply(fn)
        self.kept = fn(self.kept) if self.kept is not None else None
        return self


class AdaptedLinear(Adapted, nn.Linear):
    """A linear layer with adapters."""

    def forward(self, input: Tensor) -> Tensor:
        return self.changed(input, super().forward(input))


class AdaptedConv2d(Adapted, nn.Conv2d):
    """A convolution with adapters."""

    def forward(self, input: Tensor) -> Tensor:
        return self.changed(input, super().forward(input))


ADAPTED: dict[type[nn.Module], type[Adapted]] = {nn.Linear: AdaptedLinear, nn.Conv2d: AdaptedConv2d}
PLAIN: dict[type[nn.Module], type[nn.Module]] = {adapted: plain for plain, adapted in ADAPTED.items()}
