"""Single figures: PSNR, nearest-neighbour retrieval, and the confidence interval of a proportion."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Proportion", "psnr", "ranks"]

Z95 = 1.959963984540054  # 97.5 % quantile of the standard normal distribution


@dataclass(frozen=True)
class Proportion:
    """`hits` of `total`, made by `of`.

    Attributes:
        share: hits / total.
        low, high: the Wilson score interval of 95 % (Wilson 1927), inside [0, 1] and sensible at both ends.
    """

    hits: int
    total: int
    share: float
    low: float
    high: float

    @staticmethod
    def of(hits: int, total: int) -> Proportion:
        """Raises: ValueError unless 0 <= hits <= total and total >= 1."""
        if not 0 <= hits <= total or total < 1:
            raise ValueError(f"{hits} of {total} is no proportion")
        p, z2 = hits / total, Z95**2 / total
        center = (p + z2 / 2) / (1 + z2)
        half = math.sqrt(p * (1 - p) * z2 + z2**2 / 4) / (1 + z2)
        return Proportion(hits, total, p, max(0.0, center - half), min(1.0, center + half))

    def __str__(self) -> str:
        interval = f"95 % interval {100 * self.low:.1f} to {100 * self.high:.1f}"
        return f"{100 * self.share:.1f} % ({self.hits} of {self.total}, {interval})"


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB: (B,).

    10 log10(1 / mean squared error) with both mapped from [-1, 1] to [0, 1] and `image` clamped; infinite for
    equal pictures.

    Args:
        image, reference: (B, C, H, W).
    """
    error = ((image.clamp(-1, 1) - reference) / 2).cpu().double().square().flatten(1).mean(1)
    return -10 * error.log10()


def ranks(features: Tensor, references: Tensor, truth: Tensor, alike: Tensor | None = None) -> Tensor:
    """How many other references are as near (L2) to each feature as the true one: (B,) int64, 0 = none.

    Args:
        features: (B, D).
        references: (N, D).
        truth: (B,) row of the right reference.
        alike: (N,) int64, equal for references that are the same picture, any of which is then the true
            one; None = all differ.
    """
    alike = torch.arange(len(references)) if alike is None else alike
    distance = torch.cdist(features, references, compute_mode="donot_use_mm_for_euclid_dist")
    right = alike[truth][:, None] == alike  # (B, N)
    own = distance.masked_fill(~right, torch.inf).amin(1, keepdim=True)
    return ((distance <= own) & ~right).sum(1)
