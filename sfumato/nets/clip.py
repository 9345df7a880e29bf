"""CLIP: a vision and a text transformer with one space of embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.nets.encoder import EncoderBlock
from sfumato.nets.transformer import FeedForward

__all__ = [
    "CLIP",
    "PIXEL_MEAN",
    "PIXEL_STD",
    "CLIPConfig",
    "CLIPText",
    "CLIPTextConfig",
    "CLIPVision",
    "CLIPVisionConfig",
    "EmbeddingMoments",
    "EmbeddingMomentsConfig",
    "TextStates",
    "seen",
]

# Of red, green and blue in [0, 1], in the pictures that CLIP was trained on.
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Activation = Literal["quick", "none"]
"""GELU: "quick" in OpenAI's weights, "none" (exact) in OpenCLIP's."""


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """Shape of the text tower.

    Args:
        embed: width of the shared space, 0 = no projection into it.
        end: id of the end token; None = the highest of a text, which it is in the published vocabulary.
    """

    vocab: int = 49408
    context: int = 77
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    embed: int = 768
    activation: Activation = "quick"
    end: int | None = None


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """Shape of the vision tower; `side` is that of its pictures in pixels, `embed` as for text."""

    side: int = 224
    patch: int = 14
    width: int = 1024
    depth: int = 24
    heads: int = 16
    hidden: int = 4096
    embed: int = 768
    activation: Activation = "quick"


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Both towers; the defaults are OpenAI's ViT-L/14."""

    vision: CLIPVisionConfig = CLIPVisionConfig()
    text: CLIPTextConfig = CLIPTextConfig()


@dataclass(frozen=True)
class TextStates:
    """What text conditioning takes.

    Attributes:
        states: before the first block and after each, (B, L, width), without the final norm.
        last: the last one after it.
        pooled: of `last`, the end token (B, width).
        embedding: pooled, projected (B, embed); pooled itself without a projection.
    """

    states: tuple[Tensor, ...]
    last: Tensor
    pooled: Tensor
    embedding: Tensor


class CLIPText(nn.Module):
    """Token ids -> states and embedding (Radford et al. 2021, arXiv:2103.00020, section 2.4).

    Attention is causal, so that padding after the end token is of no effect.
    """

    projection: nn.Linear | None

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        c = self.config = config
        self.tokens = nn.Embedding(c.vocab, c.width)
        self.positions = nn.Parameter(0.01 * torch.randn(c.context, c.width))
        self.blocks = _blocks(c)
        self.norm = nn.LayerNorm(c.width)
        self.projection = nn.Linear(c.width, c.embed, bias=False) if c.embed else None

    def forward(self, ids: Tensor) -> TextStates:
        """Ids (B, L) int64. The first end token is the one that is pooled, as in the published code.

        Raises: ValueError if L exceeds the context.
        """
        if ids.shape[1] > self.config.context:
            raise ValueError(
                f"{ids.shape[1]} tokens for a text tower with a context of {self.config.context}"
            )
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1], causal=True))
        last = self.norm(states[-1])
        ends = (ids if self.config.end is None else (ids == self.config.end).int()).argmax(1)
        pooled = last[torch.arange(len(ids), device=ids.device), ends]
        embedding = pooled if self.projection is None else self.projection(pooled)
        return TextStates(tuple(states), last, pooled, embedding)


class CLIPVision(nn.Module):
    """Picture -> embedding (Radford et al. 2021, arXiv:2103.00020, section 2.4)."""

    projection: nn.Linear | None

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patches = nn.Conv2d(3, c.width, c.patch, c.patch, bias=False)
        self.cls = nn.Parameter(c.width**-0.5 * torch.randn(c.width))
        self.positions = nn.Parameter(c.width**-0.5 * torch.randn((c.side // c.patch) ** 2 + 1, c.width))
        self.norm_in = nn.LayerNorm(c.width)
        self.blocks = _blocks(c)
        self.norm = nn.LayerNorm(c.width)
        self.projection = nn.Linear(c.width, c.embed, bias=False) if c.embed else None

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, 3, side, side), normalized by CLIP's mean and deviation -> (B, embed)."""
        return self.embed(self.states(image)[-1])

    def states(self, image: Tensor) -> tuple[Tensor, ...]:
        """Before the first block and after each, (B, 1 + patches, width), class token first."""
        x = self.patches(image).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1) + self.positions
        states = [self.norm_in(x)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return tuple(states)

    def embed(self, state: Tensor) -> Tensor:
        """Embedding (B, embed) of the last state; the normalized class token without a projection."""
        pooled = self.norm(state[:, 0])
        return pooled if self.projection is None else self.projection(pooled)


@dataclass(frozen=True, kw_only=True)
class EmbeddingMomentsConfig:
    """Width of the embeddings."""

    dim: int = 768


class EmbeddingMoments(nn.Module):
    """Mean and deviation of embeddings, (1, dim) each, as Stable unCLIP keeps them beside its networks."""

    def __init__(self, config: EmbeddingMomentsConfig) -> None:
        super().__init__()
        self.config = config
        self.mean = nn.Parameter(torch.zeros(1, config.dim))
        self.std = nn.Parameter(torch.ones(1, config.dim))


class CLIP(nn.Module):
    """Both towers, and the learned scale of their likeness."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = CLIPVision(config.vision)
        self.text = CLIPText(config.text)
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))  # log(1 / 0.07)

    def see(self, pictures: Tensor) -> Tensor:
        """Embeddings (B, embed) of pictures (B, 3, H, W) in [-1, 1], see `seen`."""
        return self.vision(seen(pictures, self.vision.config.side))


def seen(pictures: Tensor, side: int) -> Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] as CLIP takes them: the middle square of this side, normalized."""
    short = min(pictures.shape[-2:])
    if short != side:
        size = [round(n * side / short) for n in pictures.shape[-2:]]
        pictures = F.interpolate(pictures, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = ((n - side) // 2 for n in pictures.shape[-2:])
    mean, std = (pictures.new_tensor(v).reshape(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    return (pictures[..., top : top + side, left : left + side] / 2 + 0.5 - mean) / std


def _blocks(c: CLIPTextConfig | CLIPVisionConfig) -> nn.ModuleList:
    return nn.ModuleList(
        EncoderBlock(c.width, c.heads, FeedForward(c.width, c.hidden, approximate=c.activation))
        for _ in range(c.depth)
    )
