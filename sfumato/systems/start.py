"""Where the walk of a stage begins: noise, a picture, or what the stage before it left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sfumato.conditioners.image import shrink_mask
from sfumato.core.random import Noise
from sfumato.core.types import Inputs, expand
from sfumato.diffusion.constraints import Known, projection
from sfumato.diffusion.grid import Grid, repaint
from sfumato.systems.codec import Codec

__all__ = ["Beginning", "Continue", "FromImage", "FromNoise", "Place", "Start"]


class Place(NamedTuple):
    """What a start needs to know of its stage.

    Attributes:
        like: zeros of the shape, device and dtype of the sample, (n, C, h, w).
        grid: the walk, cut to the stage's window.
    """

    like: Tensor
    grid: Grid
    codec: Codec
    noise: Noise


class Beginning(NamedTuple):
    """The sample at level 0 of `grid`, and what to do with it after each step."""

    x: Tensor
    grid: Grid
    project: Callable[[Tensor, int], Tensor] | None = None


@dataclass(frozen=True)
class FromNoise:
    """Pure noise.

    Attributes:
        scale: "unit" draws N(0, I), as latent diffusion, ADM and GLIDE do; "sigma" draws N(0, sigma^2 I) of
            the first level, which variance-exploding schedules need.
        temperature: factor on the noise; GLIDE's upsampler uses 0.997.
    """

    scale: Literal["unit", "sigma"] = "unit"
    temperature: float = 1.0
    kind: Literal["noise"] = "noise"

    def begin(self, inputs: Inputs, place: Place) -> Beginning:
        """Noise of the seeds."""
        std = place.grid.points[0].sigma if self.scale == "sigma" else 1.0
        return Beginning(self.temperature * std * place.noise(place.like), place.grid)


@dataclass(frozen=True)
class FromImage:
    """`inputs.image`, noised to 1 - `inputs.strength` of the walk: img2img.

    Meng et al. 2021 (arXiv:2108.01073).

    With `inputs.mask` only the masked part changes: after each step the rest is put back at that level's
    noise.

    Attributes:
        jump_length, resamples: RePaint's going back (Lugmayr et al. 2022, arXiv:2201.09865), off by default.
    """

    jump_length: int = 10
    resamples: int = 1
    kind: Literal["image"] = "image"

    def begin(self, inputs: Inputs, place: Place) -> Beginning:
        """The noised picture. Raises: ValueError without a picture, or for a strength outside (0, 1]."""
        if inputs.image is None:
            raise ValueError(
                "this start noises a picture, and there is none; give an image, or start from noise"
            )
        if not 0 < inputs.strength <= 1:
            raise ValueError(
                f"strength {inputs.strength:g} is outside (0, 1]; 1 = repaint all, 0.5 = half of the walk"
            )
        grid = place.grid.window(1 - inputs.strength, 1) if inputs.strength < 1 else place.grid
        height, width = (side * place.codec.factor for side in place.like.shape[-2:])
        z = place.codec.encode(fitted(inputs.image.to(place.like), (height, width))).to(place.like)
        level = grid.level(0)
        x = expand(level.alpha, z) * z + expand(level.sigma, z) * place.noise(z)
        if inputs.mask is None:
            return Beginning(x, grid)
        if self.resamples > 1:
            grid = repaint(grid, self.jump_length, self.resamples)
        keep = 1 - shrink_mask(inputs.mask.to(z), (z.shape[-2], z.shape[-1]))
        # Its own stream: how often the known part is noised must not shift what the sampler draws.
        return Beginning(x, grid, projection(Known(z, keep), grid, place.noise.fork("known")))


@dataclass(frozen=True)
class Continue:
    """`inputs.latent` as the stage before it left it, at the noise level where this stage's window begins."""

    kind: Literal["continue"] = "continue"

    def begin(self, inputs: Inputs, place: Place) -> Beginning:
        """That sample. Raises: ValueError if there is none, or it has another shape."""
        if inputs.latent is None:
            raise ValueError(
                "this stage continues a walk, and there is no latent; run the stage before it or give one"
            )
        if inputs.latent.shape != place.like.shape:
            found, expected = tuple(inputs.latent.shape), tuple(place.like.shape)
            raise ValueError(f"the latent to continue has shape {found}, this stage works on {expected}")
        return Beginning(inputs.latent.to(place.like), place.grid)


Start = Annotated[FromNoise | FromImage | Continue, Field(discriminator="kind")]


def fitted(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, C, H, W) at another size; itself if it has that size already."""
    if image.shape[-2:] == torch.Size(size):
        return image
    return F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
