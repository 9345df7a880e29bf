"""The verb that measures: evaluate."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from sfumato.api import load
from sfumato.cli.output import check_writable
from sfumato.cli.parsing import parse
from sfumato.core.config import to_json
from sfumato.core.registry import unknown
from sfumato.core.world import joined
from sfumato.evaluation.openmoji import Protocol
from sfumato.evaluation.openmoji import evaluate as measure

__all__ = ["evaluate"]

WAIT = 600.0  # seconds that processes wait for each other


@dataclass(frozen=True, kw_only=True)
class OpenMoji:
    """Measure how well a system reconstructs the OpenMoji pictures, and draws them from their captions."""

    directory: Positional[Path | None] = None
    """Folder that `sfumato data openmoji` wrote; by default rendered once into the user's cache."""
    protocol: Annotated[Protocol, arg(name="")] = field(default_factory=Protocol)
    sheet: Path | None = None
    """PNG file for a sheet of 48 prompts."""
    json: bool = False
    """Print JSON."""
    system: Path | None = None
    """Folder of the system; by default the one that comes with sfumato."""
    device: str = "auto"
    """cpu, cuda ...; auto takes an accelerator if there is one."""


def evaluate(args: list[str]) -> int:
    """`sfumato evaluate`."""
    if not args or args[0] in ("-h", "--help"):
        print(
            "usage: sfumato evaluate openmoji [DIR] ...\n\n"
            "  openmoji DIR  Reconstruction PSNR and retrieval accuracy on the OpenMoji set.\n\n"
            "More about it: sfumato evaluate openmoji --help"
        )
        return 0
    if args[0] not in TASKS:
        raise ValueError(unknown("evaluation", args[0], list(TASKS)))
    return TASKS[args[0]](args[1:])


def openmoji(args: list[str]) -> int:
    """`sfumato evaluate openmoji`."""
    flags = parse(OpenMoji, "evaluate openmoji", args)
    if flags.sheet is not None:
        check_writable(flags.sheet)
    with joined(flags.device, seconds=WAIT) as world, _progress() as told:
        system = world.agree(lambda: load(flags.system, device=world.device(flags.device)))
        result = measure(
            system,
            flags.directory,
            protocol=flags.protocol,
            sheet=flags.sheet,
            progress=told if world.leads else None,
            world=world,
        )
    if world.leads:
        print(json.dumps(to_json(result), indent=1) if flags.json else "\n".join(result.lines()))
    return 0


TASKS: dict[str, Callable[[list[str]], int]] = {"openmoji": openmoji}


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on the terminal, if there is one, for each part of the work."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks = {}

        def told(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield told
