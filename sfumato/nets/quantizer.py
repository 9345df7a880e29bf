"""Embeddings as tokens: principal coordinates of pictures, and their cosines to texts, in equal buckets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Axes", "Quantizer"]

TOP = 0.5  # share of the texts' cosines above which one is drawn; the paper swept 50, 70, 85 and 95 %
NARROWEST = 1e-6  # width of a bucket: coordinates that never change have no range


@dataclass(frozen=True)
class Axes:
    """Principal axes of embeddings.

    Attributes:
        mean: (D,).
        axes: (D, D) rows from the largest variance to the smallest.
    """

    mean: Tensor
    axes: Tensor

    @staticmethod
    def of(embeddings: Tensor) -> Axes:
        """Those of rows (N, D)."""
        rows = embeddings.double().cpu()
        return Axes(rows.mean(0), torch.linalg.eigh(torch.cov(rows.mT, correction=0)).eigenvectors.flip(1).mT)

    def truncated(self, embeddings: Tensor, count: int) -> Tensor:
        """Embeddings (n, D) without all but their first `count` coordinates."""
        axes, mean = self.axes[:count].to(embeddings), self.mean.to(embeddings)
        return (embeddings - mean) @ axes.mT @ axes + mean


class Quantizer(nn.Module):
    """Image embedding <-> tokens, as buffers that are saved with the net.

    Token 0 is the cosine to the text, tokens 1 to `kept` are the first principal coordinates; each range that
    was seen in `fit` is cut into equal buckets (Ramesh et al. 2022, arXiv:2204.06125, section 2.2).

    Args:
        dim: of the embeddings.
        kept: number of principal coordinates.
        buckets: of each.
    """

    mean: Tensor
    axes: Tensor
    low: Tensor
    width: Tensor
    below: Tensor

    def __init__(self, dim: int, kept: int, buckets: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("axes", torch.eye(dim)[:kept])
        self.register_buffer("low", -torch.ones(1 + kept))
        self.register_buffer("width", torch.full((1 + kept,), 2 / buckets))
        # Share of the pictures whose cosine is in this bucket or below it.
        self.register_buffer("below", torch.arange(1, buckets + 1) / buckets)

    def fit(self, images: Tensor, texts: Tensor) -> None:
        """Take axes, ranges and the distribution of cosines from pairs (N, D) of a data set.

        Raises: ValueError in one line if the widths differ from this prior's, or there are too few pairs.
        """
        kept, dim = self.axes.shape
        for name, rows in (("images", images), ("texts", texts)):
            if rows.shape != (len(images), dim):
                raise ValueError(
                    f"embeddings of {name} have shape {tuple(rows.shape)} and this prior is for "
                    f"{(len(images), dim)}: set dim to the width of its CLIP"
                )
        if len(images) <= kept:
            raise ValueError(f"{len(images)} pictures have no {kept} principal axes; lower kept, or add some")
        found = Axes.of(images)
        self.mean.copy_(found.mean)
        self.axes.copy_(found.axes[:kept])
        values = self._values(images.to(self.mean), texts.to(self.mean))
        low, high = values.aminmax(dim=0)
        self.low.copy_(low)
        self.width.copy_(((high - low) / self.buckets).clamp_min(NARROWEST))
        cosines = torch.bincount(self.encode(images, texts)[:, 0], minlength=self.buckets)
        self.below.copy_(cosines.double().cumsum(0) / len(images))

    def encode(self, images: Tensor, texts: Tensor) -> Tensor:
        """(B, D) each -> tokens (B, 1 + kept) int64; what is out of range goes to the nearest bucket."""
        values = self._values(images.to(self.mean), texts.to(self.mean))
        return ((values - self.low) / self.width).floor().long().clamp(0, self.buckets - 1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, 1 + kept) -> embeddings (B, D): middles of the buckets, and the mean on other axes."""
        middles = self.low + (tokens + 0.5) * self.width
        with torch.autocast(tokens.device.type, enabled=False):
            return middles[:, 1:] @ self.axes + self.mean

    def matching(self, share: Tensor) -> Tensor:
        """Uniform numbers (B,) in [0, 1] -> tokens 0 (B,) from the upper half of their distribution."""
        drawn = TOP + (1 - TOP) * share.to(self.below)
        return torch.searchsorted(self.below, drawn).clamp_max(self.buckets - 1)

    def _values(self, images: Tensor, texts: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):  # half precision is coarser than buckets
            cosine = F.cosine_similarity(images, texts, dim=1)[:, None]
            return torch.cat([cosine, (images - self.mean) @ self.axes.mT], dim=1)
