"""Checkpoints of a run: written whole or not at all, verified, and read back exactly."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import IO, Any, cast

import torch

from sfumato.core.config import from_json, to_json
from sfumato.training.durable import Entry, fault_of, sync_folder, write_file

__all__ = ["Checkpoints"]

LOGGER = logging.getLogger(__name__)
STATE, MANIFEST = "state.pt", "manifest.json"
# Folders that are no checkpoints: being written, making room for a newer one of the same name, being removed.
WRITING, ASIDE, REMOVING = ".writing-", ".aside-", ".removing-"


class Checkpoints:
    """The folder `checkpoints/` of a run; one sub-folder per checkpoint, named by the images seen.

    A checkpoint is written into a temporary folder, every file flushed to the disk, the manifest with sizes
    and SHA-256 last; then the folder is renamed and its parent flushed. Older ones are removed only after
    the new one was read back and found to be what was written. So at every moment, also after a power cut,
    the newest folder with a manifest is complete, or an older one is still there.

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
        return [path for path in self._all() if (path / MANIFEST).is_file()]

    def save(self, state: dict[str, Any], images: int) -> Path:
        """Write `state` as the checkpoint at `images` and remove those that are no longer kept.

        Raises: ValueError in one line if it cannot be written or reads back differently; earlier checkpoints
            are untouched then.
        """
        final = self.folder / f"{images:012d}"
        try:
            self._write(state, images, final)
        except OSError as error:
            shutil.rmtree(self.folder / f"{WRITING}{final.name}", ignore_errors=True)
            kept = self.paths()
            raise ValueError(
                f"cannot write the checkpoint {final}: {error.strerror or error}; free space or choose "
                f"another --out; last good checkpoint: {kept[-1] if kept else 'none'}"
            ) from None
        self._prune()
        return final

    def load(self) -> dict[str, Any] | None:
        """State of the newest complete checkpoint, on the CPU; None if the run has none yet.

        What a crash left behind is removed first, and each checkpoint that is passed over is logged.

        Raises: ValueError in one line if there are checkpoints and none of them can be used.
        """
        self._tidy()
        reasons = []
        for path in reversed(self._all()):
            found = _read(path)
            if not isinstance(found, str):
                return found
            LOGGER.warning("checkpoint %s is passed over: %s", path, found)
            reasons.append(f"{path.name}: {found}")
        if reasons:
            raise ValueError(
                f"no checkpoint in {self.folder} can be used ({'; '.join(reasons)}); put back a copy, or "
                "remove that folder to begin again"
            )
        return None

    def _all(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.name.isdigit() and path.is_dir())

    def _write(self, state: dict[str, Any], images: int, final: Path) -> None:
        writing, aside = (self.folder / f"{prefix}{final.name}" for prefix in (WRITING, ASIDE))
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            sync_folder(self.folder.parent)
        if writing.exists():
            shutil.rmtree(writing)
        writing.mkdir()
        # torch.save needs no more of a file than `write` and `flush`.
        files = {STATE: write_file(writing / STATE, lambda sink: torch.save(state, cast(IO[bytes], sink)))}
        manifest = {"images": images, "files": {name: to_json(entry) for name, entry in files.items()}}
        text = (json.dumps(manifest, indent=1) + "\n").encode()
        write_file(writing / MANIFEST, lambda sink: sink.write(text))
        sync_folder(writing)
        if final.exists():  # one that was found damaged, and was made anew
            final.rename(aside)
        try:
            writing.rename(final)
            sync_folder(self.folder)
            for name, entry in files.items():
                if (fault := fault_of(final / name, entry)) is not None:
                    raise OSError(f"it was not read back as written ({fault})")
        except OSError:
            shutil.rmtree(final, ignore_errors=True)
            if aside.exists():
                aside.rename(final)
            raise
        if aside.exists():
            shutil.rmtree(aside)

    def _prune(self) -> None:
        """Remove old checkpoints. That one cannot be removed is no reason to end a run."""
        try:
            for old in self.paths()[: -self.keep]:
                _remove(old)
        except OSError as error:
            LOGGER.warning("an old checkpoint in %s cannot be removed: %s", self.folder, error)

    def _tidy(self) -> None:
        """Put in order what a process left that died while it saved."""
        leftovers = sorted(self.folder.glob(".*")) if self.folder.is_dir() else []
        for path in leftovers:
            if path.name.startswith(ASIDE):
                home = self.folder / path.name.removeprefix(ASIDE)
                if not home.exists():
                    path.rename(home)
                    continue
            if path.name.startswith((WRITING, ASIDE, REMOVING)):
                LOGGER.info("removing %s, left by a save that did not finish", path)
                shutil.rmtree(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint in such a way that a process that dies meanwhile does not leave half of one."""
    going = path.with_name(f"{REMOVING}{path.name}")
    os.rename(path, going)
    shutil.rmtree(going)


def _read(path: Path) -> dict[str, Any] | str:
    """State of a checkpoint, or why it cannot be used."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = from_json(dict[str, Entry], manifest["files"])
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({' '.join(str(error).split())})"
    for name, entry in {STATE: None, **files}.items():
        fault = f"{name} is not in its {MANIFEST}" if entry is None else fault_of(path / name, entry)
        if fault is not None:
            return fault
    try:
        state: dict[str, Any] = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        return f"{STATE} cannot be read ({' '.join(str(error).split())[:120]})"
    return state
