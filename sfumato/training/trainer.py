"""The training loop. It knows neither images nor noise: only tasks, phases and a count of samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.core.random import Noise
from sfumato.training.batches import Batch
from sfumato.training.ema import Average
from sfumato.training.log import RunLog
from sfumato.training.optim import OptimConfig, PhaseOptimizer
from sfumato.training.posthoc import PostHoc, PostHocConfig
from sfumato.training.state import Checkpoints
from sfumato.training.task import Loss, Moment, Task

__all__ = ["Trainer", "TrainerConfig"]


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """Length and cadence of a run; every count is in images.

    Attributes:
        images: to see in the whole run.
        batch: images per step.
        seed: of the data order, the augmentation and all noise.
        ema: final decay per step of the moving average.
        posthoc: other averages, tracked so that one of any width can be made after the run.
        log_every: images between log lines; 0 = one at the end.
        preview_every: images between sample grids, with one at the end; 0 = none.
        validate_every: images between validations, with one at the end, if pictures are held out; 0 = none.
        save_every: images between checkpoints; 0 = one at the end.
        keep: checkpoints kept.
        device: "auto" takes an accelerator if there is one.
        quiet: no progress bar.
        trackers: programs that are told the numbers of the log, names in `trackers.TRACKERS`.
    """

    images: int
    batch: int = 64
    seed: int = 0
    ema: float = 0.999
    posthoc: PostHocConfig = field(default_factory=PostHocConfig)
    log_every: int = 1000
    preview_every: int = 10000
    validate_every: int = 10000
    save_every: int = 10000
    keep: int = 2
    device: str = "auto"
    quiet: bool = False
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("images", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name} is {getattr(self, name)}; it must be at least 1")


class Trainer:
    """Runs a task over batches until enough images were seen, from the newest checkpoint if there is one.

    A stopped and resumed run ends with the same bits as an uninterrupted one (same machine and thread
    count): the data position is the number of images seen, and the noise of a sample is derived from the
    seed and that number.

    Attributes:
        validate: called with the images seen every `validate_every` images and at the end; its numbers are
            logged.

    Args:
        task: already on its device.
        batches: the batch that starts at a given number of images seen; its length is what counts.
        config: see TrainerConfig.
        optim: of the phases that bring none of their own.
        log: see RunLog.
        checkpoints: see Checkpoints.
        preview: called with the images seen every `preview_every` images and at the end.
        publish: called with the averaged modules after every checkpoint, and on a resume.
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
        preview: Callable[[int], object] | None = None,
        publish: Callable[[Mapping[str, nn.Module]], None] | None = None,
    ) -> None:
        self.task = task
        self.batches = batches
        self.config = config
        self.log = log
        self.checkpoints = checkpoints
        self.preview = preview
        self.publish = publish
        self.validate: Callable[[int], Mapping[str, float]] | None = None
        self.images = 0
        self.steps = 0
        averaged = {name: task.modules[name] for name in task.averaged}
        self.average = Average(averaged, config.ema)
        self.posthoc = PostHoc(averaged, config.posthoc, checkpoints.folder.parent)
        self.optimizers = {
            name: PhaseOptimizer([task.modules[m] for m in phase.modules], phase.optim or optim)
            for name, phase in task.phases.items()
        }

    def fit(self) -> None:
        """Train to `config.images`, with logs, previews and checkpoints on the way and at the end.

        Raises: ValueError in one line if a loss or a gradient is not finite; no weight has changed in that
            phase and the last checkpoint stays.
        """
        self.resume()
        while self.images < self.config.images:
            before = self.images
            metrics = self._step(self.batches(before))
            self.log.step(self.images, metrics)
            done = self.images >= self.config.images
            if self.preview and self._due(before, self.config.preview_every):
                self.preview(self.images)
            if self.validate and self._due(before, self.config.validate_every):
                self.log.note(self.images, self.validate(self.images))
            if done or self._passed(before, self.config.save_every):
                self.save()
        self.log.close(self.images)

    def resume(self) -> None:
        """Take up the newest checkpoint, or start at nothing."""
        state = self.checkpoints.load()
        if state is not None:
            self.load_state_dict(state)
            self._publish()  # the run may have died between a checkpoint and this
        self.log.begin(self.images, float(state["seconds"]) if state else 0.0)

    def save(self) -> None:
        """Write a checkpoint of the present state, and publish the averages."""
        self.checkpoints.save(self.state_dict(), self.images)
        self._publish()

    def _publish(self) -> None:
        if self.publish is not None:
            self.publish(self.average.modules)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, besides the recipe and the data."""
        return {
            "images": self.images,
            "steps": self.steps,
            "seconds": self.log.pause(),
            "modules": {name: module.state_dict() for name, module in self.task.modules.items()},
            "average": self.average.state_dict(),
            "posthoc": self.posthoc.state_dict(),
            "memories": {name: memory.state_dict() for name, memory in self.task.memories.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.images, self.steps = int(state["images"]), int(state["steps"])
        for name, module in self.task.modules.items():
            module.load_state_dict(state["modules"][name])
        self.average.load_state_dict(state["average"])
        self.posthoc.load_state_dict(state["posthoc"], self.images)
        for name, memory in self.task.memories.items():
            memory.load_state_dict(state["memories"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        noise = Noise([_seed("sample", self.config.seed, self.images + i) for i in range(len(batch))])
        # Layers that draw for themselves (nn.Dropout) use torch's generator: it follows the position too.
        torch.manual_seed(_seed("layers", self.config.seed, self.images))
        moment = Moment(self.images, self.config.images)
        end = self.images + len(batch)
        metrics: dict[str, Tensor] = {}
        for loss in self.task.losses(batch, noise, moment):
            optimizer = self.optimizers[loss.phase]
            optimizer.backward(loss.value)
            norm = optimizer.clip()
            self._check(loss, norm)
            lr = optimizer.step(self.images, end, self.config.images)
            own = {
                "loss": loss.value,
                "grad_norm": norm,
                "lr": torch.tensor(lr, dtype=torch.float64),
                **loss.metrics,
            }
            metrics |= {f"{loss.phase}/{name}": value.detach() for name, value in own.items()}
        self.average.update()
        self.posthoc.update(self.images, end, self.config.images)
        self.images, self.steps = end, self.steps + 1
        return metrics

    def _check(self, loss: Loss, norm: Tensor) -> None:
        if bool(torch.isfinite(loss.value) & torch.isfinite(norm)):
            return
        what = "gradient" if bool(torch.isfinite(loss.value)) else "loss"
        kept = self.checkpoints.paths()
        raise ValueError(
            f"the {what} of phase {loss.phase!r} is not finite at step {self.steps + 1} "
            f"({self.images:,} images); last checkpoint: {kept[-1] if kept else 'none'}; "
            "lower the learning rate or raise its warm-up"
        )

    def _due(self, before: int, every: int) -> bool:
        """Whether the last step crossed a multiple of `every` or ended the run; 0 = never."""
        return bool(every) and (self.images >= self.config.images or self._passed(before, every))

    def _passed(self, before: int, every: int) -> bool:
        """Whether a multiple of `every` was crossed by the last step; 0 = never."""
        return bool(every) and self.images // every > before // every


def _seed(name: str, seed: int, position: int) -> int:
    """63 bits for a purpose at a position of a run, whatever the batch size or the number of processes."""
    return int.from_bytes(hashlib.sha256(f"{name}/{seed}/{position}".encode()).digest()[:8], "little") >> 1
