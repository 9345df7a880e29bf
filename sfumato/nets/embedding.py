"""What a U-Net is told besides the picture: one embedding vector for all blocks, and a sequence of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.types import Conditioning
from sfumato.nets.attention import AttentionPool
from sfumato.nets.blocks import ACTIVATIONS, EmbeddingMLP, LayerNorm, dtype_of, sinusoid

__all__ = ["EmbedderConfig", "Embedding", "EmbeddingConfig", "Feature", "Tokens", "TokensConfig"]

Field = Literal["label", "aug", "pooled", "image_embed", "micro", "tokens", "guidance"]


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One field of a Conditioning and the width it has there.

    Args:
        field: its name; `aug` (B,) counts as width 1.
        dim: width of the field, or number of rows where it indexes a table (null class included).
        sinusoid: every number of the field becomes this many sines and cosines; 0 = it is used as it is.
    """

    field: Field
    dim: int
    sinusoid: int = 0

    @property
    def width(self) -> int:
        """Width after the sinusoids."""
        return self.dim * (self.sinusoid or 1)


@dataclass(frozen=True, kw_only=True)
class EmbedderConfig:
    """One term that is added to the time embedding.

    Args:
        kind: "table" = a learned row per integer (class label of ADM, noise level of the x4 upscaler);
            "linear" = a projection (pooled text of GLIDE, image embedding of unCLIP); "mlp" = two layers
            (text, size and crop of SDXL, side by side; augmentation level of IF); "pool" = attention pooling
            of the tokens (IF).
        features: what it reads; exactly one for "table" and "pool".
        heads: of "pool".
    """

    kind: Literal["table", "linear", "mlp", "pool"]
    features: tuple[Feature, ...]
    heads: int = 0

    def __post_init__(self) -> None:
        if not self.features or (self.kind in ("table", "pool") and len(self.features) > 1):
            wanted = "one" if self.kind in ("table", "pool") else "at least one"
            raise ValueError(
                f"embedder of kind {self.kind!r} has {len(self.features)} features: give {wanted}"
            )
        if (self.kind == "pool") != (self.heads > 0):
            raise ValueError(f"embedder of kind {self.kind!r} has heads={self.heads}: 'pool' alone has heads")


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig:
    """The embedding vector of a U-Net: time, and what is added to it.

    Args:
        time_dim: number of sines and cosines of t.
        dim: width of the vector; 4 * time_dim in most published nets.
        cos_first: order of the sinusoids, see `blocks.sinusoid`.
        shift: shift of their frequencies, see `blocks.sinusoid`.
        guidance_dim: number of sines and cosines of cond.guidance, which are projected and added to those of
            t; 0 = the net was not distilled from a guided one (Luo et al. 2023, arXiv:2310.04378, section
            4.1).
        extras: the further terms.
    """

    time_dim: int
    dim: int
    cos_first: bool = True
    shift: float = 0.0
    guidance_dim: int = 0
    extras: tuple[EmbedderConfig, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """The sequence that a U-Net's attention reads.

    Args:
        dim: width of cond.tokens.
        width: width after a learned projection; 0 = no projection.
        norm: LayerNorm after the projection (unCLIP).
        image_tokens: number of tokens projected from cond.image_embed that stand before the others (unCLIP).
        image_dim: width of cond.image_embed.
        masked: positions whose cond.mask is False cannot be attended to. GLIDE, latent diffusion, Stable
            Diffusion and IF attend to padding.
    """

    dim: int
    width: int = 0
    norm: bool = False
    image_tokens: int = 0
    image_dim: int = 0
    masked: bool = False

    def __post_init__(self) -> None:
        if (self.image_tokens > 0) != (self.image_dim > 0):
            raise ValueError(
                f"image_tokens={self.image_tokens}, image_dim={self.image_dim}: give both or none"
            )

    @property
    def out_dim(self) -> int:
        """Width of the tokens as the attention sees them."""
        return self.width or self.dim


class Embedding(nn.Module):
    """activation(mlp(sinusoid(t)) + extras); every block applies only a linear layer to it."""

    def __init__(self, config: EmbeddingConfig, activation: str) -> None:
        super().__init__()
        self.config, self.activation = config, ACTIVATIONS[activation]
        self.time = EmbeddingMLP(config.time_dim, config.dim, activation)
        width = config.guidance_dim
        self.guidance = nn.Linear(width, config.time_dim, bias=False) if width else None
        self.extras = nn.ModuleList(EMBEDDERS[e.kind](e, config.dim, activation) for e in config.extras)

    def forward(self, t: Tensor, cond: Conditioning) -> Tensor:
        """t (B,) -> (B, dim)."""
        c = self.config
        features = sinusoid(t, c.time_dim, cos_first=c.cos_first, shift=c.shift).to(dtype_of(self.time))
        if self.guidance is not None:
            w = sinusoid(1000 * needed(cond, "guidance"), c.guidance_dim, cos_first=False, shift=1.0)
            features = features + self.guidance(w.to(features.dtype))
        embedding = self.time(features)
        for extra in self.extras:
            embedding = embedding + extra(cond)
        return self.activation(embedding)


class TableEmbedder(nn.Module):
    """A learned row per integer."""

    def __init__(self, config: EmbedderConfig, out: int, activation: str) -> None:
        super().__init__()
        self.field = config.features[0].field
        self.table = nn.Embedding(config.features[0].dim, out)

    def forward(self, cond: Conditioning) -> Tensor:
        """-> (B, out)."""
        return self.table(needed(cond, self.field).long())


class VectorEmbedder(nn.Module):
    """One or two linear layers of all features side by side."""

    def __init__(self, config: EmbedderConfig, out: int, activation: str) -> None:
        super().__init__()
        self.features = config.features
        width = sum(f.width for f in config.features)
        mlp = config.kind == "mlp"
        self.proj: nn.Module = EmbeddingMLP(width, out, activation) if mlp else nn.Linear(width, out)

    def forward(self, cond: Conditioning) -> Tensor:
        """-> (B, out)."""
        parts = [_vector(needed(cond, f.field), f) for f in self.features]
        return self.proj(torch.cat([part.to(dtype_of(self)) for part in parts], dim=1))


class PoolEmbedder(nn.Module):
    """Attention pooling of the tokens as they came, before any projection."""

    def __init__(self, config: EmbedderConfig, out: int, activation: str) -> None:
        super().__init__()
        self.pool = AttentionPool(config.features[0].dim, out, config.heads)

    def forward(self, cond: Conditioning) -> Tensor:
        """-> (B, out)."""
        return self.pool(needed(cond, "tokens").to(dtype_of(self)))


EMBEDDERS = {"table": TableEmbedder, "linear": VectorEmbedder, "mlp": VectorEmbedder, "pool": PoolEmbedder}


class Tokens(nn.Module):
    """The token sequence that the attention reads, and its mask."""

    def __init__(self, config: TokensConfig) -> None:
        super().__init__()
        self.config, width = config, config.out_dim
        self.proj = nn.Linear(config.dim, width) if config.width else None
        self.norm = LayerNorm(width) if config.norm else None
        self.image = nn.Linear(config.image_dim, width * config.image_tokens) if config.image_tokens else None

    def forward(self, cond: Conditioning, dtype: torch.dtype) -> Tensor:
        """-> (B, image_tokens + L, out_dim); `dtype` is that of the net's weights."""
        tokens = needed(cond, "tokens").to(dtype)
        if tokens.ndim != 3 or tokens.shape[2] != self.config.dim:
            shape, dim = tuple(tokens.shape), self.config.dim
            raise ValueError(f"cond.tokens has shape {shape}; this network needs (batch, length, {dim})")
        if self.proj is not None:
            tokens = self.proj(tokens)
        if self.norm is not None:
            tokens = self.norm(tokens)
        if self.image is not None:
            # Channel-major, as in the published unCLIP weights: token j, channel c is entry n c + j.
            image = self.image(needed(cond, "image_embed").to(dtype))
            image = image.unflatten(1, (self.config.out_dim, self.config.image_tokens)).transpose(1, 2)
            tokens = torch.cat([image.to(tokens.dtype), tokens], dim=1)
        return tokens

    def mask(self, cond: Conditioning) -> Tensor | None:
        """What may be attended to, (B, 1, 1, image_tokens + L) bool; None = everything."""
        if not self.config.masked or cond.mask is None:
            return None
        return F.pad(cond.mask, (self.config.image_tokens, 0), value=True)[:, None, None, :]


def needed(cond: Conditioning, field: Field) -> Tensor:
    """A field of the conditioning.

    Raises: ValueError if it is not set.
    """
    value: Tensor | None = getattr(cond, field)
    if value is None:
        raise ValueError(f"this network needs cond.{field}; it is None")
    return value


def _vector(value: Tensor, feature: Feature) -> Tensor:
    """A field (B,) or (B, K) as (B, width). Numbers that are NaN say nothing: zeros in place of their waves.

    Raises: ValueError if its width is not the configured one.
    """
    value = value if value.ndim > 1 else value[:, None]
    if value.shape[1:] != (feature.dim,):
        shape = tuple(value.shape)
        raise ValueError(f"cond.{feature.field} has shape {shape}; this network needs (batch, {feature.dim})")
    return sinusoid(value, feature.sinusoid).flatten(1).nan_to_num() if feature.sinusoid else value
