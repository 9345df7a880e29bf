"""Runs as their folders tell of them, read without torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

__all__ = ["LOSS", "Best", "Run", "find_runs", "read_log", "read_run"]

LOSS = "validation/loss"
"""Name of the validation loss in the log."""
QUIET = 120.0  # seconds without a line after which a run counts as stopped, or three times its usual pause
State = Literal["new", "running", "stopped", "finished"]


@dataclass(frozen=True)
class Best:
    """The lowest validation loss of a run, and the images seen then."""

    loss: float
    images: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder.

    Attributes:
        folder: its path.
        name: of the folder.
        recipe: by which it is trained.
        state: "new" without a line in the log; "running" if the log was written to lately; "finished" when
            every image was seen; else "stopped".
        images, total: seen, and to be seen.
        losses: last mean of each phase.
        best: None without a validation.
        images_per_second: middle of the last lines; None before the first.
        hours: trained.
        rows: of the log.
    """

    folder: Path
    name: str
    recipe: str
    state: State
    images: int
    total: int
    losses: Mapping[str, float]
    best: Best | None
    images_per_second: float | None
    hours: float
    rows: Sequence[Mapping[str, float]]

    def curve(self, metric: str) -> tuple[list[float], list[float]]:
        """Images and values of a metric; both empty if the log has none."""
        rows = [row for row in self.rows if metric in row]
        return [row["images"] for row in rows], [row[metric] for row in rows]

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON, without the rows."""
        best = None if self.best is None else {"loss": self.best.loss, "images": self.best.images}
        return {
            "folder": str(self.folder),
            "name": self.name,
            "recipe": self.recipe,
            "state": self.state,
            "images": self.images,
            "total": self.total,
            "losses": dict(self.losses),
            "best_validation": best,
            "images_per_second": self.images_per_second,
            "hours": round(self.hours, 4),
        }


def find_runs(places: Sequence[Path]) -> list[Path]:
    """Run folders among these places and up to two levels below them, sorted within each place.

    Raises: ValueError in one line for a place that holds none.
    """
    found: list[Path] = []
    for place in places:
        files = [file for pattern in ("", "*/", "*/*/") for file in place.glob(f"{pattern}recipe.json")]
        if not files:
            raise ValueError(
                f"there is no run in {place}: no recipe.json in it or below; give the folder of a run, or "
                "the one that holds your runs"
            )
        found += sorted(file.parent for file in files)
    return list(dict.fromkeys(found))


def read_run(folder: Path, *, now: float) -> Run:
    """What a run folder says, at `now`, in seconds since the epoch.

    Raises: ValueError in one line if recipe.json is none.
    """
    recipe, total = _recipe(folder / "recipe.json")
    log = folder / "log.jsonl"
    rows = read_log(log) if log.is_file() else []
    steps = [row for row in rows if "images_per_second" in row]
    last = rows[-1] if rows else {}
    images = int(last.get("images", 0))
    named = [item for row in steps for item in row.items() if _is_loss(item[0])]
    measured = [Best(row[LOSS], int(row["images"])) for row in rows if LOSS in row]
    return Run(
        folder=folder,
        name=folder.resolve().name,
        recipe=recipe,
        state=_state(rows, images >= total, now - log.stat().st_mtime if rows else 0.0),
        images=images,
        total=total,
        losses={name.partition("/")[0]: value for name, value in named},
        best=min(measured, key=lambda best: best.loss, default=None),
        images_per_second=statistics.median(r["images_per_second"] for r in steps[-5:]) if steps else None,
        hours=last.get("seconds", 0.0) / 3600,
        rows=rows,
    )


def read_log(path: Path) -> list[dict[str, float]]:
    """Rows of a JSONL log; a last line that a crash cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _is_loss(name: str) -> bool:
    return name.endswith("/loss") and name != LOSS


def _state(rows: Sequence[Mapping[str, float]], done: bool, silence: float) -> State:
    if not rows:
        return "new"
    if done:
        return "finished"
    pauses = [b["seconds"] - a["seconds"] for a, b in pairwise(rows[-6:])]
    return "running" if silence <= max(QUIET, 3 * max(pauses, default=0.0)) else "stopped"


def _recipe(path: Path) -> tuple[str, int]:
    """Name and number of images."""
    try:
        recipe = json.loads(path.read_text("utf-8"))
        return str(recipe["name"]), int(recipe["trainer"]["images"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not the recipe of a run; name another folder, or remove it") from None
