"""Latents of a whole data set, computed once: moments of the posterior, normalised per channel."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from sfumato.core.image import contents, to_float
from sfumato.core.world import ALONE, World
from sfumato.data.datasets import ImageFolder, Sample, stack
from sfumato.data.order import Draw
from sfumato.data.store import ShardError
from sfumato.nets.autoencoder import Autoencoder
from sfumato.training.batches import Batch, Draws, check_damage, on_device
from sfumato.training.cache import Fields, TensorCache, fingerprint, key_of

__all__ = ["LatentBatches", "Moments", "encode_folder", "statistics"]

CHUNK = 64  # pictures encoded at a time
REVISION = 1  # of how pictures are read and prepared; another one, and all latents are computed again

Size = tuple[int, int]


@dataclass(frozen=True)
class Moments:
    """Posterior of every picture of a folder.

    Attributes:
        cache: holds them; on disk they are read as they are needed.
        keys: of the N rows in the cache.
        text: N captions.
        index: (N,) row that was read; another than its own where that file is damaged.
        labels: (N,) int64 classes; None if a picture has none.
    """

    cache: TensorCache
    keys: tuple[str, ...]
    text: tuple[str, ...]
    index: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, row: int) -> Tensor:
        """(2C, h, w) mean and log-variance of the autoencoder's latent, float32 on the CPU."""
        return self.cache[self.keys[row]]["moments"]

    def frame(self, row: int) -> Tensor:
        """(4,) int64: height and width of the file's picture, top and left of its crop."""
        return self.cache[self.keys[row]]["frame"]


def encode_folder(
    net: Autoencoder,
    folder: ImageFolder,
    cache: Path | None = None,
    *,
    sizes: Sequence[Size] | None = None,
    world: World = ALONE,
) -> Moments:
    """Moments of every picture of a folder, in its order.

    The key of a picture is the hash of its file, of the transform and of the net: what has changed is encoded
    again, and nothing else. A picture encoded again can differ in its last bits, because convolutions over
    batches of another size round differently.

    Args:
        net: on the device that is to do the work.
        folder: its transform must not depend on the draw.
        cache: folder of the cache, see TensorCache; files of it that serve no picture are removed.
        sizes: (height, width) that each picture is cropped to; None = what the transform says.
        world: processes that share the work, if there is a cache.

    Raises: ValueError if more than 1 % of the files are damaged, or the cache cannot be written.
    """
    count = len(folder)
    if cache is not None and world.size > 1:
        mine = _Encoding(net, folder, TensorCache(cache), sizes)
        world.agree(lambda: mine.run({row: row for row in world.share(count)}))
    encoding = _Encoding(net, folder, TensorCache(cache), sizes)
    encoding.run({row: row for row in range(count)})
    damaged = [row for row in range(count) if row not in encoding.keys]
    if len(damaged) == count:
        raise ValueError(
            f"none of the {count} pictures in {folder.path} can be read; see `sfumato data check`"
        )
    good = set(encoding.keys)
    instead = {
        row: next(other for step in range(1, count) if (other := (row + step) % count) in good)
        for row in damaged
    }
    encoding.run(instead)
    keys = tuple(encoding.keys[row] for row in range(count))
    world.lead(lambda: encoding.cache.prune(keys))
    index = [instead.get(row, row) for row in range(count)]
    read = [folder.entries[i] for i in index]
    labels = [entry.label for entry in read if entry.label is not None]
    return Moments(
        encoding.cache,
        keys,
        tuple(entry.text or "" for entry in read),
        torch.tensor(index),
        torch.tensor(labels) if len(labels) == count else None,
    )


