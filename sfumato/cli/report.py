"""The verb for reports, which take many runs: report dit-designs."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from sfumato.cli.bench import progress
from sfumato.cli.output import check_writable
from sfumato.cli.parsing import parse
from sfumato.cli.runs import code_of
from sfumato.core.registry import unknown
from sfumato.reports.findings import findings
from sfumato.reports.pages import NAME, dry, page, recorded, write
from sfumato.reports.plan import Plan
from sfumato.reports.running import budgeted, run
from sfumato.training.signals import Stopped

__all__ = ["report"]


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Redo the findings on DiT: block designs at equal compute, loss against compute, and what helps.

    Every cell is a run below --runs; the same command goes on where it was stopped, and runs no cell twice.
    Nor does it run those that a report in --out has from the same settings.
    """

    plan: Annotated[Plan, arg(name="")] = field(default_factory=Plan)
    dry_run: bool = False
    """List the cells with parameters, operations, and the time that one measured step foretells; run none."""
    out: Path | None = None
    """Folder for dit-designs.json, dit-designs.md and the charts; by default the tables are printed alone."""


def report(args: list[str]) -> int:
    """`sfumato report dit-designs`; 75 after SIGTERM and 130 after Ctrl-C, when the same command goes on."""
    if not args or args[0] in ("-h", "--help"):
        print(
            "usage: sfumato report dit-designs ...\n\n"
            "  dit-designs   Compare block designs, sizes and improvements of DiT on scenes.\n\n"
            "All settings: sfumato report dit-designs --help"
        )
        return 0
    if args[0] != NAME:
        raise ValueError(unknown("report", args[0], [NAME]))
    flags = parse(Flags, f"report {NAME}", args[1:])
    if flags.out is not None:
        check_writable(flags.out / f"{NAME}.md")
    try:
        with progress() as told:
            planned, costs = budgeted(flags.plan, told)
            known = [] if flags.out is None else recorded(flags.out)
            outcomes = [] if flags.dry_run else run(flags.plan, planned, told, known)
    except Stopped as stopped:
        print(f"sfumato: {stopped}; the same command goes on from here", file=sys.stderr)
        return code_of(stopped)
    if flags.dry_run:
        print(dry(planned, costs))
        return 0
    found = findings(flags.plan, outcomes, costs)
    print(page(flags.plan, found))
    for path in () if flags.out is None else write(flags.out, flags.plan, outcomes, costs, found):
        print(path)
    return 0
