"""Where an evaluation's pictures come from: folders, .npz files, a system's samples or reconstructions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sfumato.core.config import to_json
from sfumato.core.image import from_pil, to_pil
from sfumato.data.datasets import ImageFolder
from sfumato.data.transforms import CenterCrop
from sfumato.evaluation.npz import read_pictures
from sfumato.systems.conditioning import LabelConfig
from sfumato.systems.guides import ByClassifier
from sfumato.systems.options import SampleOptions
from sfumato.systems.request import Request
from sfumato.systems.system import System

__all__ = [
    "Array",
    "Folder",
    "Generated",
    "Pictures",
    "Reconstructed",
    "open_pictures",
    "pixel_digest",
]


class Pictures(Protocol):
    """A set of pictures of one size, read in any order."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        ...

    @property
    def texts(self) -> Sequence[str] | None:
        """Captions, if there are any."""
        ...

    @property
    def protocol(self) -> Mapping[str, object]:
        """What a result says of it."""
        ...

    def __len__(self) -> int: ...

    def __call__(self, rows: range) -> Tensor:
        """(B, 3, H, W) uint8."""
        ...


class Folder:
    """Pictures of a folder or of shards.

    Args:
        size: cropped to (height, width) as ADM prepares data, if given; else all must be of one size.

    Raises: ValueError in one line if there are none, or they are smaller than `size`.
    """

    def __init__(self, path: Path, size: tuple[int, int] | None = None) -> None:
        self._folder = ImageFolder(path, transform=None if size is None else CenterCrop(size))
        self.texts: Sequence[str] | None = self._folder.texts if any(self._folder.texts) else None
        first = self._folder[0]
        if size is not None and (first.size[0] < size[0] or first.size[1] < size[1]):
            raise ValueError(
                f"{first.name} is {first.size[1]}x{first.size[0]}, smaller than the samples of "
                f"{size[1]}x{size[0]}; enlarging it would change what is measured"
            )
        self.size = first.image.shape[1], first.image.shape[2]
        preparation = "as they are" if size is None else f"center crop of {size[1]}x{size[0]}"
        self.protocol: Mapping[str, object] = {"kind": "folder", "preparation": preparation}

    @property
    def labels(self) -> list[int]:
        """Class of every picture. Raises: ValueError in one line if one has none."""
        return self._folder.labels

    def __len__(self) -> int:
        return len(self._folder)

    def __call__(self, rows: range) -> Tensor:
        return self._folder.images(rows)


class Array:
    """Pictures of an .npz file, (N, H, W, 3) uint8."""

    texts: Sequence[str] | None = None

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.size = array.shape[1], array.shape[2]
        self.protocol: Mapping[str, object] = {"kind": "npz", "preparation": "as they are"}

    def __len__(self) -> int:
        return len(self._array)

    def __call__(self, rows: range) -> Tensor:
        return (
            torch.from_numpy(np.array(self._array[rows.start : rows.stop])).permute(0, 3, 1, 2).contiguous()
        )


@dataclass(frozen=True)
class Generated:
    """Samples of a system; picture i has seed + i, and caption or class i, from the beginning where they end.

    Attributes:
        texts: captions, for systems that are told texts.
        request: options of `System.generate`, such as steps.
        batch: of the sampler; does not change the pictures.
    """

    system: System
    n: int
    seed: int
    texts: Sequence[str] | None
    request: Request
    batch: int = 16

    @property
    def size(self) -> tuple[int, int]:
        """Of its pictures. Raises: ValueError if the system makes none."""
        if self.system.size is None:
            raise ValueError(
                f"system {self.system.about.name!r} makes no pictures, so it cannot be evaluated"
            )
        return self.system.size

    @property
    def protocol(self) -> Mapping[str, object]:
        """Of system and sampling."""
        options = self.system.resolve(**self.request)
        return {
            "kind": "samples",
            "system": self.system.about.name,
            "fingerprint": self.system.fingerprint,
            "n": self.n,
            "seed": self.seed,
            "told": "captions of the reference"
            if self.texts
            else "classes by turns"
            if self.classes
            else "nothing",
            "options": {name: to_json(value, SampleOptions) for name, value in options.items()},
        }

    @property
    def classes(self) -> int:
        """How many the system knows, or what guides it; 0 = it is told none."""
        kinds = (c for stage in self.system.config.stages for c in stage.conditioners)
        known = [c.num_classes for c in kinds if isinstance(c, LabelConfig)]
        guides = (stage.guide for stage in self.system.stages)
        known += [g.net.config.num_classes for g in guides if isinstance(g, ByClassifier)]
        return known[0] if known else 0

    def __len__(self) -> int:
        return self.n

    def __call__(self, rows: range) -> Tensor:
        request: Request = {**self.request}
        texts = None if not self.texts else [self.texts[i % len(self.texts)] for i in rows]
        if self.classes:
            request["label"] = [i % self.classes for i in rows]
        elif texts is None:
            request["n"] = len(rows)
        images = self.system.generate(texts, seed=self.seed + rows.start, batch=self.batch, **request)
        return torch.stack([from_pil(image) for image in images])


@dataclass(frozen=True)
class Reconstructed:
    """What the codec of a system makes of pictures."""

    system: System
    originals: Pictures

    @property
    def size(self) -> tuple[int, int]:
        """Of the originals."""
        return self.originals.size

    @property
    def texts(self) -> Sequence[str] | None:
        """Of the originals."""
        return self.originals.texts

    @property
    def protocol(self) -> Mapping[str, object]:
        """Of the system."""
        name, fingerprint = self.system.about.name, self.system.fingerprint
        return {"kind": "reconstructions", "system": name, "fingerprint": fingerprint}

    def __len__(self) -> int:
        return len(self.originals)

    def __call__(self, rows: range) -> Tensor:
        return torch.stack(
            [from_pil(self.system.reconstruct(to_pil(picture))) for picture in self.originals(rows)]
        )


def open_pictures(path: Path, size: tuple[int, int] | None = None) -> Pictures | None:
    """The pictures at a path; None if it is an .npz of statistics alone.

    Raises: ValueError in one line if there are none, or they are not of `size` and cannot be cropped to it.
    """
    if path.suffix != ".npz":
        return Folder(path, size)
    array = read_pictures(path)
    if array is None:
        return None
    found = Array(array)
    if size is not None and found.size != size:
        raise ValueError(
            f"{path} has pictures of {found.size[1]}x{found.size[0]}, the samples are {size[1]}x{size[0]}; "
            "compare pictures of one size"
        )
    return found


def pixel_digest(pixels: Tensor) -> Tensor:
    """(B, 32) uint8: the SHA-256 of each picture's pixels; their sum tells sets apart, whatever the order."""
    rows = [hashlib.sha256(picture.numpy().tobytes()).digest() for picture in pixels.contiguous()]
    return torch.tensor([list(row) for row in rows], dtype=torch.uint8)
