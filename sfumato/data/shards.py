"""WebDataset shards: tar files of key.jpg, key.txt, key.json and key.cls, indexed once for random access."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

from sfumato.core.image import EXTENSIONS, size_of
from sfumato.core.png import write_whole
from sfumato.data.entries import Entry, number_labels
from sfumato.data.store import ShardError, ShardStore

__all__ = ["Member", "read_shards"]

REVISION = 1  # of the index; another one, and old indexes are made again
THREADS = 8  # shards indexed at a time: mostly waiting for disks and servers
NAMED = 10  # damaged shards that an error names
TOLD = ("txt", "json", "cls")
BLOCK = 512  # bytes of a tar header


@dataclass(frozen=True, slots=True)
class Member:
    """A picture within a shard.

    Attributes:
        shard: name of the tar file. stamp: of the state that was indexed.
        name: within it. offset, size: of its bytes in the plain tar file.
        fault: why it cannot be used whatever its bytes are; None if it can.
    """

    store: ShardStore
    shard: str
    stamp: str
    name: str
    offset: int
    size: int
    fault: str | None = None

    def read_bytes(self) -> bytes:
        """The picture's file.

        Raises: ValueError if its metadata are malformed; ShardError if the shard cannot be read.
        """
        if self.fault is not None:
            raise ValueError(f"cannot use the picture {self}: {self.fault}")
        return self.store.read(self.shard, self.stamp, self.offset, self.size)

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"


@dataclass(frozen=True, slots=True)
class _Row:
    """What the index keeps of a picture; `label` is a number or a name."""

    name: str
    offset: int
    size: int
    shape: Sequence[int] | None
    text: str | None
    label: object
    fields: Mapping[str, object]
    fault: str | None


def read_shards(names: Sequence[str], store: ShardStore) -> tuple[list[Entry], tuple[str, ...]]:
    """The pictures of some shards, shard by shard in the order of each, and the names of their classes.

    The members of a picture share the key: their name up to the first dot. The caption is key.txt, else
    "text" or "caption" of the object in key.json; the label is key.cls, else "label" of that object, a number
    or a name (names are numbered over all shards, sorted); the object's other values are fields. Keys without
    a picture and names that begin with a dot are passed over. A picture whose caption, label or object is
    malformed, or whose key has two pictures, counts as damaged.

    The index of a shard is made by one pass over it, and kept in the store until the shard changes.

    Raises: ShardError naming up to ten shards that are cut short or cannot be read; ValueError if there are
    no pictures, or labels of two kinds.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda name: _indexed(name, store), names))
    wrong = [said for said in found if isinstance(said, ShardError)]
    if wrong:
        more = f" (and {len(wrong) - NAMED} more)" if len(wrong) > NAMED else ""
        said = "; ".join(str(error) for error in wrong[:NAMED])
        raise ShardError(f"{len(wrong)} of {len(names)} shards cannot be read: {said}{more}")
    rows = [
        (block, part[0], row)
        for block, part in enumerate(found)
        if isinstance(part, tuple)
        for row in part[1]
    ]
    if not rows:
        allowed = ", ".join(sorted(EXTENSIONS))
        raise ValueError(
            f"the {len(names)} shards, the first is {names[0]}, hold no pictures; allowed: {allowed}"
        )
    labels, classes = number_labels(
        [row.label for *_, row in rows], lambda i: f"{names[rows[i][0]]}/{rows[i][2].name}"
    )
    entries = [
        Entry(
            file=Member(store, names[block], stamp, row.name, row.offset, row.size, row.fault),
            text=row.text,
            label=label,
            size=None if row.shape is None else (row.shape[0], row.shape[1]),  # JSON has no tuples
            block=block,
            fields=row.fields,
        )
        for (block, stamp, row), label in zip(rows, labels, strict=True)
    ]
    return entries, classes


