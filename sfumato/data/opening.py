"""The one place that decides what a data path is: a folder of pictures, tar shards, or scenes."""

from __future__ import annotations

from pathlib import Path

from sfumato.data.entries import Entry, read_entries
from sfumato.data.locations import address, is_remote, shard_names
from sfumato.data.scenes.source import PREFIX, scene_entries
from sfumato.data.shards import read_shards
from sfumato.data.store import ShardStore

__all__ = ["open_pictures"]


def open_pictures(
    path: str | Path, store: ShardStore | None = None, *, allow_missing: bool = False
) -> tuple[list[Entry], tuple[str, ...]]:
    """The pictures of a data path, and the names of their classes.

    Scenes drawn as they are read if it begins with "scenes:", shards if `locations.shard_names` finds any
    there, else a folder as in `entries.read_entries`.

    Args:
        store: of local copies and indexes of shards; by default one in the user's cache.
        allow_missing: see `entries.read_entries`.

    Raises: ValueError in one line if there are no pictures, or the metadata or a shard are damaged.
    """
    if str(path).startswith(PREFIX):
        return scene_entries(str(path)), ()
    if names := shard_names(path):
        return read_shards(names, store or ShardStore())
    if is_remote(address(path)):
        raise ValueError(
            f"{address(path)} holds no tar files; pictures of other machines are read from shards"
        )
    return read_entries(Path(path), allow_missing=allow_missing)
