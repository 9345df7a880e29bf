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
from sfumato.cli.evaluating import Flags, measured
from sfumato.cli.output import check_writable
from sfumato.cli.parsing import parse
from sfumato.core.config import from_json, to_json
from sfumato.core.registry import unknown
from sfumato.core.world import joined
from sfumato.data.locations import is_remote
from sfumato.evaluation.evaluate import Result, differences
from sfumato.evaluation.likelihood import BoundProtocol
from sfumato.evaluation.likelihood import bits as bound
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


@dataclass(frozen=True, kw_only=True)
class Bits:
    """Measure how well a system of discrete diffusion predicts pictures: a bound in bits per dimension."""

    system: Positional[Path]
    """Folder of the system, or a file of another program."""
    directory: Positional[Path]
    """Pictures: a folder or tar shards."""
    protocol: Annotated[BoundProtocol, arg(name="")] = field(default_factory=BoundProtocol)
    batch: int = 32
    """Pictures computed at a time."""
    json: bool = False
    """Print JSON, with the curve of all steps."""
    device: str = "auto"
    """cpu, cuda ...; auto takes an accelerator if there is one."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Put the figures of several systems side by side; they must be of one protocol."""

    results: Positional[tuple[Path, ...]]
    """Files with what `sfumato evaluate SYSTEM --json` printed."""


def evaluate(args: list[str]) -> int:
    """`sfumato evaluate`."""
    if not args or args[0] in ("-h", "--help"):
        print(
            "usage: sfumato evaluate SYSTEM --reference DIR ...\n"
            "       sfumato evaluate openmoji [DIR] ...\n"
            "       sfumato evaluate bits SYSTEM DIR ...\n"
            "       sfumato evaluate compare A.json B.json ...\n\n"
            "  SYSTEM        FID, KID, precision and recall ... of a system, a folder or an .npz file.\n"
            "  openmoji DIR  Reconstruction PSNR and retrieval accuracy on the OpenMoji set.\n"
            "  bits          The bound of a discrete diffusion on pictures, in bits per dimension.\n"
            "  compare A B   Put results of one protocol side by side.\n\n"
            "More about each: sfumato evaluate . --help, sfumato evaluate openmoji --help"
        )
        return 0
    if args[0] in TASKS:
        return TASKS[args[0]](args[1:])
    if not args[0].startswith("-") and not Path(args[0]).exists() and not is_remote(args[0]):
        raise ValueError(
            f"{unknown('evaluation', args[0], list(TASKS))}, or the path of a system or of pictures"
        )
    return general(args)


def general(args: list[str]) -> int:
    """`sfumato evaluate SYSTEM`."""
    flags = parse(Flags, "evaluate", args)
    with joined(flags.device, seconds=WAIT) as world, _progress() as told:
        for text in measured(flags, told, world):
            print(text, flush=True)
    return 0


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


def bits(args: list[str]) -> int:
    """`sfumato evaluate bits`."""
    flags = parse(Bits, "evaluate bits", args)
    if flags.batch < 1:
        raise ValueError(f"--batch is {flags.batch}; allowed: 1 or more pictures")
    with joined(flags.device, seconds=WAIT) as world, _progress() as told:
        system = world.agree(lambda: load(flags.system, device=world.device(flags.device)))
        result = bound(
            system,
            flags.directory,
            protocol=flags.protocol,
            batch=flags.batch,
            tell=told if world.leads else lambda what, done, total: None,
            world=world,
        )
    if world.leads:
        print(json.dumps(to_json(result), indent=1) if flags.json else "\n".join(result.lines()))
    return 0


def compare(args: list[str]) -> int:
    """`sfumato evaluate compare`."""
    flags = parse(Compare, "evaluate compare", args)
    if len(flags.results) < 2:
        raise ValueError(f"{len(flags.results)} result to compare; give at least two files of --json")
    (first, result), *others = results = [(path, _read(path)) for path in flags.results]
    for path, other in others:
        if unlike := differences(result.protocol, other.protocol):
            raise ValueError(
                f"{first} and {path} cannot be compared: {'; '.join(unlike)}; measure both under one protocol"
            )
    for path, found in results:
        print(path, *(figure.line() for figure in found.figures), sep="\n  ")
    return 0


def _read(path: Path) -> Result:
    try:
        return from_json(Result, path.read_text("utf-8"), where=str(path))
    except json.JSONDecodeError:
        raise ValueError(f"{path} is no result of `sfumato evaluate --json`: not JSON") from None


TASKS: dict[str, Callable[[list[str]], int]] = {"openmoji": openmoji, "bits": bits, "compare": compare}


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
