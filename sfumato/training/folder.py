"""The folder of a run: whose it is, that one process alone writes into it, and what crashes left there."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from sfumato.core.config import to_json
from sfumato.training.durable import replace_file, sync_folder
from sfumato.training.recipe import Recipe, differences, retuned

__all__ = ["RUN_FILES", "claim", "forget", "held", "settled", "tidy"]

LOGGER = logging.getLogger(__name__)
RECIPE = "recipe.json"
# What a run writes and a run of another recipe must not find; the recipe, which says whose the rest is, last.
RUN_FILES = (
    *("checkpoints", "previews", "system", "best", "averages"),
    *("adapter.safetensors", "log.jsonl", "skipped.json", "tokenizer.json", RECIPE),
)
# How `write_whole` names a file, and `write_folder` a folder, before it is finished or after it was replaced.
UNFINISHED = re.compile(rf"\..+\.\d+\.part|\.({'|'.join(map(re.escape, RUN_FILES))})\.\w{{8}}(\.old)?")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder, which is made; the lock dies with the process.

    Raises: ValueError in one line if another process trains there, or the folder cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY) if os.name == "posix" else None
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror}; choose another --out") from None
    try:
        if descriptor is not None:
            _lock(descriptor, folder)
        yield
    finally:
        with contextlib.suppress(OSError):  # one is not empty
            for path in made:
                path.rmdir()
        if descriptor is not None:
            os.close(descriptor)


def claim(recipe: Recipe, *, force: bool = False) -> bool:
    """Write recipe.json, or check that the run in the folder is this one; allowed changes are logged.

    Args:
        force: remove a run of another recipe, with its checkpoints, instead of refusing.

    Returns: whether the run begins here.
    Raises: ValueError in one line with what differs, or with what would be overwritten.
    """
    folder = recipe.folder
    trouble = _trouble(folder, recipe)
    if trouble and not force:
        raise ValueError(f"{trouble}; choose another --out, or --force to remove it and begin again")
    if trouble:
        forget(folder)
    new = not (folder / RECIPE).is_file()
    if not new and (changed := retuned(json.loads((folder / RECIPE).read_text("utf-8")), recipe)):
        LOGGER.warning("the run in %s goes on with other settings: %s", folder, "; ".join(changed))
    text = (json.dumps(to_json(recipe), indent=1) + "\n").encode()
    try:
        replace_file(folder / RECIPE, text)
    except OSError as error:
        raise ValueError(f"cannot write {folder / RECIPE}: {error.strerror}; choose another --out") from None
    return new


def forget(folder: Path) -> None:
    """Remove what a run wrote, and nothing else; a cache, which is known by what it was made of, stays."""
    for path in (*(folder / name for name in RUN_FILES), *folder.glob("skipped-*.json")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove unfinished files of a process that died; only for who holds the folder."""
    for place in (folder, *(folder / name for name in ("previews", "averages", "latents", "texts"))):
        for path in place.glob(".*") if place.is_dir() else ():
            if UNFINISHED.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def settled(folder: Path) -> None:
    """Flush to the disk the files that the run depends on from its first step to its last."""
    for path in (path for name in RUN_FILES if (path := folder / name).is_file()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def _trouble(folder: Path, recipe: Recipe) -> str:
    """Why this recipe cannot go on in a folder; "" if it can."""
    path = folder / RECIPE
    if not path.is_file():
        found = next((name for name in RUN_FILES if (folder / name).exists()), None)
        return f"{folder} holds {found} and no {RECIPE}, so it is not known whose that is" if found else ""
    try:
        changed = differences(json.loads(path.read_text("utf-8")), recipe)
    except (ValueError, AttributeError) as error:
        return f"{path} is not the JSON of a recipe ({error})"
    return f"{folder} holds a run of another recipe ({'; '.join(changed)})" if changed else ""


def _lock(descriptor: int, folder: Path) -> None:
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another process trains in {folder}; wait for it, or choose another --out"
        ) from None
    except OSError:  # some network file systems have no locks
        return
