"""Following a run from another process: each system that it publishes, copied so that it is safe to load."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Published", "watch"]

MANIFEST = "system.json"  # of a system folder; it holds the digests of the other files


@dataclass(frozen=True)
class Published:
    """What a run published.

    Attributes:
        folder: a copy of the run's system/, which goes away when the iteration goes on.
        images: seen by the run until then.
        last: whether the run is at its end.
    """

    folder: Path
    images: int
    last: bool


def watch(run: Path, *, every: float = 5.0, timeout: float = 3600.0) -> Iterator[Published]:
    """Each system that a run publishes from now on, beginning with the one that is there.

    Ends after the system of the run's last image, or when there was no new one for `timeout` seconds. A run
    that publishes faster than its systems are used is followed to the newest; the ones between are left out.

    Args:
        run: folder of the run; nothing is written into it.
        every: seconds between two looks.

    Raises: ValueError in one line if the folder is no run.
    """
    total = _total(run)
    known, since = b"", time.monotonic()
    while True:
        manifest, images = _manifest(run), _images(run)
        if manifest not in (known, b"") and images is not None:
            with tempfile.TemporaryDirectory(prefix="sfumato-watch-") as place:
                copy = Path(place) / "system"
                if _copied(run / "system", copy, manifest):
                    known = manifest
                    yield Published(copy, images, images >= total)
                    since = time.monotonic()
        if known == manifest and images is not None and images >= total:
            return
        if time.monotonic() - since >= timeout:
            return
        time.sleep(every)


def _total(run: Path) -> int:
    """Images of the whole run."""
    file = run / "recipe.json"
    try:
        return int(json.loads(file.read_text("utf-8"))["trainer"]["images"])
    except OSError:
        raise ValueError(f"there is no run in {run}: no recipe.json; give the folder of a run") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file} is not the recipe of a run; give the folder of a run") from None


def _manifest(run: Path) -> bytes:
    try:
        return (run / "system" / MANIFEST).read_bytes()
    except OSError:  # not published yet, or between the two renames that replace it
        return b""


def _images(run: Path) -> int | None:
    """Images that the published system had seen; None if that cannot be known at this moment.

    A run publishes right after the checkpoint of the same state, so it is the newest checkpoint that is not
    newer than the system.
    """
    try:
        written = (run / "system" / MANIFEST).stat().st_mtime_ns
        found = [
            int(file.parent.name)
            for file in (run / "checkpoints").glob("*/manifest.json")
            if file.parent.name.isdigit() and file.stat().st_mtime_ns <= written
        ]
    except OSError:  # one was replaced or removed meanwhile
        return None
    return max(found, default=None)


def _copied(folder: Path, copy: Path, manifest: bytes) -> bool:
    """Copy a system; False if it was replaced meanwhile, so that the copy may be a mixture."""
    try:
        shutil.copytree(folder, copy)
        return manifest == (copy / MANIFEST).read_bytes() == (folder / MANIFEST).read_bytes()
    except (OSError, shutil.Error):
        return False
