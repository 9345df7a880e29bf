"""Constraints on a walk: thresholds on x0, known regions blended into x0, known regions projected onto x_t.

Order, whoever composes them: guidance -> blend -> threshold. An external score travels beside x0 in
`Denoised.grad` and is folded in by the sampler after all of these; the x0 that DDIM derives from it is not
thresholded again, as in ADM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from sfumato.core.types import Denoised, Level, expand
from sfumato.diffusion.denoiser import DenoiseFn, rebuild
from sfumato.diffusion.grid import Grid

__all__ = [
    "Dynamic",
    "Known",
    "Static",
    "Threshold",
    "ThresholdConfig",
    "blended",
    "constrained",
    "projection",
    "thresholded",
]


class Threshold(Protocol):
    """A bound on x0, (B, C, ...) -> the same shape."""

    def __call__(self, x0: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Static:
    """Clamp x0 to [-limit, limit]: 1 for pictures, 10 for Karlo's image embeddings.

    Attributes:
        keep_eps: leave eps as the network said it (diffusers' DDIM); else it follows x0 (guided-diffusion).

    Raises: ValueError if the limit is not positive.
    """

    limit: float = 1.0
    keep_eps: bool = False
    kind: Literal["static"] = "static"

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"threshold limit {self.limit} must be positive")

    def __call__(self, x0: Tensor) -> Tensor:
        return x0.clamp(-self.limit, self.limit)


@dataclass(frozen=True)
class Dynamic:
    """Clamp x0 to [-s, s] and divide by s, where s = clamp(quantile(|x0|, percentile), 1, max) per sample.

    Saharia et al. 2022 (arXiv:2205.11487), sec. 2.3. DeepFloyd IF: percentile 0.95, max 1.5 (first stage) or
    1 (others, the same as Static).

    Attributes:
        percentile: in (0, 1]; the paper's 99.5 % is 0.995.
        max: upper bound of s, at least 1; None = no bound.

    Raises: ValueError if a value is out of range.
    """

    percentile: float = 0.995
    max: float | None = None
    kind: Literal["dynamic"] = "dynamic"

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 1:
            raise ValueError(f"threshold percentile {self.percentile} is outside (0, 1]; 99.5 % is 0.995")
        if self.max is not None and not self.max >= 1:
            raise ValueError(f"threshold max {self.max} must be at least 1, or None for no bound")

    def __call__(self, x0: Tensor) -> Tensor:
        s = _quantile(x0.flatten(1).abs(), self.percentile).clamp(1.0, self.max)
        bound = expand(s, x0)
        return x0.clamp(-bound, bound) / bound


ThresholdConfig = Annotated[Static | Dynamic | None, Field(discriminator="kind")]


@dataclass(frozen=True)
class Known:
    """A region whose content is given.

    Attributes:
        x0: (B, C, ...) clean content.
        keep: broadcasts against x0, 1 where x0 is known, 0 where it is to be made; fractions mix.
    """

    x0: Tensor
    keep: Tensor

    def into(self, x: Tensor, content: Tensor) -> Tensor:
        """x with `content` in the known region."""
        keep = self.keep.to(x)
        return x * (1 - keep) + content.to(x) * keep


def thresholded(fn: DenoiseFn, threshold: Threshold) -> DenoiseFn:
    """Bound the x0 of `fn`; eps follows, so that DDIM and DDPM see the same x0, unless it is to be kept."""

    def bounded(x_t: Tensor, level: Level) -> Denoised:
        denoised = fn(x_t, level)
        if isinstance(threshold, Static) and threshold.keep_eps:
            return replace(denoised, x0=threshold(denoised.x0))
        return rebuild(x_t, level, denoised, x0=threshold(denoised.x0))

    return bounded


def blended(fn: DenoiseFn, known: Known) -> DenoiseFn:
    """Put the known region into the x0 of `fn`; eps follows.

    Inpainting of GLIDE (Nichol et al. 2021, arXiv:2112.10741), whose code does it before the threshold.
    """

    def filled(x_t: Tensor, level: Level) -> Denoised:
        denoised = fn(x_t, level)
        return rebuild(x_t, level, denoised, x0=known.into(denoised.x0, known.x0))

    return filled


def constrained(
    fn: DenoiseFn, *, known: Known | None = None, threshold: Threshold | None = None
) -> DenoiseFn:
    """Blend, then threshold: the order in which both are meant to act on a guided denoiser."""
    if known is not None:
        fn = blended(fn, known)
    return fn if threshold is None else thresholded(fn, threshold)


def projection(
    known: Known, grid: Grid, noise: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, int], Tensor]:
    """A `project` for `integrate`: after each step the known region becomes alpha_i x0 + sigma_i z.

    z is drawn anew each time. At a last level without noise the region is exactly the given content.
    Song et al. 2021 (arXiv:2011.13456), app. I.2; Lugmayr et al. 2022 (arXiv:2201.09865), eq. 8, adds grid
    jumps.
    """

    def project(x: Tensor, i: int) -> Tensor:
        alpha, sigma = grid.points[i]
        content = alpha * known.x0.to(x)
        if sigma > 0:
            content = torch.add(content, noise(x), alpha=sigma)
        return known.into(x, content)

    return project


def _quantile(rows: Tensor, q: float) -> Tensor:
    """Linearly interpolated quantile of each row, (B, N) -> (B,).

    torch.quantile would sort all, and refuses more than 2^24 elements.
    """
    position = q * (rows.shape[1] - 1)
    low = int(position)
    ranked = rows.topk(rows.shape[1] - low, dim=1, sorted=True).values
    below, above = ranked[:, -1], ranked[:, max(ranked.shape[1] - 2, 0)]
    return torch.lerp(below, above, position - low)
