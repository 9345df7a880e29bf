"""The numbers that SDXL is told of its pictures: size, crop, and target size or score."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, Inputs

__all__ = ["Sizes"]


@dataclass(frozen=True)
class Sizes:
    """Original height and width, top and left of the crop, then target height and width, or a score.

    Podell et al. 2023 (arXiv:2307.01952), section 2.2.

    Attributes:
        size: (height, width) where the inputs say none.
        scored: a score stands in place of the target size, as SDXL's refiner wants it.
        score, null_score: what it is, with and without what guidance amplifies.
    """

    size: tuple[int, int]
    scored: bool = False
    score: float = 6.0
    null_score: float = 2.5

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """Field micro, (n, 6) or (n, 5)."""
        return self._told(inputs, self.score if inputs.aesthetic is None else inputs.aesthetic)

    def null(self, inputs: Inputs, cond: Conditioning) -> Conditioning:
        """The same sizes, with the lower score."""
        return replace(cond, micro=self._told(inputs, self.null_score).micro) if self.scored else cond

    def _told(self, inputs: Inputs, score: float) -> Conditioning:
        size = inputs.size or self.size
        last = (score,) if self.scored else inputs.target_size or size
        row = torch.tensor([*(inputs.original_size or size), *inputs.crop, *last], dtype=torch.float32)
        return Conditioning(micro=row.expand(inputs.n, -1))
