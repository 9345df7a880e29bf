"""Weights in the caches of the model hub and of torch.hub; nothing is downloaded here."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["REPOSITORY", "WEIGHTS", "hub_cache", "located", "resolved", "snapshot", "torch_hub"]

WEIGHTS = (
    *("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin"),
    "open_clip_pytorch_model.bin",
)
"""Names that a folder's weights may have, in the order in which they are looked for."""


REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
"""ORG/NAME[@REVISION] of the model hub."""


def torch_hub() -> Path:
    """Folder of the files that torch.hub has downloaded."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TORCH_HOME") or cache / "torch") / "hub" / "checkpoints"


def hub_cache() -> Path:
    """Folder in which the model hub's programs keep what they download."""
    home = (
        os.environ.get("HF_HOME")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    )
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")


def snapshot(repository: str, revision: str = "main") -> Path | None:
    """Folder of ORG/NAME in the cache of the model hub, or None.

    Args:
        revision: a branch, tag or commit.
    """
    folder = hub_cache() / f"models--{repository.replace('/', '--')}"
    ref = folder / "refs" / revision
    commit = ref.read_text("utf-8").strip() if ref.is_file() else revision
    found = folder / "snapshots" / commit
    return found if found.is_dir() else None


def resolved(path: Path) -> Path:
    """The path, or where ORG/NAME[@REVISION] of the model hub lies in its cache if there is no such path.

    Raises: ValueError in one line if it is of that form and is in neither place.
    """
    match = REPOSITORY.fullmatch(path.as_posix())
    if path.exists() or match is None:
        return path
    place = snapshot(match[1], match[2] or "main")
    if place is None:
        raise ValueError(
            f"there is no file or folder {path}, nor is it in the cache of the model hub; check the path, or "
            f"fetch it from there first: sfumato pull {path}"
        )
    return place


def located(
    given: Path | None, what: str, *, files: Sequence[str] = (), repositories: Sequence[str] = ()
) -> Path:
    """The weights file of a network.

    Args:
        given: a file, a folder that holds one of WEIGHTS, or ORG/NAME[@REVISION] in the cache; None = the
            first that is found of `files` in the cache of torch.hub and of `repositories` in the model hub's.
        what: the network, for errors.

    Raises: ValueError in one line that says where it was looked for and what to do.
    """
    if given is not None:
        name, _, revision = str(given).partition("@")
        place = given if given.exists() else snapshot(name, revision or "main")
        if place is None:
            raise ValueError(
                f"there are no weights of {what} at {given}: no such file or folder, and not in the cache"
            )
        if (found := _within(place)) is None:
            raise ValueError(f"{place} holds no weights of {what}: none of {', '.join(WEIGHTS)}")
        return found
    for file in files:
        if (torch_hub() / file).is_file():
            return torch_hub() / file
    for repository in repositories:
        place = snapshot(repository)
        if place is not None and (found := _within(place)) is not None:
            return found
    wanted = [
        *(f"{torch_hub()}/{file}" for file in files),
        *(f"{name} of the model hub" for name in repositories),
    ]
    raise ValueError(
        f"the weights of {what} are not on this machine (looked for {', '.join(wanted)}); sfumato downloads "
        "nothing: fetch one of them, or give its path"
    )


def _within(place: Path) -> Path | None:
    if place.is_file():
        return place
    return next((place / name for name in WEIGHTS if (place / name).is_file()), None)
