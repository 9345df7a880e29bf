"""How gradients come about in one process or many: alone, replicated (DDP), or sharded (FSDP2)."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor, nn

from sfumato.core.world import ALONE, World
from sfumato.data.datasets import ImageFolder
from sfumato.nets.lora import Adapter
from sfumato.nets.tags import entrances_of
from sfumato.training.compute import blocks_of
from sfumato.training.optim import PhaseOptimizer
from sfumato.training.task import Loss, Task

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Alone", "Engine", "Parallel", "Replicated", "Sharded", "check_shares", "engine_for"]

LOGGER = logging.getLogger(__name__)
Parallel = Literal["replicate", "shard"]
Forward = Callable[[], Loss]


class Engine(Protocol):
    """Forward and backward passes of a phase, whose gradients are means over all processes.

    Attributes:
        mesh: over which parameters are sharded; None = every process holds all of them.
        world: the processes.
    """

    @property
    def mesh(self) -> DeviceMesh | None: ...

    @property
    def world(self) -> World: ...

    def backward(
        self, phase: str, forward: Forward, optimizer: PhaseOptimizer, *, share: float, last: bool
    ) -> Loss:
        """Add the gradients of `share` times a loss to the parameters of a phase.

        Args:
            forward: computes the loss.
            optimizer: of the phase.
            last: no other micro-batch of this step follows in this phase.
        """
        ...


class Alone:
    """One process."""

    mesh = None
    world = ALONE

    def backward(
        self, phase: str, forward: Forward, optimizer: PhaseOptimizer, *, share: float, last: bool
    ) -> Loss:
        """See Engine; no other module's gradients are touched."""
        loss = forward()
        optimizer.backward(loss.value * share)
        return loss


class Replicated:
    """DistributedDataParallel: every process holds all; gradients are averaged while they are computed.

    A phase is wrapped as a whole, and not its nets, so that a task may call them as it likes: a part of a
    net, several in turn, or adapters that act inside another net. Every parameter of a phase must get a
    gradient in every step.

    Args:
        task: on its device.
    """

    mesh = None

    def __init__(self, task: Task, world: World) -> None:
        self.world = world
        wrap = nn.parallel.DistributedDataParallel
        self._phases = {
            name: wrap(_Call([task.modules[m] for m in phase.modules]), gradient_as_bucket_view=True)
            for name, phase in task.phases.items()
        }

    def backward(
        self, phase: str, forward: Forward, optimizer: PhaseOptimizer, *, share: float, last: bool
    ) -> Loss:
        """See Engine; no other module's gradients are touched."""
        wrapped, kept = self._phases[phase], list[Loss]()

        def value() -> Tensor:
            # Alone what is differentiated: DDP takes all that the result depends on for used.
            kept.append(forward())
            return kept[0].value * share

        with contextlib.nullcontext() if last else wrapped.no_sync():
            optimizer.backward(wrapped(value))
        return kept[0]


class _Call(nn.Module):
    """Modules whose forward is whatever it is given."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)

    def forward(self, compute: Callable[[], Tensor]) -> Tensor:
        return compute()


class Sharded:
    """FSDP2: weights, gradients, averages and optimizer states are spread over the processes.

    Every block is gathered when it is needed and let go after it. Of a task with one phase.

    Args:
        task: its modules are sharded in place.
    """

    def __init__(self, task: Task, world: World) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        if len(task.phases) > 1:
            raise world.fail(
                "trainer.parallel shard is for tasks of one phase, and this one has "
                f"{', '.join(task.phases)}; choose replicate"
            )
        if any(isinstance(module, Adapter) for module in task.modules.values()):
            raise world.fail("trainer.parallel shard trains whole nets, and not adapters; choose replicate")
        # Keys and values are views of what a layer returns; nothing here writes into them.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        self.world = world
        device = next(p.device for module in task.modules.values() for p in module.parameters())
        self.mesh = init_device_mesh(device.type, (world.size,))
        for module in task.modules.values():
            module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 needs it
            units = {module, *blocks_of(module)}
            for layer in reversed(list(module.modules())):  # what is inside first
                if layer in units or entrances_of(layer):
                    fully_shard(layer, mesh=self.mesh)
                for method in entrances_of(layer):
                    register_fsdp_forward_method(layer, method)

    def backward(
        self, phase: str, forward: Forward, optimizer: PhaseOptimizer, *, share: float, last: bool
    ) -> Loss:
        """See Engine. Gradients are scattered after every micro-batch, so that none is ever held whole."""
        loss = forward()
        torch.autograd.backward(loss.value * share)
        return loss


def engine_for(task: Task, parallel: Parallel, world: World) -> Engine:
    """The engine of a run. Raises: ValueError in one line if the task cannot be sharded."""
    if world.size == 1:
        return Alone()
    return Sharded(task, world) if parallel == "shard" else Replicated(task, world)


def check_shares(pictures: ImageFolder, batch: int, world: World) -> None:
    """Say what part of the data each process gets, before anything is computed.

    Raises: ValueError in one line if a process gets none, or they do not see the same data.
    """
    if world.size == 1:
        return
    names = "\n".join(f"{str(e.file).removeprefix(str(pictures.path))} {e.text}" for e in pictures.entries)
    seen = world.gather((len(pictures), hashlib.sha256(names.encode()).hexdigest()))
    other = next((rank for rank, one in enumerate(seen) if one != seen[0]), None)
    if other is not None:
        raise world.fail(
            f"the processes see different data at {pictures.path}: process 0 has {seen[0][0]} pictures and "
            f"process {other} has {seen[other][0]}, or others; give all of them the same files"
        )
    if batch < world.size or batch > len(pictures):
        raise world.fail(
            f"trainer.batch {batch} of {len(pictures)} pictures leaves some of {world.size} processes with "
            f"none; choose from {world.size} to {len(pictures)}"
        )
    part, (full, rest) = batch // world.size, divmod(len(pictures), batch)
    told = (f"process {r}: {full * part + min(max(rest - r * part, 0), part)}" for r in range(world.size))
    LOGGER.info(
        "%d processes; of %d pictures an epoch gives %s; batches of %d, %d from each",
        *(world.size, len(pictures), ", ".join(told), batch, part),
    )
