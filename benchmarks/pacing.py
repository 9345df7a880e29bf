"""Both ends of a pipe: a training loop in a process of its own, and who tells it how many steps to take."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TextIO

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Burst", "Done", "Pacer", "Worker", "peak_mb"]


@dataclass(frozen=True)
class Burst:
    """Some steps in a row: their wall time, and the CPU time of all threads of the process."""

    wall: float
    cpu: float


class Done(Exception):
    """Nobody wants any more steps."""


class Pacer:
    """Called by a loop at the beginning of every step; returns as soon as the step is wanted.

    What a loop does between two calls is what is measured, so that everything belongs to it: data, loss,
    optimizer, averages, log. When its input ends there is one more step, whose operations are counted.

    Args:
        asked: lines, each with a number of steps.
        answers: gets one line of JSON for each of them.

    Attributes:
        peak: of memory, in MB, when the input ended.
        flops: of products of matrices and convolutions in a step, forwards and backwards.
    """

    def __init__(self, asked: TextIO, answers: TextIO) -> None:
        self._asked, self._answers = asked, answers
        self._left = 0
        self._began: Burst | None = None
        self._counting: contextlib.ExitStack | None = None
        self._counter = FlopCounterMode(display=False)
        self.peak, self.flops = 0.0, 0

    def __call__(self) -> None:
        """Wait until a step is wanted. Raises: Done when there will be no more."""
        if self._counting is not None:
            self._counting.close()
            self.flops = self._counter.get_total_flops()
            raise Done
        if self._left == 0:
            self._tell()
            line = self._asked.readline()
            if not line.strip():
                self._count()
                return
            self._left = int(line)
            self._began = Burst(time.perf_counter(), time.process_time())
        self._left -= 1

    def _tell(self) -> None:
        if self._began is not None:
            wall, cpu = time.perf_counter() - self._began.wall, time.process_time() - self._began.cpu
            print(json.dumps(asdict(Burst(wall, cpu))), file=self._answers, flush=True)

    def _count(self) -> None:
        self.peak = peak_mb()
        self._counting = contextlib.ExitStack()
        # What is fused is counted as the products that it consists of.
        self._counting.enter_context(sdpa_kernel(SDPBackend.MATH))
        self._counting.enter_context(self._counter)


class Worker:
    """A loop in a process of its own, which sleeps unless it is told to take steps.

    Args:
        command: what starts it; it must pace itself by a Pacer on its input and output.
        threads: of torch.
    """

    def __init__(self, command: Sequence[str], threads: int) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def steps(self, count: int) -> Burst:
        """Let it take some steps. Raises: RuntimeError if it has died."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        return Burst(**self._line())

    def end(self) -> dict[str, float]:
        """Let it end; what it says of itself. Raises: RuntimeError if it has died."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        said = self._line()
        self._process.wait()
        return said

    def kill(self) -> None:
        """End it whatever it does."""
        self._process.kill()
        self._process.wait()

    def _line(self) -> dict[str, float]:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"a measured process ended by itself: {' '.join(self._process.args)}")  # type: ignore[arg-type]
        said: dict[str, float] = json.loads(line)
        return said


def peak_mb() -> float:
    """Most memory that this process has held until now, in 10^6 bytes.

    On Linux it begins with the peak of the process that started it, which should be a small one.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6  # macOS counts bytes, Linux KiB
