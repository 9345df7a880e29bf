"""The conditioner protocol, its empty case and the union of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, Inputs

__all__ = ["Conditioner", "Merged", "Unconditional", "merged"]


class Conditioner(Protocol):
    """Inputs -> Conditioning. Gradients flow: a text tower can be trained together with the denoiser."""

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """What the network is told, one row per picture.

        Args:
            noise: for conditioners that augment; they say so with a ValueError if it is missing.

        Raises: ValueError naming what the inputs lack.
        """
        ...

    def null(self, inputs: Inputs, cond: Conditioning) -> Conditioning:
        """`cond` without what guidance amplifies and training drops; the rest, and its noise, is shared."""
        ...


@dataclass(frozen=True)
class Unconditional:
    """Tells the network nothing."""

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """An empty conditioning."""
        return Conditioning()

    def null(self, inputs: Inputs, cond: Conditioning) -> Conditioning:
        """`cond` itself."""
        return cond


@dataclass(frozen=True)
class Merged:
    """Several conditioners, each of which fills fields of its own; `concat` takes the channels of all."""

    parts: tuple[Conditioner, ...]

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """All their fields. Raises: ValueError if two of them fill the same one."""
        cond = Conditioning()
        for part in self.parts:
            fields: dict[str, Any] = dict(part(inputs, noise).items())
            if cond.concat is not None and "concat" in fields:
                more = fields.pop("concat").to(cond.concat)
                cond = replace(cond, concat=torch.cat([cond.concat, more], dim=1))
            if twice := sorted(fields.keys() & dict(cond.items()).keys()):
                raise ValueError(f"two conditioners of one stage fill {', '.join(twice)}; keep one of them")
            cond = replace(cond, **fields)
        return cond

    def null(self, inputs: Inputs, cond: Conditioning) -> Conditioning:
        """Each part drops its own."""
        for part in self.parts:
            cond = part.null(inputs, cond)
        return cond


def merged(parts: Sequence[Conditioner]) -> Conditioner:
    """None, one or several conditioners as one."""
    if not parts:
        return Unconditional()
    return parts[0] if len(parts) == 1 else Merged(tuple(parts))
