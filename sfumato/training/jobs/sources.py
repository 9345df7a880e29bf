"""What a denoiser learns from: pictures, latents or embeddings, with captions and classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.checkpoints.native import MANIFEST, read_folder
from sfumato.conditioners.image import unit
from sfumato.core.image import to_float
from sfumato.data.datasets import ImageFolder, stack
from sfumato.data.order import Draw
from sfumato.nets.autoencoder import Autoencoder
from sfumato.nets.clip import CLIP
from sfumato.nets.perceptual import PerceptualNet
from sfumato.nets.prior import PriorConfig
from sfumato.systems.config import CodecConfig, EmbeddingsConfig, LatentsConfig, PixelsConfig
from sfumato.text.tokenizers import Tokenizer
from sfumato.training.batches import Batch, Draws, check_damage, on_device, open_folder
from sfumato.training.jobs.base import Base
from sfumato.training.jobs.job import Place, part, picture_batches, spread, trained
from sfumato.training.latents import LatentBatches, Moments, encode_folder, statistics
from sfumato.training.recipe import Recipe
from sfumato.training.tasks.denoising import DenoisingConfig

__all__ = ["Source", "Vectors", "embed_folder", "of_clip", "pooled", "source_of"]

SURVEYED = 4096  # pictures from which the scale of latents is measured if they are not all encoded anyway
CHUNK = 64  # pictures embedded at a time
Batches = Callable[[int], Batch]
Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Source:
    """What a denoiser learns from.

    Attributes:
        shape: of one sample, (C, h, w) or (D,).
        frozen: nets that the codec uses.
        vectors: the table behind the batches, for denoisers of embeddings.
        clip: that reads the captions, and its tokenizer.
    """

    codec: CodecConfig
    shape: tuple[int, ...]
    batches: Batches
    frozen: Mapping[str, nn.Module]
    vectors: Vectors | None = None
    clip: tuple[CLIP, Tokenizer] | None = None


@dataclass(frozen=True)
class Vectors:
    """Embedding of every picture of a folder.

    Attributes:
        table: (N, D) float32 on the CPU.
        text: N captions.
        index: (N,) row that was read; another than its own where that file is damaged.
        embed: pictures (B, 3, H, W) in [-1, 1] -> (B, D), float32 on the CPU.
        labels: (N,) int64 classes; None if a picture has none.
    """

    table: Tensor
    text: tuple[str, ...]
    index: Tensor
    embed: Embed
    labels: Tensor | None = None

    def batches(self, order: Draws, size: int, device: torch.device) -> Batches:
        """Batches by position, in an order over the same rows."""

        def batch(images: int) -> Batch:
            drawn = [draw.index for draw in order.take(images, size)]
            text = tuple(self.text[i] for i in drawn)
            return Batch(
                text=text,
                index=self.index[drawn],
                vectors=on_device(self.table[drawn], device),
                labels=None if self.labels is None else self.labels[drawn],
            )

        return batch

    def nearest(self, vector: Tensor) -> Tensor:
        """Rows (n,) whose embeddings are nearest to vectors (n, D), each dimension in units of its spread."""
        scale = self.table.std(0, correction=0).clamp_min(1e-6)
        return torch.cdist(vector.float().cpu() / scale, self.table / scale).argmin(1)


def source_of(recipe: Recipe, config: DenoisingConfig, place: Place, base: Base | None) -> Source:
    """Pictures, cached latents, pictures that become latents as they are drawn, or embeddings.

    Raises: ValueError in one line if the nets that they need are missing or do not fit the data.
    """
    if config.clip is not None:
        if config.init is not None or config.autoencoder is not None:
            raise ValueError("task.clip goes with neither init nor autoencoder: its decoder works on pixels")
        return of_clip(recipe, config.clip, place, embedded=isinstance(config.net, PriorConfig))
    if config.embedder is not None:
        taps = trained(config.embedder, PerceptualNet, "openmoji-perceptual", place.device)
        return _embeddings(recipe, place, partial(pooled, taps), base)
    if base is not None and isinstance(base.codec, EmbeddingsConfig):
        raise ValueError(f"{base.path} denoises embeddings; set task.embedder to the net that makes them")
    if config.autoencoder is not None:
        net = trained(config.autoencoder, Autoencoder, "openmoji-autoencoder", place.device)
        return _latents(recipe, config, place, net, None)
    if base is not None and base.autoencoder is not None:
        assert isinstance(base.codec, LatentsConfig)
        return _latents(recipe, config, place, base.autoencoder.requires_grad_(False), base.codec)
    return _pixels(recipe, place)


def _pixels(recipe: Recipe, place: Place) -> Source:
    size = recipe.data.size
    return Source(PixelsConfig(), (3, size, size), picture_batches(recipe, place), {})


def of_clip(recipe: Recipe, path: Path, place: Place, *, embedded: bool) -> Source:
    """Embeddings by a trained CLIP, for a prior, else pictures; in both cases with the towers.

    Raises: ValueError in one line if there is none at `path`.
    """
    clip = trained(path, CLIP, "openmoji-clip", place.device)
    folder = path if (path / MANIFEST).is_file() else path / "system"
    tokenizer = read_folder(folder, device=place.device).parts.tokenizers["tokenizer"]
    source = _pixels(recipe, place)
    if embedded:
        source = _embeddings(recipe, place, partial(embedding_of, clip), None)
    frozen = {"text_encoder": clip.text, "image_encoder": clip.vision}
    return replace(source, frozen=frozen, clip=(clip, tokenizer))


@torch.no_grad()
def embedding_of(clip: CLIP, pictures: Tensor) -> Tensor:
    """Embeddings (B, D) of pictures in [-1, 1], of mean square 1; on the CPU."""
    return unit(clip.see(pictures.to(clip.logit_scale.device)).float()).cpu()


def embed_folder(embed: Embed, folder: ImageFolder) -> Vectors:
    """The embedding of every picture of a folder."""
    samples = folder.draw([Draw(i, i, 0) for i in range(len(folder))])
    check_damage(folder)
    labels = [sample.label for sample in samples if sample.label is not None]
    return Vectors(
        torch.cat([embed(to_float(chunk)) for chunk in stack(samples).split(CHUNK)]),
        tuple(sample.text or "" for sample in samples),
        torch.tensor([sample.index for sample in samples]),
        embed,
        torch.tensor(labels) if len(labels) == len(samples) else None,
    )


@torch.no_grad()
def pooled(net: PerceptualNet, images: Tensor) -> Tensor:
    """Spatial means of all taps of a perceptual net, side by side."""
    taps = net.trunk(images.to(next(net.parameters()).device))
    return torch.cat([tap.mean((2, 3)) for tap in taps], dim=1).float().cpu()


def _latents(
    recipe: Recipe, config: DenoisingConfig, place: Place, net: Autoencoder, codec: LatentsConfig | None
) -> Source:
    """Latents in the scale of `codec`; None = measured on the data."""
    _check_sizes(recipe, net.config.factor)
    side = recipe.data.size // net.config.factor
    shape = net.config.embed_dim, side, side
    pictures = picture_batches(recipe, place)
    cached = config.cache and not recipe.data.augments
    moments, sampled = None, config.posterior == "sample"
    if cached:
        moments = encode_folder(
            net,
            place.pictures,
            config.latents or place.out / "latents",
            sizes=pictures.order.sizes,
            world=place.world,
        )
    if codec is None:
        surveyed = moments or _survey(recipe, net, pictures.order.sizes)
        mean, std = statistics(surveyed, sampled=sampled)
        codec = LatentsConfig(mean=mean, std=std)
    frozen = {"autoencoder": net}
    if moments is None:
        return Source(codec, shape, pictures, frozen)
    scale = codec.mean, codec.std
    batches = LatentBatches(moments, scale, pictures.order, part(recipe, place), place.device)
    return Source(codec, shape, batches, frozen)


def _check_sizes(recipe: Recipe, factor: int) -> None:
    for name in ("size", "buckets"):
        value = getattr(recipe.data, name)
        if value is not None and value % factor:
            raise ValueError(
                f"data.{name} {value} is not a multiple of {factor}, the factor of the autoencoder"
            )


def _survey(recipe: Recipe, net: Autoencoder, sizes: Sequence[tuple[int, int]] | None) -> Moments:
    """Latents of some of the pictures, as they are without augmentation."""
    folder = open_folder(replace(recipe.data, flip=False, shift=0, crop=None))
    folder.entries = spread(folder.entries, SURVEYED)
    return encode_folder(net, folder, sizes=None if sizes is None else spread(sizes, SURVEYED))


def _embeddings(recipe: Recipe, place: Place, embed: Embed, base: Base | None) -> Source:
    """Embeddings in the scale of the base if there is one."""
    if recipe.data.augments:
        raise ValueError("embeddings are computed once for each picture; leave out data.flip, shift and crop")
    vectors = embed_folder(embed, place.pictures)
    std, mean = torch.std_mean(vectors.table.double(), dim=0, correction=0)
    std = torch.where(std > 1e-6, std, torch.ones_like(std))  # a feature that is always off stays at zero
    codec: CodecConfig = EmbeddingsConfig(mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    if base is not None and not isinstance(base.codec, EmbeddingsConfig):
        raise ValueError(f"{base.path} denoises {base.codec.kind}, not embeddings; leave out task.embedder")
    batches = vectors.batches(picture_batches(recipe, place).order, part(recipe, place), place.device)
    shape = (vectors.table.shape[1],)
    return Source(base.codec if base is not None else codec, shape, batches, {}, vectors)
