"""What metrics need of torch.distributed: sums and rows of all ranks; of one process its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_rows", "all_sum", "processes", "rank", "world"]


@contextlib.contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, if it did."""
    mine = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _started()
    if mine:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        if mine:
            dist.destroy_process_group()


def world() -> int:
    """Number of processes that share the work."""
    return dist.get_world_size() if _started() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if _started() else 0


def all_sum(value: Tensor) -> Tensor:
    """Sum over the ranks of a CPU tensor, which has the same shape on each."""
    if world() == 1:
        return value
    total = value.clone().to(_device())
    dist.all_reduce(total)
    return total.to(value.device)


def all_rows(rows: Tensor, position: Tensor) -> Tensor:
    """The rows of all ranks in the order of their positions, so that it does not matter who made which.

    Args:
        rows: (n, ...) on the CPU; n may differ between ranks.
        position: (n,) int64, different for every row of all ranks.
    """
    if world() > 1:
        rows, position = _gathered(rows), _gathered(position)
    return rows[position.argsort()]


def _gathered(rows: Tensor) -> Tensor:
    """Rows of all ranks, rank by rank: padded to the longest, as collectives want equal shapes."""
    counts = all_sum(torch.eye(world(), dtype=torch.int64)[rank()] * len(rows)).tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:]).to(_device())
    padded[: len(rows)] = rows.to(padded.device)
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n].cpu() for part, n in zip(parts, counts, strict=True)])


def _started() -> bool:
    return dist.is_available() and dist.is_initialized()


def _device() -> torch.device:
    """Where the backend wants its tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
