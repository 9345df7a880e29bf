"""Guidance by an external score grad_x log p(y | x_t): a classifier, or a similarity to a text or picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.core.types import Conditioning, Denoised, Level
from sfumato.diffusion.denoiser import DenoiseFn, Denoiser, model_time
from sfumato.diffusion.guidance import CFG, Guidance

__all__ = ["LogProb", "ScoreGuidance", "class_log_prob", "gradient", "score_guided", "similarity"]

LogProb = Callable[[Tensor, Level], Tensor]
"""(x_t (B, C, ...), level) -> log p(y | x_t) up to a constant, one number per sample (B,)."""


@dataclass(frozen=True)
class ScoreGuidance:
    """Adds scale * grad_x log p(y | x_t) to the score, after any other guidance and after the constraints.

    It sets `Denoised.grad`; the sampler decides what that means: ddpm shifts its mean by variance * grad, the
    others fold it into eps. Dhariwal & Nichol 2021 (arXiv:2105.05233), algorithms 1 and 2. It holds a
    function, so it is not part of a JSON configuration.

    Attributes:
        log_prob: for instance `class_log_prob` or `similarity`; its gradient is taken at x_t.
        inner: guidance of the denoiser itself.
    """

    log_prob: LogProb
    scale: float = 1.0
    inner: Guidance = field(default_factory=CFG)

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"guidance scale {self.scale} is not a finite number; 0 = off")

    def bind(self, denoiser: Denoiser, cond: Conditioning, null: Conditioning) -> DenoiseFn:
        """See Guidance."""
        fn = self.inner.bind(denoiser, cond, null)
        if self.scale == 0:
            return fn
        return score_guided(fn, lambda x_t, level: self.scale * gradient(self.log_prob, x_t, level))


def score_guided(fn: DenoiseFn, grad: Callable[[Tensor, Level], Tensor]) -> DenoiseFn:
    """Add grad(x_t, level), of the shape of x_t, to the external score of `fn`."""

    def guided(x_t: Tensor, level: Level) -> Denoised:
        denoised, extra = fn(x_t, level), grad(x_t, level)
        return replace(denoised, grad=extra if denoised.grad is None else denoised.grad + extra)

    return guided


def gradient(log_prob: LogProb, x_t: Tensor, level: Level) -> Tensor:
    """d sum(log_prob) / d x_t, also inside no_grad and inference_mode; the parameters gather no gradient.

    Raises: ValueError unless log_prob returns one number per sample.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = x_t.detach().clone().requires_grad_()
        values = log_prob(x, level)
        if values.shape != x.shape[:1]:
            got = tuple(values.shape)
            raise ValueError(f"log_prob returned shape {got}; it must be one number per sample, ({len(x)},)")
        return torch.autograd.grad(values.sum(), x)[0]


def class_log_prob(classifier: Callable[[Tensor, Tensor], Tensor], label: Tensor) -> LogProb:
    """log softmax(classifier(x_t, t))[label].

    Args:
        classifier: trained on noisy samples, (B, C, ...), (B,) -> logits (B, K).
        label: (B,) int64.
    """

    def log_prob(x_t: Tensor, level: Level) -> Tensor:
        log_p = F.log_softmax(classifier(x_t, model_time(x_t, level)), dim=1)
        return log_p.gather(1, label.to(x_t.device)[:, None])[:, 0]

    return log_prob


def similarity(
    encoder: Callable[[Tensor, Tensor], Tensor], target: Tensor, temperature: float = 100.0
) -> LogProb:
    """temperature * cosine(encoder(x_t, t), target): GLIDE's noised CLIP (arXiv:2112.10741, eq. 8).

    Args:
        encoder: trained on noisy samples, (B, C, ...), (B,) -> features (B, D).
        target: (B, D) features of the text or picture.
        temperature: exp(logit_scale) of the CLIP model.
    """

    def log_prob(x_t: Tensor, level: Level) -> Tensor:
        return temperature * F.cosine_similarity(encoder(x_t, model_time(x_t, level)), target.to(x_t), dim=1)

    return log_prob
