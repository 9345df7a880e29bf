"""What a run says while it trains: one JSON object per line in a file, trackers, and a progress bar."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from sfumato.training.durable import replace_file
from sfumato.training.history import read_log
from sfumato.training.metrics import summary
from sfumato.training.trackers import Tracker

__all__ = ["RunLog", "SilentLog"]

LOGGER = logging.getLogger(__name__)
SHOWN = {"loss": "loss", "lr": "lr", "grad_norm": "gradient"}  # of each phase, beside the bar


class RunLog:
    """Means of the metrics since the last line, written at a fixed cadence of images.

    Use as a context manager around a run, for the progress bar and the trackers. A tracker that fails is
    left out from then on, with a warning: it must not end a run.

    Args:
        path: JSONL file; appended to, and cut back by `begin` on a resume.
        total: images of the whole run; when they are seen, the last line is written.
        every: images between two lines; 0 = that one alone.
        quiet: no progress bar.
        trackers: told the same numbers.
    """

    def __init__(
        self, path: Path, total: int, every: int, *, quiet: bool = False, trackers: Sequence[Tracker] = ()
    ) -> None:
        self.path = path
        self.total = total
        self.every = every or total
        self.seconds = 0.0  # trained until the last line
        self.trackers = list(trackers)
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._lines = 0
        self._bar = Bar(quiet)
        self._task = self._bar.add_task("train", total=total)
        self._images = 0  # at the last line
        self._clock = time.perf_counter()  # then

    def __enter__(self) -> RunLog:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._tell(lambda tracker: tracker.end())

    def begin(self, images: int, state: Mapping[str, Any] | None = None) -> None:
        """Stand at `images`; lines of a log that went further than the checkpoint are removed.

        Args:
            state: what `state_dict` gave there: the next line is then that of a run that was never stopped.
        """
        self._lines = self._cut(images, (state or {}).get("lines"))
        state = state or {"images": images, "seconds": (0.0, 0.0), "sums": {}, "counts": {}}
        self._images, self._sums, self._counts = state["images"], dict(state["sums"]), dict(state["counts"])
        self.seconds, since = state["seconds"]
        # Not an update: images of an earlier session must not count as speed of this one.
        self._bar.reset(self._task, completed=images)
        self._tell(lambda tracker: tracker.begin(images))
        self._clock = time.perf_counter() - since

    def state_dict(self) -> dict[str, Any]:
        """What the next line will be made of."""
        since = time.perf_counter() - self._clock
        return {
            "images": self._images,
            "seconds": (self.seconds, since),
            "sums": dict(self._sums),
            "counts": dict(self._counts),
            "lines": self._lines,
        }

    def step(self, images: int, metrics: Mapping[str, Tensor]) -> None:
        """Record one training step that ended at `images`; writes a line when `every` images have passed."""
        for name, metric in metrics.items():
            value = metric.detach()
            value = value.double() if value.device.type == "cpu" else value.float()
            self._sums[name] = self._sums[name].to(value.device) + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1
        self._bar.update(self._task, completed=images)
        if images // self.every > self._images // self.every or images >= self.total:
            self._write(images)

    def note(self, images: int, values: Mapping[str, float]) -> None:
        """Write a line of its own: numbers that are no means over steps, such as those of a validation."""
        self._bar.say({name: value for name, value in values.items() if name.count("/") == 1})
        self._line(images, {"seconds": round(self.seconds + time.perf_counter() - self._clock, 3)}, values)

    def picture(self, images: int, path: Path) -> None:
        """Show the trackers a sheet of samples, a PNG file."""
        self._tell(lambda tracker: tracker.picture(images, path))

    def _cut(self, images: int, lines: int | None) -> int:
        """Remove what lies beyond a number of images, and lines beyond a number; returns how many stay."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.is_file():
            return 0
        kept = [row for row in read_log(self.path) if row["images"] <= images][:lines]
        replace_file(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        return len(kept)

    def _write(self, images: int) -> None:
        means: dict[str, float] = {}
        for name, total in self._sums.items():
            means |= summary(name, total, self._counts[name])
        now = time.perf_counter()
        elapsed = now - self._clock
        self.seconds += elapsed
        rate = round((images - self._images) / max(elapsed, 1e-9), 3)
        self._bar.say(means)
        self._line(images, {"seconds": round(self.seconds, 3), "images_per_second": rate}, means)
        self._sums, self._counts = {}, {}
        self._images, self._clock = images, now

    def _line(self, images: int, times: Mapping[str, float], values: Mapping[str, float]) -> None:
        finite = {name: float(f"{value:.6g}") for name, value in values.items() if math.isfinite(value)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"images": images, **times, **finite}) + "\n")
            file.flush()
            os.fsync(file.fileno())  # or a power cut could take lines that a checkpoint counts on
        self._lines += 1
        self._tell(lambda tracker: tracker.numbers(images, {**times, **finite}))

    def _tell(self, say: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                say(tracker)
            except Exception as error:  # whatever another program raises, the run goes on
                self.trackers.remove(tracker)
                LOGGER.warning("tracker %s failed and is left out: %s", type(tracker).__name__, error)


class SilentLog(RunLog):
    """The log of a process that leaves files, trackers and the bar to another one."""

    def __init__(self, path: Path, total: int, every: int, *, quiet: bool = True) -> None:
        super().__init__(path, total, every, quiet=True)

    def _cut(self, images: int, lines: int | None) -> int:
        return 0

    def _line(self, images: int, times: Mapping[str, float], values: Mapping[str, float]) -> None:
        pass


class Bar(Progress):
    """A bar on stderr with speed and time left, and below it the newest numbers of every phase."""

    def __init__(self, quiet: bool) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} images"),
            RateColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=quiet,
        )
        self._numbers: dict[str, float] = {}

    def say(self, numbers: Mapping[str, float]) -> None:
        """Show these from now on, and the others that were shown before."""
        self._numbers |= numbers

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar and its lines of numbers."""
        yield self.make_tasks_table(self.tasks)
        for phase in dict.fromkeys(name.partition("/")[0] for name in getattr(self, "_numbers", {})):
            shown = [
                f"{word} {self._numbers[f'{phase}/{name}']:.4g}"
                for name, word in SHOWN.items()
                if f"{phase}/{name}" in self._numbers
            ]
            if shown:
                yield Text(f"  {phase}: {', '.join(shown)}", overflow="ellipsis", no_wrap=True)


class RateColumn(ProgressColumn):
    """Images per second."""

    def render(self, task: Task) -> Text:
        """Text of the column."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} img/s" if speed else "- img/s")
