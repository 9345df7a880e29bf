"""What reports on trained systems share: the true pictures, the systems, and pictures drawn for captions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Unpack

import torch
from torch import Tensor

from sfumato.checkpoints.native import MANIFEST, Folder, read_folder
from sfumato.core.device import device_of
from sfumato.core.image import from_pil, grid, to_float
from sfumato.data.datasets import ImageFolder
from sfumato.data.transforms import CenterCrop
from sfumato.evaluation.measures import Proportion
from sfumato.evaluation.openmoji import References, captioned, retrieval
from sfumato.systems.request import Request
from sfumato.systems.system import System, load_system

__all__ = ["Asked", "Truth", "columns", "drawn", "nearest", "nets_at", "size_of", "strip", "system_at"]

SHOWN = 8  # pictures in a row of a sheet


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is drawn in every cell."""

    data: Path = Path("data/openmoji")
    """Folder that `sfumato data openmoji` wrote."""
    split: Literal["train", "held_out"] = "train"
    """Of the captions."""
    pictures: int = 100
    """Drawn in each cell, in the order of the SHA-256 of their captions; picture i has seed + i."""
    seed: int = 0
    batch: int = 25
    """Pictures made at a time; it does not change them."""
    device: str = "auto"
    """cpu, cuda ...; auto takes an accelerator if there is one."""

    @property
    def notice(self) -> dict[str, str]:
        """Text that goes into pictures: license and authors of the data."""
        note = self.data / "ATTRIBUTION.txt"
        return {"Copyright": note.read_text("utf-8").strip()} if note.is_file() else {}

    def __post_init__(self) -> None:
        for name in ("pictures", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: a whole number from 1")


@dataclass(frozen=True)
class Truth:
    """All true pictures at one size, and those whose captions are drawn.

    Attributes:
        pixels: (N, 3, H, W) uint8.
        references: the pixels as features, in [-1, 1].
        rows: whose captions are drawn.
    """

    asked: Asked
    folder: ImageFolder
    pixels: Tensor
    references: References
    rows: list[int]

    @staticmethod
    def of(asked: Asked, size: int | tuple[int, int], *, label: str | None = None) -> Truth:
        """The pictures cropped to a size; `label` is the field that holds their classes.

        Raises: ValueError in one line if there are none, or none of the split.
        """
        if not asked.data.is_dir():
            told = f"`sfumato data openmoji {asked.data}` writes them"
            raise ValueError(f"there are no pictures at {asked.data}; {told}")
        folder = ImageFolder(asked.data, transform=CenterCrop(size), label=label)
        pixels, number = folder.images(), dict[bytes, int]()
        alike = [number.setdefault(picture.numpy().tobytes(), len(number)) for picture in pixels]
        references = References(to_float(pixels).flatten(1), torch.tensor(alike), torch.zeros(0))
        return Truth(asked, folder, pixels, references, captioned(folder, asked.split)[: asked.pictures])

    @property
    def texts(self) -> list[str]:
        """Captions of the rows."""
        return [self.folder.texts[i] for i in self.rows]

    @property
    def scope(self) -> str:
        """What is drawn, in words."""
        return f"{len(self.rows)} captions, split {self.asked.split}"

    @property
    def real(self) -> Tensor:
        """The true pictures of the captions, (n, 3, H, W) in [-1, 1]."""
        return to_float(self.pixels[self.rows])

    def top1(self, made: Tensor) -> Proportion:
        """How often the picture of a caption, (n, 3, H, W) uint8, is nearest in pixels to the true one."""
        return nearest(to_float(made).flatten(1), self.references, self.rows)

    @cached_property
    def digest(self) -> str:
        """Of the pictures, captions, classes and splits."""
        digest = hashlib.sha256(self.pixels.numpy().tobytes())
        rows = [[entry.text, entry.label, entry.fields.get("split")] for entry in self.folder.entries]
        digest.update(json.dumps(rows).encode())
        return digest.hexdigest()[:16]

    def told(self, *fingerprints: str, **settings: object) -> dict[str, object]:
        """What decides the result of a cell: pictures, systems by fingerprint, and settings."""
        asked = {"split": self.asked.split, "pictures": self.asked.pictures, "seed": self.asked.seed}
        return {"data": self.digest, "systems": fingerprints, **asked, **settings}


def nearest(features: Tensor, references: References, rows: Sequence[int]) -> Proportion:
    """How often features (n, D) are nearest to the references of their rows."""
    return retrieval(features, references, rows).top1


def system_at(path: Path, recipe: str, device: str) -> System:
    """The system in a run's folder. Raises: ValueError in one line if there is none, or for a fault in it."""
    return load_system(_folder_at(path, recipe), device=device_of(device))


def nets_at(path: Path, recipe: str, device: str) -> Folder:
    """The nets in a run's folder. Raises: ValueError in one line if there are none, or for a fault in it."""
    return read_folder(_folder_at(path, recipe), device=device_of(device))


def drawn(
    system: System, asked: Asked, text: Sequence[str] | None = None, **request: Unpack[Request]
) -> Tensor:
    """(n, 3, H, W) uint8: one picture for each caption, or for each label of the request."""
    images = system.generate(text, seed=asked.seed, batch=asked.batch, **request)
    return torch.stack([from_pil(image) for image in images])


def strip(made: Tensor) -> Tensor:
    """The first pictures side by side."""
    return grid(made[:SHOWN], columns=SHOWN)


def columns(texts: Sequence[str]) -> str:
    """What stands in the columns of a sheet of strips."""
    return f"Columns of the sheet: {', '.join(texts[:SHOWN])}."


def size_of(system: System) -> tuple[int, int]:
    """(height, width) of its pictures. Raises: ValueError if it makes none."""
    if system.size is None:
        raise ValueError(f"{system.about.name} makes no pictures; give the folder of another system")
    return system.size


def _folder_at(path: Path, recipe: str) -> Path:
    """The checkpoint in a run's folder, or the folder itself."""
    found = next((p for p in (path, path / "system") if (p / MANIFEST).is_file()), None)
    if found is None:
        raise ValueError(
            f"there is nothing trained at {path}; run `sfumato train {recipe}`, or give the folder of another"
        )
    return found
