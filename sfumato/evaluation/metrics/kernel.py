"""Kernel distance of two sets of features (KID, KD-DINOv2), unbiased at any number of samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SUBSETS", "SUBSET_SIZE", "KernelDistance", "kernel_distance", "mmd2"]

SUBSETS, SUBSET_SIZE = 100, 1000  # as published


@dataclass(frozen=True)
class KernelDistance:
    """Mean and standard deviation over subsets of `size` samples."""

    mean: float
    std: float
    subsets: int
    size: int


def mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased squared maximum mean discrepancy of x (n, D) and y (m, D) (Gretton et al. 2012, eq. 3).

    Kernel (x . y / D + 1)^3 as for KID. Dot products are made in the dtype of the features, sums in float64.
    """
    n, m = len(x), len(y)
    xx, yy, xy = (_kernel(a, b) for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return within - 2 * xy.mean()


def kernel_distance(
    x: Tensor, y: Tensor, *, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 0
) -> KernelDistance:
    """KID (Binkowski et al. 2018, arXiv:1801.01401, section 4): mean of `mmd2` over random subsets.

    It may be negative: its expectation is 0 for samples of one distribution.

    Args:
        x, y: features (n, D) and (m, D).
        size: of a subset, drawn without replacement; fewer if there are fewer samples, as the result says.
        seed: of the draws.

    Raises: ValueError in one line for fewer than 2 samples, or other dimensions.
    """
    size = min(size, len(x), len(y))
    if size < 2:
        raise ValueError(f"a kernel distance needs at least 2 samples each, not {len(x)} and {len(y)}")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of {x.shape[1]} and of {y.shape[1]} dimensions cannot be compared")
    generator = torch.Generator().manual_seed(seed)

    def subset(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:size]]

    values = torch.stack([mmd2(subset(x), subset(y)) for _ in range(subsets)])
    return KernelDistance(float(values.mean()), float(values.std(correction=0)), subsets, size)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return ((x @ y.T).double() / x.shape[1] + 1) ** 3
