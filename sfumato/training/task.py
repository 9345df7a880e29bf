"""What the training loop asks of a task: modules, phases, and the losses of one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from sfumato.core.random import Noise
from sfumato.training.batches import Batch
from sfumato.training.optim import OptimConfig

__all__ = ["Loss", "Memory", "Metrics", "Moment", "Phase", "Task"]

Metrics = Mapping[str, Tensor]


class Moment(NamedTuple):
    """Where a run stands: images seen before this batch, and images that the whole run will see."""

    images: int
    total: int

    def reached(self, start: float) -> bool:
        """Whether `start` has come: up to 1 it is a fraction of the run, above 1 a number of images."""
        return self.images >= (start * self.total if start <= 1 else start)


class Loss(NamedTuple):
    """A scalar to minimise over the modules of `phase`, and detached numbers worth logging."""

    phase: str
    value: Tensor
    metrics: Metrics


@dataclass(frozen=True)
class Phase:
    """One backward pass and optimizer step per batch over some of the task's modules.

    Attributes:
        modules: names in `Task.modules`; no module may belong to two phases.
        optim: this phase's own optimizer; None = the run's.
        start: when it begins, see `Moment.reached`.
    """

    modules: tuple[str, ...]
    optim: OptimConfig | None = None
    start: float = 0.0


class Memory(Protocol):
    """Something without parameters that an exact resume must restore."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Task(Protocol):
    """A loss and what it trains.

    Attributes:
        modules: everything that is trained or carries state; frozen nets stay outside.
        phases: by name, in the order in which `losses` yields them.
        averaged: the modules of which the run keeps a moving average.
        memories: by name, what else the losses depend on from batch to batch.
    """

    @property
    def modules(self) -> Mapping[str, nn.Module]: ...

    @property
    def phases(self) -> Mapping[str, Phase]: ...

    @property
    def averaged(self) -> tuple[str, ...]: ...

    @property
    def memories(self) -> Mapping[str, Memory]: ...

    def losses(self, batch: Batch, noise: Noise, moment: Moment) -> Iterator[Loss]:
        """Yield the loss of each phase whose start has been reached at `moment`, in the order of `phases`.

        The loop steps a phase's optimizer before it asks for the next loss. All randomness comes from
        `noise`, which has one stream per sample of the batch.
        """
        ...

    def preview(self, averaged: Mapping[str, nn.Module]) -> Tensor:
        """Pictures (n, 3, H, W) in [-1, 1] that show how far `averaged`, the moving averages, have come."""
        ...
