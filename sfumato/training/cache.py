"""Tensors that were expensive to compute, kept on disk by the hash of what they were computed from."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sfumato.core.png import write_whole

__all__ = ["TensorCache", "fingerprint", "key_of"]

LOGGER = logging.getLogger(__name__)
SHARD = 256 << 20  # bytes
Fields = Mapping[str, Tensor]


def key_of(*parts: object) -> str:
    """32 hexadecimal digits that differ if any part does; parts are told by their text."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]


def fingerprint(net: nn.Module, config: object) -> str:
    """Identity of an encoder: digest of its settings and of every weight."""
    digest = hashlib.sha256(repr(config).encode())
    for name, tensor in net.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()[:32]


class TensorCache:
    """Named tensors for each key, in safetensors files of bounded size.

    A file is called by the SHA-256 of its bytes and written whole, so it is complete and true to its name or
    it is damaged, which is looked into when the cache is opened: a damaged one is removed with a line in the
    log, and what it held is missing. Names never clash, so that several processes may add to one folder.

    Args:
        folder: made when something is added; None = in memory only.
        limit: bytes of a file; what is larger by itself gets a file to itself.
    """

    def __init__(self, folder: Path | None, *, limit: int = SHARD) -> None:
        self.folder = folder
        self.limit = limit
        self._memory: dict[str, Fields] = {}
        self._files: dict[str, tuple[Path, list[str]]] = {}  # key -> its file and the names in it
        self._open: dict[Path, safe_open] = {}
        for path in sorted(folder.glob("*.safetensors")) if folder is not None else ():
            self._take_up(path)

    def __len__(self) -> int:
        return len(self._memory) + len(self._files)

    def __contains__(self, key: str) -> bool:
        return key in self._memory or key in self._files

    def __getitem__(self, key: str) -> Fields:
        """The tensors of a key, on the CPU. Raises: KeyError if there are none."""
        if key in self._memory:
            return self._memory[key]
        path, names = self._files[key]
        return {name: self._open[path].get_tensor(f"{key}.{name}") for name in names}

    def add(self, items: Iterable[tuple[str, Fields]]) -> None:
        """Keep tensors; a file is written whenever enough came together, and at the end.

        Raises: ValueError in one line if a file cannot be written.
        """
        waiting: dict[str, Fields] = {}
        size = 0
        for key, fields in items:
            own = sum(tensor.numel() * tensor.element_size() for tensor in fields.values())
            if waiting and size + own > self.limit and self.folder is not None:
                self._write(waiting)
                waiting, size = {}, 0
            waiting[key] = {name: tensor.detach().cpu().contiguous() for name, tensor in fields.items()}
            size += own
        self._write(waiting)

    def prune(self, keys: Collection[str]) -> None:
        """Remove the files that hold none of these keys: of earlier weights, or of pictures long changed."""
        wanted = set(keys)
        used = {path for key, (path, _) in self._files.items() if key in wanted}
        for path in self._open.keys() - used:
            del self._open[path]
            self._files = {key: place for key, place in self._files.items() if place[0] != path}
            path.unlink(missing_ok=True)

    def _write(self, waiting: Mapping[str, Fields]) -> None:
        if self.folder is None:
            self._memory.update(waiting)
        elif waiting:
            data = save({f"{key}.{name}": t for key, fields in waiting.items() for name, t in fields.items()})
            path = self.folder / f"{hashlib.sha256(data).hexdigest()[:32]}.safetensors"
            write_whole(path, data)
            self._take_up(path)

    def _take_up(self, path: Path) -> None:
        """Enter what a file holds, or remove it if it is damaged."""
        try:
            with open(path, "rb") as file:
                whole = hashlib.file_digest(file, "sha256").hexdigest()[:32] == path.stem
            opened = safe_open(path, "pt") if whole else None
        except (OSError, SafetensorError):
            opened = None
        if opened is None:
            LOGGER.warning("%s is damaged; what it held is computed again", path)
            path.unlink(missing_ok=True)
            return
        self._open[path] = opened
        names: dict[str, list[str]] = {}
        for full in opened.keys():  # noqa: SIM118  a file, not a mapping
            key, _, name = full.partition(".")
            names.setdefault(key, []).append(name)
        self._files |= {key: (path, own) for key, own in names.items()}
