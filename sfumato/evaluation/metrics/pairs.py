"""Likeness of pictures in pairs, and of pictures and their captions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["clip_score", "ssim"]

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


def ssim(image: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each picture, (B,) float64 (Wang et al. 2004, eq. 13 and 17).

    Gaussian window of 11x11 with standard deviation 1.5 at every place where it fits whole, moments of the
    population, K1 = 0.01, K2 = 0.03; the mean over places and color channels. No downsampling beforehand.

    Args:
        image, reference: (B, C, H, W) in [-1, 1]; `image` is clamped.

    Raises: ValueError in one line if the shapes differ or a side is shorter than the window.
    """
    if image.shape != reference.shape or min(image.shape[-2:]) < WINDOW:
        raise ValueError(
            f"SSIM compares pictures of one size of at least {WINDOW}x{WINDOW}, not "
            f"{tuple(image.shape)} and {tuple(reference.shape)}"
        )
    x, y = ((v.cpu().double() + 1) / 2 for v in (image.clamp(-1, 1), reference))
    mx, my = _blurred(x), _blurred(y)
    vx, vy, cov = _blurred(x * x) - mx * mx, _blurred(y * y) - my * my, _blurred(x * y) - mx * my
    c1, c2 = K1**2, K2**2
    likeness = (2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))
    return likeness.flatten(1).mean(1)


def clip_score(image: Tensor, text: Tensor) -> Tensor:
    """100 max(cos, 0) of embeddings (B, D) of pictures and their captions: (B,).

    Hessel et al. 2021 (arXiv:2104.08718, section 3) have 2.5 in place of 100.
    """
    return 100 * F.cosine_similarity(image.double(), text.double()).clamp_min(0)


def _blurred(x: Tensor) -> Tensor:
    place = torch.arange(WINDOW, dtype=x.dtype) - WINDOW // 2
    weight = (-place.square() / (2 * SIGMA**2)).exp()
    weight = (weight / weight.sum()).expand(x.shape[1], 1, 1, -1)
    rows = F.conv2d(x, weight, groups=x.shape[1])
    return F.conv2d(rows, weight.mT, groups=x.shape[1])
