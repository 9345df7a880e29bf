"""Codecs: between pictures (or embeddings) and what the denoiser works on."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sfumato.core.random import Noise
from sfumato.nets.autoencoder import Autoencoder

__all__ = ["Codec", "Embeddings", "Latents", "Pixels"]


class Codec(Protocol):
    """x <-> z; z is what diffuses."""

    @property
    def factor(self) -> int:
        """Pixels per cell of z along one side."""
        ...

    def encode(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """z of x; `noise` samples the posterior of a probabilistic codec, without it z is the mean."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """x of z."""
        ...


@dataclass(frozen=True)
class Pixels:
    """The denoiser works on pictures in [-1, 1] themselves."""

    factor: int = 1

    def encode(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """x itself."""
        return x

    def decode(self, z: Tensor) -> Tensor:
        """z itself."""
        return z


@dataclass(frozen=True)
class Latents:
    """Latents of an autoencoder, normalised: z = (latent - mean) / std.

    Attributes:
        mean, std: one number for all channels or one per channel. Stable Diffusion's scale 0.18215 is std 1
            / 0.18215.
        full: the autoencoder computes in float32 whatever the rest does: SDXL's overflows in float16.

    Raises: ValueError if their lengths do not fit the latents, or a std is not positive.
    """

    autoencoder: Autoencoder
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    full: bool = False

    def __post_init__(self) -> None:
        if self.full:
            self.autoencoder.float()
        channels = self.autoencoder.config.embed_dim
        _check_moments(self.mean, self.std, (1, channels), "latent channels")

    @property
    def factor(self) -> int:
        """The autoencoder's."""
        return self.autoencoder.config.factor

    def encode(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> (B, C, H / factor, W / factor)."""
        with self._precision(x):
            posterior = self.autoencoder.encode(x.float() if self.full else x)
        latent = posterior.mean if noise is None else posterior.sample(noise(posterior.mean))
        return (latent - _like(self.mean, latent)) / _like(self.std, latent)

    def decode(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> pictures (B, 3, h * factor, w * factor), which may leave [-1, 1] a little."""
        z = z.float() if self.full else z
        with self._precision(z):
            return self.autoencoder.decode(z * _like(self.std, z) + _like(self.mean, z))

    def _precision(self, x: Tensor) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(x.device.type, enabled=False) if self.full else contextlib.nullcontext()


@dataclass(frozen=True)
class Embeddings:
    """Vectors (B, D), such as CLIP image embeddings, normalised by one mean and std or one per dimension."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    factor: int = 1

    def __post_init__(self) -> None:
        _check_moments(self.mean, self.std, (1, max(len(self.mean), len(self.std))), "dimensions")

    def encode(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """(x - mean) / std."""
        return (x - _like(self.mean, x)) / _like(self.std, x)

    def decode(self, z: Tensor) -> Tensor:
        """z * std + mean."""
        return z * _like(self.std, z) + _like(self.mean, z)


def _like(values: Sequence[float], x: Tensor) -> Tensor:
    """(1, C or 1, 1, ...) on the device and in the dtype of x."""
    return torch.tensor(values, dtype=torch.float64).to(x).reshape(1, -1, *[1] * (x.ndim - 2))


def _check_moments(mean: Sequence[float], std: Sequence[float], allowed: tuple[int, int], what: str) -> None:
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in allowed:
            raise ValueError(
                f"{name} has {len(values)} values; expected 1, or one for each of {allowed[1]} {what}"
            )
    if not all(s > 0 for s in std):
        raise ValueError(f"std {tuple(std)} must be positive")
