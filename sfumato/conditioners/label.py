"""Class labels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, Inputs

__all__ = ["LabelCond", "LabelToken"]


@dataclass(frozen=True)
class LabelCond:
    """A class in 0..num_classes - 1; num_classes itself is the null class.

    Attributes:
        has_null: whether the network knows the null class; ADM's do not.
    """

    num_classes: int
    has_null: bool = True

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """Field label; without labels all pictures are unconditional.

        Raises: ValueError for a class outside the range, or if there is not one label per picture.
        """
        if inputs.label is None and not self.has_null:
            raise ValueError(
                f"this network is always told a class: give label, from 0 to {self.num_classes - 1}, for "
                f"each of {inputs.n} pictures"
            )
        if inputs.label is None:
            return Conditioning(label=torch.full((inputs.n,), self.num_classes, dtype=torch.long))
        label = inputs.label
        if label.shape != (inputs.n,):
            raise ValueError(
                f"label has shape {tuple(label.shape)}; expected one integer per picture, ({inputs.n},)"
            )
        if bool(((label < 0) | (label >= self.num_classes)).any()):
            raise ValueError(f"label {label.tolist()} holds a class outside 0..{self.num_classes - 1}")
        return Conditioning(label=label.long())

    def null(self, inputs: Inputs, cond: Conditioning) -> Conditioning:
        """The null class for every picture; `cond` itself if there is none."""
        if not self.has_null:
            return cond
        assert cond.label is not None
        return replace(cond, label=torch.full_like(cond.label, self.num_classes))


@dataclass(frozen=True)
class LabelToken:
    """The class as a token, as latent diffusion is told it.

    Attributes:
        labels: what the classes are; its null class is a class of the encoder, too.
        encoder: label (B,) -> tokens (B, 1, D).
    """

    labels: LabelCond
    encoder: nn.Module

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """Field tokens (n, 1, D); errors as of LabelCond."""
        label = self.labels(inputs).label
        assert label is not None
        return Conditioning(tokens=self._tokens(label))

    def null(self, inputs: Inputs, cond: Conditioning) -> Conditioning:
        """The token of the null class for every picture; `cond` itself if there is none."""
        if not self.labels.has_null:
            return cond
        return replace(cond, tokens=self._tokens(torch.full((inputs.n,), self.labels.num_classes)))

    def _tokens(self, label: Tensor) -> Tensor:
        tokens: Tensor = self.encoder(label.to(next(self.encoder.parameters()).device))
        return tokens
