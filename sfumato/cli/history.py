"""The verb that looks back: runs."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from sfumato.cli.output import check_writable
from sfumato.cli.parsing import parse

if TYPE_CHECKING:
    from sfumato.core.chart import Curve
    from sfumato.training.history import Run

__all__ = ["runs"]

PLACE = Path("runs")


@dataclass(frozen=True, kw_only=True)
class Runs:
    """List runs: how far they are, how fast, and their losses; draw their curves."""

    folders: Positional[tuple[Path, ...]] = ()
    """Folders of runs, or that hold runs; by default runs/."""
    plot: Path | None = None
    """PNG file for the loss curves of all of them."""
    metrics: tuple[str, ...] = ()
    """What to draw, such as denoiser/loss denoiser/grad_norm; by default every loss."""
    scale: Literal["auto", "log", "linear"] = "auto"
    """Of the drawn values; auto is log if all are positive."""
    json: bool = False
    """Print JSON."""


def runs(args: list[str]) -> int:
    """`sfumato runs`."""
    from sfumato.training.history import find_runs, read_run

    flags = parse(Runs, "runs", args)
    if flags.plot is not None:
        check_writable(flags.plot)
    now = time.time()
    found = [read_run(folder, now=now) for folder in find_runs(flags.folders or (PLACE,))]
    if flags.plot is not None:
        _plot(found, flags)
    if flags.json:
        print(json.dumps([run.as_dict() for run in found], indent=1))
    else:
        _print(found)
        if flags.plot is not None:
            print(flags.plot)
    return 0


def _print(found: Sequence[Run]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("run", "recipe"):
        table.add_column(name, overflow="fold", min_width=9)
    table.add_column("state", no_wrap=True)
    table.add_column("images", justify="right", no_wrap=True)
    table.add_column("last loss", justify="right", overflow="fold", min_width=9)
    for name in ("best validation", "img/s", "hours"):
        table.add_column(name, justify="right", overflow="fold", min_width=5)
    for run in found:
        table.add_row(*_cells(run))
    Console().print(table)


def _cells(run: Run) -> list[str]:
    alone = len(run.losses) == 1
    losses = "\n".join(
        f"{value:.4g}" if alone else f"{phase} {value:.4g}" for phase, value in run.losses.items()
    )
    best = "-" if run.best is None else f"{run.best.loss:.4g} at {_round(run.best.images)}"
    rate = "-" if run.images_per_second is None else f"{run.images_per_second:.1f}"
    images = f"{_round(run.images)}/{_round(run.total)}"
    return [run.name, run.recipe, run.state, images, losses or "-", best, rate, f"{run.hours:.2f}"]


def _round(images: int) -> str:
    """Three digits: 38k, 1.25M."""
    from sfumato.core.chart import short

    return short(float(f"{images:.3g}"))


def _plot(found: Sequence[Run], flags: Runs) -> None:
    from sfumato.core.chart import chart
    from sfumato.core.png import save_png

    assert flags.plot is not None
    curves = [curve for run in found for curve in _curves(run, flags.metrics, alone=len(found) == 1)]
    if not curves:
        known = sorted({name for run in found for row in run.rows for name in row if "/" in name})
        asked = " or ".join(flags.metrics) or "loss"
        raise ValueError(f"no run has logged {asked}; their logs have: {', '.join(known) or 'nothing yet'}")
    title = found[0].name if len(found) == 1 else ""
    value = flags.metrics[0] if len(flags.metrics) == 1 else "value" if flags.metrics else "loss"
    scale = None if flags.scale == "auto" else flags.scale
    save_png(flags.plot, chart(curves, title=title, labels=("images", value), scale=scale))


def _curves(run: Run, metrics: Sequence[str], *, alone: bool) -> list[Curve]:
    """The curves of one run, with its name in front unless it is alone; those of validations are dashed."""
    from sfumato.core.chart import Curve

    names = dict.fromkeys(name for row in run.rows for name in row if name.endswith("/loss"))
    curves = []
    for metric in metrics or names:
        x, y = run.curve(metric)
        if x:
            name = metric if alone else f"{run.name}: {metric}"
            curves.append(Curve(name, x, y, dashed=metric.startswith("validation/")))
    return curves
