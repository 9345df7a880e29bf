"""Batches by position: which samples come next is a pure function of the seed and the images seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfumato.core.image import to_float
from sfumato.data.datasets import ImageFolder, Sample, stack
from sfumato.data.order import Order
from sfumato.data.transforms import CenterCrop, Chain, Flip, Shift, Transform

__all__ = ["Batch", "DataConfig", "PictureBatches", "open_folder", "order_of"]

MOST_DAMAGED = 0.01  # share of files that may be unreadable before a run stops


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples of one step, on the training device.

    Attributes:
        text: B captions, "" where there is none.
        index: (B,) int64 row of each sample in the data set.
        images: (B, 3, H, W) in [-1, 1]; None if the task works from cached moments.
        moments: (B, 2C, h, w) mean and log-variance of normalised latents.
        vectors: (B, D) embeddings, for denoisers of those.
        label: (B,) int64 class, for denoisers that are told one.
    """

    text: tuple[str, ...]
    index: Tensor
    images: Tensor | None = None
    moments: Tensor | None = None
    vectors: Tensor | None = None
    label: Tensor | None = None

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
        path: an image folder; see `sfumato data check`.
        size: side of the square to which pictures are scaled and cropped.
        split: keep pictures whose metadata field "split" has this value; None = all.
        even: metadata field whose values are drawn equally often, whatever number of pictures share one;
            None = every picture equally often.
        flip: exchange left and right in half of the draws; not for captions that tell them apart.
        shift: move pictures by up to this many pixels, against white.
    """

    path: Path = Path("data")
    size: int = 64
    split: str | None = None
    even: str | None = None
    flip: bool = False
    shift: int = 0

    @property
    def augments(self) -> bool:
        """Whether a picture looks different from draw to draw."""
        return self.flip or self.shift > 0

    def transform(self) -> Transform:
        """The preparation of one picture."""
        steps: list[Transform] = [CenterCrop(self.size)]
        if self.flip:
            steps.append(Flip())
        if self.shift:
            steps.append(Shift(self.shift))
        return Chain(tuple(steps))


def open_folder(config: DataConfig) -> ImageFolder:
    """The training pictures. Raises: ValueError in one line if there are none."""
    where = {"split": config.split} if config.split is not None else None
    return ImageFolder(config.path, transform=config.transform(), where=where)


def order_of(folder: ImageFolder, config: DataConfig, seed: int) -> Order:
    """In what order the pictures are drawn. Raises: ValueError if the metadata lack the field `even`."""
    groups = None if config.even is None else [str(value) for value in folder.column(config.even)]
    return Order(len(folder), seed=seed, groups=groups)


class PictureBatches:
    """Batches of pictures, read and prepared as they are needed.

    Args:
        folder: with its transform.
        order: of the draws.
        size: samples per batch.
        device: where the batch goes.
    """

    def __init__(self, folder: ImageFolder, order: Order, size: int, device: torch.device) -> None:
        self.folder = folder
        self.order = order
        self.size = size
        self.device = device

    @property
    def skipped(self) -> Mapping[Path, str]:
        """Damaged files met so far, and why each could not be read."""
        return self.folder.skipped

    def __call__(self, images: int) -> Batch:
        """The batch that begins with draw number `images`.

        Raises: ValueError if more than 1 % of the files turned out to be damaged.
        """
        samples = self.folder.draw(self.order.take(images, self.size))
        check_damage(self.folder)
        pictures = to_float(stack(samples)).to(self.device, memory_format=torch.channels_last)
        return Batch(text=captions(samples), index=rows(samples), images=pictures)


def captions(samples: list[Sample]) -> tuple[str, ...]:
    """The caption of every sample, "" where there is none."""
    return tuple(sample.text or "" for sample in samples)


def rows(samples: list[Sample]) -> Tensor:
    """The row of every sample in its folder, (B,) int64."""
    return torch.tensor([sample.index for sample in samples])


def check_damage(folder: ImageFolder) -> None:
    """Raise ValueError in one line if more than 1 % of a folder's files could not be read so far."""
    if len(folder.skipped) > MOST_DAMAGED * len(folder):
        reason = next(iter(folder.skipped.values()))
        raise ValueError(
            f"{len(folder.skipped)} of {len(folder)} pictures are damaged, more than 1 %: {reason}; "
            f"see `sfumato data check {folder.path}`"
        )
