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
    """`hits` of `total`, with the Wilson score interval of 95 % (Wilson 1927)."""

    hits: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.hits <= self.total or self.total < 1:
            raise ValueError(f"{self.hits} of {self.total} is no proportion")

    @property
    def share(self) -> float:
        """hits / total."""
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper bound of the share; inside [0, 1] and sensible at 0 and total hits too."""
        n, p = self.total, self.share
        center = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
        half = Z95 / (1 + Z95**2 / n) * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
        return max(0.0, center - half), min(1.0, center + half)

    def __str__(self) -> str:
        low, high = self.interval
        interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f}"
        return f"{100 * self.share:.1f} % ({self.hits} of {self.total}, {interval})"


def psnr(image: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB: (B,).

    10 log10(1 / mean squared error) with both mapped from [-1, 1] to [0, 1] and `image` clamped; infinite for
    equal pictures.

    Args:
        image, reference: (B, C, H, W).
    """
    error = ((image.clamp(-1, 1) - reference) / 2).double().square().flatten(1).mean(1)
    return -10 * error.log10()


def ranks(features: Tensor, references: Tensor, truth: Tensor) -> Tensor:
    """How many references are nearer (L2) to each feature than the true one: (B,) int64, 0 = the nearest.

    A reference at exactly the same distance counts as nearer unless it is equal to the true one, for then
    nobody could tell the two apart.

    Args:
        features: (B, D).
        references: (N, D).
        truth: (B,) row of the right reference.
    """
    distance = torch.cdist(features, references, compute_mode="donot_use_mm_for_euclid_dist")
    own = distance.gather(1, truth[:, None])
    twin = torch.cdist(references[truth], references, compute_mode="donot_use_mm_for_euclid_dist") == 0
    return ((distance <= own) & ~twin).sum(1)
