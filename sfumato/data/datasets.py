"""Pictures as training data, of folders or shards: read in any order, by rules that do not depend on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from sfumato.core.image import from_pil, load, size_of
from sfumato.data.entries import Entry, number_labels
from sfumato.data.opening import open_pictures
from sfumato.data.order import Draw
from sfumato.data.store import ShardError, ShardStore
from sfumato.data.transforms import Transform, View

__all__ = ["ImageFolder", "Sample", "stack"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture, ready for a batch.

    Attributes:
        image: (3, H, W) uint8, after the transform.
        text: caption; None if there is none.
        label: number of the class, or None.
        name: of the file: its path, or SHARD/MEMBER.
        size: (height, width) of the file's picture, upright, before the transform.
        crop: (top, left) of the image within the resized picture; see `transforms.View`.
        index: row in the folder; of the picture that was read, if it stands in for a damaged one.
        fields: the other columns of the metadata.
    """

    image: Tensor
    text: str | None
    label: int | None
    name: str
    size: tuple[int, int]
    crop: tuple[int, int]
    index: int
    fields: Mapping[str, object]


class ImageFolder:
    """Pictures with captions, labels and fields.

    A folder in a layout of `entries.read_entries`, or tar shards as in `shards.read_shards`.

    How files of every kind become RGB: `core.image.decode`.

    Args:
        path: of the folder, or of shards as in `locations.shard_names`.
        transform: applied to each picture; see `data.transforms`.
        label: field whose values are the classes, instead of the labels of the data; numbered before `where`.
        where: keep only entries whose fields have these values, such as {"split": "train"}.
        store: of local copies and indexes of shards; by default one in the user's cache.

    Attributes:
        entries: what is known of each picture without opening it.
        classes: names of the labels, if they have names.
        skipped: file -> why it could not be read, of all damaged files met so far.

    Raises: ValueError in one line if the folder, its metadata or a shard is wrong, or `where` fits nothing.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        transform: Transform | None = None,
        label: str | None = None,
        where: Mapping[str, object] | None = None,
        store: ShardStore | None = None,
    ) -> None:
        self.path = Path(path)
        self.transform = transform
        entries, self.classes = open_pictures(self.path, store)
        if label is not None:
            entries, self.classes = _labeled(entries, label)
        for name, value in (where or {}).items():
            entries = _matching(entries, name, value)
        self.entries: tuple[Entry, ...] = tuple(entries)
        self.skipped: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def texts(self) -> list[str]:
        """The caption of every entry, "" where there is none."""
        return [entry.text or "" for entry in self.entries]

    @property
    def labels(self) -> list[int]:
        """The label of every entry.

        Raises: ValueError if one has none.
        """
        bare = next((entry.file for entry in self.entries if entry.label is None), None)
        if bare is not None:
            raise ValueError(
                f"{bare} has no label; give class folders, a 'label' in the metadata or .cls files"
            )
        return [entry.label for entry in self.entries if entry.label is not None]

    @property
    def sizes(self) -> list[tuple[int, int] | None]:
        """(height, width) of every picture, upright, from the headers of the files; None if it has none."""
        return [_size(entry) for entry in self.entries]

    def column(self, name: str) -> list[object]:
        """A field of every entry, None where it is absent.

        Raises: ValueError if no entry has it.
        """
        _require_column(self.entries, name)
        return [entry.fields.get(name) for entry in self.entries]

    def __getitem__(self, index: int) -> Sample:
        """A sample whose random choices are those of seed 0.

        Raises: ValueError in one line if the file is damaged; IndexError beyond the end.
        """
        return self.read(range(len(self))[index])

    def read(self, index: int, *, seed: int = 0) -> Sample:
        """A sample; `seed` decides its crop, flip and so on.

        Raises: ValueError in one line if the file is damaged.
        """
        return self._sample(index, from_pil(load(self.entries[index].file)), Draw(0, index, seed))

    def draw(self, draws: Sequence[Draw]) -> list[Sample]:
        """The samples of some draws: `folder.draw(order.take(position, batch))`.

        A damaged file is noted in `skipped` and the next readable entry takes its place, so that the sample
        at a position stays a pure function of seed and position, and batches stay full.

        Raises: ValueError if no file can be read.
        """
        return [self._readable(draw) for draw in draws]

    def images(self, indices: Sequence[int] | None = None) -> Tensor:
        """(N, 3, H, W) uint8 pictures of these rows, or of all, each as `self[i]` gives it.

        Raises: ValueError if a file is damaged or the sizes differ.
        """
        return stack([self[i] for i in (range(len(self)) if indices is None else indices)])

    def attempt(self, draw: Draw) -> Sample | None:
        """The sample of a draw; None if its file is damaged, which is noted in `skipped`.

        Raises: ShardError if it lies in a shard that cannot be read.
        """
        file = self.entries[draw.index].file
        if str(file) in self.skipped:
            return None
        try:
            image = from_pil(load(file))
        except ShardError:  # thousands of pictures at once: nothing to be passed over
            raise
        except ValueError as error:
            self.skipped[str(file)] = str(error)
            return None
        return self._sample(draw.index, image, draw)

    def _readable(self, draw: Draw) -> Sample:
        for step in range(len(self)):
            sample = self.attempt(replace(draw, index=(draw.index + step) % len(self)))
            if sample is not None:
                return sample
        raise ValueError(
            f"none of the {len(self)} pictures in {self.path} can be read; see `sfumato data check`"
        )

    def _sample(self, index: int, image: Tensor, draw: Draw) -> Sample:
        entry = self.entries[index]
        view = View(image, target=draw.size)
        if self.transform:
            view = self.transform(view, Random(draw.seed))
        return Sample(
            image=view.image,
            text=entry.text,
            label=entry.label,
            name=str(entry.file),
            size=(image.shape[1], image.shape[2]),
            crop=view.crop,
            index=index,
            fields=entry.fields,
        )


def stack(samples: Sequence[Sample]) -> Tensor:
    """(B, 3, H, W) uint8 of samples of one size.

    Raises: ValueError if there are none, or naming two files of different size.
    """
    if not samples:
        raise ValueError("a batch needs at least one picture")
    first = samples[0]
    for sample in samples:
        if sample.image.shape != first.image.shape:
            sizes = " and ".join(f"{s.name} ({s.image.shape[2]}x{s.image.shape[1]})" for s in (first, sample))
            raise ValueError(
                f"pictures of different size cannot form a batch: {sizes}; crop or resize them first"
            )
    return torch.stack([sample.image for sample in samples])


def _size(entry: Entry) -> tuple[int, int] | None:
    return entry.size or (size_of(entry.file) if isinstance(entry.file, Path) else None)


def _require_column(entries: Sequence[Entry], name: str) -> None:
    names = sorted({key for entry in entries for key in entry.fields})
    if name not in names:
        raise ValueError(f"the metadata has no field {name!r}; it has: {', '.join(names) or 'none'}")


def _labeled(entries: Sequence[Entry], field: str) -> tuple[list[Entry], tuple[str, ...]]:
    """The entries with the values of a field as their labels, and the names of the classes."""
    _require_column(entries, field)
    values = [entry.fields.get(field) for entry in entries]
    labels, classes = number_labels(values, lambda i: f"{field} of {entries[i].file}")
    pairs = zip(entries, labels, strict=True)
    return [replace(entry, label=label) for entry, label in pairs], classes


def _matching(entries: list[Entry], name: str, value: object) -> list[Entry]:
    _require_column(entries, name)
    kept = [entry for entry in entries if entry.fields.get(name) == value]
    if not kept:
        values = sorted({repr(entry.fields.get(name)) for entry in entries})
        raise ValueError(f"no picture has {name} = {value!r}; it has: {', '.join(values[:8])}")
    return kept
