"""Pictures as points of CLIP's space: variations, interpolation, text differences, truncation.

Ramesh et al. 2022 (arXiv:2204.06125), sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.conditioners.base import Conditioner, Merged
from sfumato.conditioners.image import ImageEmbed, fitted, unit
from sfumato.core.types import Inputs
from sfumato.diffusion.guidance import CFG
from sfumato.diffusion.inversion import inverted
from sfumato.nets.clip import CLIPText, CLIPVision, seen
from sfumato.nets.quantizer import Axes
from sfumato.systems.stage import Stage
from sfumato.systems.start import Continue
from sfumato.systems.system import System

__all__ = ["Axes", "Space", "difference", "slerp", "spherical_mean"]

ROUNDS = 50  # of the mean on a sphere, which needs about ten


def slerp(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """From a (t = 0) to b (t = 1) along the great circle, the length going from |a| to |b|; (n, D) each.

    Shoemake 1985. Vectors of one direction are mixed along the straight line.

    Raises: ValueError if the widths differ: they are of different CLIPs.
    """
    if a.shape[-1] != b.shape[-1]:
        raise ValueError(
            f"embeddings of widths {a.shape[-1]} and {b.shape[-1]}: they are of different CLIPs; embed both "
            "with one"
        )
    t = torch.as_tensor(t, dtype=a.dtype, device=a.device)
    u, v = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    angle = (u * v).sum(-1, keepdim=True).clamp(-1, 1).acos()
    near = angle.sin() < 1e-6
    safe = torch.where(near, torch.ones_like(angle), angle)
    first = torch.where(near, 1 - t, ((1 - t) * safe).sin() / safe.sin())
    second = torch.where(near, t.expand_as(angle), (t * safe).sin() / safe.sin())
    length: Tensor = (1 - t) * a.norm(dim=-1, keepdim=True) + t * b.norm(dim=-1, keepdim=True)
    return length * F.normalize(first * u + second * v, dim=-1)


def spherical_mean(vectors: Tensor, weights: Sequence[float]) -> Tensor:
    """(k, D) and k weights -> (D,): the point with the least weighted squared angle to all, of mean length.

    Buss & Fillmore 2001, algorithm A1. For two vectors it is `slerp`.

    Raises: ValueError if the weights are not k numbers of a positive sum.
    """
    w = torch.tensor(weights, dtype=torch.float64)
    if len(w) != len(vectors) or not float(w.sum()) > 0 or bool((w < 0).any()):
        raise ValueError(f"weights {list(weights)} for {len(vectors)} pictures; give one each, none below 0")
    w = (w / w.sum())[:, None]
    points = F.normalize(vectors.double().cpu(), dim=1)
    mean = F.normalize((w * points).sum(0), dim=0)
    for _ in range(ROUNDS):
        cosine = (points @ mean).clamp(-1, 1)[:, None]
        away = F.normalize(points - cosine * mean, dim=1)  # zero for a point that is the mean itself
        step = (w * cosine.acos() * away).sum(0)
        length = step.norm()
        if float(length) < 1e-12:
            break
        mean = F.normalize(length.cos() * mean + length.sin() * step / length, dim=0)
    length = (w[:, 0] * vectors.double().cpu().norm(dim=1)).sum()
    return torch.mul(length, mean).to(vectors)


def difference(image: Tensor, text: Tensor, base: Tensor, theta: float) -> Tensor:
    """slerp(image, text - base, theta), (n, D): a picture moved from one caption's meaning towards another's.

    The paper takes theta up to between 0.25 and 0.5.
    """
    change = F.normalize(F.normalize(text, dim=-1) - F.normalize(base, dim=-1), dim=-1)
    return slerp(image, change * image.norm(dim=-1, keepdim=True), theta)


@dataclass(frozen=True)
class Space:
    """The space of a system that draws from image embeddings and has CLIP's towers beside it.

    Raises: ValueError if the system has no such stage.
    """

    system: System

    def __post_init__(self) -> None:
        if not any(_reads(stage.conditioner) for stage in self.system.stages):
            raise ValueError(
                f"{self.system.about.name} draws from no image embeddings: take an unCLIP system"
            )

    @property
    def decoder(self) -> Stage:
        """The stage that draws from embeddings."""
        return next(stage for stage in self.system.stages if _reads(stage.conditioner))

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Tensor:
        """Embeddings (n, D) of pictures (n, 3, H, W) in [-1, 1]."""
        tower = self.system.parts.nets.get("image_encoder")
        if not isinstance(tower, CLIPVision):
            raise ValueError(
                f"{self.system.about.name} has no image tower; give the embedding of the picture"
            )
        return self._scaled(tower(seen(images.to(self.decoder.device), tower.config.side)))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (n, D) of texts."""
        tower, tokenizer = self.system.parts.nets["text_encoder"], self.system.parts.tokenizers["tokenizer"]
        assert isinstance(tower, CLIPText)
        return self._scaled(tower(tokenizer(texts)[0].to(self.decoder.device)).embedding)

    def drawn_by_prior(self, texts: Sequence[str], seed: int = 0) -> Tensor:
        """Embeddings (n, D) that the prior draws. Raises: ValueError if the system has none."""
        priors = [stage.name for stage in self.system.stages if stage.emits == "image_embed"]
        if not priors:
            raise ValueError(f"{self.system.about.name} has no prior; join one with sfumato.cascade")
        done = self.system.run(Inputs(n=len(texts), text=texts), only=priors, seed=seed).image_embed
        assert done is not None
        return done

    def decode(
        self,
        embeddings: Tensor,
        *,
        texts: Sequence[str] | None = None,
        seed: int = 0,
        noise: Tensor | None = None,
        eta: float = 0.0,
        steps: int | None = None,
    ) -> Tensor:
        """Pictures (n, 3, H, W) in [-1, 1] of embeddings (n, D).

        Args:
            texts: what is in them; None = not said.
            noise: x_T (n, C, h, w) such as `inverted` gives, from which DDIM draws with this eta.
            steps: of the decoder.
        """
        names, own = [stage.name for stage in self.system.stages], self.decoder
        options = replace(own.defaults, steps=steps or own.defaults.steps)
        if noise is not None:
            options = replace(options, sampler="ddim", knobs={"eta": eta}, start=Continue())
        inputs = Inputs(n=len(embeddings), text=texts, image_embed=embeddings, latent=noise)
        only = names[names.index(own.name) :]
        done = self.system.run(inputs, {own.name: options}, only=only, seed=seed).low_res
        assert done is not None
        return done

    @torch.no_grad()
    def inverted(
        self,
        images: Tensor,
        embeddings: Tensor,
        *,
        texts: Sequence[str] | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """x_T (n, C, h, w) from which DDIM draws pictures again: what their embeddings do not tell of them.

        Guidance is off in the inversion; `decode` follows it best with guidance 1 and many steps.
        """
        stage, n = self.decoder, len(images)
        assert stage.pixels is not None
        x = stage.codec.encode(fitted(images.to(stage.device), stage.pixels))
        inputs = Inputs(n=n, text=texts, image_embed=embeddings)
        cond = stage.conditioner(inputs).to(stage.device)
        options = replace(stage.defaults, steps=steps or stage.defaults.steps)
        denoise = CFG().bind(stage.denoiser, cond, cond)
        return inverted(denoise, options.grid(stage.denoiser.schedule), x)

    def _scaled(self, embeddings: Tensor) -> Tensor:
        reader = _reads(self.decoder.conditioner)
        return unit(embeddings) if reader is not None and reader.unit else embeddings


def _reads(conditioner: Conditioner) -> ImageEmbed | None:
    parts = conditioner.parts if isinstance(conditioner, Merged) else (conditioner,)
    return next((part for part in parts if isinstance(part, ImageEmbed)), None)
