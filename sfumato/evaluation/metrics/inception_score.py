"""Inception score from running sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.core.world import ALONE, World

__all__ = ["InceptionScore", "Score"]

SPLIT = 5000


@dataclass(frozen=True)
class Score:
    """Mean and standard deviation over the splits."""

    mean: float
    std: float
    splits: int


class InceptionScore:
    """exp(E KL(p(y|x) | p(y))) in splits of 5,000 samples in their order, then the mean (arXiv:1606.03498).

    The divergence is E sum_y p log p - sum_y q log q with q = E p: sums over samples, and over processes.

    Args:
        n: samples that there will be in all.
        classes: of the logits.
    """

    def __init__(self, n: int, classes: int) -> None:
        self.n = n
        splits = max(1, -(-n // SPLIT))
        self.count = torch.zeros(splits, dtype=torch.float64)
        self.entropy = torch.zeros(splits, dtype=torch.float64)
        self.total = torch.zeros(splits, classes, dtype=torch.float64)

    def update(self, logits: Tensor, position: Tensor) -> None:
        """Add logits (B, classes) of the samples at `position` (B,) in 0..n-1."""
        log_p = logits.detach().cpu().double().log_softmax(1)
        split, p = position // SPLIT, log_p.exp()
        self.count.index_add_(0, split, torch.ones(len(p), dtype=torch.float64))
        self.entropy.index_add_(0, split, (p * log_p).sum(1))
        self.total.index_add_(0, split, p)

    def score(self, world: World = ALONE) -> Score:
        """Over all processes, which must all call. Raises: ValueError if samples are missing."""
        count, entropy, total = (world.sum(v) for v in (self.count, self.entropy, self.total))
        if int(count.sum()) != self.n:
            raise ValueError(f"an Inception score of {self.n} samples got {int(count.sum())}")
        q = total / count[:, None]
        scores = (entropy / count - torch.special.xlogy(q, q).sum(1)).exp()
        return Score(float(scores.mean()), float(scores.std(correction=0)), len(scores))
