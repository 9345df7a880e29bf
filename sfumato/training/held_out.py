"""Pictures that a run does not train on: which they are, and how they are read."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sfumato.core.image import to_float
from sfumato.core.random import Noise
from sfumato.core.types import Inputs
from sfumato.core.world import ALONE, World
from sfumato.data.datasets import ImageFolder, stack
from sfumato.data.entries import Entry
from sfumato.data.order import Draw
from sfumato.training.batches import DataConfig, open_folder

__all__ = ["HeldOut", "ValidationConfig", "hold_out"]


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Which pictures are kept from training to measure it, `trainer.validate_every` images.

    Attributes:
        split: those whose metadata field "split" has this value, whatever data.split says.
        share: or this share of the pictures, chosen by their file names, so that it stays the same when
            others are added; None = no such share.
        pictures: most that are used, at equal distances; the others are not trained on either.
        draws: times and noises for each picture.
        velocity: log validation/velocity too, which compares denoisers of different objectives.
    """

    split: str | None = None
    share: float | None = None
    pictures: int = 256
    draws: int = 4
    velocity: bool = False

    def __post_init__(self) -> None:
        if self.split is not None and self.share is not None:
            raise ValueError(f"validation.split {self.split!r} and share {self.share}: choose one of them")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"validation.share is {self.share}; allowed: between 0 and 1, such as 0.05")
        if self.pictures < 1 or self.draws < 1:
            raise ValueError(
                f"validation.pictures {self.pictures} and draws {self.draws} must both be at least 1"
            )


def hold_out(
    pictures: ImageFolder, config: ValidationConfig, data: DataConfig
) -> tuple[ImageFolder, ImageFolder | None]:
    """The pictures to train on and, without augmentation, those to validate on, None if there shall be none.

    Raises: ValueError in one line if nothing is left on one side.
    """
    if config.split is None and config.share is None:
        return pictures, None
    held = open_folder(replace(data, split=config.split or data.split, flip=False, shift=0, crop=None))
    if config.share is not None:
        share = config.share
        held.entries = tuple(e for e in held.entries if _position(_name(e, held)) < share)
    apart = {_name(entry, held) for entry in held.entries}
    rest = copy.copy(pictures)
    rest.entries = tuple(entry for entry in pictures.entries if _name(entry, held) not in apart)
    if not rest.entries or not held.entries:
        asked = f"split {config.split!r}" if config.share is None else f"share {config.share}"
        raise ValueError(
            f"validation.{asked} leaves {len(rest)} pictures to train on and {len(held)} to validate on; "
            "both need at least one"
        )
    step = max(1, len(held) // config.pictures)
    held.entries = held.entries[::step][: config.pictures]
    return rest, held


class HeldOut:
    """The pictures to validate on, read once.

    Args:
        folder: of them alone.
        batch: pictures that go through a network at a time.
        draws: times and noises for each.
        world: processes that share the batches.
    """

    def __init__(self, folder: ImageFolder, batch: int, draws: int, world: World = ALONE) -> None:
        self.world = world
        samples = folder.draw([Draw(i, i, 0) for i in range(len(folder))])
        self.pictures = stack(samples)
        self.text = tuple(sample.text or "" for sample in samples)
        labels = [sample.label for sample in samples]
        self.label = None if None in labels else torch.tensor(labels)
        self.batch = batch
        self.draws = draws

    def rows(self) -> list[slice]:
        """The batches of this process, as rows."""
        n = len(self.text)
        rows = [slice(start, min(start + self.batch, n)) for start in range(0, n, self.batch)]
        return rows[self.world.rank :: self.world.size]

    def pooled(self, values: list[Tensor]) -> Tensor:
        """What all processes measured, in one tensor (n,) of float64 on the CPU."""
        own = torch.cat([torch.empty(0, dtype=torch.float64), *(v.double().cpu() for v in values)])
        return torch.cat(self.world.gather(own))

    def images(self, rows: slice, device: torch.device) -> Tensor:
        """(B, 3, H, W) in [-1, 1]."""
        return to_float(self.pictures[rows]).to(device, memory_format=torch.channels_last)

    def inputs(self, rows: slice) -> Inputs:
        """What is known of these pictures."""
        label = None if self.label is None else self.label[rows]
        image = to_float(self.pictures[rows])
        return Inputs(n=rows.stop - rows.start, text=self.text[rows], label=label, image=image)

    def noise(self, rows: slice, name: str) -> Noise:
        """The same streams for a picture at each validation."""
        return Noise(range(rows.start, rows.stop)).fork(f"validation/{name}")


def _name(entry: Entry, folder: ImageFolder) -> str:
    """What a picture is called within its folder, or within its shards."""
    file = entry.file
    return file.relative_to(folder.path).as_posix() if isinstance(file, Path) else str(file)


def _position(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
