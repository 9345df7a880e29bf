"""Pictures as conditioning: a low-resolution picture to enlarge, a masked one to complete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, Inputs, expand
from sfumato.diffusion.schedules import NoiseSchedule

__all__ = ["ImageEmbed", "Inpaint", "LowRes", "shrink_mask", "unit"]


@dataclass(frozen=True)
class LowRes:
    """The previous stage's picture, enlarged, as extra channels.

    With `aug` > 0 it is noised first, and the network is told how much: cascaded diffusion's conditioning
    augmentation (Ho et al. 2021, arXiv:2106.15282). The noise is drawn once per picture, the same for cond
    and null.

    Attributes:
        factor: enlargement.
        mode: interpolation.
        schedule, aug: time at which the picture is noised, on this schedule; None = not at all.
    """

    factor: int = 4
    mode: Literal["bilinear", "bicubic"] = "bilinear"
    schedule: NoiseSchedule | None = None
    aug: float | None = None
    antialias: bool = False

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """Fields concat (n, 3, factor h, factor w) and, with augmentation, aug.

        Raises: ValueError if there is no low-resolution picture, or no noise to augment it with.
        """
        if inputs.low_res is None:
            raise ValueError(
                "this stage enlarges a picture, and there is none; run the stage before it or give low_res"
            )
        picture = F.interpolate(
            inputs.low_res, scale_factor=float(self.factor), mode=self.mode, antialias=self.antialias
        )
        if self.schedule is None or self.aug is None:
            return Conditioning(concat=picture)
        if noise is None:
            raise ValueError("a low-resolution picture that is augmented needs noise; pass Noise(seeds)")
        level = self.schedule(torch.full((inputs.n,), self.aug, dtype=torch.float64))
        noisy = expand(level.alpha, picture) * picture + expand(level.sigma, picture) * noise(picture)
        return Conditioning(concat=noisy, aug=level.t.to(picture.device, torch.float32))

    def null(self, inputs: Inputs, cond: Conditioning) -> Conditioning:
        """`cond` itself: the picture is never dropped."""
        return cond


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
class Inpaint:
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
        mask = shrink_mask(inputs.mask, (known.shape[-2], known.shape[-1])).to(known)
        return Conditioning(concat=torch.cat([mask, known] if self.mask_first else [known, mask], dim=1))

    def null(self, inputs: Inputs, cond: Conditioning) -> Conditioning:
        """`cond` itself: the picture is never dropped."""
        return cond


def unit(embeddings: Tensor) -> Tensor:
    """(n, D) with a mean square of 1 in each row."""
    scale: float = embeddings.shape[1] ** 0.5
    return scale * F.normalize(embeddings, dim=1)


def shrink_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, 1, H, W) -> (n, 1, *size): a cell is repainted if any of its pixels is."""
    return F.adaptive_max_pool2d(mask, size)
