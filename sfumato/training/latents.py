"""Latents of a whole data set, computed once: moments of the posterior, normalised per channel."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sfumato.core.image import to_float
from sfumato.core.png import write_whole
from sfumato.data.datasets import ImageFolder, stack
from sfumato.data.order import Draw, Order
from sfumato.nets.autoencoder import Autoencoder
from sfumato.training.batches import Batch, captions, check_damage, rows

__all__ = ["LatentBatches", "Moments", "encode_folder", "statistics"]

CHUNK = 64  # pictures encoded at a time


@dataclass(frozen=True)
class Moments:
    """Posterior of every picture of a folder.

    Attributes:
        mean, logvar: (N, C, h, w) float32 on the CPU, of the autoencoder's latents.
        text: N captions.
        index: (N,) row that was read; another than its own where that file is damaged.
    """

    mean: Tensor
    logvar: Tensor
    text: tuple[str, ...]
    index: Tensor


def encode_folder(net: Autoencoder, folder: ImageFolder, cache: Path | None = None) -> Moments:
    """Moments of every picture of a folder, in its order.

    Args:
        net: on the device that is to do the work.
        folder: its transform must not depend on the draw.
        cache: safetensors file to read them from if it fits the weights and the pictures, and to write to
            if it does not.

    Raises: ValueError if more than 1 % of the files are damaged, or the cache cannot be written.
    """
    device = next(net.parameters()).device
    samples = folder.draw([Draw(i, i, 0) for i in range(len(folder))])
    check_damage(folder)
    pictures = stack(samples)
    key = _key(net, pictures)
    moments = _read(cache, key) if cache is not None else None
    if moments is None:
        with torch.no_grad():
            parts = [net.encode(to_float(chunk).to(device)) for chunk in pictures.split(CHUNK)]
        moments = torch.cat([torch.cat([p.mean, p.logvar], dim=1).float().cpu() for p in parts])
        if cache is not None:
            write_whole(cache, save({"moments": moments.contiguous()}, {"key": key}))
    mean, logvar = moments.chunk(2, dim=1)
    return Moments(mean, logvar, captions(samples), rows(samples))


def statistics(moments: Moments, *, sampled: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each latent channel over a data set.

    Args:
        sampled: of posterior samples, whose variance adds to that of the posterior means; else of the means.
    """
    mean = moments.mean.double().mean((0, 2, 3))
    variance = moments.mean.double().var((0, 2, 3), correction=0)
    if sampled:
        variance = variance + moments.logvar.double().exp().mean((0, 2, 3))
    return tuple(mean.tolist()), tuple(variance.clamp_min(1e-12).sqrt().tolist())


class LatentBatches:
    """Batches of normalised moments: mean (m - mean) / std and log-variance v - 2 ln(std) per channel.

    Args:
        moments: of the data set.
        scale: mean and std of each channel.
        order: of the draws, over the same rows.
        size: samples per batch.
        device: where the batch goes.
    """

    def __init__(
        self,
        moments: Moments,
        scale: tuple[tuple[float, ...], tuple[float, ...]],
        order: Order,
        size: int,
        device: torch.device,
    ) -> None:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in scale)
        self._table = torch.cat([(moments.mean - mean) / std, moments.logvar - 2 * std.log()], dim=1)
        self._source = moments
        self.order = order
        self.size = size
        self.device = device

    def __call__(self, images: int) -> Batch:
        """The batch that begins with draw number `images`."""
        drawn = [draw.index for draw in self.order.take(images, self.size)]
        text = tuple(self._source.text[i] for i in drawn)
        return Batch(text=text, index=self._source.index[drawn], moments=self._table[drawn].to(self.device))


def _key(net: Autoencoder, pictures: Tensor) -> str:
    """Digest of the weights and of the prepared pictures: if either changes, so do the latents."""
    digest = hashlib.sha256(repr(net.config).encode())
    for part in _bytes(net, pictures):
        digest.update(part)
    return digest.hexdigest()


def _bytes(net: Autoencoder, pictures: Tensor) -> Iterator[memoryview]:
    for tensor in (*net.state_dict().values(), pictures):
        yield memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _read(cache: Path, key: str) -> Tensor | None:
    """The moments of a cache file; None if it is absent, damaged or of other weights or pictures."""
    try:
        with safe_open(cache, "pt") as file:
            return file.get_tensor("moments") if (file.metadata() or {}).get("key") == key else None
    except (OSError, SafetensorError):
        return None
