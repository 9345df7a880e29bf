"""Damaged small pictures from which an upsampler learns to draw large ones."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sfumato.core.image import from_pil, to_float, to_pil, to_uint8

__all__ = ["DegradeConfig", "degraded"]


@dataclass(frozen=True, kw_only=True)
class DegradeConfig:
    """How the small picture is made of the large one.

    Attributes:
        factor: by which it is smaller.
        kind: "area" = averaged; "blur" = and blurred with sigma 0.6 over 3 pixels, as for unCLIP's first
            upsampler; "bsr" = blur, resizing, noise and JPEG in any order (Zhang et al. 2021,
            arXiv:2103.14006), as for its second.
        crop: side of a part of the large picture that is trained on instead of all of it; None = all.
    """

    factor: int = 2
    kind: Literal["area", "blur", "bsr"] = "blur"
    crop: int | None = None

    def __post_init__(self) -> None:
        if self.factor < 2 or (self.crop is not None and (self.crop < 1 or self.crop % self.factor)):
            raise ValueError(
                f"factor {self.factor}, crop {self.crop}: the factor is at least 2, crop a multiple of it"
            )


def degraded(pictures: Tensor, config: DegradeConfig, seeds: Sequence[int]) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, 3, H / factor, W / factor); picture i depends on seed i alone."""
    if config.kind == "bsr":
        rows = [_bsr(p, config.factor, Random(s)) for p, s in zip(pictures.cpu(), seeds, strict=True)]
        return torch.stack(rows).to(pictures)
    small = F.avg_pool2d(pictures, config.factor)
    return small if config.kind == "area" else _blur(small, 0.6, 0.6, 0.0, reach=1)


def _bsr(picture: Tensor, factor: int, rng: Random) -> Tensor:
    """One picture (3, H, W), with the ranges of latent diffusion's light variant."""
    height, width = (side // factor for side in picture.shape[-2:])

    def between(low: float, high: float) -> float:
        return low + (high - low) * rng.random()

    def blur(x: Tensor) -> Tensor:
        across, along = between(0.1, 0.6 * factor), between(0.1, 0.6 * factor)
        turn, reach = between(0, math.pi), int(between(1, 4))
        return _blur(x[None], across, along if rng.random() < 0.5 else across, turn, reach=reach)[0]

    def resize(x: Tensor) -> Tensor:
        scale = between(1, 2 * factor) / factor
        mode = ("area", "bilinear", "bicubic")[int(between(0, 3))]
        return F.interpolate(x[None], [max(round(n / scale), 4) for n in (height, width)], mode=mode)[0]

    def noise(x: Tensor) -> Tensor:
        own = torch.Generator().manual_seed(int(between(0, 2**53)))
        channels = 1 if rng.random() < 0.5 else 3
        return x + 2 * between(1, 2) / 255 * torch.randn(channels, *x.shape[1:], generator=own)

    def jpeg(x: Tensor) -> Tensor:
        file = io.BytesIO()
        to_pil(to_uint8(x)).save(file, "JPEG", quality=int(between(80, 96)))
        return to_float(from_pil(Image.open(file).convert("RGB")))

    steps: list[Callable[[Tensor], Tensor]] = [blur, blur, resize, noise, jpeg]
    for _, step in sorted(((rng.random(), step) for step in steps), key=lambda pair: pair[0]):
        picture = step(picture)
    small = F.interpolate(picture[None], (height, width), mode="bicubic", antialias=True)[0]
    return jpeg(small.clamp(-1, 1))


def _blur(x: Tensor, across: float, along: float, turn: float, *, reach: int) -> Tensor:
    """Gaussian blur of (B, C, H, W) with two deviations in pixels, turned by an angle, 2 reach + 1 wide."""
    line = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    down, right = torch.meshgrid(line, line, indexing="ij")
    u, v = (
        right * math.cos(turn) + down * math.sin(turn),
        down * math.cos(turn) - right * math.sin(turn),
    )
    kernel = torch.exp(-((u / across) ** 2 + (v / along) ** 2) / 2)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(F.pad(x, [reach] * 4, mode="replicate"), kernel, groups=x.shape[1])
