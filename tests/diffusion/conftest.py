"""A data distribution whose denoiser is known exactly, as a network of any parameterization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from sfumato.core.types import Conditioning, Denoised, Level
from sfumato.diffusion import SAMPLERS, Denoiser, Grid, NoiseSchedule, Parameterization, Run, integrate
from sfumato.diffusion.grid import Point

MEAN = torch.tensor([0.4, -0.8, 0.1], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.5, 0.3, 0.0], [0.3, 1.2, -0.2], [0.0, -0.2, 0.2]], dtype=torch.float64)
VALUES, VECTORS = torch.linalg.eigh(COVARIANCE)


@dataclass(frozen=True)
class Gaussian:
    """Data N(MEAN, COVARIANCE) in three dimensions; samples are (B, 3) float64."""

    mean: Tensor = MEAN
    covariance: Tensor = COVARIANCE

    def moments(self, point: Point) -> tuple[Tensor, Tensor]:
        """Mean and covariance of x_t = alpha x_0 + sigma eps."""
        eye = torch.eye(len(self.mean), dtype=torch.float64)
        return point.alpha * self.mean, point.alpha**2 * self.covariance + point.sigma**2 * eye

    def denoise(self, x: Tensor, level: Level) -> Denoised:
        """E[x_0 | x_t] and the noise it implies, for a level of shape () or (B,)."""
        alpha, sigma = level.alpha.reshape(-1, 1), level.sigma.reshape(-1, 1)
        spread = alpha**2 * VALUES + sigma**2
        centered = (x - alpha * self.mean) @ VECTORS
        x0 = self.mean + (alpha * VALUES / spread * centered) @ VECTORS.T
        return Denoised(x0, (sigma / spread * centered) @ VECTORS.T)

    def flow(self, x: Tensor, start: Point, end: Point) -> Tensor:
        """Where the probability flow takes x from one level to another: it rescales each eigendirection."""
        stretch = [(p.alpha**2 * VALUES + p.sigma**2).sqrt() for p in (start, end)]
        centered = (x - start.alpha * self.mean) @ VECTORS
        return end.alpha * self.mean + (stretch[1] / stretch[0] * centered) @ VECTORS.T

    def denoiser(
        self, schedule: NoiseSchedule, parameterization: Parameterization, unembed: Callable[[Tensor], Tensor]
    ) -> Denoiser:
        """A Denoiser over a network that sees only inp * x_t and the embedded time, and returns the exact F.

        `unembed` recovers the schedule's own time from what the network embeds.
        """

        def net(scaled: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            level = schedule(unembed(t))
            skip, out, inp = (c.reshape(-1, 1) for c in parameterization(level))
            x = scaled / inp
            return (self.denoise(x, level).x0 - skip * x) / out

        return Denoiser(net, schedule, parameterization)


class Responses:
    """Noise for a linear walk that yields its exact mean and covariance instead of a sample.

    Row 0 of the batch starts at the mean and never sees noise; each further row differs from it in one unit:
    of the start, or of one draw. The rows' differences from row 0 at the end are the columns of the walk's
    linear map.
    """

    def __init__(self, draws: int, dim: int = 3) -> None:
        self.draws, self.dim, self.used = draws, dim, 0

    def start(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """(1 + dim + draws * dim, dim): the mean, and it plus each column of a root of the covariance."""
        x = mean.repeat(1 + self.dim * (1 + self.draws), 1)
        x[1 : 1 + self.dim] += torch.linalg.cholesky(covariance).T
        return x

    def __call__(self, like: Tensor) -> Tensor:
        assert self.used < self.draws, "more draws than allowed for"
        z, first = torch.zeros_like(like), 1 + self.dim * (1 + self.used)
        z[first : first + self.dim] = torch.eye(self.dim, dtype=like.dtype)
        self.used += 1
        return z

    @staticmethod
    def moments(end: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the end of the walk."""
        columns = end[1:] - end[0]
        return end[0], columns.T @ columns


def walk_moments(
    denoise: Callable[[Tensor, Level], Denoised],
    grid: Grid,
    sampler: str,
    knobs: dict[str, float | str],
    start: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Exact mean and covariance after a walk of a linear denoiser that starts at N(start)."""
    noise = Responses(draws=2 * len(grid))
    run = Run(denoise, grid, noise)
    return noise.moments(integrate(partial(SAMPLERS[sampler], **knobs), run, noise.start(*start)))


@pytest.fixture
def gaussian() -> Gaussian:
    return Gaussian()


@pytest.fixture
def moments_after() -> Callable[..., tuple[Tensor, Tensor]]:
    return walk_moments
