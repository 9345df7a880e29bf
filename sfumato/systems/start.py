"""Where the walk of a stage begins: noise, a picture, or what the stage before it left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

from pydantic import Field
from torch import Tensor

from sfumato.conditioners.image import fitted, shrink_mask
from sfumato.core.random import Noise
from sfumato.core.types import Inputs, expand
from sfumato.diffusion.constraints import Known, projection
from sfumato.diffusion.denoiser import DenoiseFn
from sfumato.diffusion.grid import Grid, repaint
from sfumato.diffusion.inversion import inverted
from sfumato.systems.codec import Codec

__all__ = ["Beginning", "Continue", "Fill", "FromImage", "FromNoise", "Inverted", "Place", "Start"]


class Place(NamedTuple):
    """What a start needs to know of its stage.

    Attributes:
        like: zeros of the shape, device and dtype of the sample, (n, C, h, w).
        grid: the walk, cut to the stage's window and to the strength of an edit.
        denoise: makes the stage's denoiser, without guidance, of what it is told.
    """

    like: Tensor
    grid: Grid
    codec: Codec
    noise: Noise
    denoise: Callable[[Inputs], DenoiseFn] | None = None


class Beginning(NamedTuple):
    """The sample at level 0 of `grid`, what to do with it after each step, and what is known of its x0."""

    x: Tensor
    grid: Grid
    project: Callable[[Tensor, int], Tensor] | None = None
    known: Known | None = None


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
    """`inputs.image`, noised to `inputs.strength` of the walk: img2img.

    Meng et al. 2021 (arXiv:2108.01073). All steps that were asked for are done, within that part of the walk.

    With `inputs.mask` only the masked part changes: after each step the rest is put back at that level's
    noise.

    Attributes:
        jump_length, resamples: RePaint's going back (Lugmayr et al. 2022, arXiv:2201.09865), off by default.
        blend: put the rest back; networks that are told the mask do without.
    """

    jump_length: int = 10
    resamples: int = 1
    blend: bool = True
    kind: Literal["image"] = "image"

    def begin(self, inputs: Inputs, place: Place) -> Beginning:
        """The noised picture. Raises: ValueError without a picture."""
        z, grid, level = _encoded(inputs, place), place.grid, place.grid.level(0)
        x = expand(level.alpha, z) * z + expand(level.sigma, z) * place.noise(z)
        if inputs.mask is None or not self.blend:
            return Beginning(x, grid)
        if self.resamples > 1:
            grid = repaint(grid, self.jump_length, self.resamples)
        # Its own stream: how often the known part is noised must not shift what the sampler draws.
        return Beginning(x, grid, projection(_known(z, inputs.mask), grid, place.noise.fork("known")))


@dataclass(frozen=True)
class Fill:
    """Pure noise, with `inputs.image` put into the x0 of every step where `inputs.mask` keeps it.

    For nets that were trained to fill holes (Nichol et al. 2021, arXiv:2112.10741); without a picture and a
    mask it is FromNoise.

    Attributes:
        temperature: as of FromNoise.
    """

    temperature: float = 1.0
    kind: Literal["fill"] = "fill"

    def begin(self, inputs: Inputs, place: Place) -> Beginning:
        """Noise of the seeds, and what is known."""
        beginning = FromNoise(temperature=self.temperature).begin(inputs, place)
        if inputs.image is None or inputs.mask is None:
            return beginning
        return beginning._replace(known=_known(_encoded(inputs, place), inputs.mask))


@dataclass(frozen=True)
class Inverted:
    """The sample from which DDIM draws `inputs.image` again; with another prompt it draws an edit of it.

    Sampler "ddim" with the same steps, prompt and guidance 1 gives the picture back.

    Attributes:
        source: what the picture shows.
        rounds: see `diffusion.inversion.inverted`; each is an evaluation of the network per step.
    """

    source: str = ""
    rounds: int = 3
    kind: Literal["inverted"] = "inverted"

    def begin(self, inputs: Inputs, place: Place) -> Beginning:
        """The sample. Raises: ValueError without a picture, or for less than one round."""
        x, grid = _encoded(inputs, place), place.grid
        assert place.denoise is not None
        denoise = place.denoise(replace(inputs, text=[self.source] * inputs.n, negative=None))
        return Beginning(inverted(denoise, grid, x, self.rounds), grid)


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


Start = Annotated[FromNoise | FromImage | Fill | Inverted | Continue, Field(discriminator="kind")]


def _encoded(inputs: Inputs, place: Place) -> Tensor:
    """`inputs.image` as a sample. Raises: ValueError if there is none."""
    if inputs.image is None:
        raise ValueError("this start needs a picture, and there is none; give an image, or start from noise")
    height, width = (side * place.codec.factor for side in place.like.shape[-2:])
    return place.codec.encode(fitted(inputs.image.to(place.like), (height, width))).to(place.like)


def _known(z: Tensor, mask: Tensor) -> Known:
    return Known(z, 1 - shrink_mask(mask.to(z), (z.shape[-2], z.shape[-1])))
