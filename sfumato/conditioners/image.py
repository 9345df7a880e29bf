"""Pictures as conditioning: one to enlarge, to complete or to edit, how near things are, and hints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.conditioners.base import Conditioner, Merged
from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, Inputs, expand
from sfumato.diffusion.schedules import Discrete, NoiseSchedule

__all__ = [
    "Depth",
    "Edit",
    "Hint",
    "ImageEmbed",
    "Inpaint",
    "Kept",
    "LowRes",
    "augmentation",
    "checked_level",
    "enlarging",
    "fitted",
    "shrink_mask",
    "told_level",
    "unit",
]


class Kept:
    """A conditioner that guidance does not drop."""

    def null(self, inputs: Inputs, cond: Conditioning) -> Conditioning:
        """`cond` itself: the picture is never dropped."""
        return cond


@dataclass(frozen=True)
class LowRes(Kept):
    """The previous stage's picture, enlarged, as extra channels; or `inputs.image`, made small before.

    With a schedule it is noised first, and the network is told how much: cascaded diffusion's conditioning
    augmentation (Ho et al. 2021, arXiv:2106.15282). The noise is drawn once per picture, the same for cond
    and null.

    Attributes:
        factor: enlargement.
        mode: interpolation.
        schedule, aug: time at which the picture is noised, on this schedule; None = not at all. `inputs.aug`
            is in its place, if given: 0 to 1, the share of the schedule.
        align: enlarge from corner to corner (DeepFloyd IF), not from edge to edge.
        rounded: to the 256 values of a picture file first, as GLIDE hands it on.
    """

    factor: int = 4
    mode: Literal["bilinear", "bicubic"] = "bilinear"
    schedule: NoiseSchedule | None = None
    aug: float | None = None
    align: bool = False
    rounded: bool = False
    antialias: bool = False

    def __post_init__(self) -> None:
        if self.schedule is not None and self.aug is not None:
            low, high = self.schedule.span
            if not low <= self.aug <= high:
                raise ValueError(f"aug is {self.aug:g}; allowed: {low:g} to {high:g}, a time of its schedule")

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """Fields concat (n, 3, factor h, factor w) and, with augmentation, aug.

        Raises: ValueError if there is no low-resolution picture, no noise to augment it with, or a level
            outside [0, 1].
        """
        low_res = self._small(inputs)
        if self.rounded:
            low_res = ((low_res + 1) * 127.5).round() / 127.5 - 1
        picture = F.interpolate(
            low_res,
            scale_factor=float(self.factor),
            mode=self.mode,
            align_corners=self.align,
            antialias=self.antialias,
        )
        if self.schedule is None or (self.aug is None and inputs.aug is None):
            return Conditioning(concat=picture)
        level, noisy = augmentation(picture, inputs, self.schedule, self.aug or 0.0, noise)
        return Conditioning(concat=noisy, aug=level)

    def _small(self, inputs: Inputs) -> Tensor:
        """The low-resolution picture; in training, that of the picture to be restored."""
        if inputs.low_res is not None:
            return inputs.low_res
        if inputs.image is None:
            raise ValueError(
                "this stage enlarges a picture, and there is none; run the stage before it or give low_res"
            )
        return F.interpolate(inputs.image, scale_factor=1 / self.factor, mode="bilinear", antialias=True)


def enlarging(conditioner: Conditioner) -> LowRes | None:
    """What reads the low-resolution picture, if anything does."""
    parts = conditioner.parts if isinstance(conditioner, Merged) else (conditioner,)
    return next((c for c in parts if isinstance(c, LowRes)), None)


def told_level(conditioner: Conditioner) -> bool:
    """Whether anything is noised before it is read, and the level told."""
    parts = conditioner.parts if isinstance(conditioner, Merged) else (conditioner,)
    return any(getattr(part, "schedule", None) is not None for part in parts)


def checked_level(aug: Tensor) -> Tensor:
    """Levels of augmentation themselves. Raises: ValueError if one is outside [0, 1]."""
    wrong = aug[~((aug >= 0) & (aug <= 1))]
    if len(wrong):
        raise ValueError(
            f"aug is {float(wrong[0]):g}; allowed: 0, the picture as it is, to 1, noise alone; try 0.1"
        )
    return aug


@dataclass(frozen=True)
class ImageEmbed:
    """The image embedding that a prior drew or a picture has.

    Attributes:
        empty: number of pictures -> the embeddings (n, D) that stand for none; None = zeros.
        unit: bring every embedding to a mean square of 1, so that those of texts will do as well.
    """

    empty: Callable[[int], Tensor] | None = None
    unit: bool = False

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """Field image_embed (n, D). Raises: ValueError if there is none for each picture."""
        if inputs.image_embed is None or len(inputs.image_embed) != inputs.n:
            found = "none" if inputs.image_embed is None else f"{len(inputs.image_embed)}"
            raise ValueError(
                f"this stage draws {inputs.n} pictures from image embeddings, and there is {found}; run the "
                "prior before it, or give image_embed"
            )
        return Conditioning(image_embed=unit(inputs.image_embed) if self.unit else inputs.image_embed)

    def null(self, inputs: Inputs, cond: Conditioning) -> Conditioning:
        """The embeddings that stand for none."""
        assert cond.image_embed is not None
        none = torch.zeros_like(cond.image_embed) if self.empty is None else self.empty(inputs.n)
        return replace(cond, image_embed=none)


@dataclass(frozen=True)
class Inpaint(Kept):
    """The known part of a picture and the mask as extra channels, for networks trained to fill holes.

    Attributes:
        encode: picture (n, 3, H, W) -> what the network works on, (n, C, h, w).
        mask_first: mask before picture (Stable Diffusion) or after it (GLIDE).
        marks_known: the mask is 1 where the picture is known, and without a picture nothing is (GLIDE).
        black: the hole is black, not gray, and the mask -1 where the picture is known (latent diffusion).
    """

    encode: Callable[[Tensor], Tensor]
    mask_first: bool = True
    marks_known: bool = False
    black: bool = False

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """Field concat (n, C + 1, h, w).

        Raises: ValueError without a picture or a mask, unless nothing may be known.
        """
        image, hole = inputs.image, inputs.mask
        if (image is None or hole is None) and self.marks_known and inputs.size is not None:
            image, hole = torch.zeros(inputs.n, 3, *inputs.size), torch.ones(inputs.n, 1, *inputs.size)
        if image is None or hole is None:
            raise ValueError("this system fills holes in a picture: give an image and a mask (1 = repaint)")
        if inputs.size is not None:
            image, hole = fitted(image, inputs.size), shrink_mask(hole, inputs.size)
        known = self.encode(image * (1 - hole) - hole if self.black else image * (1 - hole))
        # As nets of latents were trained: the corner of a cell says for all of it.
        mask = F.interpolate(hole, size=known.shape[-2:], mode="nearest").to(known)
        mask = 1 - mask if self.marks_known else 2 * mask - 1 if self.black else mask
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

    `inputs.aug`, the share of the schedule, goes before `time`.

    Raises: ValueError without noise, or for a level outside [0, 1].
    """
    if noise is None:
        raise ValueError("what is augmented needs noise; pass Noise(seeds)")
    times = torch.full((inputs.n,), time, dtype=torch.float64)
    if inputs.aug is not None:
        low, high = schedule.span
        times = checked_level(inputs.aug.double().cpu())
        if isinstance(schedule, Discrete):  # level 0.25 of 1000 steps is step 250, and 1 the last one
            times = (times * (high + 1)).round().clamp_max(high)
        else:
            times = low + times * (high - low)
    level = schedule(times)
    noisy = expand(level.alpha, x) * x + expand(level.sigma, x) * noise(x)
    return level.t.to(x.device, torch.float32), noisy


