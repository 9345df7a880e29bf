"""The verb that looks for what is broken: doctor."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from sfumato.api import load
from sfumato.cli.parsing import parse
from sfumato.evaluation.doctor import Examination, examine

if TYPE_CHECKING:
    from sfumato.evaluation.doctor import Diagnosis

__all__ = ["doctor"]

BROKEN = 1  # exit code
MARKS = {True: "pass", False: "FAIL", None: "-"}


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Examine a system with pictures of its data set, and name the part that is broken.

    Exit code 0 if every check passes, 1 if not.
    """

    system: Positional[Path | None] = None
    """Folder of the system; by default the one that comes with sfumato."""
    data: Path
    """Image folder that it was trained on."""
    examination: Annotated[Examination, arg(name="")] = field(default_factory=Examination)
    json: bool = False
    """Print JSON."""
    device: str = "auto"
    """cpu, cuda ...; auto takes an accelerator if there is one."""


def doctor(args: list[str]) -> int:
    """`sfumato doctor`."""
    flags = parse(Doctor, "doctor", args)
    system = load(flags.system, device=flags.device)
    with _progress() as told:
        diagnosis = examine(system, flags.data, examination=flags.examination, progress=told)
    if flags.json:
        checks = [asdict(check) for check in diagnosis.checks]
        broken = diagnosis.broken.part if diagnosis.broken else None
        print(json.dumps({"broken": broken, "diagnosis": diagnosis.line(), "checks": checks}, indent=1))
    else:
        _print(diagnosis)
    return BROKEN if diagnosis.broken else 0


def _print(diagnosis: Diagnosis) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE)
    for name in ("check", "", "found", "wanted"):
        table.add_column(name)
    for check in diagnosis.checks:
        table.add_row(check.name, MARKS[check.passed], check.found, check.wanted)
    Console().print(table)
    print(diagnosis.line())


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line on the terminal, if there is one, with the check that is made."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda name: None
        return
    with console.status("examining") as status:
        yield lambda name: status.update(f"examining: {name}")