def _indexed(name: str, store: ShardStore) -> tuple[str, list[_Row]] | ShardError:
    """Stamp and rows of a shard, from its index file or by making that."""
    try:
        stamp = store.stamp(name)
        path = store.folder / f"{stamp}-{REVISION}.json"
        try:
            saved = json.loads(path.read_bytes())
            return stamp, [_Row(*row) for row in saved]
        except (OSError, ValueError, TypeError):  # absent or damaged
            rows = _scan(name, stamp, store)
        values = [[getattr(row, field) for field in _Row.__slots__] for row in rows]
        write_whole(path, json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode())
        return stamp, [_Row(*row) for row in json.loads(path.read_bytes())]
    except ShardError as error:
        return error


def _scan(name: str, stamp: str, store: ShardStore) -> list[_Row]:
    """The rows of a shard, from the tar file itself."""
    keys: dict[str, dict[str, tarfile.TarInfo]] = {}
    twice: set[str] = set()
    with store.open(name, stamp) as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    key, ending = _split(member.name)
                    if member.isreg() and not member.issparse() and (ending in TOLD or _pictured(ending)):
                        endings = keys.setdefault(key, {})
                        twice |= {key} if ending in endings else set()
                        endings[ending] = member
                _check_end(file, tar.offset)
        except tarfile.TarError as error:
            raise ShardError(f"{name} is damaged: {error}; fetch or make it again") from None
        return [
            row for key, members in keys.items() if (row := _row(file, members, key in twice)) is not None
        ]


def _check_end(file: IO[bytes], offset: int) -> None:
    """Raise if the archive has no end mark: tarfile takes damage and a missing rest for the end."""
    file.seek(offset)
    mark = file.read(BLOCK)
    if mark != bytes(BLOCK):
        what = "it ends without its end mark" if len(mark) < BLOCK else "what follows is no header"
        raise tarfile.ReadError(f"{what}, at byte {offset}")


def _split(name: str) -> tuple[str, str]:
    """Key and ending of a member; hidden ones have no ending."""
    path = PurePosixPath(name)
    if not path.name or any(part.startswith(".") for part in path.parts):
        return name, ""
    stem, _, ending = path.name.partition(".")
    return str(path.with_name(stem)), ending.lower()


def _pictured(ending: str) -> bool:
    return f".{ending}" in EXTENSIONS


def _row(file: IO[bytes], members: Mapping[str, tarfile.TarInfo], twice: bool) -> _Row | None:
    """What a key's members say; None without a picture."""
    pictures = [member for ending, member in members.items() if _pictured(ending)]
    if not pictures:
        return None
    told = {ending: _bytes(file, members[ending]) for ending in TOLD if ending in members}
    first = pictures[0]
    shape = size_of(_bytes(file, first))
    try:
        if twice or len(pictures) > 1:
            raise ValueError("its key occurs twice in the shard")
        text, label, fields = _told(told)
        return _Row(first.name, first.offset_data, first.size, shape, text, label, fields, None)
    except ValueError as error:
        return _Row(first.name, first.offset_data, first.size, shape, None, None, {}, str(error))


def _bytes(file: IO[bytes], member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    return file.read(member.size)


def _told(told: Mapping[str, bytes]) -> tuple[str | None, object, Mapping[str, object]]:
    """Caption, label and fields. Raises: ValueError with the member that is malformed."""
    texts = {}
    for ending, data in told.items():
        try:
            texts[ending] = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"its .{ending} is not UTF-8 text") from None
    try:
        fields = json.loads(texts["json"]) if "json" in texts else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"its .json is not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(fields, dict):
        raise ValueError("its .json is no JSON object")
    caption, label = fields.pop("text", None), fields.pop("label", None)
    other = caption if caption is not None else fields.get("caption")
    text = texts.get("txt", other)
    if text is not None and not isinstance(text, str):
        raise ValueError(f"its caption must be a string, not {text!r}")
    if "cls" in texts:
        name = texts["cls"].strip()
        label = int(name) if name.isdecimal() else name
    return " ".join((text or "").split()) or None, label, fields
