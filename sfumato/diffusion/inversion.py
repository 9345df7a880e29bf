"""DDIM inversion: the sample from which a walk draws a picture again."""

from __future__ import annotations

import torch
from torch import Tensor

from sfumato.diffusion.denoiser import DenoiseFn
from sfumato.diffusion.grid import Grid

__all__ = ["inverted"]


@torch.no_grad()
def inverted(denoise: DenoiseFn, grid: Grid, x: Tensor, rounds: int = 3) -> Tensor:
    """The sample at the first level of a grid from which DDIM comes to x, (B, C, ...), at the last.

    DDIM's step x_i -> x_{i+1} (Song et al. 2020, arXiv:2010.02502, eq. 12) is solved for x_i by fixed-point
    iteration (Pan et al. 2023, arXiv:2309.04907). One round is the usual inversion, which takes eps at
    x_{i+1}; with more, the walk over the same grid without guidance gives x back.

    Raises: ValueError for less than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; allowed: at least 1; try 3")
    for i in reversed(range(len(grid))):
        now, after = grid.points[i], grid.points[i + 1]
        guess = x
        for _ in range(rounds):
            found = denoise(guess, grid.level(i))
            if now.sigma > now.alpha and after.sigma > 0:  # near pure noise eps says nothing new
                ratio = now.sigma / after.sigma
                guess = ratio * (x - after.alpha * found.x0) + now.alpha * found.x0
            else:
                ratio = now.alpha / after.alpha
                guess = ratio * (x - after.sigma * found.eps) + now.sigma * found.eps
        x = guess
    return x
