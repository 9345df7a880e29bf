"""The DiT of the paper in its sizes, 1000 classes, learned variance: DITS["dit-xl-2"]() is a DiTConfig.

Peebles & Xie 2023 (arXiv:2212.09748), table 1. Multiply-adds are those of a 256-pixel picture, a latent of
32x32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sfumato.core.registry import Registry
from sfumato.nets.dit_block import DiTConfig

__all__ = ["DITS", "SIZES"]

SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}
"""Depth, width, heads: 33M, 130M, 458M and 675M parameters."""
PATCHES = (2, 4, 8)
DITS: Registry[Callable[[], DiTConfig]] = Registry("DiT preset")


def _published(size: str, patch: int) -> DiTConfig:
    depth, width, heads = SIZES[size]
    return DiTConfig(patch=patch, width=width, depth=depth, heads=heads, num_classes=1000, out_channels=8)


for _size in SIZES:
    for _patch in PATCHES:
        DITS(f"dit-{_size}-{_patch}")(partial(_published, _size, _patch))