@dataclass(frozen=True)
class Hint:
    """The pictures that ControlNets and T2I-Adapters read.

    Attributes:
        guess: of each of them, whether it leaves alone what guidance leaves behind.
        channels: of the picture that each reads; 1 = gray.
    """

    guess: tuple[bool, ...]
    channels: tuple[int, ...]

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """Fields hint (n, K, H, W) in [0, 1] and, for guess mode, control.

        Raises: ValueError without a hint, or if one that reads gray pictures is given colors.
        """
        hint, count = inputs.hint, len(self.channels)
        if hint is None:
            raise ValueError(f"{count} ControlNets or T2I-Adapters read a picture each, and there is no hint")
        if hint.shape[1] == 3 * count != sum(self.channels):  # pictures, all of them with three channels
            pairs = enumerate(zip(hint.chunk(count, dim=1), self.channels, strict=True))
            hint = torch.cat([_gray(one, i) if wide == 1 else one for i, (one, wide) in pairs], dim=1)
        control = hint.new_ones(inputs.n, count) if any(self.guess) else None
        return Conditioning(hint=(hint + 1) / 2, control=control)

    def null(self, inputs: Inputs, cond: Conditioning) -> Conditioning:
        """The picture stays; in guess mode it does not act."""
        if cond.control is None:
            return cond
        return replace(cond, control=cond.control * (1 - cond.control.new_tensor(self.guess)))


def _gray(picture: Tensor, i: int) -> Tensor:
    """(n, 3, H, W) -> (n, 1, H, W). Raises: ValueError if it has colors."""
    if not torch.equal(picture, picture[:, :1].expand_as(picture)):
        raise ValueError(
            f"picture {i + 1} of the hint has colors, and the net that reads it takes gray ones; convert it "
            'first, with picture.convert("L") if that is what it was trained on'
        )
    return picture[:, :1]


def fitted(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, C, H, W) at another size; itself if it has that size already."""
    if image.shape[-2:] == torch.Size(size):
        return image
    return F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(-1, 1)


def unit(embeddings: Tensor) -> Tensor:
    """(n, D) with a mean square of 1 in each row."""
    scale: float = embeddings.shape[1] ** 0.5
    return scale * F.normalize(embeddings, dim=1)


def shrink_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, 1, H, W) -> (n, 1, *size): a cell is repainted if any of its pixels is."""
    return F.adaptive_max_pool2d(mask, size)
