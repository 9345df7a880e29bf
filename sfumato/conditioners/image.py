"""Pictures as extra channels: one to enlarge, one to complete, one to edit, and how far away things are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, Inputs, expand
from sfumato.diffusion.schedules import NoiseSchedule

__all__ = ["Depth", "Edit", "Inpaint", "LowRes", "augmentation", "shrink_mask"]


class Kept:
    """A conditioner that guidance does not drop."""

    def null(self, inputs: Inputs, cond: Conditioning) -> Conditioning:
        """`cond` itself: the picture is never dropped."""
        return cond


@dataclass(frozen=True)
class LowRes(Kept):
    """The previous stage's picture, enlarged, as extra channels.

    With `aug` > 0 it is noised first, and the network is told how much: cascaded diffusion's conditioning
    augmentation (Ho et al. 2021, arXiv:2106.15282). The noise is drawn once per picture, the same for cond
    and null.

    Attributes:
        factor: enlargement.
        mode: interpolation.
        schedule, aug: time at which the picture is noised, on this schedule; None = not at all. What
            `inputs.noise_level` says goes before.
    """

    factor: int = 4
    mode: Literal["bilinear", "bicubic"] = "bilinear"
    schedule: NoiseSchedule | None = None
    aug: float | None = None

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """Fields concat (n, 3, factor h, factor w) and, with augmentation, aug.

        Raises: ValueError if there is no low-resolution picture, or no noise to augment it with.
        """
        if inputs.low_res is None:
            raise ValueError(
                "this stage enlarges a picture, and there is none; run the stage before it or give low_res"
            )
        picture = F.interpolate(
            inputs.low_res, scale_factor=float(self.factor), mode=self.mode, antialias=False
        )
        if self.schedule is None or self.aug is None:
            return Conditioning(concat=picture)
        level, noisy = augmentation(picture, inputs, self.schedule, self.aug, noise)
        return Conditioning(concat=noisy, aug=level)


@dataclass(frozen=True)
class Inpaint(Kept):
    """The known part of a picture and the mask as extra channels, for networks trained to fill holes.

    Attributes:
        encode: picture (n, 3, H, W) -> what the network works on, (n, C, h, w).
        mask_first: mask before picture (Stable Diffusion) or after it (GLIDE).
    """

    encode: Callable[[Tensor], Tensor]
    mask_first: bool = True

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """Field concat (n, C + 1, h, w).

        Raises: ValueError without a picture or a mask.
        """
        if inputs.image is None or inputs.mask is None:
            raise ValueError("this system fills holes in a picture: give an image and a mask (1 = repaint)")
        known = self.encode(inputs.image * (1 - inputs.mask))
        # As these nets were trained: the corner of a cell says for all of it.
        mask = F.interpolate(inputs.mask, size=known.shape[-2:], mode="nearest").to(known)
        return Conditioning(concat=torch.cat([mask, known] if self.mask_first else [known, mask], dim=1))


@dataclass(frozen=True)
class Edit(Kept):
    """The picture that an instruction is about: InstructPix2Pix (Brooks et al. 2023, arXiv:2211.09800).

    Attributes:
        encode: picture (n, 3, H, W) -> latents (n, C, h, w) as the autoencoder gives them, not normalized.
    """

    encode: Callable[[Tensor], Tensor]

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """Field concat (n, C, h, w). Raises: ValueError without a picture."""
        if inputs.image is None:
            raise ValueError("this system edits a picture, and there is none; give an image")
        return Conditioning(concat=self.encode(inputs.image))


@dataclass(frozen=True)
class Depth(Kept):
    """How near things are, brighter = nearer, stretched to [-1, 1]: depth to image of Stable Diffusion 2.

    Attributes:
        factor: pixels per cell of what the network works on.
    """

    factor: int = 8

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """Field concat (n, 1, H / factor, W / factor). Raises: ValueError without a hint."""
        if inputs.hint is None:
            raise ValueError("this system is told how near things are: give a depth picture as hint")
        size = [side // self.factor for side in inputs.hint.shape[-2:]]
        depth = F.interpolate(inputs.hint.mean(1, keepdim=True), size=size, mode="bicubic")
        low, high = (f(depth, dim=(1, 2, 3), keepdim=True) for f in (torch.amin, torch.amax))
        # A flat picture says nothing: zero, where the published code divides by zero.
        return Conditioning(concat=2 * (depth - low) / (high - low).clamp(min=1e-6) - (high > low).to(depth))


def augmentation(
    x: Tensor, inputs: Inputs, schedule: NoiseSchedule, time: float, noise: Noise | None
) -> tuple[Tensor, Tensor]:
    """Times (n,) that a network is told, and x (n, ...) noised so far.

    `inputs.noise_level` goes before `time`.

    Raises: ValueError without noise, or for a level that the schedule does not have.
    """
    if noise is None:
        raise ValueError("a picture that is augmented needs noise; pass Noise(seeds)")
    time = time if inputs.noise_level is None else inputs.noise_level
    low, high = schedule.span
    if not low <= time <= high:
        raise ValueError(f"noise_level is {time:g}; allowed: {low:g} to {high:g}, where 0 adds hardly any")
    level = schedule(torch.full((inputs.n,), time, dtype=torch.float64))
    noisy = expand(level.alpha, x) * x + expand(level.sigma, x) * noise(x)
    return level.t.to(x.device, torch.float32), noisy


def shrink_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, 1, H, W) -> (n, 1, *size): a cell is repainted if any of its pixels is."""
    return F.adaptive_max_pool2d(mask, size)
