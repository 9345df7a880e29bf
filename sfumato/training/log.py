"""What a run says while it trains: one JSON object per line in a file, and a progress bar."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from sfumato.training.metrics import summary

__all__ = ["RunLog", "read_log"]


class RunLog:
    """Means of the metrics since the last line, written at a fixed cadence of images.

    Use as a context manager around a run, for the progress bar.

    Args:
        path: JSONL file; appended to, and cut back by `begin` on a resume.
        total: images of the whole run.
        every: images between two lines; 0 = one line at the end.
        quiet: no progress bar.
    """

    def __init__(self, path: Path, total: int, every: int, *, quiet: bool = False) -> None:
        self.path = path
        self.every = every or total
        self.seconds = 0.0
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} images"),
            RateColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[losses]}"),
            console=Console(stderr=True),
            disable=quiet,
            transient=False,
        )
        self._task = self._bar.add_task("train", total=total, losses="")
        self._images = 0
        self._clock = time.perf_counter()

    def __enter__(self) -> RunLog:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def begin(self, images: int, seconds: float) -> None:
        """Stand at `images`; lines of a log that went further than the checkpoint are removed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            kept = [row for row in read_log(self.path) if row["images"] <= images]
            self.path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._images, self.seconds = images, seconds
        self._bar.update(self._task, completed=images)
        self._clock = time.perf_counter()

    def step(self, images: int, metrics: Mapping[str, Tensor]) -> None:
        """Record one training step that ended at `images`; writes a line when `every` images have passed."""
        for name, metric in metrics.items():
            value = metric.detach()
            value = value.double() if value.device.type == "cpu" else value.float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._bar.update(self._task, completed=images)
        if images // self.every > self._images // self.every:
            self._write(images)

    def close(self, images: int) -> None:
        """Write what has not been written yet."""
        if self._sums:
            self._write(images)

    def pause(self) -> float:
        """Seconds trained so far, to be stored in a checkpoint."""
        return self.seconds + time.perf_counter() - self._clock

    def _write(self, images: int) -> None:
        means: dict[str, float] = {}
        for name, total in self._sums.items():
            means |= summary(name, total, self._counts[name])
        now = time.perf_counter()
        elapsed = now - self._clock
        self.seconds += elapsed
        line: dict[str, float] = {"images": images, "seconds": round(self.seconds, 3)}
        line["images_per_second"] = round((images - self._images) / max(elapsed, 1e-9), 3)
        line |= {name: float(f"{value:.6g}") for name, value in means.items() if math.isfinite(value)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = [f"{name} {value:.4g}" for name, value in means.items() if name.endswith("/loss")]
        self._bar.update(self._task, losses="  ".join(shown))
        self._sums, self._counts = {}, {}
        self._images, self._clock = images, now


class RateColumn(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        """Text of the column."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} img/s" if speed else "- img/s")


def read_log(path: Path) -> list[dict[str, float]]:
    """Rows of a JSONL log; a last line that a crash cut short is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
