"""Pictures as CLIP's vision tower sees them: Stable unCLIP and image variations."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sfumato.conditioners.image import augmentation
from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, Inputs
from sfumato.diffusion.schedules import NoiseSchedule
from sfumato.nets.clip import CLIPVision, EmbeddingMoments, seen

__all__ = ["ClipImage"]


@dataclass(frozen=True)
class ClipImage:
    """The embedding of `inputs.image`, or `inputs.image_embed` itself.

    Without a schedule it is the only token (image variations). With one it is normalized, noised, and goes
    beside the time embedding (Stable unCLIP); guidance leaves zeros behind in both.

    Attributes:
        tower: with its projection.
        moments: mean and deviation of embeddings, for the noise; None = 0 and 1.
        schedule, aug: as of `image.LowRes`.
    """

    tower: CLIPVision
    moments: EmbeddingMoments | None = None
    schedule: NoiseSchedule | None = None
    aug: float = 0.0

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """Field tokens (n, 1, D), or image_embed (n, D) and aug (n,).

        Raises: ValueError without a picture.
        """
        embed = inputs.image_embed
        if embed is None:
            if inputs.image is None:
                raise ValueError("this system varies a picture, and there is none; give an image")
            embed = self.tower(seen(inputs.image, self.tower.config.side))
        if self.schedule is None:
            return Conditioning(tokens=embed[:, None])
        mean, std = (0.0, 1.0) if self.moments is None else (self.moments.mean, self.moments.std)
        level, noisy = augmentation((embed - mean) / std, inputs, self.schedule, self.aug, noise)
        return Conditioning(image_embed=noisy * std + mean, aug=level)

    def null(self, inputs: Inputs, cond: Conditioning) -> Conditioning:
        """`cond` without the picture: zeros, also in place of the waves of its noise level."""
        if self.schedule is None:
            return replace(cond, tokens=None if cond.tokens is None else torch.zeros_like(cond.tokens))
        assert cond.image_embed is not None
        assert cond.aug is not None
        return replace(
            cond, image_embed=torch.zeros_like(cond.image_embed), aug=torch.full_like(cond.aug, torch.nan)
        )
