"""What a denoiser learns from: pictures, latents or embeddings, with captions and classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sfumato.core.image import to_float
from sfumato.data.datasets import ImageFolder, stack
from sfumato.data.order import Draw, Order
from sfumato.nets.autoencoder import Autoencoder
from sfumato.nets.perceptual import PerceptualNet
from sfumato.systems.config import CodecConfig, EmbeddingsConfig, LatentsConfig, PixelsConfig
from sfumato.training.batches import Batch, captions, check_damage, open_folder, order_of, rows
from sfumato.training.jobs.base import Base
from sfumato.training.jobs.job import Place, picture_batches, spread, trained
from sfumato.training.latents import LatentBatches, Moments, encode_folder, statistics
from sfumato.training.recipe import Recipe
from sfumato.training.tasks.denoising import DenoisingConfig

__all__ = ["Source", "Vectors", "embed_folder", "labelled", "source_of"]

SURVEYED = 4096  # pictures from which the scale of latents is measured if they are not all encoded anyway
CHUNK = 64  # pictures embedded at a time
Batches = Callable[[int], Batch]


@dataclass(frozen=True)
class Source:
    """What a denoiser learns from.

    Attributes:
        shape: of one sample, (C, h, w) or (D,).
        frozen: nets that the codec uses.
        vectors: the table behind the batches, for denoisers of embeddings.
    """

    codec: CodecConfig
    shape: tuple[int, ...]
    batches: Batches
    frozen: Mapping[str, nn.Module]
    vectors: Vectors | None = None


@dataclass(frozen=True)
class Vectors:
    """Embedding of every picture of a folder.

    Attributes:
        table: (N, D) float32 on the CPU.
        text: N captions.
        index: (N,) row that was read; another than its own where that file is damaged.
    """

    table: Tensor
    text: tuple[str, ...]
    index: Tensor

    def batches(self, order: Order, size: int, device: torch.device) -> Batches:
        """Batches by position, in an order over the same rows."""

        def batch(images: int) -> Batch:
            drawn = [draw.index for draw in order.take(images, size)]
            text = tuple(self.text[i] for i in drawn)
            return Batch(text=text, index=self.index[drawn], vectors=self.table[drawn].to(device))

        return batch

    def nearest(self, vector: Tensor) -> Tensor:
        """Rows (n,) whose embeddings are nearest to vectors (n, D), each dimension in units of its spread."""
        scale = self.table.std(0, correction=0).clamp_min(1e-6)
        return torch.cdist(vector.float().cpu() / scale, self.table / scale).argmin(1)


def source_of(recipe: Recipe, config: DenoisingConfig, place: Place, base: Base | None) -> Source:
    """Pictures, cached latents, pictures that become latents as they are drawn, or embeddings.

    Raises: ValueError in one line if the nets that they need are missing or do not fit the data.
    """
    if config.embedder is not None:
        return _embeddings(recipe, config, place, base)
    if base is not None and isinstance(base.codec, EmbeddingsConfig):
        raise ValueError(f"{base.path} denoises embeddings; set task.embedder to the net that makes them")
    if config.autoencoder is not None:
        net = trained(config.autoencoder, Autoencoder, "openmoji-autoencoder", place.device)
        return _latents(recipe, config, place, net, None)
    if base is not None and base.autoencoder is not None:
        assert isinstance(base.codec, LatentsConfig)
        return _latents(recipe, config, place, base.autoencoder.requires_grad_(False), base.codec)
    size, pictures = recipe.data.size, picture_batches(recipe, place)
    return Source(PixelsConfig(), (3, size, size), pictures, {})


def labelled(source: Source, folder: ImageFolder, num_classes: int, device: torch.device) -> Source:
    """The same with the class of every sample.

    Raises: ValueError in one line if a picture has none, or one that the net has no row for.
    """
    table = torch.tensor(folder.labels)
    if int(table.max()) >= num_classes:
        raise ValueError(
            f"the data have a class {int(table.max())}, and the net has num_classes {num_classes}; set "
            f"task.net.num_classes {int(table.max()) + 1}"
        )

    def batches(images: int) -> Batch:
        batch = source.batches(images)
        return replace(batch, label=table[batch.index].to(device))

    return replace(source, batches=batches)


def embed_folder(net: PerceptualNet, folder: ImageFolder) -> Vectors:
    """Spatial means of all taps of a perceptual net, side by side, for every picture of a folder."""
    device = next(net.parameters()).device
    samples = folder.draw([Draw(i, i, 0) for i in range(len(folder))])
    check_damage(folder)
    parts = []
    for chunk in stack(samples).split(CHUNK):
        with torch.no_grad():
            taps = net.trunk(to_float(chunk).to(device))
        parts.append(torch.cat([tap.mean((2, 3)) for tap in taps], dim=1).float().cpu())
    return Vectors(torch.cat(parts), captions(samples), rows(samples))


def _latents(
    recipe: Recipe, config: DenoisingConfig, place: Place, net: Autoencoder, codec: LatentsConfig | None
) -> Source:
    """Latents in the scale of `codec`; None = measured on the data."""
    size, factor = recipe.data.size, net.config.factor
    if size % factor:
        raise ValueError(f"data.size {size} is not a multiple of {factor}, the factor of the autoencoder")
    shape = net.config.embed_dim, size // factor, size // factor
    cached = config.cache and not recipe.data.augments
    moments, sampled = None, config.posterior == "sample"
    if cached:
        moments = encode_folder(net, place.pictures, place.out / "latents.safetensors")
    if codec is None:
        mean, std = statistics(moments or _survey(recipe, net), sampled=sampled)
        codec = LatentsConfig(mean=mean, std=std)
    frozen = {"autoencoder": net}
    if moments is None:
        return Source(codec, shape, picture_batches(recipe, place), frozen)
    order = order_of(place.pictures, recipe.data, recipe.trainer.seed)
    scale = codec.mean, codec.std
    return Source(
        codec, shape, LatentBatches(moments, scale, order, recipe.trainer.batch, place.device), frozen
    )


def _survey(recipe: Recipe, net: Autoencoder) -> Moments:
    """Latents of some of the pictures, as they are without augmentation."""
    folder = open_folder(replace(recipe.data, flip=False, shift=0))
    folder.entries = spread(folder.entries, SURVEYED)
    return encode_folder(net, folder)


def _embeddings(recipe: Recipe, config: DenoisingConfig, place: Place, base: Base | None) -> Source:
    """Features of a perceptual net, in the scale of the base if there is one."""
    assert config.embedder is not None
    if recipe.data.augments:
        raise ValueError("embeddings are computed once for each picture; set data.flip and data.shift to off")
    net = trained(config.embedder, PerceptualNet, "openmoji-perceptual", place.device)
    vectors = embed_folder(net, place.pictures)
    std, mean = torch.std_mean(vectors.table.double(), dim=0, correction=0)
    std = torch.where(std > 1e-6, std, torch.ones_like(std))  # a feature that is always off stays at zero
    codec: CodecConfig = EmbeddingsConfig(mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    if base is not None and not isinstance(base.codec, EmbeddingsConfig):
        raise ValueError(f"{base.path} denoises {base.codec.kind}, not embeddings; leave out task.embedder")
    order = order_of(place.pictures, recipe.data, recipe.trainer.seed)
    batches = vectors.batches(order, recipe.trainer.batch, place.device)
    shape = (vectors.table.shape[1],)
    return Source(base.codec if base is not None else codec, shape, batches, {}, vectors)
