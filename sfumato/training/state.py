"""Checkpoints of a run: written whole or not at all, and read back exactly."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

__all__ = ["Checkpoints"]

STATE, MANIFEST = "state.pt", "manifest.json"


class Checkpoints:
    """The folder `checkpoints/` of a run; one sub-folder per checkpoint, named by the images seen.

    A checkpoint is written into a temporary folder, flushed to disk, described by a manifest with its size
    and SHA-256, and then renamed. Older ones are removed only after that.

    Args:
        folder: created when the first checkpoint is written.
        keep: how many of the newest to keep, at least 1.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least one checkpoint must be kept")
        self.folder = folder
        self.keep = keep

    def paths(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(p for p in self.folder.iterdir() if p.name.isdigit() and (p / MANIFEST).is_file())

    def save(self, state: dict[str, Any], images: int) -> Path:
        """Write `state` as the checkpoint at `images` and remove those that are no longer kept.

        Raises: ValueError if the folder cannot be written; earlier checkpoints are untouched then.
        """
        final = self.folder / f"{images:012d}"
        temporary = self.folder / f".writing-{images:012d}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            with (temporary / STATE).open("wb") as file:
                torch.save(state, file)
                _flush(file.fileno(), file)
            manifest = {
                "images": images,
                "size": (temporary / STATE).stat().st_size,
                "sha256": _sha256(temporary / STATE),
            }
            with (temporary / MANIFEST).open("w", encoding="utf-8") as text:
                json.dump(manifest, text)
                _flush(text.fileno(), text)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            _sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise ValueError(
                f"cannot write the checkpoint {final}: {error.strerror}; free space or choose --out"
            ) from None
        for old in self.paths()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def load(self) -> dict[str, Any] | None:
        """State of the newest checkpoint whose size and hash agree with its manifest, on the CPU, or None."""
        for path in reversed(self.paths()):
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            file = path / STATE
            if (
                file.is_file()
                and file.stat().st_size == manifest["size"]
                and _sha256(file) == manifest["sha256"]
            ):
                state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
                return state
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(descriptor: int, file: Any) -> None:
    file.flush()
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; Windows cannot open folders and does not need it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
