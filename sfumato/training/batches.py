"""Batches by position: which samples come next is a pure function of the seed and the images seen."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from sfumato.core.image import to_float
from sfumato.data.buckets import BucketOrder, bucket_sizes
from sfumato.data.datasets import ImageFolder, Sample, stack
from sfumato.data.locations import address
from sfumato.data.order import Draw, Order
from sfumato.data.store import ShardStore
from sfumato.data.transforms import CenterCrop, Chain, Flip, RandomCrop, Shift, Transform

__all__ = [
    "Batch",
    "DataConfig",
    "Draws",
    "PictureBatches",
    "check_captions",
    "check_labels",
    "on_device",
    "open_folder",
    "order_of",
]

LOGGER = logging.getLogger(__name__)
MOST_DAMAGED = 0.01  # share of files that may be unreadable before a run stops
NAMED = 10  # damaged files that an error names


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one step, on the training device.

    Attributes:
        text: B captions, "" where there is none.
        index: (B,) int64 row of each sample in the data set.
        images: (B, 3, H, W) in [-1, 1]; None if the task works from cached moments.
        moments: (B, 2C, h, w) mean and log-variance of normalised latents.
        sizes: (B, 2) int64 height and width of the files' pictures, upright.
        crops: (B, 2) int64 top and left of the crops in the resized pictures; see `transforms.View`.
        labels: (B,) int64 classes; None if a sample has none.
        vectors: (B, D) embeddings, for denoisers of those.
    """

    text: tuple[str, ...]
    index: Tensor
    images: Tensor | None = None
    moments: Tensor | None = None
    sizes: Tensor | None = None
    crops: Tensor | None = None
    labels: Tensor | None = None
    vectors: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    @property
    def pictures(self) -> Tensor:
        """`images`, for tasks that cannot do without."""
        assert self.images is not None, "the batches of this run carry no pictures"
        return self.images


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pictures, and how they are prepared.

    Attributes:
        path: an image folder or tar shards ('shards/*.tar'); see `sfumato data check`.
        size: side of the square to which pictures are scaled and cropped.
        buckets: instead of squares, sizes of the same area that are multiples of this number, each picture
            cropped to that of the nearest proportions, and batches of one size; None = squares.
        split: keep pictures whose metadata field "split" has this value; None = all.
        label: metadata field whose values are the classes; None = the labels of the data.
        even: metadata field whose values are drawn equally often, whatever number of pictures share one;
            None = every picture equally often.
        flip: exchange left and right in half of the draws; not for captions that tell them apart.
        shift: move pictures by up to this many pixels, against white.
        crop: cut a random part, of at least this share of the shorter side, and not the middle of all.
        mix: shards whose pictures are shuffled among each other; None = all. For sets that are larger than
            the cache of their copies: it must hold a few more shards than these.
        cache: folder of indexes and copies of shards; None = one in the user's cache.
        cache_gb: gigabytes of copies to keep; None = all.
        ahead: batches that a thread reads while a step is computed; None = as the device makes it useful.
    """

    path: Path = Path("data")
    size: int = 64
    split: str | None = None
    label: str | None = None
    even: str | None = None
    flip: bool = False
    shift: int = 0
    buckets: int | None = None
    crop: float | None = None
    mix: int | None = None
    cache: Path | None = None
    cache_gb: float | None = None
    ahead: int | None = None

    def __post_init__(self) -> None:
        if self.ahead is not None and self.ahead < 0:
            raise ValueError(f"data.ahead is {self.ahead}; it must be 0 batches or more, or None")
        for name in ("even", "mix"):
            if self.buckets is not None and getattr(self, name) is not None:
                raise ValueError(f"data.buckets and data.{name} cannot be combined; set one of them to None")

    @property
    def augments(self) -> bool:
        """Whether a picture looks different from draw to draw."""
        return self.flip or self.shift > 0 or self.crop is not None

    def transform(self) -> Transform:
        """The preparation of one picture."""
        cut = CenterCrop(self.size) if self.crop is None else RandomCrop(self.size, self.crop)
        steps: list[Transform] = [cut]
        if self.flip:
            steps.append(Flip())
        if self.shift:
            steps.append(Shift(self.shift))
        return Chain(tuple(steps))


def open_folder(config: DataConfig) -> ImageFolder:
    """The training pictures. Raises: ValueError in one line if there are none."""
    where = {"split": config.split} if config.split is not None else None
    limit = None if config.cache_gb is None else round(config.cache_gb * 1e9)
    store = ShardStore(config.cache, limit=limit)
    return ImageFolder(
        config.path, transform=config.transform(), label=config.label, where=where, store=store
    )


class Draws(Protocol):
    """An order of samples, by position: `Order` or `BucketOrder`."""

    @property
    def sizes(self) -> Sequence[tuple[int, int]] | None:
        """(height, width) that each picture is cropped to; None = what the preparation says."""
        ...

    def take(self, position: int, count: int) -> list[Draw]: ...


def order_of(folder: ImageFolder, config: DataConfig, seed: int, batch: int = 1) -> Order | BucketOrder:
    """In what order the pictures are drawn.

    Args:
        batch: samples of a step over all processes; with buckets, they have one size.

    Raises: ValueError if the metadata lack the field `even`, or buckets do not fit the size.
    """
    if config.buckets is not None:
        order = BucketOrder(folder.sizes, bucket_sizes(config.size, config.buckets), batch, seed=seed)
        told = ", ".join(f"{width}x{height}: {n}" for (height, width), n in order.pictures.items())
        LOGGER.info("%d pictures in %d buckets (%s)", len(folder), len(order.pictures), told)
        return order
    groups = None if config.even is None else [str(value) for value in folder.column(config.even)]
    blocks = [entry.block for entry in folder.entries]
    return Order(len(folder), seed=seed, groups=groups, blocks=blocks, mix=config.mix)


def check_captions(folder: ImageFolder) -> None:
    """Raise ValueError in one line if no picture has a caption; say in the log how many have none."""
    bare = sum(not text for text in folder.texts)
    if bare == len(folder):
        raise ValueError(
            f"no picture of {address(folder.path)} has a caption, and the task learns from text; "
            "give a 'text' in metadata.jsonl, or a .txt file with the name of each picture"
        )
    if bare:
        LOGGER.warning("%d of %d pictures have no caption; see `sfumato data check`", bare, len(folder))


def check_labels(folder: ImageFolder, classes: int) -> None:
    """Raise ValueError in one line if a picture has no label, or one that is not in 0 .. classes - 1."""
    wrong = [row for row, label in enumerate(folder.labels) if label >= classes]
    if wrong:
        entry = folder.entries[wrong[0]]
        raise ValueError(
            f"{len(wrong)} of {len(folder)} labels are out of range, the first is {entry.label} of "
            f"{entry.file}; the net has {classes} classes, so labels go from 0 to {classes - 1}"
        )


class PictureBatches:
    """Batches of pictures, read and prepared as they are needed.

    Args:
        folder: with its transform.
        order: of the draws.
        size: samples per batch.
        device: where the batch goes.
    """

    def __init__(self, folder: ImageFolder, order: Draws, size: int, device: torch.device) -> None:
        self.folder = folder
        self.order = order
        self.size = size
        self.device = device

    @property
    def skipped(self) -> Mapping[str, str]:
        """Damaged files met so far, and why each could not be read."""
        return self.folder.skipped

    def __call__(self, images: int) -> Batch:
        """The batch that begins with draw number `images`.

        Raises: ValueError if more than 1 % of the files turned out to be damaged.
        """
        samples = self.folder.draw(self.order.take(images, self.size))
        check_damage(self.folder)
        pictures = to_float(stack(samples)).contiguous(memory_format=torch.channels_last)
        return Batch(
            text=tuple(sample.text or "" for sample in samples),
            index=torch.tensor([sample.index for sample in samples]),
            images=on_device(pictures, self.device),
            sizes=torch.tensor([sample.size for sample in samples]),
            crops=torch.tensor([sample.crop for sample in samples]),
            labels=_labels(samples),
        )


def on_device(rows: Tensor, device: torch.device) -> Tensor:
    """Rows that were made on the CPU on the training device; for CUDA without waiting for the copy."""
    if device.type == "cuda":
        rows = rows.pin_memory()  # only from such memory does a copy run beside the computation
    return rows.to(device, non_blocking=device.type == "cuda")


def _labels(samples: list[Sample]) -> Tensor | None:
    labels = [sample.label for sample in samples if sample.label is not None]
    return torch.tensor(labels) if len(labels) == len(samples) else None


def check_damage(folder: ImageFolder) -> None:
    """Raise ValueError in one line, with ten of their names, if over 1 % of the files could not be read."""
    if len(folder.skipped) > MOST_DAMAGED * len(folder):
        names = list(folder.skipped)
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise ValueError(
            f"{len(names)} of {len(folder)} pictures are damaged, more than 1 %: "
            f"{', '.join(names[:NAMED])}{more}; the first: {folder.skipped[names[0]]}; "
            f"see `sfumato data check {address(folder.path)}`"
        )
