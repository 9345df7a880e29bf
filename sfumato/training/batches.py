"""Batches by position: which samples come next is a pure function of the seed and the images seen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Batch"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one step.

    Attributes:
        images: (B, 3, H, W) in [-1, 1], on the training device.
        text: B captions.
        index: (B,) int64 row of each sample in the data set.
    """

    images: Tensor
    text: tuple[str, ...]
    index: Tensor

    def __len__(self) -> int:
        return len(self.text)
