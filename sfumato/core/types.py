"""The value types that every layer exchanges: Level, Denoised, Conditioning, Inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Conditioning", "Denoised", "Inputs", "KeysValues", "Level", "Reading", "expand"]

WHOLE = ("size", "original_size", "crop", "target_size")  # fields of Inputs that all pictures share
KeysValues = tuple[
    tuple[Tensor, Tensor], ...
]  # one (keys, values) pair per attention layer that reads the tokens


def expand(v: Tensor, like: Tensor) -> Tensor:
    """Cast v, () or (B,), to the dtype and device of `like`; append axes until it broadcasts against it."""
    v = v.to(like)
    return v.reshape(v.shape + (1,) * (like.ndim - v.ndim)) if v.ndim else v


class Level(NamedTuple):
    """A noise level: x_t = alpha * x_0 + sigma * eps, eps ~ N(0, I).

    t is the model time, what the network embeds (index, ln(sigma)/4, 1-u ...); all () or (B,), float64.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor


@dataclass(frozen=True, slots=True)
class Denoised:
    """What a denoiser says of x_t; every tensor has the shape of x_t, (B, C, ...)."""

    x0: Tensor
    """E[x_0 | x_t]."""
    eps: Tensor
    """The noise that x0 implies."""
    var: Tensor | None = None
    """Learned-range coordinate: log-variance between "small" (-1) and "large" (+1), not squashed."""
    grad: Tensor | None = None
    """External score grad_x log p(y | x_t), already scaled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """What a network may be told besides x_t and t; every tensor has batch B first."""

    label: Tensor | None = None
    """(B,) int64 class; num_classes = null."""
    tokens: Tensor | None = None
    """(B, L, D) sequence for cross or joint attention."""
    mask: Tensor | None = None
    """(B, L) bool, True = real token."""
    pooled: Tensor | None = None
    """(B, D) global text embedding."""
    image_embed: Tensor | None = None
    """(B, D) CLIP image embedding."""
    micro: Tensor | None = None
    """(B, K) raw numbers: size, crop, target size, aesthetic score."""
    concat: Tensor | None = None
    """(B, C', H, W) channels that the Denoiser appends to x_t."""
    guidance: Tensor | None = None
    """(B,) w = scale - 1 of the guidance that a distilled network has learned."""
    aug: Tensor | None = None
    """(B,) noise-augmentation level of `concat` or `image_embed`."""
    hint: Tensor | None = None
    """(B, K, H, W) picture(s) in [0, 1] of the nets beside a U-Net, side by side in the channels."""
    control: Tensor | None = None
    """(B, n) how much each net beside a U-Net acts on each row; None = all fully."""
    kv: KeysValues | None = None
    """Keys and values of `tokens` for each attention layer that reads them, from the net's `prepare`."""
    features: tuple[tuple[Tensor, ...], ...] = ()
    """What each net beside a U-Net makes of its part of `hint`, from `prepare`."""

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that are set, by field name; what `prepare` derived is not among them."""
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in ("kv", "features") and value is not None:
                yield f.name, value

    def map(self, fn: Callable[[Tensor], Tensor]) -> Conditioning:
        """Apply fn to every tensor, what was prepared included."""
        kv = None if self.kv is None else tuple((fn(k), fn(v)) for k, v in self.kv)
        maps = tuple(tuple(fn(v) for v in one) for one in self.features)
        return replace(self, kv=kv, features=maps, **{name: fn(v) for name, v in self.items()})

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Conditioning:
        """Move to a device; floating tensors also take `dtype`."""
        return self.map(lambda v: v.to(device, dtype if dtype and v.is_floating_point() else v.dtype))

    def select(self, keep: Tensor, other: Conditioning) -> Conditioning:
        """Row by row this conditioning where keep (B,) bool is True, else `other`: caption and label dropout.

        Raises: ValueError if the two hold different fields.
        """
        Conditioning._same_fields([self, other])
        theirs = dict(other.items())
        rows = {
            k: torch.where(keep.reshape((-1,) + (1,) * (v.ndim - 1)), v, theirs[k]) for k, v in self.items()
        }
        return replace(self, kv=None, features=(), **rows)

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Stack along the batch axis; prepare after this, not before.

        Raises: ValueError if the parts hold different fields or were already prepared.
        """
        Conditioning._same_fields(parts)
        if any(p.kv is not None for p in parts):
            raise ValueError("concatenate conditionings before prepare(), not after it")
        columns = [dict(p.items()) for p in parts]
        joined: dict[str, Any] = {k: torch.cat([c[k] for c in columns]) for k in columns[0]}
        return Conditioning(**joined)

    @staticmethod
    def _same_fields(parts: Sequence[Conditioning]) -> None:
        names = [sorted(k for k, _ in p.items()) for p in parts]
        if any(n != names[0] for n in names):
            raise ValueError(f"cannot combine conditionings that hold different fields: {names}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How CLIP's text towers read a prompt.

    Attributes:
        weights: "(word)" counts 1.1, "(word:1.3)" as much as it says, "[word]" 1 / 1.1; False = these are
            letters like any other.
        chunks: pieces of 75 tokens that are read, each by itself; what is longer is cut.
        skip: blocks that are left out at the end of each tower, beyond those that the system leaves out;
            diffusers' clip_skip. Others count the layer itself: their 1 is 0 here, their 2 is 1.

    Raises: ValueError for fewer than one chunk, or fewer than no blocks.
    """

    weights: bool = False
    chunks: int = 1
    skip: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("chunks", self.chunks, 1), ("skip", self.skip, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} of a prompt is {value!r}; allowed: a whole number from {least} on")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What a user or a data set supplies to a system, and what its stages hand on; images in [-1, 1]."""

    n: int = 1
    """Number of pictures; every sequence and tensor below has this length."""
    text: Sequence[str] | None = None
    negative: Sequence[str] | None = None
    label: Tensor | None = None
    """(n,) int64."""
    size: tuple[int, int] | None = None
    """(height, width) in pixels of the result; None = the system's own."""
    reading: Reading | None = None
    """How prompts are read; None = as the system's settings say."""
    original_size: tuple[int, int] | None = None
    """(height, width) that SDXL takes the picture to have had; None = `size`, as for target_size."""
    crop: tuple[int, int] = (0, 0)
    """(top, left) that SDXL takes to have been cut off."""
    target_size: tuple[int, int] | None = None
    aesthetic: float | None = None
    """Score that SDXL's refiner is told; None = its 6."""
    image: Tensor | None = None
    """(n, 3, H, W): the picture to edit."""
    mask: Tensor | None = None
    """(n, 1, H, W) in {0, 1}, 1 = repaint."""
    strength: float = 1.0
    """How much of the walk an edit repeats, in (0, 1]."""
    hint: Tensor | None = None
    """(n, K, H, W): what ControlNets and T2I-Adapters read, side by side; or how near things are."""
    low_res: Tensor | None = None
    """(n, 3, h, w): result of the previous stage, or a photo to enlarge."""
    aug: Tensor | None = None
    """(n,) in [0, 1]: noise on `low_res`, or on the embedding of `image`; None = the stage's own level."""
    image_embed: Tensor | None = None
    latent: Tensor | None = None

    def rows(self, chosen: Sequence[int]) -> Inputs:
        """The same for some of the pictures."""
        cut: dict[str, Any] = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, Tensor):
                cut[one.name] = value[list(chosen)]
            elif isinstance(value, list | tuple) and one.name not in WHOLE:
                cut[one.name] = [value[i] for i in chosen]
        return replace(self, n=len(chosen), **cut)
