"""The verbs about pictures to learn from: data openmoji, data scenes, data check."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from sfumato.cli.parsing import parse
from sfumato.core.registry import unknown
from sfumato.data.scenes.splits import Split

__all__ = ["data"]


@dataclass(frozen=True, kw_only=True)
class OpenMoji:
    """Render the named pictures of the OpenMoji set into an image folder with captions."""

    directory: Positional[Path]
    """Folder to write; an interrupted run goes on where it stopped."""
    size: int = 64
    """Side in pixels."""


@dataclass(frozen=True, kw_only=True)
class ScenesFlags:
    """Write captioned scenes as tar shards; training draws its own from the data path scenes:COUNT."""

    directory: Positional[Path]
    """Folder to write; a new one."""
    count: int
    """Number of pictures."""
    size: int = 64
    """Side in pixels: 32, 64 or 128."""
    seed: int = 0
    """Other seeds, other scenes."""
    split: Split = "train"
    """What is held out from training, and so in none of the scenes of train."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """Open every picture of a folder or of tar shards; report sizes, captions, damage and duplicates."""

    directory: Positional[Path]
    """Image folder: class folders, metadata.jsonl, metadata.csv or .txt files beside the pictures. Or tar
    shards: a folder of them, 'shards/*.tar', 'shards/{000..009}.tar.gz', s3://bucket/{000..009}.tar."""
    cache: Path | None = None
    """Folder of indexes and copies of shards; by default one in the user's cache."""
    json: bool = False
    """Print JSON."""


def data(args: list[str]) -> int:
    """`sfumato data`."""
    if not args or args[0] in ("-h", "--help"):
        print(
            "usage: sfumato data {openmoji,scenes,check} ...\n\n"
            "  openmoji DIR  Render the OpenMoji set into an image folder with captions.\n"
            "  scenes DIR    Write captioned scenes of colored shapes as tar shards.\n"
            "  check DIR     Report on a folder of pictures, or on tar shards.\n\n"
            "More about one: sfumato data check --help"
        )
        return 0
    if args[0] not in TASKS:
        raise ValueError(unknown("data command", args[0], list(TASKS)))
    return TASKS[args[0]](args[1:])


def openmoji(args: list[str]) -> int:
    """`sfumato data openmoji`."""
    from sfumato.data.openmoji import render

    flags = parse(OpenMoji, "data openmoji", args)
    with _progress("rendering") as told:
        print(render(flags.directory, size=flags.size, progress=told))
    return 0


def scenes(args: list[str]) -> int:
    """`sfumato data scenes`."""
    from sfumato.data.scenes.source import SceneSet, write_scenes

    flags = parse(ScenesFlags, "data scenes", args)
    wanted = SceneSet(count=flags.count, size=flags.size, seed=flags.seed, split=flags.split)
    with _progress("drawing") as told:
        print(write_scenes(flags.directory, wanted, progress=told))
    return 0


def check(args: list[str]) -> int:
    """`sfumato data check`."""
    from sfumato.data.check import check as examine
    from sfumato.data.store import ShardStore

    flags = parse(Check, "data check", args)
    with _progress("reading") as told:
        report = examine(flags.directory, store=ShardStore(flags.cache), progress=told)
    print(json.dumps(report.as_dict(), indent=1) if flags.json else "\n".join(report.lines()))
    if not report.ok:
        name, why = next(iter(report.failed.items()))
        raise ValueError(
            f"{len(report.failed)} of {report.count} pictures in {report.directory} cannot be read, "
            f"the first is {name} ({why}); replace or remove them"
        )
    return 0


TASKS: dict[str, Callable[[list[str]], int]] = {"openmoji": openmoji, "scenes": scenes, "check": check}


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the terminal, if there is one, told (done, in all)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
