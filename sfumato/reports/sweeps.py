"""Reports on trained systems: cells that each measure one setting, recorded one by one, and their pages."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from sfumato import __version__
from sfumato.core.chart import Curve, chart
from sfumato.core.config import from_json, to_json
from sfumato.core.png import save_png, write_whole
from sfumato.evaluation.measures import Proportion
from sfumato.reports.pages import share, table
from sfumato.training.signals import Stop

__all__ = ["Cell", "Figure", "Measured", "Outcome", "Report", "Sweep", "page", "recorded", "run", "write"]

Figure = Proportion | float
Tell = Callable[[str, int, int], None]
"""Told (what, done, in all)."""
GAP = 6  # pixels between the rows of a sheet


@dataclass(frozen=True)
class Measured:
    """What a cell found.

    Attributes:
        figures: by name.
        picture: (3, H, W) uint8, the cell's row of the sheet; None = it has none.
    """

    figures: Mapping[str, Figure]
    picture: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of a curve, or a row of its own.

    Attributes:
        name: of the curve.
        x: None = a level that all points are compared with.
        told: JSON data that decide what is found: digests of systems and pictures, and settings.
        measure: does the work.
    """

    name: str
    x: float | None = None
    told: Mapping[str, object]
    measure: Callable[[], Measured]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A part of a report.

    Attributes:
        name: in the names of files.
        title: heading.
        x: what is varied; "" = nothing, the rows are things of their own.
        note: what the figures are, and the columns of the sheet.
        cells: in the order of the table.
    """

    name: str
    title: str
    x: str = ""
    note: str
    cells: tuple[Cell, ...]

    def identity(self, cell: Cell) -> str:
        """Of everything that decides what the cell finds."""
        told = json.dumps([self.name, cell.name, cell.x, cell.told], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a command measures.

    Attributes:
        name: of the report, and of its files.
        plan: the settings as JSON data.
        notice: text that goes into the pictures: license and authors.
    """

    name: str
    title: str
    plan: Mapping[str, object]
    sweeps: tuple[Sweep, ...]
    notice: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A cell that is done, as NAME.json keeps it.

    Attributes:
        pictured: whether its row of the sheet is NAME-cells/IDENTITY.png.
        identity: see `Sweep.identity`.
    """

    part: str
    name: str
    x: float | None
    figures: Mapping[str, Figure]
    pictured: bool
    identity: str


def recorded(name: str, out: Path | None) -> dict[str, Outcome]:
    """The cells by identity that a report in the folder has, also one that was stopped.

    Raises: ValueError in one line if the file is not one of a report.
    """
    path = None if out is None else out / f"{name}.json"
    if path is None or out is None or not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text("utf-8"))
        cells = [*data["cells"], *data["earlier"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} holds no report; remove it, or choose another --out") from None
    found = [from_json(Outcome, one, where=str(path)) for one in cells]
    return {one.identity: one for one in found if not one.pictured or _row(out, name, one).is_file()}


def run(report: Report, out: Path | None, tell: Tell) -> list[Outcome]:
    """Measure every cell that is not recorded; with a folder each is recorded as soon as it is done.

    Raises:
        ValueError: in one line for what a cell refuses.
        Stopped: after SIGTERM or Ctrl-C; the same call goes on from the last cell that was done.
    """
    known, planned = recorded(report.name, out), [(s, c) for s in report.sweeps for c in s.cells]
    done: list[Outcome] = []
    with contextlib.ExitStack() as stack:
        if out is not None:  # else there is nothing to go on with
            stack.enter_context(stack.enter_context(Stop()).interruptible())
        for i, (sweep, cell) in enumerate(planned):
            tell("measuring", i, len(planned))
            outcome = known.get(sweep.identity(cell))
            if outcome is None:
                outcome = _measured(report, sweep, cell, out)
                known[outcome.identity] = outcome
                if out is not None:
                    _record(report, out, [*done, outcome], known)
            done.append(outcome)
        tell("measuring", len(planned), len(planned))
    return done


def page(report: Report, outcomes: Sequence[Outcome]) -> str:
    """The tables as Markdown."""
    parts = []
    for sweep, own in _parts(report, outcomes):
        names = _names(own)
        parts += [f"## {sweep.title}", sweep.note]
        if names:
            header = ["", *([sweep.x] if sweep.x else []), *names]
            rows = [
                [
                    one.name,
                    *([_short(one.x)] if sweep.x else []),
                    *(_short(one.figures.get(n)) for n in names),
                ]
                for one in own
            ]
            parts.append(table(header, rows))
    return "\n\n".join(parts)


def write(report: Report, outcomes: Sequence[Outcome], out: Path) -> Iterator[Path]:
    """The files of the report, by name NAME*, each as it is written."""
    yield _record(report, out, outcomes, recorded(report.name, out))
    shown = []
    for sweep, own in _parts(report, outcomes):
        for figure in _names(own) if sweep.x else ():
            path = out / f"{report.name}-{sweep.name}-{_slug(figure)}.png"
            drawn = chart(
                list(_curves(own, figure)), title=sweep.title, labels=(sweep.x, figure), scale="linear"
            )
            yield save_png(path, drawn)
            shown.append(f"![{sweep.title}: {figure}]({path.name})")
        rows = [_row(out, report.name, one) for one in own if one.pictured]
        if rows:
            path = out / f"{report.name}-{sweep.name}-sheet.png"
            yield save_png(path, _sheet(rows), text=report.notice)
            names = ", ".join(_label(one) for one in own if one.pictured)
            shown.append(f"![{sweep.title}]({path.name})\n\nRows from the top: {names}.")
    text = f"# {report.title}\n\n`sfumato report {report.name}`\n\n{page(report, outcomes)}\n\n"
    yield write_whole(out / f"{report.name}.md", (text + "\n\n".join(shown) + "\n").encode())


def _measured(report: Report, sweep: Sweep, cell: Cell, out: Path | None) -> Outcome:
    found = cell.measure()
    outcome = Outcome(
        part=sweep.name,
        name=cell.name,
        x=cell.x,
        figures=found.figures,
        pictured=found.picture is not None and out is not None,
        identity=sweep.identity(cell),
    )
    if found.picture is not None and out is not None:
        save_png(_row(out, report.name, outcome), found.picture, text=report.notice)
    return outcome


def _record(report: Report, out: Path, cells: Sequence[Outcome], known: Mapping[str, Outcome]) -> Path:
    """Cells of other settings stay recorded, so that a change of mind costs nothing."""
    own = {one.identity for one in cells}
    numbers = {
        "version": __version__,
        "plan": report.plan,
        "cells": [to_json(one) for one in cells],
        "earlier": [to_json(one) for one in known.values() if one.identity not in own],
    }
    return write_whole(out / f"{report.name}.json", (json.dumps(numbers, indent=1) + "\n").encode())


def _row(out: Path, name: str, one: Outcome) -> Path:
    return out / f"{name}-cells" / f"{one.identity}.png"


def _parts(report: Report, outcomes: Sequence[Outcome]) -> Iterator[tuple[Sweep, list[Outcome]]]:
    for sweep in report.sweeps:
        if own := [one for one in outcomes if one.part == sweep.name]:
            yield sweep, own


def _names(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(name for one in outcomes for name in one.figures))


def _curves(outcomes: Sequence[Outcome], figure: str) -> Iterator[Curve]:
    """One for each name; what has no x is a level across all."""
    having = [one for one in outcomes if figure in one.figures]
    across = [one.x for one in outcomes if one.x is not None]
    for name in dict.fromkeys(one.name for one in having):
        own = [(one.x, _value(one.figures[figure])) for one in having if one.name == name]
        points = sorted((x, y) for x, y in own if x is not None)
        level = [(x, y) for none, y in own if none is None for x in (min(across), max(across))]
        x, y = zip(*(points or level), strict=True)
        yield Curve(name, x, y, dashed=not points)


def _value(figure: Figure) -> float:
    return figure.share if isinstance(figure, Proportion) else figure


def _short(value: Figure | None) -> str:
    if value is None:
        return ""
    return share(value) + " %" if isinstance(value, Proportion) else f"{value:.4g}"


def _label(one: Outcome) -> str:
    return one.name if one.x is None else f"{one.name} {one.x:g}"


def _slug(figure: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in figure.lower()).split())


def _sheet(rows: Sequence[Path]) -> Image.Image:
    pictures = [Image.open(path).convert("RGB") for path in rows]
    height = sum(one.height + GAP for one in pictures) - GAP
    sheet = Image.new("RGB", (max(one.width for one in pictures), height), "white")
    top = 0
    for one in pictures:
        sheet.paste(one, (0, top))
        top += one.height + GAP
    return sheet
