"""Files that are on the disk, not only in its cache, when the call returns; with a digest of their bytes."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sfumato.checkpoints.files import sha256

__all__ = ["Entry", "Sink", "entry_of", "fault_of", "replace_file", "sync_folder", "write_file"]

BLOCK = 1 << 20  # bytes that small writes are joined to; larger ones pass as they are


@dataclass(frozen=True)
class Entry:
    """What a file must be: its size in bytes and the SHA-256 of its content in hex."""

    size: int
    sha256: str


class Sink:
    """A file opened for writing that digests what passes and remembers why it failed.

    torch.save makes thousands of writes of a few bytes: the file below is one with a buffer. It turns a full
    disk into a RuntimeError about its own archive; `error` has the true reason.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._size = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Pass bytes on; returns how many."""
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._digest.update(data)
        self._size += len(data)
        return len(data)

    def flush(self) -> None:
        """Pass on what is buffered."""
        self._file.flush()

    @property
    def entry(self) -> Entry:
        """Of all that was written."""
        return Entry(self._size, self._digest.hexdigest())


def write_file(path: Path, fill: Callable[[Sink], object]) -> Entry:
    """A new file that `fill` writes, flushed to the disk.

    Returns: of the bytes as they were sent, not as they are read back.
    Raises: OSError if it cannot be written.
    """
    with path.open("wb", buffering=BLOCK) as file:
        sink = Sink(file)
        try:
            fill(sink)
        except RuntimeError:
            if sink.error is not None:
                raise sink.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return sink.entry


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that at every moment, also after a power cut, it is the old one or the new one.

    Raises: OSError if it cannot be written; the old one is untouched then.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write_file(part, lambda sink: sink.write(data))
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable; Windows cannot open folders and does not need it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def entry_of(path: Path) -> Entry:
    """Of a file that another library has written, as it is read back."""
    return Entry(path.stat().st_size, sha256(path))


def fault_of(path: Path, entry: Entry) -> str | None:
    """How a file differs from what was written, or None if it does not."""
    if not path.is_file():
        return f"{path.name} is missing"
    if (size := path.stat().st_size) != entry.size:
        return f"{path.name} has {size} bytes instead of {entry.size}"
    if sha256(path) != entry.sha256:
        return f"{path.name} does not have the SHA-256 of its manifest"
    return None
