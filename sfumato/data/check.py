"""What is in an image folder or in shards, and what is wrong with it."""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from sfumato.core.image import PictureFile, decode
from sfumato.data.entries import Entry, pictures
from sfumato.data.locations import address
from sfumato.data.opening import open_pictures
from sfumato.data.store import ShardError, ShardStore

__all__ = ["Report", "check"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The findings of `check`; paths are relative to the folder, if it is one.

    Attributes:
        directory: that was checked, or the pattern of the shards.
        count: entries, readable or not.
        sizes: "WIDTHxHEIGHT" -> pictures, upright, most frequent first.
        formats: "PNG RGBA" and so on -> pictures.
        classes: name or number of each label -> entries; empty without labels.
        uncaptioned: entries without a caption.
        failed: file -> why it cannot be read; files that the metadata names and that do not exist are among
        them. unlisted: pictures in the folder that its metadata does not name, so that they are not read.
        same_file: groups of files with the same bytes. same_pixels: groups of files with the same picture but
        different bytes.
    """

    directory: str
    count: int
    sizes: dict[str, int]
    formats: dict[str, int]
    classes: dict[str, int]
    uncaptioned: tuple[str, ...]
    failed: dict[str, str]
    unlisted: tuple[str, ...]
    same_file: tuple[tuple[str, ...], ...]
    same_pixels: tuple[tuple[str, ...], ...]

    @property
    def ok(self) -> bool:
        """Whether every entry can be read; missing captions and duplicates are for the user to judge."""
        return not self.failed

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)

    def lines(self, *, limit: int = 10) -> list[str]:
        """The report as text, with at most `limit` lines for each kind of finding."""
        read = self.count - len(self.failed)
        found = [f"{self.directory}: {self.count} pictures, {read} readable"]
        found += _section("sizes", [f"{size}: {n}" for size, n in self.sizes.items()], limit)
        found += _section("formats", [f"{kind}: {n}" for kind, n in self.formats.items()], limit)
        found += _section("classes", [f"{name}: {n}" for name, n in self.classes.items()], limit)
        found += _section("without caption", self.uncaptioned, limit)
        found += _section("cannot be read", [f"{name}: {why}" for name, why in self.failed.items()], limit)
        found += _section("not named in the metadata", self.unlisted, limit)
        found += _section("same file", [", ".join(group) for group in self.same_file], limit)
        found += _section(
            "same picture in different files", [", ".join(group) for group in self.same_pixels], limit
        )
        return found


def check(
    directory: str | Path,
    *,
    store: ShardStore | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Open every picture of a data path and report.

    Args:
        directory: a folder or shards, as in `opening.open_pictures`.
        store: of local copies and indexes of shards; by default one in the user's cache.
        progress: told (pictures done, pictures in all).

    Raises: ValueError in one line if there are no pictures, or metadata or a shard as a whole are damaged.
    """
    entries, classes = open_pictures(directory, store, allow_missing=True)
    base = address(directory)
    findings = _Findings()
    for done, entry in enumerate(entries, 1):
        findings.add(_name(base, entry.file), entry.file)
        if progress:
            progress(done, len(entries))
    name_of = {i: name for i, name in enumerate(classes)}
    labels = Counter(name_of.get(e.label, str(e.label)) for e in entries if e.label is not None)
    return Report(
        directory=base,
        count=len(entries),
        sizes=dict(findings.sizes.most_common()),
        formats=dict(findings.formats.most_common()),
        classes=dict(sorted(labels.items())),
        uncaptioned=tuple(_name(base, e.file) for e in entries if e.text is None),
        failed=findings.failed,
        unlisted=tuple(_unlisted(base, entries)),
        same_file=_groups(findings.by_bytes),
        same_pixels=_groups(findings.by_pixels),
    )


def _unlisted(base: str, entries: Sequence[Entry]) -> Iterator[str]:
    """Picture files that lie in the folder and are not read."""
    if all(isinstance(entry.file, Path) for entry in entries):
        listed = {entry.file for entry in entries}
        yield from (_name(base, path) for path in pictures(Path(base)) if path not in listed)


class _Findings:
    """What opening the files tells, one file at a time."""

    def __init__(self) -> None:
        self.sizes: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.failed: dict[str, str] = {}
        self.by_bytes: dict[bytes, list[str]] = defaultdict(list)
        self.by_pixels: dict[bytes, list[str]] = defaultdict(list)

    def add(self, name: str, file: PictureFile) -> None:
        try:
            data = file.read_bytes()
            image = decode(data, name=name)
        except FileNotFoundError:
            self.failed[name] = "the metadata names it but there is no such file"
        except OSError as error:
            self.failed[name] = error.strerror or str(error)
        except ShardError:
            raise
        except ValueError as error:
            self.failed[name] = re.sub(r"^cannot \w+ the picture .*?: ", "", str(error))
        else:
            with Image.open(io.BytesIO(data)) as header:
                self.formats[f"{header.format} {header.mode}"] += 1
            size = f"{image.width}x{image.height}"
            self.sizes[size] += 1
            twins = self.by_bytes[hashlib.sha256(data).digest()]
            if not twins:  # the same bytes are reported once, as the same file
                self.by_pixels[hashlib.sha256(size.encode() + image.tobytes()).digest()].append(name)
            twins.append(name)


def _name(base: str, file: PictureFile) -> str:
    return file.relative_to(base).as_posix() if isinstance(file, Path) else str(file).removeprefix(f"{base}/")


def _groups(by: dict[bytes, list[str]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(names) for names in by.values() if len(names) > 1)


def _section(title: str, items: Sequence[str], limit: int) -> list[str]:
    if not items:
        return []
    rest = [f"  ... and {len(items) - limit} more"] if len(items) > limit else []
    return [f"{title} ({len(items)}):", *(f"  {item}" for item in items[:limit]), *rest]
