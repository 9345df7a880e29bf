"""Checkpoints of a run: written whole or not at all, verified, and read back exactly."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import torch

from sfumato.core.config import from_json, to_json
from sfumato.core.world import ALONE, World
from sfumato.training.durable import Entry, fault_of, sync_folder, write_file
from sfumato.training.shards import SHARDS, join, read_shards, split, write_shards

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

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

    Of several processes the first writes and commits, while each writes its own part of what is sharded;
    the folder must be the same for all.

    Args:
        folder: created when the first checkpoint is written.
        keep: how many of the newest to keep, at least 1.
        world: the processes of the run.
    """

    def __init__(self, folder: Path, keep: int = 2, world: World = ALONE) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least one checkpoint must be kept")
        self.folder = folder
        self.keep = keep
        self.world = world

    def paths(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return [path for path in self._all() if (path / MANIFEST).is_file()]

    def save(self, state: dict[str, Any], images: int) -> Path:
        """Write `state` as the checkpoint at `images` and remove those that are no longer kept.

        Raises: ValueError in one line if it cannot be written or reads back differently; earlier checkpoints
            are untouched then.
        """
        final = self.folder / f"{images:012d}"
        marked, shards = split(state)
        plain = marked if shards else state
        try:
            writing = self.world.lead(lambda: self._begin(final))
            files = self.world.agree(lambda: write_shards(writing, shards, self.world))
            self.world.lead(lambda: self._finish(plain, images, files, writing, final))
        except OSError as error:
            shutil.rmtree(self.folder / f"{WRITING}{final.name}", ignore_errors=True)
            kept = self.paths()
            raise ValueError(
                f"cannot write the checkpoint {final}: {error.strerror or error}; free space or choose "
                f"another --out; last good checkpoint: {kept[-1] if kept else 'none'}"
            ) from None
        if self.world.leads:
            self._prune()
        return final

    def load(self, mesh: DeviceMesh | None = None) -> dict[str, Any] | None:
        """State of the newest complete checkpoint, on the CPU; None if the run has none yet.

        What a crash left behind is removed first, and each checkpoint that is passed over is logged.

        Args:
            mesh: over which sharded tensors are spread, on its devices; None = they are put together.

        Raises: ValueError in one line if there are checkpoints and none of them can be used.
        """
        paths = self.world.lead(self._tidied)
        reasons = []
        for path in reversed(paths):
            found = _read(path, self.world)
            fault = next((f for f in self.world.gather(found if isinstance(found, str) else None) if f), None)
            if fault is None and not isinstance(found, str):
                return cast(dict[str, Any], join(found, read_shards(path, mesh)))
            LOGGER.warning("checkpoint %s is passed over: %s", path, fault)
            reasons.append(f"{path.name}: {fault}")
        if reasons:
            raise self.world.fail(
                f"no checkpoint in {self.folder} can be used ({'; '.join(reasons)}); put back a copy, or "
                "remove that folder to begin again"
            )
        return None

    def _all(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.name.isdigit() and path.is_dir())

    def _begin(self, final: Path) -> Path:
        """An empty folder to write into."""
        writing = self.folder / f"{WRITING}{final.name}"
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            sync_folder(self.folder.parent)
        if writing.exists():
            shutil.rmtree(writing)
        writing.mkdir()
        return writing

    def _finish(
        self, state: object, images: int, files: dict[str, Entry], writing: Path, final: Path
    ) -> None:
        """Write what is not sharded, then the manifest; rename, and read back."""
        aside = self.folder / f"{ASIDE}{final.name}"
        # torch.save needs no more of a file than `write` and `flush`.
        own = write_file(writing / STATE, lambda sink: torch.save(state, cast(IO[bytes], sink)))
        files = {STATE: own, **files}
        manifest = {"images": images, "files": {name: to_json(entry) for name, entry in files.items()}}
        text = (json.dumps(manifest, indent=1) + "\n").encode()
        write_file(writing / MANIFEST, lambda sink: sink.write(text))
        if len(files) > 1:
            sync_folder(writing / SHARDS)
        sync_folder(writing)
        if final.exists():  # one that was found damaged, and was made anew
            final.rename(aside)
        try:
            writing.rename(final)
            if (fault := fault_of(final / STATE, own)) is not None:  # of the others it is the read-back
                raise OSError(f"it was not read back as written ({fault})")
        except OSError:
            shutil.rmtree(final, ignore_errors=True)
            if aside.exists():
                aside.rename(final)
            raise
        sync_folder(self.folder)
        if aside.exists():
            shutil.rmtree(aside)

    def _prune(self) -> None:
        """Remove old checkpoints. That one cannot be removed is no reason to end a run."""
        try:
            for old in self.paths()[: -self.keep]:
                _remove(old)
        except OSError as error:
            LOGGER.warning("an old checkpoint in %s cannot be removed: %s", self.folder, error)

    def _tidied(self) -> list[Path]:
        """Every checkpoint, after what a process that died while it saved has left is put in order."""
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
        return self._all()


def _remove(path: Path) -> None:
    """Remove a checkpoint in such a way that a process that dies meanwhile does not leave half of one."""
    going = path.with_name(f"{REMOVING}{path.name}")
    os.rename(path, going)
    shutil.rmtree(going)


def _read(path: Path, world: World) -> dict[str, Any] | str:
    """State of a checkpoint without its shards, or why it cannot be used; each process looks at its files."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = from_json(dict[str, Entry], manifest["files"])
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({' '.join(str(error).split())})"
    if STATE not in files:
        return f"{STATE} is not in its {MANIFEST}"
    for i in world.share(len(files)):
        name = list(files)[i]
        if (fault := fault_of(path / name, files[name])) is not None:
            return fault
    try:
        state: dict[str, Any] = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
        return f"{STATE} cannot be read ({' '.join(str(error).split())[:120]})"
    return state
