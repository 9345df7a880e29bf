"""Local copies of shards that cannot be read in place: those of other machines, and compressed ones."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import shutil
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sfumato.data.locations import is_remote, remote

__all__ = ["ShardError", "ShardStore"]

PAUSES = (1.0, 4.0, 16.0)  # seconds before each further attempt to fetch


class ShardError(ValueError):
    """A whole shard cannot be read: it is cut short, has changed or cannot be fetched. No picture's fault."""


class ShardStore:
    """A folder of plain tar files made from shards that are remote or compressed.

    Bytes in the middle of a gzip stream cannot be reached without all bytes before them, and pictures do not
    shrink by it, so a compressed shard is unpacked once, as a whole. A remote one is fetched as a whole too:
    one request for thousands of pictures instead of one for each. A plain tar file on disk is read where it
    is.

    Args:
        folder: of the copies and of the indexes of all shards; by default one in the user's cache.
        limit: bytes of copies to keep; the least recently used go first. None = all.
    """

    def __init__(self, folder: str | Path | None = None, *, limit: int | None = None) -> None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.folder = Path(folder) if folder is not None else base / "sfumato" / "shards"
        self.limit = limit
        self._fetching = threading.Lock()

    def stamp(self, name: str) -> str:
        """Changes when the shard changes: of name, size and time of change, or what the server gives for it.

        Raises: ShardError if there is no such shard.
        """
        try:
            if is_remote(name):
                system, path = remote(name)
                info = system.info(path)  # the key of a web address is of the address alone
                marks = [info.get(name) for name in ("size", "ETag", "Last-Modified")]
                state = f"{marks} {system.ukey(path)}"
            else:
                found = os.stat(name)
                state = f"{os.path.abspath(name)} {found.st_size} {found.st_mtime_ns}"
        except OSError as error:
            raise ShardError(f"cannot read the shard {name}: {error.strerror or error}") from None
        return hashlib.sha256(f"{name} {state}".encode()).hexdigest()[:32]

    def read(self, name: str, stamp: str, offset: int, size: int) -> bytes:
        """Some bytes of the plain tar file.

        Raises: ShardError if it has no such bytes.
        """
        with self.open(name, stamp) as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise ShardError(f"the shard {name} was changed while it was in use; start again")
        return data

    @contextmanager
    def open(self, name: str, stamp: str) -> Iterator[IO[bytes]]:
        """The plain tar file, for reading. Raises: ShardError if it cannot be had."""
        try:
            file = self._opened(name, stamp)
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ShardError(f"cannot read the shard {name}: {' '.join(str(reason).split())}") from None
        with file:
            yield file

    def _opened(self, name: str, stamp: str) -> IO[bytes]:
        if not is_remote(name) and not _compressed(name):
            return open(name, "rb")
        path = self.folder / f"{stamp}.tar"
        for _ in range(3):  # another process may remove the copy between a look and the opening
            with contextlib.suppress(FileNotFoundError):
                file = open(path, "rb")  # noqa: SIM115  returned open
                os.utime(path)
                return file
            with self._fetching:
                if not path.is_file():
                    self._fetch(name, path)
        raise ShardError(f"the copy {path} of {name} vanishes again and again; give the data cache more room")

    def _fetch(self, name: str, path: Path) -> None:
        """Copy a shard, unpacked if need be; the copy is there whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            for pause in (*PAUSES, None) if is_remote(name) else (None,):
                try:
                    _copy(name, part)
                    break
                except OSError:
                    if pause is None:
                        raise
                    time.sleep(pause)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        self._evict(path)

    def _evict(self, kept: Path) -> None:
        """Remove copies until the rest fits; never the one just made."""
        if self.limit is None:
            return
        sizes: dict[Path, tuple[int, int]] = {}
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                state = path.stat()
                sizes[path] = state.st_mtime_ns, state.st_size
        total = sum(size for _, size in sizes.values())
        for path in sorted(sizes.keys() - {kept}, key=lambda p: sizes[p]):
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= sizes[path][1]


def _compressed(name: str) -> bool:
    return name.endswith("gz")


def _copy(name: str, target: Path) -> None:
    if is_remote(name):
        system, path = remote(name)
        source = system.open(path, "rb")
    else:
        source = open(name, "rb")  # noqa: SIM115  closed below
    with source, open(target, "wb") as out:
        if _compressed(name):
            with gzip.GzipFile(fileobj=source) as unpacked:
                shutil.copyfileobj(unpacked, out, 1 << 20)
        else:
            shutil.copyfileobj(source, out, 1 << 20)
