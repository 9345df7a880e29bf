"""The verb for reports, which take many runs or systems that were trained: report NAME."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from sfumato.cli.bench import progress
from sfumato.cli.output import check_writable
from sfumato.cli.parsing import parse
from sfumato.cli.runs import code_of
from sfumato.core.registry import unknown
from sfumato.reports import cascades, pages, sweeps, unclip
from sfumato.reports.findings import findings
from sfumato.reports.plan import Plan
from sfumato.reports.running import budgeted, run
from sfumato.training.signals import Stopped

__all__ = ["report"]


@dataclass(frozen=True, kw_only=True)
class DiTFlags:
    """Redo the findings on DiT: block designs at equal compute, loss against compute, and what helps.

    Every cell is a run below --runs; the same command goes on where it was stopped, and runs no cell twice.
    Nor does it run those that a report in --out has from the same settings.
    """

    plan: Annotated[Plan, arg(name="")] = field(default_factory=Plan)
    dry_run: bool = False
    """List the cells with parameters, operations, and the time that one measured step foretells; run none."""
    out: Path | None = None
    """Folder for dit-designs.json, dit-designs.md and the charts; by default the tables are printed alone."""


@dataclass(frozen=True, kw_only=True)
class CascadesFlags:
    """Measure pixel systems over their settings: thresholds, noise on what is enlarged, and guides.

    Nothing is trained. With --out the same command goes on where it was stopped, and runs no cell twice.
    """

    plan: Annotated[cascades.Plan, arg(name="")] = field(default_factory=cascades.Plan)
    out: Path | None = None
    """Folder for cascades.json, cascades.md, charts and sheets; by default the tables are printed alone."""


@dataclass(frozen=True, kw_only=True)
class UnclipFlags:
    """Measure unCLIP: retrieval by its CLIP, priors against none, pictures as points, and other systems.

    Nothing is trained. With --out the same command goes on where it was stopped, and runs no cell twice.
    """

    plan: Annotated[unclip.Plan, arg(name="")] = field(default_factory=unclip.Plan)
    out: Path | None = None
    """Folder for unclip.json, unclip.md and sheets; by default the tables are printed alone."""


def report(args: list[str]) -> int:
    """`sfumato report NAME`; 75 after SIGTERM and 130 after Ctrl-C, when the same command goes on."""
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, REPORTS)) + 2
        rows = [f"  {name:<{width}}{(verb.__doc__ or '').splitlines()[0]}" for name, verb in REPORTS.items()]
        usage = "usage: sfumato report NAME ..."
        print("\n".join([usage, "", *rows, "", "All settings of one: sfumato report NAME --help"]))
        return 0
    if args[0] not in REPORTS:
        raise ValueError(unknown("report", args[0], list(REPORTS)))
    try:
        return REPORTS[args[0]](args[1:])
    except Stopped as stopped:
        print(f"sfumato: {stopped}; the same command goes on from here", file=sys.stderr)
        return code_of(stopped)


def _dit(args: list[str]) -> int:
    """Compare block designs, sizes and improvements of DiT on scenes."""
    flags = parse(DiTFlags, f"report {pages.NAME}", args)
    _check_out(flags.out, pages.NAME)
    with progress() as told:
        planned, costs = budgeted(flags.plan, told)
        known = [] if flags.out is None else pages.recorded(flags.out)
        outcomes = [] if flags.dry_run else run(flags.plan, planned, told, known)
    if flags.dry_run:
        print(pages.dry(planned, costs))
        return 0
    found = findings(flags.plan, outcomes, costs)
    print(pages.page(flags.plan, found))
    for path in () if flags.out is None else pages.write(flags.out, flags.plan, outcomes, costs, found):
        print(path)
    return 0


def _cascades(args: list[str]) -> int:
    """Thresholds, noise on what is enlarged, and guides of pixel systems on OpenMoji."""
    flags = parse(CascadesFlags, f"report {cascades.NAME}", args)
    _check_out(flags.out, cascades.NAME)
    return _swept(cascades.report_on(flags.plan), flags.out)


def _unclip(args: list[str]) -> int:
    """CLIP, priors and computing with pictures of unCLIP on OpenMoji, beside other systems."""
    flags = parse(UnclipFlags, f"report {unclip.NAME}", args)
    _check_out(flags.out, unclip.NAME)
    return _swept(unclip.report_on(flags.plan), flags.out)


REPORTS: Mapping[str, Callable[[list[str]], int]] = {
    pages.NAME: _dit,
    cascades.NAME: _cascades,
    unclip.NAME: _unclip,
}


def _swept(asked: sweeps.Report, out: Path | None) -> int:
    with progress() as told:
        outcomes = sweeps.run(asked, out, told)
    print(sweeps.page(asked, outcomes))
    for path in () if out is None else sweeps.write(asked, outcomes, out):
        print(path)
    return 0


def _check_out(out: Path | None, name: str) -> None:
    if out is not None:
        check_writable(out / f"{name}.md")
