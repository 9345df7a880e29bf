"""One step of training: micro-batches, phases, the finite check, and the optimizers."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from sfumato.core.random import Noise
from sfumato.training.batches import Batch
from sfumato.training.compute import Precision, autocast
from sfumato.training.distributed import Engine
from sfumato.training.guard import Fault, Snapshot, Watch, finite
from sfumato.training.optim import PhaseOptimizer
from sfumato.training.signals import Stop, Stopped
from sfumato.training.task import Loss, Moment, Task

__all__ = ["Outcome", "Step", "split"]

T = TypeVar("T")


class Outcome(NamedTuple):
    """Numbers to log, by "phase/name", and what was not finite if the step was skipped."""

    metrics: dict[str, Tensor]
    fault: Fault | None = None


@dataclass
class Micro:
    """A part of the batch on its walk through the phases.

    Attributes:
        losses: of the phases, one after the other.
        share: of the batch.
        position: images seen before its first sample.
    """

    losses: Iterator[Loss]
    share: float
    position: int


class Step:
    """Takes the optimizers of a task one step.

    All micro-batches walk through a phase before its optimizer steps, and only then does any of them go on
    to the next phase: for losses that are means over samples the step is that of the whole batch at once.
    A ratio or statistic of a batch (BatchNorm, the adaptive weight of a GAN) is that of a micro-batch.

    If a loss or the norm of a phase's gradient is not finite, that phase and those after it do not step, and
    buffers and memories are as they were before.

    Args:
        task: on its device.
        optimizers: by phase.
        seed: of the run: the noise of a sample depends on it and on the sample's position alone.
        total: images of the whole run.
        accumulate: micro-batches per batch.
        precision: see `compute.autocast`.
        stop: interrupts a step in which no weight has changed yet; nothing remains of it.
        engine: of the gradients.
    """

    def __init__(
        self,
        task: Task,
        optimizers: Mapping[str, PhaseOptimizer],
        *,
        seed: int,
        total: int,
        accumulate: int = 1,
        precision: Precision = "float32",
        stop: Stop,
        engine: Engine,
    ) -> None:
        self.task = task
        self.engine = engine
        self.world = engine.world
        self.optimizers = optimizers
        self.seed = seed
        self.total = total
        self.accumulate = accumulate
        self.stop = stop
        device = next(p.device for module in task.modules.values() for p in module.parameters())
        self._autocast = autocast(device, precision)

    def __call__(self, batch: Batch, images: int, *, watched: bool = False) -> Outcome:
        """Step on the batch that begins after `images` images.

        Args:
            batch: this process's part of it.
            watched: find the first module that is not finite; slow.

        Raises: Stopped; then nothing has changed.
        """
        before, metrics, moment = Snapshot(self.task), dict[str, Tensor](), Moment(images, self.total)
        micros = self._micros(batch, moment)
        active = [name for name, phase in self.task.phases.items() if moment.reached(phase.start)]
        watch = Watch(self.task.modules) if watched else None
        with watch if watch is not None else contextlib.nullcontext():
            for number, phase in enumerate(active):
                try:
                    with contextlib.nullcontext() if number else self.stop.interruptible():
                        loss = self._backward(micros, phase, number)
                except Stopped:
                    self._drop(before)
                    raise
                norm = self.optimizers[phase].clip()
                if not finite(loss.value, norm):
                    fault = self._fault(loss, watch)
                    self._drop(before)
                    return Outcome({}, fault)
                seen = images + len(batch) * self.world.size
                lr = self.optimizers[phase].step(images, seen, self.total)
                own = {"loss": loss.value, "grad_norm": norm, "lr": torch.tensor(lr, dtype=torch.float64)}
                metrics |= {f"{phase}/{k}": v.detach() for k, v in {**own, **loss.metrics}.items()}
        return Outcome(metrics)

    def _micros(self, batch: Batch, moment: Moment) -> list[Micro]:
        """The micro-batches of this process, whose rows come after those of the processes before it."""
        position, micros = moment.images + self.world.rank * len(batch), list[Micro]()
        for part in split(batch, self.accumulate):
            noise = Noise([_derived("sample", self.seed, position + i) for i in range(len(part))])
            losses = self.task.losses(part, noise, moment)
            micros.append(Micro(losses, len(part) / len(batch), position))
            position += len(part)
        return micros

    def _backward(self, micros: Sequence[Micro], phase: str, number: int) -> Loss:
        """Add up the gradients of a phase, the one with that number; its loss and metrics, over all."""
        found: list[Loss] = []
        for micro in micros:
            # Layers that draw for themselves (nn.Dropout) use torch's generator: it follows the position too.
            torch.manual_seed(_derived(f"layers{number or ''}", self.seed, micro.position))
            loss = self.engine.backward(
                phase,
                partial(self._next, micro, phase),
                self.optimizers[phase],
                share=micro.share,
                last=micro is micros[-1],
            )
            found.append(Loss(phase, loss.value.detach(), loss.metrics))
        mean = _mean(found, [micro.share for micro in micros])
        value, *others = self.world.mean([mean.value, *mean.metrics.values()])
        return Loss(phase, value, dict(zip(mean.metrics, others, strict=True)))

    def _next(self, micro: Micro, phase: str) -> Loss:
        with self._autocast():
            loss = next(micro.losses)
        assert loss.phase == phase, "a task yields the phases that have started, in their order"
        return loss

    def _fault(self, loss: Loss, watch: Watch | None) -> Fault:
        """What is not finite, and where it began on the process where it did."""
        what: Literal["loss", "gradient"] = "gradient" if finite(loss.value) else "loss"
        told = self.world.gather(None if watch is None else (bool(watch.output), watch.culprit(what)))
        culprits = [one for one in told if one is not None]
        first = next((text for seen, text in culprits if seen), culprits[0][1] if culprits else "")
        return Fault(loss.phase, what, first)

    def _drop(self, before: Snapshot) -> None:
        """Undo what a step has done that is not to be."""
        before.restore()
        for optimizer in self.optimizers.values():
            for parameter in optimizer.parameters:
                parameter.grad = None


def split(batch: Batch, parts: int) -> list[Batch]:
    """A batch cut into `parts` of equal size, or of sizes that differ by one."""
    edges = [len(batch) * i // parts for i in range(parts + 1)]
    rows = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return [
        batch if parts == 1 else replace(batch, **{name: _cut(v, a, b) for name, v in rows.items()})
        for a, b in pairwise(edges)
    ]


def _cut(rows: T, start: int, stop: int) -> T:
    """Some rows of a field; what has no rows is the same for all."""
    return rows[start:stop] if isinstance(rows, Tensor | tuple | list) else rows  # type: ignore[return-value]


def _mean(losses: Sequence[Loss], shares: Sequence[float]) -> Loss:
    if len(losses) == 1:
        return losses[0]
    values = [{"": loss.value, **loss.metrics} for loss in losses]
    assert len({(loss.phase, *value) for loss, value in zip(losses, values, strict=True)}) == 1
    mean = {
        k: torch.stack([s * v[k].detach() for s, v in zip(shares, values, strict=True)]).sum(0)
        for k in values[0]
    }
    return Loss(losses[0].phase, mean.pop(""), mean)


def _derived(name: str, seed: int, position: int) -> int:
    """63 bits for a purpose at a position of a run, whatever the batch size or the number of processes."""
    return int.from_bytes(hashlib.sha256(f"{name}/{seed}/{position}".encode()).digest()[:8], "little") >> 1
