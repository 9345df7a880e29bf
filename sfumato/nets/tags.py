"""Marks that a network puts on its layers for whoever trains it; they change nothing else."""

from __future__ import annotations

from typing import Literal, TypeVar

from torch import nn

__all__ = ["Role", "entrances_of", "fused", "parts_of", "role_of_layer", "tagged"]

Role = Literal["matrix", "edge", "embedding", "vector"]
"""Hidden weight, weight at the border of a net, table of vectors, bias or gain."""

M = TypeVar("M", bound=nn.Module)
ROLE, PARTS = "_sfumato_role", "_sfumato_parts"


def tagged(layer: M, role: Role) -> M:
    """The layer itself, its weight marked with a role; for layers whose type and shape do not tell it."""
    object.__setattr__(layer, ROLE, role)  # a module's own __setattr__ is for tensors and modules
    return layer


def fused(layer: M, parts: int) -> M:
    """The layer itself, its rows marked as `parts` matrices of equal size, one upon the other (q, k, v)."""
    object.__setattr__(layer, PARTS, parts)
    return layer


def role_of_layer(layer: nn.Module) -> Role | None:
    """The role it was marked with."""
    role: Role | None = getattr(layer, ROLE, None)
    return role


def entrances_of(layer: nn.Module) -> tuple[str, ...]:
    """Methods beside `forward` by which a layer is entered while its block is not: its weights are needed.

    They matter where weights are gathered block by block; a class names them in `entrances`.
    """
    names: tuple[str, ...] = getattr(layer, "entrances", ())
    return names


def parts_of(layer: nn.Module) -> int:
    """How many matrices its weight consists of; 1 unless it was marked."""
    parts: int = getattr(layer, PARTS, 1)
    return parts
