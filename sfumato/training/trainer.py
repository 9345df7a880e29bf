"""The training loop. It knows neither images nor noise: only tasks, phases and a count of samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from sfumato.training.architecture import restore
from sfumato.training.batches import Batch
from sfumato.training.compute import Precision, compile_parts, recompute
from sfumato.training.distributed import Parallel, engine_for
from sfumato.training.ema import Average
from sfumato.training.guard import Fault, bad_weight
from sfumato.training.log import RunLog
from sfumato.training.optim import OptimConfig, PhaseOptimizer
from sfumato.training.posthoc import PostHoc, PostHocConfig
from sfumato.training.signals import Stop, Stopped
from sfumato.training.state import Checkpoints
from sfumato.training.step import Step
from sfumato.training.task import Task

__all__ = ["Trainer", "TrainerConfig"]

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Length, cadence and computation of a run; every count is in images unless it says steps.

    Attributes:
        images: to see in the whole run.
        batch: images per step.
        accumulate: micro-batches of which a batch is made, for memory's sake; 1 = all at once.
        seed: of the data order, the augmentation and all noise.
        ema: final decay per step of the moving average.
        posthoc: other averages, tracked so that one of any width can be made after the run.
        precision: of forward passes; "auto" is bfloat16 where the device has it, else float32.
        compile: compile the parts of the nets with torch.compile.
        recompute: keep no activations inside blocks but compute them again: less memory, more time.
        patience: steps in a row with a loss or gradient that is not finite, after which the run stops.
        log_every: images between log lines; 0 = one at the end.
        preview_every: images between sample grids, with one at the end; 0 = none.
        validate_every: images between validations, with one at the end, if pictures are held out; 0 = none.
        save_every: images between checkpoints; 0 = one at the end.
        keep: checkpoints kept.
        device: "auto" takes an accelerator if there is one.
        parallel: in several processes, "replicate" everything (DDP) or "shard" it (FSDP2), for nets that are
            too large for one device.
        timeout: seconds that processes wait for each other before they say which one is missing.
        quiet: no progress bar.
        trackers: programs that are told the numbers of the log, names in `trackers.TRACKERS`.
    """

    images: int
    batch: int = 64
    accumulate: int = 1
    seed: int = 0
    ema: float = 0.999
    posthoc: PostHocConfig = field(default_factory=PostHocConfig)
    precision: Precision = "float32"
    compile: bool = False
    recompute: bool = False
    patience: int = 10
    log_every: int = 1000
    preview_every: int = 10000
    validate_every: int = 10000
    save_every: int = 10000
    keep: int = 2
    device: str = "auto"
    parallel: Parallel = "replicate"
    timeout: float = 600.0
    quiet: bool = False
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("images", "batch", "accumulate", "patience", "keep", "timeout"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name} is {getattr(self, name)}; it must be at least 1")
        if self.batch % self.accumulate:
            raise ValueError(
                f"trainer.batch {self.batch} cannot be cut into {self.accumulate} equal micro-batches; "
                "choose a trainer.accumulate that divides it"
            )


