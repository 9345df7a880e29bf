"""What is in an image folder, and what is wrong with it."""

from __future__ import annotations

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from sfumato.core.image import decode
from sfumato.data.entries import Entry, pictures, read_entries

__all__ = ["Report", "check"]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The findings of `check`; all paths are relative to the folder.

    Attributes:
        directory: that was checked.
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


def check(directory: str | Path, *, progress: Callable[[int, int], None] | None = None) -> Report:
    """Open every picture of a folder and report.

    Args:
        directory: in a layout of `entries.read_entries`.
        progress: told (pictures done, pictures in all).

    Raises: ValueError in one line if the folder is absent or empty, or its metadata is malformed.
    """
    directory = Path(directory)
    entries, classes = read_entries(directory, allow_missing=True)
    findings = _Findings()
    for done, entry in enumerate(entries, 1):
        findings.add(entry.path.relative_to(directory).as_posix(), entry.path)
        if progress:
            progress(done, len(entries))
    listed = {entry.path for entry in entries}
    name_of = {i: name for i, name in enumerate(classes)}
    labels = Counter(name_of.get(e.label, str(e.label)) for e in entries if e.label is not None)
    return Report(
        directory=str(directory),
        count=len(entries),
        sizes=dict(findings.sizes.most_common()),
        formats=dict(findings.formats.most_common()),
        classes=dict(sorted(labels.items())),
        uncaptioned=tuple(_names(directory, (e for e in entries if e.text is None))),
        failed=findings.failed,
        unlisted=tuple(p.relative_to(directory).as_posix() for p in pictures(directory) if p not in listed),
        same_file=_groups(findings.by_bytes),
        same_pixels=_groups(findings.by_pixels),
    )


class _Findings:
    """What opening the files tells, one file at a time."""

    def __init__(self) -> None:
        self.sizes: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.failed: dict[str, str] = {}
        self.by_bytes: dict[bytes, list[str]] = defaultdict(list)
        self.by_pixels: dict[bytes, list[str]] = defaultdict(list)

    def add(self, name: str, path: Path) -> None:
        try:
            data = path.read_bytes()
            image = decode(data, name=name)
        except FileNotFoundError:
            self.failed[name] = "the metadata names it but there is no such file"
        except OSError as error:
            self.failed[name] = error.strerror or str(error)
        except ValueError as error:
            self.failed[name] = str(error).removeprefix(f"cannot read the picture {name}: ")
        else:
            with Image.open(io.BytesIO(data)) as header:
                self.formats[f"{header.format} {header.mode}"] += 1
            size = f"{image.width}x{image.height}"
            self.sizes[size] += 1
            twins = self.by_bytes[hashlib.sha256(data).digest()]
            if not twins:  # the same bytes are reported once, as the same file
                self.by_pixels[hashlib.sha256(size.encode() + image.tobytes()).digest()].append(name)
            twins.append(name)


def _names(directory: Path, entries: Iterator[Entry]) -> Iterator[str]:
    return (entry.path.relative_to(directory).as_posix() for entry in entries)


def _groups(by: dict[bytes, list[str]]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(names) for names in by.values() if len(names) > 1)


def _section(title: str, items: Sequence[str], limit: int) -> list[str]:
    if not items:
        return []
    rest = [f"  ... and {len(items) - limit} more"] if len(items) > limit else []
    return [f"{title} ({len(items)}):", *(f"  {item}" for item in items[:limit]), *rest]
