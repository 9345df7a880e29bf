"""Noise from seeds: image i of a request depends on its own seed alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Noise"]


class Noise:
    """One CPU generator per sample, so that a draw does not depend on batch size, device or number of ranks.

    Args:
        seeds: one integer per row of every tensor that will be drawn.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = tuple(int(s) for s in seeds)
        self._generators = [torch.Generator().manual_seed(s) for s in self.seeds]

    def __call__(self, like: Tensor) -> Tensor:
        """N(0, 1) of the shape, device and dtype of `like`, whose first axis is one row per seed."""
        return self._draw(like, lambda shape, g: torch.randn(shape, generator=g))

    def uniform(self, like: Tensor) -> Tensor:
        """U[0, 1) of the shape, device and dtype of `like`."""
        return self._draw(like, lambda shape, g: torch.rand(shape, generator=g, dtype=torch.float64))

    def integers(self, high: int) -> Tensor:
        """One integer in [0, high) per row: (B,) int64, on the CPU."""
        return torch.stack([torch.randint(high, (), generator=g) for g in self._generators])

    def fork(self, name: str) -> Noise:
        """Independent streams for a named part (a stage), so that skipping a part leaves the others alone."""
        return Noise([_derive(seed, name) for seed in self.seeds])

    def _draw(self, like: Tensor, fn: Callable[[torch.Size, torch.Generator], Tensor]) -> Tensor:
        if like.shape[:1] != (len(self._generators),):
            raise ValueError(
                f"noise of {len(self._generators)} seeds was asked for a tensor of shape {tuple(like.shape)}"
            )
        rows = torch.stack([fn(like.shape[1:], g) for g in self._generators])
        return rows.to(like.device, like.dtype)


def _derive(seed: int, name: str) -> int:
    """63 bits of a hash: streams of different (seed, name) share nothing."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1
