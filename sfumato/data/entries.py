"""What is known of pictures before any is opened: captions, labels, fields; and how folders tell it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from sfumato.core.image import EXTENSIONS, PictureFile

__all__ = ["Entry", "number_labels", "pictures", "read_entries"]

Row = tuple[int, Mapping[str, object]]  # line number in the metadata file, from 1, and its columns


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One picture.

    Attributes:
        file: its path, or the member of a shard.
        text: caption; None if there is none or it is blank.
        label: number of the class, from 0.
        size: (height, width), upright, if it is known without opening the file.
        block: number of the shard that holds it; 0 in a folder.
        fields: the other columns of the metadata.
    """

    file: PictureFile
    text: str | None = None
    label: int | None = None
    size: tuple[int, int] | None = None
    block: int = 0
    fields: Mapping[str, object] = field(default_factory=dict)


def pictures(directory: Path) -> list[Path]:
    """All picture files below a folder, sorted by their path; names that begin with a dot are ignored.

    Raises: ValueError in one line if the folder is absent or no folder.
    """
    if not directory.is_dir():
        state = "is not a folder" if directory.exists() else "does not exist"
        raise ValueError(
            f"the data folder {directory} {state}; give the folder that holds the pictures, "
            f"or make one: sfumato data openmoji {directory}"
        )
    found = (path for path in directory.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    shown = (path for path in found if not any(p.startswith(".") for p in path.relative_to(directory).parts))
    return sorted(shown, key=lambda path: path.relative_to(directory).parts)


def read_entries(directory: Path, *, allow_missing: bool = False) -> tuple[list[Entry], tuple[str, ...]]:
    """The pictures of a folder, and the names of their classes.

    With metadata.jsonl or metadata.csv at its top: the files named there, in that order, and no others.
    Columns: `file_name` (relative to the folder), `text`, `label` (numbers, or names, which are numbered in
    sorted order); others are kept as fields. Without: every picture below the folder, sorted; the caption is
    the text file beside it with the same name and ending .txt, its line breaks made spaces; if every picture
    lies in a subfolder, the first-level subfolders are the classes.

    Args:
        allow_missing: also return entries whose file is absent, instead of an error.

    Raises: ValueError in one line naming the file, and the line in it, that is wrong.
    """
    files = pictures(directory)
    found = {
        name: directory / name for name in ("metadata.jsonl", "metadata.csv") if (directory / name).is_file()
    }
    if len(found) == 2:
        raise ValueError(f"{directory} has both metadata.jsonl and metadata.csv; remove one")
    for name, path in found.items():
        entries, classes = _from_rows(path, list(_READERS[name](path)))
        gone = [e.file for e in entries if not Path(str(e.file)).is_file()]
        if gone and not allow_missing:
            raise ValueError(f"{path} names {len(gone)} files that do not exist, the first is {gone[0]}")
        if not entries:
            raise ValueError(f"{path} is empty: it must have one line for each picture")
        return entries, classes
    if not files:
        allowed = ", ".join(sorted(EXTENSIONS))
        raise ValueError(f"{directory} holds no pictures; allowed endings: {allowed}")
    return _from_tree(directory, files)


def _from_tree(directory: Path, files: list[Path]) -> tuple[list[Entry], tuple[str, ...]]:
    tops = [path.relative_to(directory).parts for path in files]
    classes = sorted({parts[0] for parts in tops}) if all(len(parts) > 1 for parts in tops) else []
    number = {name: i for i, name in enumerate(classes)}
    entries = [
        Entry(file=path, text=_sidecar(path), label=number.get(parts[0]))
        for path, parts in zip(files, tops, strict=True)
    ]
    return entries, tuple(classes)


def _sidecar(path: Path) -> str | None:
    text = path.with_suffix(".txt")
    return (" ".join(_decoded(text).split()) or None) if text.is_file() else None


def _from_rows(path: Path, rows: list[Row]) -> tuple[list[Entry], tuple[str, ...]]:
    names: dict[str, int] = {}
    for line, row in rows:
        name = _file_name(row, f"{path}:{line}")
        if name in names:
            raise ValueError(f"{path}:{line}: {name!r} was already named in line {names[name]}")
        names[name] = line
    labels, classes = number_labels([row.get("label") for _, row in rows], lambda i: f"{path}:{rows[i][0]}")
    entries = [
        Entry(
            file=path.parent / name,
            text=_text(row, f"{path}:{line}"),
            label=label,
            fields={k: v for k, v in row.items() if k not in ("file_name", "text", "label")},
        )
        for name, (line, row), label in zip(names, rows, labels, strict=True)
    ]
    return entries, classes


def _file_name(row: Mapping[str, object], where: str) -> str:
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        columns = ", ".join(map(repr, row)) or "nothing"
        raise ValueError(
            f"{where}: needs 'file_name', the path of a picture relative to the folder; it has {columns}"
        )
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{where}: file_name {name!r} must be relative to the folder and stay inside it")
    return name


def _text(row: Mapping[str, object], where: str) -> str | None:
    text = row.get("text")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: text must be a string, not {text!r}")
    return text if text and text.strip() else None


def number_labels(
    values: Sequence[object], where: Callable[[int], str]
) -> tuple[list[int | None], tuple[str, ...]]:
    """Labels as numbers, and the names of the classes if they were given by name.

    Names are numbered in sorted order; names that are all digits are numbers.

    Args:
        values: one for each picture; None or "" where there is none.
        where: says which picture the i-th value belongs to.

    Raises: ValueError in one line if a label is neither a number from 0 nor a name, or both occur.
    """
    given = [(i, value) for i, value in enumerate(values) if value not in (None, "")]
    for i, value in given:
        number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not number and not isinstance(value, str):
            raise ValueError(f"{where(i)}: label must be a number from 0 or a name, not {value!r}")
        if type(value) is not type(given[0][1]):
            raise ValueError(
                f"{where(i)}: label {value!r} must be a {type(given[0][1]).__name__} like those before it"
            )
    named = sorted({value for _, value in given if isinstance(value, str)})
    if all(name.isdecimal() for name in named):  # a CSV file has no other way to write numbers
        named = []
    number_of = {name: i for i, name in enumerate(named)}
    return [_number(value, number_of) for value in values], tuple(named)


def _number(value: object, number_of: Mapping[str, int]) -> int | None:
    if isinstance(value, str) and value:
        return number_of[value] if number_of else int(value)
    return value if isinstance(value, int) else None


def _jsonl(path: Path) -> Iterator[Row]:
    for line, text in enumerate(_decoded(path).split("\n"), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{line}: not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}:{line}: each line must be a JSON object with 'file_name', not {text.strip()[:40]!r}"
            )
        yield line, row


def _csv(path: Path) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(_decoded(path), newline=""), strict=True)
    try:
        if "file_name" not in (reader.fieldnames or []):
            raise ValueError(f"{path}:1: the first line must name the columns, 'file_name' among them")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}:{reader.line_num}: the line must have {len(reader.fieldnames or [])} columns"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: not CSV: {error}") from None


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {"metadata.jsonl": _jsonl, "metadata.csv": _csv}


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
