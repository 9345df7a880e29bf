"""Fidelity, variety and memorization by nearest neighbors in feature space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Copies", "Manifold", "copies", "manifold"]

PR_K, DC_K = 3, 5  # neighbors of the two papers
CHUNK = 1000  # rows of a distance matrix in memory at once
NEAR, ALPHA = 50, 0.5  # of the calibrated distance


@dataclass(frozen=True)
class Manifold:
    """Shares in [0, 1]; density may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold(real: Tensor, fake: Tensor) -> Manifold:
    """Precision, recall, density and coverage of samples.

    Precision and recall with 3 neighbors: Kynkaanniemi et al. 2019 (arXiv:1904.06991, eq. 1 and 2). Density
    and coverage with 5: Naeem et al. 2020 (arXiv:2002.09797, eq. 4 and 5). A set's manifold is the union of
    balls around its features, each of which reaches to the k-th neighbor in the set.

    Args:
        real, fake: features (N, D) and (M, D).

    Raises: ValueError in one line for sets of at most 5 samples, or other dimensions.
    """
    if min(len(real), len(fake)) <= DC_K:
        raise ValueError(
            f"neighborhoods of {DC_K} need more samples than that, not {len(real)} and {len(fake)}; "
            "they mean something from about 1,000"
        )
    real, fake = _centered(real, fake)
    own, theirs = (_radii(x, (PR_K, DC_K)) for x in (real, fake))
    inside = torch.zeros((), dtype=torch.int64)
    density = torch.zeros((), dtype=torch.int64)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    nearest = torch.full((len(real),), torch.inf, dtype=real.dtype)
    for start in range(0, len(fake), CHUNK):
        rows = slice(start, start + CHUNK)
        squared = _squared(fake[rows], real)  # (chunk, N)
        inside += (squared <= own[:, 0]).any(1).sum()
        density += (squared <= own[:, 1]).sum()
        recalled |= (squared <= theirs[rows, :1]).any(0)
        nearest = torch.minimum(nearest, squared.amin(0))
    return Manifold(
        precision=int(inside) / len(fake),
        recall=float(recalled.double().mean()),
        density=int(density) / (DC_K * len(fake)),
        coverage=float((nearest <= own[:, 1]).double().mean()),
    )


@dataclass(frozen=True)
class Copies:
    """Samples beside the training data that they are nearest to.

    Attributes:
        share: of samples that count as copies.
        nearest: (M,) row of the nearest training picture.
        distance: (M,) L2 to it.
        calibrated: (M,) distance over ALPHA times the mean distance to the NEAR nearest; at most 1 = a copy.
    """

    share: float
    nearest: Tensor
    distance: Tensor
    calibrated: Tensor


def copies(training: Tensor, fake: Tensor) -> Copies:
    """Memorized samples by calibrated distance in feature space (Carlini et al. 2023, arXiv:2301.13188, 4.2).

    A sample that is much nearer to one training picture than to its other neighbors is a copy of it; where
    pictures are alike by nature, as white icons are, near neighbors alone do not count.

    Args:
        training, fake: features (N, D) and (M, D).

    Raises: ValueError in one line for fewer than 2 training samples, or other dimensions.
    """
    if len(training) < 2:
        raise ValueError(f"memorization needs at least 2 training pictures, not {len(training)}")
    training, fake = _centered(training, fake)
    distances, nearest = [], []
    for start in range(0, len(fake), CHUNK):
        chunk = fake[start : start + CHUNK]
        rows = _squared(chunk, training).topk(min(NEAR, len(training)), largest=False).indices
        # Anew without the cancellation of the squares: a copy's distance is exactly 0.
        apart = (training[r] - x for r, x in zip(rows, chunk, strict=True))
        exact = torch.stack([v.double().norm(dim=1) for v in apart])
        first = exact.argmin(1, keepdim=True)
        nearest.append(rows.gather(1, first)[:, 0])
        distances.append(exact.sort(1).values)
    near = torch.cat(distances)
    calibrated = near[:, 0] / (ALPHA * near.mean(1)).clamp_min(1e-300)
    share = float((calibrated <= 1).double().mean())
    return Copies(share, torch.cat(nearest), near[:, 0], calibrated)


def _centered(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both less the mean of the first, which makes the squares smaller that cancel in `_squared`."""
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features of {a.shape[1]} and of {b.shape[1]} dimensions cannot be compared")
    mean = a.double().mean(0).to(a.dtype)
    return a - mean, b - mean


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances (n, m), by a matrix product."""
    squares = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return squares.addmm_(x, y.T, alpha=-2).clamp_min_(0)


def _radii(x: Tensor, k: tuple[int, ...]) -> Tensor:
    """Squared distance of every row to its k-th neighbor other than itself, (N, len(k))."""
    parts = []
    for start in range(0, len(x), CHUNK):
        squared = _squared(x[start : start + CHUNK], x)
        squared.diagonal(start).fill_(torch.inf)
        near = squared.topk(max(k), largest=False).values
        parts.append(near[:, [i - 1 for i in k]])
    return torch.cat(parts)