class Trainer:
    """Runs a task over batches until enough images were seen, from the newest checkpoint if there is one.

    A stopped and resumed run ends with the same bits as an uninterrupted one (same machine and thread
    count): the data position is the number of images seen, and the noise of a sample is derived from the
    seed and that number.

    Args:
        task: already on its device.
        batches: the batch, or this process's part of it, that starts at a given number of images seen.
        config: see TrainerConfig.
        optim: of the phases that bring none of their own.
        log: see RunLog.
        checkpoints: see Checkpoints.
        stop: open already; None = the run cannot be stopped by a signal.
        publish: called with the averaged modules after every checkpoint, and on a resume; by process 0.

    Attributes:
        preview: called with the images seen every `preview_every` images and at the end.
        validate: the same every `validate_every` images; returns numbers for the log.
    """

    def __init__(
        self,
        task: Task,
        batches: Callable[[int], Batch],
        config: TrainerConfig,
        *,
        optim: OptimConfig,
        log: RunLog,
        checkpoints: Checkpoints,
        stop: Stop | None = None,
        publish: Callable[[Mapping[str, nn.Module]], None] | None = None,
    ) -> None:
        self.task, self.batches, self.config = task, batches, config
        self.world = world = checkpoints.world
        self.log, self.checkpoints, self.publish = log, checkpoints, publish
        self.stop = stop or Stop()
        self.preview: Callable[[int], object] | None = None
        self.validate: Callable[[int], Mapping[str, float]] | None = None
        self.images = self.steps = 0
        self.saved = -1  # images at the last checkpoint
        self.shown = {"preview": 0, "validation": 0}  # images at the last time
        self.skipped = self.in_a_row = 0  # steps whose numbers were not finite: all, and until now
        averaged = {name: task.modules[name] for name in task.averaged}
        self.average = Average(averaged, config.ema)
        self.posthoc = PostHoc(averaged, config.posthoc, checkpoints.folder.parent, world)
        if config.recompute:
            recompute(task.modules)
        if config.compile:
            compile_parts(task.modules)
        self.engine = engine_for(task, config.parallel, world)
        for copies in (self.average, *self.posthoc.averages.values()):
            copies.shard()
        self.optimizers = {
            name: PhaseOptimizer([task.modules[m] for m in phase.modules], phase.optim or optim)
            for name, phase in task.phases.items()
        }
        self._step = Step(
            task, self.optimizers, seed=config.seed, total=config.images, accumulate=config.accumulate,
            precision=config.precision, stop=self.stop, engine=self.engine,
        )  # fmt: skip

    def fit(self) -> None:
        """Train to `config.images`, with logs, previews and checkpoints on the way and at the end.

        Raises:
            Stopped: after a signal; there is a checkpoint of where the run stood.
            ValueError: in one line if losses or gradients were not finite `patience` times in a row, or
                something cannot be written; the last checkpoint stays.
        """
        self.resume()
        try:
            before = dict(self.shown)
            self._show()  # what a run that was stopped just then still owes
            if self.shown != before:
                self.save()
            while self.images < self.config.images:
                self._advance()
                self._show()
                # Not after a step that was skipped: weights that broke must not push out those that had not.
                if self._due(self.saved, self.config.save_every) and not self.in_a_row:
                    self.save()
            if self.saved < self.images:
                self.save()
        except Stopped:
            if self.saved < self.images:
                self.save()
            raise

    def resume(self) -> None:
        """Take up the newest checkpoint, or start at nothing."""
        if (state := self.checkpoints.load(self.engine.mesh)) is not None:
            self.load_state_dict(state)
            self._publish()  # the run may have died between a checkpoint and this
        self.log.begin(self.images, state.get("log") if state else None)

    def save(self) -> None:
        """Write a checkpoint of the present state, and publish the averages.

        The one place that commits a state. Raises: ValueError in one line if a weight is not finite, or the
        checkpoint cannot be written.
        """
        if name := next(filter(None, self.world.gather(bad_weight(self.task.modules))), None):
            raise self.world.fail(
                f"{name} is not finite after {self.images:,} images; {_advice(self.checkpoints)}"
            )
        self.checkpoints.save(self.state_dict(), self.images)
        self.saved = self.images
        self._publish()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, besides the recipe and the data."""
        return {
            "images": self.images,
            "steps": self.steps,
            "shown": dict(self.shown),
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "log": self.log.state_dict(),
            "modules": {name: module.state_dict() for name, module in self.task.modules.items()},
            "average": self.average.state_dict(),
            "posthoc": self.posthoc.state_dict(),
            "memories": {name: memory.state_dict() for name, memory in self.task.memories.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`. Raises: ValueError in one line if it is of another architecture."""
        restore(state, self.task, self.average, self.optimizers)
        self.images, self.steps = int(state["images"]), int(state["steps"])
        self.posthoc.load_state_dict(state["posthoc"], self.images)
        self.shown |= state["shown"]
        self.skipped, self.in_a_row = int(state["skipped"]), int(state["in_a_row"])
        self.saved = self.images

    def _advance(self) -> None:
        """One step over the next batch, whether it is taken or skipped."""
        self.stop.agree(self.world)
        with self.stop.interruptible():
            batch = self.batches(self.images + self.world.rank * (self.config.batch // self.world.size))
        outcome = self._step(batch, self.images, watched=self.in_a_row + 1 >= self.config.patience)
        end = self.images + len(batch) * self.world.size
        if outcome.fault is None:
            self.average.update()
            self.posthoc.update(self.images, end, self.config.images)
        self.in_a_row = 0 if outcome.fault is None else self.in_a_row + 1
        self.skipped += outcome.fault is not None
        self.images, self.steps = end, self.steps + 1
        self.log.step(end, {**outcome.metrics, "skipped": torch.tensor(float(outcome.fault is not None))})
        if outcome.fault is not None:
            self._endure(outcome.fault)

    def _endure(self, fault: Fault) -> None:
        """Pass over a step that was skipped; once too often, go back to the last checkpoint and stop."""
        what = f"the {fault.what} of phase {fault.phase!r} is not finite"
        LOGGER.warning(
            "step %d (%s images) was skipped: %s; %d in a row, %d in all",
            self.steps, f"{self.images:,}", what, self.in_a_row, self.skipped,
        )  # fmt: skip
        if self.in_a_row < self.config.patience:
            return
        steps = f"{self.in_a_row} step{'s' if self.in_a_row > 1 else ''} in a row"
        where = f"{steps} until step {self.steps} ({self.images:,} images)"
        self.resume()
        raise self.world.fail(f"{what}, {where}; it begins with {fault.culprit}; {_advice(self.checkpoints)}")

    def _show(self) -> None:
        """Preview and validate if it is time; if that fails, not without a checkpoint."""
        for name, every, show in (
            ("preview", self.config.preview_every, self.preview),
            ("validation", self.config.validate_every, self.validate),
        ):
            self.stop.check()
            if show is None or not self._due(self.shown[name], every):
                continue
            try:
                with self.stop.interruptible():
                    told = self.world.agree(partial(show, self.images))
            except Exception:
                if self.saved < self.images:
                    self.save()
                raise
            self.shown[name] = self.images
            if show is self.validate and isinstance(
                told, Mapping
            ):  # written down once, whatever signal comes
                self.log.note(self.images, told)

    def _publish(self) -> None:
        if (publish := self.publish) is not None and self.images > 0:
            averaged = self.average.whole()
            self.world.lead(lambda: publish(averaged))

    def _due(self, last: int, every: int) -> bool:
        return _passed(last, self.images, every) or (every > 0 and last < self.images >= self.config.images)


def _passed(before: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` lies after `before`, up to now; 0 = never."""
    return every > 0 and now // every > max(before, 0) // every


def _advice(checkpoints: Checkpoints) -> str:
    kept = checkpoints.paths()
    return (
        f"the run is back at its last checkpoint: {kept[-1] if kept else 'none'}; "
        "go on with a lower --optim.lr or a longer --optim.warmup"
    )
