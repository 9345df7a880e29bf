"""Frechet distance of two sets of features (FID, sFID, FD-DINOv2), also for infinitely many samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.core.world import World

__all__ = ["GROUPS", "Extrapolated", "Gaussian", "Moments", "extrapolated", "frechet_distance"]

GROUPS = 10
"""Parts into which samples are dealt, by turns, for the extrapolation."""
T95 = 2.2621571627409915  # 97.5 % quantile of Student's t with GROUPS - 1 degrees of freedom


@dataclass(frozen=True)
class Gaussian:
    """Mean (D,) and unbiased covariance (D, D), float64, of `n` samples; n = 0 if that is not known."""

    mean: Tensor
    cov: Tensor
    n: int = 0


class Moments:
    """Running sums in float64 of features and of their products; those of several parts or processes add up.

    Args:
        dim: length of a feature.
    """

    def __init__(self, dim: int) -> None:
        self.n = torch.zeros((), dtype=torch.int64)
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.products = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add features (B, D). Raises: ValueError if one is not finite."""
        if not features.isfinite().all():
            raise ValueError("features are not finite (NaN or inf): broken pictures or a broken feature net")
        x = features.detach().cpu().double()
        self.n += len(x)
        self.sum += x.sum(0)
        self.products.addmm_(x.T, x)

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets."""
        return self._like(self.n + other.n, self.sum + other.sum, self.products + other.products)

    def __sub__(self, other: Moments) -> Moments:
        """Moments without a part."""
        return self._like(self.n - other.n, self.sum - other.sum, self.products - other.products)

    def over(self, world: World) -> Moments:
        """Moments over all processes, which must all call."""
        return self._like(world.sum(self.n), world.sum(self.sum), world.sum(self.products))

    def gaussian(self) -> Gaussian:
        """Raises: ValueError for fewer than 2 samples, which have no covariance."""
        n = int(self.n)
        if n < 2:
            raise ValueError(f"a covariance of {n} samples does not exist; give at least 2, better 10,000")
        mean = self.sum / n
        return Gaussian(mean, (self.products - n * torch.outer(mean, mean)) / (n - 1), n)

    @staticmethod
    def _like(n: Tensor, total: Tensor, products: Tensor) -> Moments:
        made = Moments(0)
        made.n, made.sum, made.products = n, total, products
        return made


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared 2-Wasserstein distance of two Gaussians (Dowson & Landau 1982; FID: arXiv:1706.08500, eq. 6).

    |mean_a - mean_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)). The root's trace is the sum of the roots of the
    eigenvalues of A^(1/2) B A^(1/2), which is symmetric: no complex numbers and no offset on the diagonal,
    also if the covariances are singular, as those of fewer samples than dimensions are.

    Raises: ValueError in one line if the two are not of one length.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"features of {len(a.mean)} and of {len(b.mean)} dimensions cannot be compared; make both with "
            "the same feature net"
        )
    return _distance(_root(a.cov), a, b)


@dataclass(frozen=True)
class Extrapolated:
    """A distance for infinitely many samples, its interval of 95 %, and the slope over 1/N."""

    value: float
    low: float
    high: float
    slope: float


def extrapolated(parts: Sequence[Moments], reference: Gaussian) -> Extrapolated:
    """FID at infinite N from samples dealt into GROUPS parts (Chong & Forsyth 2020, arXiv:1911.07023).

    FID_N = FID_inf + slope / N to first order, and the slope depends on the generator, so that no fixed N is
    fair. The line goes through the FID of all N samples and the mean FID of the sets that lack one part each;
    the paper's fifteen random subsets would have no interval, since they overlap. This is the delete-a-group
    jackknife (Quenouille 1956): the pseudo-values, one for each part, give the mean and its standard error.

    Raises: ValueError if there are not GROUPS parts of at least 2 samples.
    """
    if len(parts) != GROUPS or min(int(part.n) for part in parts) < 2:
        raise ValueError(f"FID at infinite N needs {GROUPS} parts of samples; give at least {2 * GROUPS}")
    root = _root(reference.cov)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    n, whole = int(total.n), _distance(root, reference, total.gaussian())
    pseudo, slopes = [], []
    for part in parts:
        left = n - int(part.n)
        without = _distance(root, reference, (total - part).gaussian())
        pseudo.append((n * whole - left * without) / (n - left))  # the line through both, at 1/N = 0
        slopes.append((without - whole) / (1 / left - 1 / n))
    values = torch.tensor(pseudo, dtype=torch.float64)
    value, half = float(values.mean()), T95 * float(values.std()) / math.sqrt(GROUPS)
    return Extrapolated(value, value - half, value + half, sum(slopes) / GROUPS)


def _distance(root: Tensor, a: Gaussian, b: Gaussian) -> float:
    """The distance, given the root of a's covariance."""
    middle = root @ b.cov @ root
    eigenvalues = torch.linalg.eigvalsh((middle + middle.T) / 2)
    shift = (a.mean - b.mean).square().sum()
    return float(shift + a.cov.trace() + b.cov.trace() - 2 * eigenvalues.clamp_min(0).sqrt().sum())


def _root(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
