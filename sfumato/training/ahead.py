"""Reading ahead: the next batches are read by a thread while a step is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from sfumato.training.batches import Batch

__all__ = ["ReadAhead", "batches_ahead"]

ON_ACCELERATOR = 2  # batches; one is not enough where reading takes now less, now more time than a step


def batches_ahead(asked: int | None, device: torch.device) -> int:
    """How many batches to read ahead if the settings leave it open.

    None on a CPU, where the reader and the step want the same cores.
    """
    if asked is not None:
        return asked
    return 0 if device.type == "cpu" else ON_ACCELERATOR


class ReadAhead:
    """The same batches as without it, and the same errors at the same step; use as a context manager.

    Args:
        batches: the batch at a position. One thread calls it, for one position after the other, so it must
            not draw from torch's global generator, nor share state with what else runs.
        count: batches that are read before they are asked for; 0 = there is no thread.
        step: images from a batch to the next.
        end: images of the run; nothing is read beyond.
    """

    def __init__(self, batches: Callable[[int], Batch], count: int, *, step: int, end: int) -> None:
        self.batches = batches
        self.count = count
        self.step = step
        self.end = end
        self._reader: ThreadPoolExecutor | None = None
        self._coming: deque[tuple[int, Future[Batch]]] = deque()

    def __enter__(self) -> ReadAhead:
        if self.count:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="sfumato-reader")
            self._reader.submit(bool).result()  # the thread is there before a signal could come in between
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)
        self._reader = None
        self._coming.clear()

    def __call__(self, images: int) -> Batch:
        """The batch that begins with draw number `images`; a signal may interrupt the waiting for it.

        Raises: what reading that very batch has raised.
        """
        if self._reader is None:
            return self.batches(images)
        if self._coming and self._coming[0][0] != images:  # the run went back to a checkpoint
            for _, future in self._coming:
                future.cancel()
            self._coming.clear()
        while len(self._coming) <= self.count:
            position = images + len(self._coming) * self.step
            if self._coming and position >= self.end:
                break
            self._coming.append((position, self._reader.submit(self.batches, position)))
        batch = self._coming[0][1].result()
        self._coming.popleft()
        return batch
