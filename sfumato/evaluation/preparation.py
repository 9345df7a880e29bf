"""How each feature net was trained to see a picture: resized and normalized from 8-bit pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from PIL import Image
from torch import Tensor

from sfumato.core.image import from_pil, to_pil
from sfumato.nets.clip import PIXEL_MEAN, PIXEL_STD
from sfumato.nets.inception import SIDE

__all__ = ["PREPARATIONS", "Preparation", "for_clip", "for_dinov2", "for_inception", "tf_bilinear"]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
VIEW = 224  # side of what DINOv2 sees: FD-DINOv2 as published
Preparation = Callable[[Tensor], Tensor]


def tf_bilinear(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels (B, C, H, W) uint8 -> float32 at (height, width), as TensorFlow 1 resizes.

    Bilinear without antialiasing; place i of the result is at i * input / output, which moves the picture by
    half a pixel. The published FID depends on that; other resizing gives other figures (Parmar et al. 2022,
    arXiv:2104.11222).
    """
    x = pixels.float()
    for axis, out in ((2, size[0]), (3, size[1])):
        n = x.shape[axis]
        at = torch.arange(out, dtype=torch.float32, device=x.device) * torch.tensor(
            n / out, dtype=torch.float32
        )
        low = at.long()
        shape = [-1 if i == axis else 1 for i in range(4)]
        a, b = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp_max(n - 1))
        x = a + (b - a) * (at - low).reshape(shape)
    return x


def for_inception(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, 299, 299): (p - 128) / 128 after `tf_bilinear`."""
    return (tf_bilinear(pixels, (SIDE, SIDE)) - 128) / 128


def for_dinov2(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, 224, 224), stretched by Pillow's bicubic filter (arXiv:2306.04675)."""
    pictures = (to_pil(p).resize((VIEW, VIEW), Image.Resampling.BICUBIC) for p in pixels.cpu())
    return _normalized(pictures, IMAGENET)


def for_clip(pixels: Tensor, side: int = VIEW) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, side, side): the shorter side by Pillow's bicubic, then the middle."""
    return _normalized((_middle(to_pil(p), side) for p in pixels.cpu()), (PIXEL_MEAN, PIXEL_STD))


PREPARATIONS = {
    "inception": "TensorFlow 1 bilinear to 299x299, (p - 128) / 128",
    "dinov2": "Pillow bicubic to 224x224 on 8 bits, ImageNet mean and deviation",
    "clip": "Pillow bicubic of the shorter side on 8 bits, center crop, CLIP mean and deviation",
}
"""In words, as results state them."""


def _middle(image: Image.Image, side: int) -> Image.Image:
    # torchvision, with which CLIP was published, cuts the longer side down to a whole number.
    width, height = (side * n // min(image.size) for n in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def _normalized(pictures: Iterable[Image.Image], norm: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    x = torch.stack([from_pil(p) for p in pictures]).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in norm)
    return (x - mean) / std
