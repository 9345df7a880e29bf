"""Stage: one walk from a start to a picture, an embedding or a latent."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sfumato.conditioners.base import Conditioner, Unconditional
from sfumato.conditioners.image import fitted
from sfumato.core.random import Noise
from sfumato.core.types import Denoised, Inputs
from sfumato.diffusion.constraints import constrained
from sfumato.diffusion.denoiser import DenoiseFn, Denoiser
from sfumato.diffusion.guidance import CFG, Guidance, Guided
from sfumato.diffusion.sampling import Run, integrate
from sfumato.diffusion.score import ScoreGuidance
from sfumato.systems.codec import Codec, Pixels
from sfumato.systems.guides import Guide
from sfumato.systems.options import SampleOptions
from sfumato.systems.start import Beginning, FromImage, Inverted, Place
from sfumato.systems.tiles import tiled

__all__ = ["Emits", "Observer", "Progress", "Stage"]

Emits = Literal["image", "image_embed", "latent"]


class Progress(NamedTuple):
    """A step that a stage has just done; the tensors are on the stage's device.

    Attributes:
        step, steps: done so far, of how many.
        x: the sample, (n, C, h, w).
        denoised: the last evaluation; `codec.decode(denoised.x0)` is a preview.
    """

    stage: Stage
    step: int
    steps: int
    x: Tensor
    denoised: Denoised | None


Observer = Callable[[Progress], None]
"""Called after each step; raises `sfumato.diffusion.sampling.Cancelled` to stop."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A conditioner, a denoiser and a codec.

    Attributes:
        name: unique within the system.
        shape: of one sample as the denoiser sees it, (C, h, w) or (D,); `Inputs.size` changes h and w.
        emits: the field of Inputs that the result goes to: "image" is handed on as `low_res`.
        defaults: how it is sampled if the caller does not say.
        guide: what guidance of kind "guide" goes by.
    """

    name: str
    denoiser: Denoiser
    shape: tuple[int, ...]
    conditioner: Conditioner = field(default_factory=Unconditional)
    codec: Codec = field(default_factory=Pixels)
    emits: Emits = "image"
    defaults: SampleOptions = field(default_factory=SampleOptions)
    guide: Guide | None = None

    @property
    def factor(self) -> int:
        """Both sides of a picture must be multiples of this: the codec's factor times the network's."""
        config = getattr(self.denoiser.net, "config", None)
        own = getattr(config, "factor", None) or getattr(config, "patch", None) or 1
        return self.codec.factor * int(own)

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Default (height, width) of the picture; None for embeddings."""
        if len(self.shape) != 3:
            return None
        return self.shape[1] * self.codec.factor, self.shape[2] * self.codec.factor

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        net = self.denoiser.net
        first = next(net.parameters(), None) if isinstance(net, nn.Module) else None
        return torch.device("cpu") if first is None else first.device

    def shape_for(self, size: tuple[int, int] | None) -> tuple[int, ...]:
        """Shape of one sample for a picture of (height, width).

        Raises: ValueError if a side is not a positive multiple of the factor.
        """
        if size is None or self.pixels is None:
            return self.shape
        f = self.factor
        for side in size:
            if side < f or side % f:
                low = max(side // f, 1) * f
                near = f"{low}" if side <= f else f"{low} or {low + f}"
                raise ValueError(
                    f"size {size[1]}x{size[0]}: {side} is not allowed; allowed: multiples of {f}, try {near}"
                )
        return (self.shape[0], *(side // self.codec.factor for side in size))

    def run(
        self, inputs: Inputs, options: SampleOptions, noise: Noise, observe: Observer | None = None
    ) -> Inputs:
        """Walk, decode and put the result into the inputs of the next stage.

        Args:
            inputs: `size` is the size of this stage's picture.
            noise: one stream per picture.

        Raises: ValueError for inputs or options that do not fit; Cancelled if `observe` raises it.
        """
        if options.candidates > 1:
            return self._nearest(inputs, options, noise, observe)
        if options.tile is not None and inputs.low_res is not None and inputs.size is not None:
            factor = inputs.size[0] // inputs.low_res.shape[-2]
            if factor > 1 and max(inputs.size) > options.tile:
                return self._in_tiles(inputs, options, noise, observe, factor)
        shape = self.shape_for(inputs.size)
        inputs = _moved(replace(inputs, size=inputs.size or self.pixels), self.device)
        guidance = self._guidance(inputs, shape, options)
        with torch.no_grad(), self._precision():
            cond = self.conditioner(inputs, noise.fork(f"{self.name}/conditioning")).to(self.device)
            null = self.conditioner.null(inputs, cond).to(self.device)
            like = torch.zeros(inputs.n, *shape, device=self.device)
            if cond.concat is not None and cond.concat.shape[-2:] != like.shape[-2:]:
                found, wanted = ("x".join(map(str, v.shape[:-3:-1])) for v in (cond.concat, like))
                raise ValueError(
                    f"stage {self.name!r} works on {wanted} and is given a picture that comes to {found}; "
                    "give a low_res that fits, or its size"
                )
            edits = isinstance(options.start, FromImage | Inverted)
            grid = options.grid(self.denoiser.schedule, inputs.strength if edits else 1.0)

            def alone(told: Inputs) -> DenoiseFn:
                cond = self.conditioner(told, noise.fork(f"{self.name}/conditioning")).to(self.device)
                return CFG().bind(self.denoiser.planned(grid), cond, cond)

            place = Place(like, grid, self.codec, noise, alone)
            beginning = options.start.begin(inputs, place)
            denoise = guidance.bind(self.denoiser.planned(beginning.grid), cond, null)
            denoise = constrained(denoise, known=beginning.known, threshold=options.threshold)
            x = self._walk(denoise, beginning, options, noise, observe)
            return self._result(inputs, x, options)

    def _guidance(self, inputs: Inputs, shape: tuple[int, ...], options: SampleOptions) -> Guidance:
        asked = options.guidance
        if not isinstance(asked, Guided):
            return asked
        if self.guide is None or asked.scale == 0:
            return asked if asked.scale else asked.inner
        return ScoreGuidance(self.guide(inputs, shape), asked.scale, asked.inner)

    def _nearest(
        self, inputs: Inputs, options: SampleOptions, noise: Noise, observe: Observer | None
    ) -> Inputs:
        """Of several embeddings for each picture the one with the largest cosine to its text's.

        Ramesh et al. 2022 (arXiv:2204.06125), section 2.2, takes two.
        """
        inputs, one = _moved(inputs, self.device), replace(options, candidates=1)
        with torch.no_grad():
            text = self.conditioner(inputs, noise.fork(f"{self.name}/conditioning")).pooled
        if self.emits != "image_embed" or text is None or len(text[0]) != self.shape[0]:
            raise ValueError(
                f"candidates is {options.candidates}, and stage {self.name!r} draws nothing that can be "
                "compared with its text: only a prior does; set it to 1"
            )
        streams = [noise, *(noise.fork(f"candidate {i}") for i in range(1, options.candidates))]
        drawn = [self.run(inputs, one, stream, observe).image_embed for stream in streams]
        rows = torch.stack([v for v in drawn if v is not None])  # (candidates, n, D)
        best = torch.nn.functional.cosine_similarity(rows, text.to(rows), dim=2).argmax(0)
        return replace(
            inputs, image_embed=rows[best, torch.arange(inputs.n, device=rows.device)], latent=None
        )

    def _in_tiles(
        self, inputs: Inputs, options: SampleOptions, noise: Noise, observe: Observer | None, factor: int
    ) -> Inputs:
        """`low_res` enlarged tile by tile, each with noise of its own."""
        assert inputs.low_res is not None
        assert options.tile is not None
        whole, tile, count = replace(options, tile=None), options.tile // factor, itertools.count()

        def enlarged(part: Tensor) -> Tensor:
            size = (part.shape[-2] * factor, part.shape[-1] * factor)
            told = replace(inputs, low_res=part, size=size)
            done = self.run(told, whole, noise.fork(f"tile {next(count)}"), observe).low_res
            assert done is not None
            return done

        return replace(inputs, low_res=tiled(enlarged, inputs.low_res, tile, tile // 4, factor))

    def _walk(
        self,
        denoise: DenoiseFn,
        beginning: Beginning,
        options: SampleOptions,
        noise: Noise,
        observe: Observer | None,
    ) -> Tensor:
        steps = len(beginning.grid)

        def tell(i: int, x: Tensor, denoised: Denoised | None) -> None:
            if observe is not None:
                observe(Progress(self, i + 1, steps, x, denoised))

        run = Run(denoise, beginning.grid, noise)
        return integrate(options.step(), run, beginning.x, project=beginning.project, observe=tell)

    def _result(self, inputs: Inputs, x: Tensor, options: SampleOptions) -> Inputs:
        if self.emits == "latent":
            return replace(inputs, latent=x)
        if self.emits == "image_embed":
            return replace(inputs, image_embed=self.codec.decode(x), latent=None)
        decode = self.codec.decode
        if options.tile is not None:
            f = self.codec.factor
            picture = tiled(decode, x, max(options.tile // f, 1), options.tile // (4 * f), f)
        else:
            picture = decode(x)
        picture = picture.float().clamp(-1, 1)
        if inputs.image is not None and inputs.mask is not None:
            # The codec is lossy; what was not to be repainted is the caller's own, pixel by pixel.
            size = (picture.shape[-2], picture.shape[-1])
            mask = torch.nn.functional.interpolate(inputs.mask.to(picture), size=size, mode="nearest")
            picture = torch.where(mask > 0, picture, fitted(inputs.image.to(picture), size))
        return replace(inputs, low_res=picture, latent=None)

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        """Autocast to the dtype in which the network's weights are held, if that is a half precision."""
        net = self.denoiser.net
        weights = net.parameters() if isinstance(net, nn.Module) else ()
        half = next((p.dtype for p in weights if p.dtype in (torch.float16, torch.bfloat16)), None)
        return torch.autocast(self.device.type, half) if half is not None else contextlib.nullcontext()


def _moved(inputs: Inputs, device: torch.device) -> Inputs:
    tensors: dict[str, Any] = {
        f.name: v for f in fields(inputs) if isinstance(v := getattr(inputs, f.name), Tensor)
    }
    return replace(inputs, **{name: v.to(device) for name, v in tensors.items()})
