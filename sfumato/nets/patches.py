"""Pictures as sequences of patches, and where in the picture a patch is: sin-cos tables and rotations."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Rotation", "patchify", "rotate", "rotation", "sincos_positions", "unpatchify"]

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines (N, d) of the angles by which the channels of a head turn."""
PERIOD = 10_000.0


def patchify(x: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, H/p * W/p, C * p * p), channel-major inside a patch."""
    return F.pixel_unshuffle(x, p).flatten(2).transpose(1, 2)


def unpatchify(x: Tensor, grid: tuple[int, int], p: int) -> Tensor:
    """Inverse of patchify for a grid of (rows, columns)."""
    return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, grid), p)


@lru_cache(maxsize=16)
def sincos_positions(height: int, width: int, dim: int, base: int | None = None) -> Tensor:
    """Fixed 2-D positions (1, height * width, dim), float32; computed once, do not change it.

    Half of the channels for the column, half for the row; float64 arithmetic, as published.

    Args:
        base: coordinates run from 0 to (nearly) this many cells whatever the size, as in diffusers; None =
            to height and width.
    """
    with torch.inference_mode(False):
        angles = _angles(height, width, dim // 4, base)
        table = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
        return table.float()[None]


@lru_cache(maxsize=16)
def rotation(height: int, width: int, head_dim: int, extra: int = 0) -> Rotation:
    """Rotary positions of `extra` tokens that do not turn, followed by a grid of patches; float32.

    Pairs of channels (j, j + d/2) turn by column (first half of the pairs) or row (second half) times
    10000^(-k / (d/4)) (Su et al. 2021, arXiv:2104.09864, on two axes).
    """
    with torch.inference_mode(False):
        angles = torch.cat(_angles(height, width, head_dim // 4, None), dim=1)  # (N, d/2)
        angles = F.pad(angles, (0, 0, extra, 0)).repeat(1, 2)
        return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Turn queries or keys (B, heads, N, d)."""
    cos, sin = (part.to(x) for part in turn)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _angles(height: int, width: int, frequencies: int, base: int | None) -> list[Tensor]:
    """Column and row of every patch times the frequencies, (height * width, frequencies) float64 each."""
    j = torch.arange(frequencies, dtype=torch.float64, device="cpu")
    omega = torch.exp(-j * (math.log(PERIOD) / frequencies))
    axes = [torch.arange(n, dtype=torch.float64, device="cpu") for n in (height, width)]
    if base is not None:
        axes = [axis * (base / len(axis)) for axis in axes]
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    return [axis.reshape(-1, 1) * omega for axis in (columns, rows)]