class _Encoding:
    """The work of `encode_folder`: rows whose key is known, and encoding those that the cache lacks."""

    def __init__(
        self, net: Autoencoder, folder: ImageFolder, cache: TensorCache, sizes: Sequence[Size] | None
    ) -> None:
        self.net = net
        self.folder = folder
        self.cache = cache
        self.sizes = sizes
        self.keys: dict[int, str] = {}
        self._about = fingerprint(net, net.config), repr(folder.transform), REVISION

    def run(self, source: dict[int, int]) -> None:
        """Fill the cache for rows, each with its own picture or that of another; damaged ones get no key."""
        self.cache.add(self._fresh(source))

    def _fresh(self, source: dict[int, int]) -> Iterator[tuple[str, Fields]]:
        """What the cache lacks, encoded; pictures of one size side by side."""
        sizes = self.sizes
        rows = list(source) if sizes is None else sorted(source, key=lambda row: sizes[row])
        for _, alike in groupby(rows, self._size):
            waiting: dict[str, Sample] = {}
            for row in alike:
                self._look(row, source[row], waiting)
                if len(waiting) == CHUNK:
                    yield from self._encoded(waiting)
                    waiting = {}
            yield from self._encoded(waiting)

    def _look(self, row: int, source: int, waiting: dict[str, Sample]) -> None:
        """Note the key of a row, and its picture if that is to be encoded."""
        file = self.folder.entries[source].file
        try:
            digest = hashlib.sha256(contents(file)).hexdigest()
        except ShardError:
            raise
        except ValueError as error:
            self.folder.skipped[str(file)] = str(error)
            check_damage(self.folder)
            return
        key = key_of("latent", *self._about, self._size(row), digest)
        if key not in self.cache and key not in waiting:
            sample = self.folder.attempt(Draw(row, source, 0, self._size(row)))
            if sample is None:
                check_damage(self.folder)
                return
            waiting[key] = sample
        self.keys[row] = key

    def _size(self, row: int) -> Size | None:
        return None if self.sizes is None else self.sizes[row]

    def _encoded(self, waiting: dict[str, Sample]) -> Iterator[tuple[str, Fields]]:
        if not waiting:
            return
        device = next(self.net.parameters()).device
        with torch.no_grad():
            posterior = self.net.encode(to_float(stack(list(waiting.values()))).to(device))
        moments = torch.cat([posterior.mean, posterior.logvar], dim=1).float().cpu()
        for (key, sample), own in zip(waiting.items(), moments, strict=True):
            yield key, {"moments": own.clone(), "frame": torch.tensor([*sample.size, *sample.crop])}


def statistics(moments: Moments, *, sampled: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each latent channel over a data set.

    Args:
        sampled: of posterior samples, whose variance adds to that of the posterior means; else of the means.
    """
    cells, mean, square, spread = 0, *(torch.zeros((), dtype=torch.float64) for _ in range(3))
    for row in range(len(moments)):
        own, logvar = moments[row].double().chunk(2)
        cells += own[0].numel()
        mean = mean + own.sum((1, 2))
        square = square + own.square().sum((1, 2))
        spread = spread + logvar.exp().sum((1, 2))
    mean = mean / cells
    variance = (square / cells - mean.square()).clamp_min(0)
    if sampled:
        variance = variance + spread / cells
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
        order: Draws,
        size: int,
        device: torch.device,
    ) -> None:
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1) for values in scale)
        self._source = moments
        self.order = order
        self.size = size
        self.device = device

    def __call__(self, images: int) -> Batch:
        """The batch that begins with draw number `images`."""
        drawn = [draw.index for draw in self.order.take(images, self.size)]
        mean, logvar = torch.stack([self._source[row] for row in drawn]).chunk(2, dim=1)
        moments = torch.cat([(mean - self._mean) / self._std, logvar - 2 * self._std.log()], dim=1)
        frames = torch.stack([self._source.frame(row) for row in drawn])
        return Batch(
            text=tuple(self._source.text[row] for row in drawn),
            index=self._source.index[drawn],
            moments=on_device(moments, self.device),
            sizes=frames[:, :2],
            crops=frames[:, 2:],
            labels=None if self._source.labels is None else self._source.labels[drawn],
        )
