"""The processes of a run: the number of this one, and the few things on which all must agree."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sfumato.core.device import device_of

__all__ = ["ALONE", "Echo", "World", "joined", "local", "whole"]

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # to wait for work that one process does for all, such as writing a checkpoint
ROLL_CALL = 5.0  # seconds in which the processes that are left report, after one of them is missing
COLLECTIVE = re.compile("gloo|nccl|connection (closed|reset)|timed? ?out", re.IGNORECASE)


class Echo(ValueError):
    """An error that another process tells already, so that this one ends in silence."""

    told = agreed = True


@dataclass(frozen=True)
class World:
    """One process among `size`, all of which run the same program.

    Attributes:
        rank: number of this process, from 0.
        local: its number on its machine, which is that of its GPU.
        store: where processes leave notes for each other; None if there are no others.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    store: dist.Store | None = None
    _met: Iterator[int] = field(default_factory=itertools.count, repr=False)

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and does the talking."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device of this process: the one named, and of several GPUs its own.

        Raises: ValueError in one line if a machine has fewer GPUs than processes.
        """
        device = device_of(name)
        if self.size == 1 or device.type == "cpu" or device.index is not None:
            return device
        there = torch.accelerator.device_count()
        if self.local >= there:
            raise ValueError(
                f"process {self.local} of this machine finds {there} {device.type} devices; start at most "
                "as many with --nproc-per-node, or choose --trainer.device cpu"
            )
        torch.accelerator.set_device_index(self.local)
        return torch.device(device.type, self.local)

    def share(self, count: int) -> range:
        """Which of `count` things this process does."""
        return range(self.rank, count, self.size)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of their ranks; they pass as pickles."""
        if self.size == 1:
            return [value]
        values: list[T | None] = [None] * self.size
        with self.watched():
            dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]  # every entry was filled

    def together(self, rows: Sequence[T], count: int) -> list[T]:
        """What each process made of its `share` of `count`, put in order; on every process."""
        parts = self.gather(list(rows))
        return [parts[i % self.size][i // self.size] for i in range(count)]

    def rows(self, rows: Tensor, position: Tensor) -> Tensor:
        """The rows of all processes in the order of their positions, whoever made which.

        Args:
            rows: (n, ...) on the CPU; n may differ between processes.
            position: (n,), another one for every row of all processes.
        """
        parts = zip(*self.gather((rows, position)), strict=True)
        rows, position = (torch.cat(part) for part in parts)
        return rows[position.argsort()]

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the processes of a tensor on the CPU, of one shape on each."""
        if self.size == 1:
            return value
        total = value.clone()
        with self.watched():
            dist.all_reduce(total)
        return total

    def mean(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Means over the processes of tensors of any shape: float64 on the CPU, if there are others."""
        if self.size == 1:
            return list(values)
        exact = [v.detach().double() if v.device.type == "cpu" else v.detach().float() for v in values]
        flat = torch.cat([value.flatten() for value in exact]).cpu().double()
        parts = torch.split(self.sum(flat) / self.size, [value.numel() for value in values])
        return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]

    def joined(self, rows: Tensor) -> Tensor:
        """The rows (n, ...) of all processes in the order of their ranks, with gradients to all of them."""
        if self.size == 1:
            return rows
        whole: Tensor = _Joined.apply(rows, self)  # type: ignore[no-untyped-call]
        return whole

    def most(self, value: int) -> int:
        """The largest value that a process has."""
        if self.size == 1:
            return value
        largest = torch.tensor(value)
        with self.watched():
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def meet(self) -> None:
        """Wait for all others, however long what they do takes."""
        if self.store is None:
            return
        place = f"meeting {next(self._met)}"
        if self.store.add(place, 1) == self.size:
            self.store.set(f"{place} is over", "1")
        self.store.wait([f"{place} is over"], PATIENCE)

    def lead(self, work: Callable[[], T]) -> T:
        """The result of work that process 0 does while the others wait.

        Raises: ValueError or OSError of the work, and Echo on the other processes.
        """
        return self.agree(lambda: work() if self.leads else None, first=True)  # type: ignore[return-value]

    def agree(self, work: Callable[[], T], *, first: bool = False) -> T:
        """The result of work that every process does; if it fails on one, it fails on all.

        Agreements may lie within each other.

        Args:
            first: return what process 0 made of it.

        Raises: ValueError or OSError of the lowest process that failed, and Echo on the others.
        """
        if self.size == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except (ValueError, OSError) as caught:
            if getattr(caught, "agreed", False):  # within this agreement: all have it
                raise
            error = caught
        self.meet()
        told = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        failed = next((rank for rank, text in enumerate(told) if text is not None), None)
        if failed is not None:
            if error is not None and failed == self.rank:
                raise _agreed(error)
            raise Echo(f"process {failed} failed ({told[failed]})")
        return self.gather(result)[0] if first else result  # type: ignore[return-value]

    def fail(self, text: str) -> ValueError:
        """An error that all processes have at once, to raise; one of them will tell it."""
        return _agreed(ValueError(text)) if self.leads else Echo(text)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Say in one line which process is missing when the others wait for it in vain."""
        try:
            yield
        except RuntimeError as error:
            if self.store is None or not COLLECTIVE.search(str(error)):
                raise
            raise self._missing(self.store) from None

    def _missing(self, store: dist.Store) -> ValueError:
        """Every process that notices reports; those that do not are missing."""
        store.set(f"here is {self.rank}", "1")
        until = time.monotonic() + ROLL_CALL
        present = {self.rank}
        while time.monotonic() < until and len(present) < self.size:
            present |= {rank for rank in range(self.size) if store.check([f"here is {rank}"])}
            time.sleep(0.05)
        missing = [str(rank) for rank in range(self.size) if rank not in present]
        if not missing:
            text = f"the {self.size} processes lost each other; see what they said before, and the network"
        else:
            who = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(missing)}"
            text = (
                f"{who} of {self.size} did not come to where the others waited: ended, stuck or slow; its "
                "own output may say why, and --trainer.timeout how long to wait"
            )
        return _agreed(ValueError(text)) if min(present) == self.rank else Echo(text)


class _Joined(torch.autograd.Function):
    """Rows of all processes; the gradient of a row is the sum of what they all make of it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, world: World) -> Tensor:
        ctx.world, ctx.rows = world, len(rows)
        parts = [torch.empty_like(rows) for _ in range(world.size)]
        with world.watched():
            dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        world, grad = ctx.world, grads[0].contiguous()
        with world.watched():
            dist.all_reduce(grad)
        return grad[world.rank * ctx.rows :][: ctx.rows], None


ALONE = World()


def _agreed(error: T) -> T:
    """Mark an error that all processes have at once, so that no agreement around it shares it again."""
    error.agreed = True  # type: ignore[attr-defined]
    return error


@contextlib.contextmanager
def joined(device: str, *, seconds: float) -> Iterator[World]:
    """The processes that torchrun started, or this one alone; they part at the end.

    Args:
        device: that they compute on; it decides by which means they talk.
        seconds: that a process waits for the others.

    Raises: ValueError in one line if the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    waits, kind = timedelta(seconds=seconds), device_of(device).type
    backend = "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=waits))
        # torchrun may keep its store when it starts processes again, with the addresses of those that died.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt {attempt}", store)
        world = World(rank, size, int(os.environ.get("LOCAL_RANK", "0")), store)
        world.device(device)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=waits)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the processes of this run cannot reach each other: {reason}") from None
    try:
        yield world
        world.meet()  # who leaves first would cut off who has a last word to say
    finally:
        gc.collect()  # what talks to the others must be gone before that by which it talks
        with contextlib.suppress(RuntimeError):  # the others may be gone already
            dist.destroy_process_group()


def local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds, the same memory; others as they are."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered from all processes, which must all call; others as they are."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full
