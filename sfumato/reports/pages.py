"""The report as files: numbers as JSON, a page of tables, and charts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from PIL import Image

from sfumato import __version__
from sfumato.core.chart import Curve, chart
from sfumato.core.config import from_json, to_json
from sfumato.core.png import save_png, write_whole
from sfumato.evaluation.measures import Proportion
from sfumato.reports.findings import Findings, Row, Series, series_of
from sfumato.reports.plan import Cell, Part, Plan
from sfumato.reports.running import Costs, Outcome

__all__ = ["NAME", "dry", "page", "recorded", "share", "table", "write"]

NAME = "dit-designs"
LABELS = ("images", "validation loss")


def dry(planned: Sequence[Cell], costs: Costs) -> str:
    """A table of what each cell takes, and the sum; validation and scores come on top."""
    rows, total = [], 0.0
    for cell in planned:
        cost, images = costs[cell.part, cell.name], cell.recipe.trainer.images
        total += cost.seconds * images
        rows.append(
            [
                f"{cell.part}/{cell.name}, seed {cell.seed}",
                f"{cost.parameters:,}",
                f"{cost.gflop:.3g}",
                f"{images:,}",
                f"{cost.gflop * images / 1e6:.3g}",
                f"{cost.seconds * images / 60:.1f}",
            ]
        )
    header = ["cell", "parameters", "GFLOP per image", "images", "PFLOP", "minutes"]
    return f"{table(header, rows)}\n\n{len(rows)} cells, about {total / 3600:.2f} hours of training steps"


def page(plan: Plan, found: Findings) -> str:
    """The tables as Markdown."""
    plural = "" if plan.seeds == 1 else "s"
    parts = [
        f"{plan.images:,} images, {plan.seeds} seed{plural}; losses are means of the seeds, with the "
        "lowest and the highest. GFLOP are those of one image in training."
    ]
    if found.designs:
        parts += ["## Designs at equal compute", table(*_designs(found.designs))]
    if found.scaling:
        cells = [[*_start(row), _loss(row)] for row in found.scaling]
        parts += ["## Sizes and patches", table(["size/patch", "parameters", "GFLOP", "loss"], cells)]
        if found.by_gflop is not None and found.by_parameters is not None:
            parts.append(
                f"Correlation of the loss with log GFLOP {found.by_gflop:.2f}, with log parameters "
                f"{found.by_parameters:.2f}."
            )
    if found.improvements and found.target is not None:
        header = [
            "change",
            "parameters",
            "GFLOP",
            "velocity error",
            "images to target",
            "seeds that reached it",
        ]
        cells = [[*_start(row), _loss(row), _needed(row), f"{row.reached}"] for row in found.improvements]
        parts += [
            "## Improvements by images",
            f"The target is the baseline's last velocity error, {found.target:.4f}.",
            table(header, cells),
        ]
    return "\n\n".join(parts)


def recorded(out: Path) -> list[Outcome]:
    """The cells of a report that was written into the folder; none if there is none."""
    path = out / f"{NAME}.json"
    if not path.is_file():
        return []
    return [from_json(Outcome, one, where=str(path)) for one in json.loads(path.read_text("utf-8"))["cells"]]


def write(
    out: Path, plan: Plan, outcomes: Sequence[Outcome], costs: Costs, found: Findings
) -> Iterator[Path]:
    """The files of the report, by name dit-designs*, each as it is written."""
    numbers = {
        "version": __version__,
        "plan": to_json(plan),
        "findings": to_json(found),
        "costs": [{"part": part, "name": name, **to_json(cost)} for (part, name), cost in costs.items()],
        "cells": [to_json(one) for one in outcomes],
    }
    write_whole(out / f"{NAME}.json", (json.dumps(numbers, indent=1) + "\n").encode())
    yield out / f"{NAME}.json"
    charts = dict(_charts(plan, outcomes, found))
    pictures = "\n\n".join(f"![{part}]({NAME}-{part}.png)" for part in charts)
    for part, picture in charts.items():
        save_png(out / f"{NAME}-{part}.png", picture)
        yield out / f"{NAME}-{part}.png"
    title = "# DiT: designs, sizes and improvements"
    text = f"{title}\n\n`sfumato report {NAME}`: {page(plan, found)}\n\n{pictures}\n"
    write_whole(out / f"{NAME}.md", text.encode())
    yield out / f"{NAME}.md"


def _charts(plan: Plan, outcomes: Sequence[Outcome], found: Findings) -> Iterator[tuple[Part, Image.Image]]:
    series = list(series_of(outcomes))
    if "designs" in plan.parts:
        gflop = {row.name: row.gflop for row in found.designs}
        curves = [
            Curve(one.name, [gflop[one.name] * images / 1e3 for images in one.images], one.losses)
            for one in _of("designs", series)
        ]
        yield "designs", chart(curves, title="Block designs", labels=("TFLOP of training", LABELS[1]))
    if "scaling" in plan.parts:
        rows = sorted(found.scaling, key=lambda row: row.name)  # those of a size are then side by side
        sizes = groupby(rows, key=lambda row: row.name.split("/")[0])
        yield (
            "scaling",
            chart(
                [_by_compute(size, list(group)) for size, group in sizes],
                title="Each size with every patch",
                labels=("GFLOP of an image in training", LABELS[1]),
            ),
        )
    if "improvements" in plan.parts:
        curves = [Curve(one.name, one.images, one.velocities) for one in _of("improvements", series)]
        yield "improvements", chart(curves, title="Improvements", labels=(LABELS[0], "velocity error"))


def _by_compute(size: str, rows: Sequence[Row]) -> Curve:
    """Points joined by dashes."""
    rows = sorted(rows, key=lambda row: row.gflop)
    return Curve(size, [row.gflop for row in rows], [row.loss for row in rows], dashed=True)


def _of(part: Part, series: Sequence[Series]) -> list[Series]:
    return [one for one in series if one.part == part]


def _designs(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    splits = list(rows[0].joint)
    header = [
        "design",
        "parameters",
        "GFLOP",
        "images",
        "loss",
        *(f"all facts, {split}, %" for split in splits),
        *(f"of the nearest scene, {split}, %" for split in splits),
    ]
    cells = [
        [
            *(*_start(row), f"{row.images:,}", _loss(row)),
            *(share(part[split]) for part in (row.joint, row.nearest) for split in splits),
        ]
        for row in rows
    ]
    return header, cells


def _start(row: Row) -> list[str]:
    return [row.name, f"{row.parameters:,}", f"{row.gflop:.3g}"]


def _loss(row: Row) -> str:
    return f"{row.loss:.4f} ({row.low:.4f}-{row.high:.4f})"


def _needed(row: Row) -> str:
    return f"more than {row.images:,}" if row.needed is None else f"{row.needed:,.0f}"


def share(of: Proportion) -> str:
    """In percent, with its interval."""
    return f"{100 * of.share:.1f} ({100 * of.low:.0f}-{100 * of.high:.0f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """As Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
