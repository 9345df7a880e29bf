"""Connected regions of many masks at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["components"]


def components(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """(N, H, W) bool -> the same shape, int64: 0 outside, and a number from 1 for each region of one picture.

    Pixels belong together if they share a side. Rows are cut into runs first, so that only runs above each
    other are left to be joined; these take the smallest number of their neighbors until nothing changes.
    """
    n, height, width = mask.shape
    padded = np.zeros((n, height + 1, width + 1), bool)  # so that no row touches the next, no picture either
    padded[:, :height, :width] = mask
    flat = padded.ravel()
    starts = flat & ~np.concatenate([[False], flat[:-1]])
    run = np.where(flat, np.cumsum(starts) - 1, -1)
    above, below = run[: -(width + 1)], run[width + 1 :]
    touching = (above >= 0) & (below >= 0)
    a, b = above[touching], below[touching]
    parent = np.arange(int(starts.sum()))
    while len(a):
        low, high = np.minimum(a, b), np.maximum(a, b)
        np.minimum.at(parent, high, low)
        while not np.array_equal(parent, up := parent[parent]):
            parent = up
        a, b = parent[a], parent[b]
        apart = a != b
        a, b = a[apart], b[apart]
    _, number = np.unique(parent, return_inverse=True)
    labels = np.where(flat, np.append(number + 1, 0)[run], 0)
    return labels.reshape(padded.shape)[:, :height, :width]
