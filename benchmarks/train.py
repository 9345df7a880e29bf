"""Speed and memory of training: `python benchmarks/train.py`, on a machine with nothing else to do.

Each of two loops runs in a process of its own. They take turns, some steps each, so that what the machine
does besides falls on both; a ratio is made of one turn of each, and of the ratios the median counts.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import torch
from pacing import Burst, Done, Pacer, Worker, peak_mb
from rich.console import Console
from rich.table import Table
from setting import SIZES

LOOPS = {
    "sfumato-unet": ("ours", "unet"),
    "diffusers-unet": ("on_diffusers", "unet"),
    "sfumato-dit": ("ours", "dit"),
    "plain-dit": ("plain_dit", "dit"),
    "sfumato-cached": ("ours", "cached"),
    "sfumato-uncached": ("ours", "uncached"),
}
PAIRS = {
    "unet": ("sfumato-unet", "diffusers-unet"),
    "dit": ("sfumato-dit", "plain-dit"),
    "cache": ("sfumato-cached", "sfumato-uncached"),
}
MATRICES = (512, 1024, 2048)  # sides of those whose product gives the machine's rate
OWN = Path(__file__).resolve()


@dataclass(frozen=True)
class Spread:
    """Of several ratios."""

    min: float
    median: float
    max: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """The spread of some values."""
        return Spread(min(values), statistics.median(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.min:.2f} to {self.max:.2f})"


@dataclass(frozen=True)
class Side:
    """One of the two loops.

    Attributes:
        images_per_second: median over its turns.
        peak_mb: most memory that its process held, and `training_mb` without what it held after the imports.
        gflop: of a step, forwards and backwards, as products of matrices and convolutions cost; exact.
        gemm_share: of the machine's rate, that these reach with everything else in the step.
    """

    name: str
    images_per_second: float
    peak_mb: float
    training_mb: float
    gflop: float
    gemm_share: float


@dataclass(frozen=True)
class Pair:
    """Two loops: how much faster the first is, by the wall and in CPU time, and how much memory it takes."""

    name: str
    sides: tuple[Side, Side]
    speed: Spread
    cpu: Spread
    memory: float


def work(arguments: argparse.Namespace, asked: TextIO, answers: TextIO) -> None:
    """Be the process of one loop: take steps as they are asked for, and say at the end what they took."""
    module, function = LOOPS[arguments.worker]
    loop = getattr(importlib.import_module(module), function)
    importlib.import_module("torch._dynamo")  # optimizers import it, 50 MB, at their first step
    before, pacer = peak_mb(), Pacer(asked, answers)
    torch.manual_seed(0)
    with contextlib.suppress(Done):
        loop(SIZES[arguments.size], arguments.data, pacer)
    said = {"before": before, "peak": pacer.peak, "gflop": pacer.flops / 1e9}
    print(json.dumps(said), file=answers, flush=True)


def gemm_rate(seconds: float) -> float:
    """10^9 operations a second in the best product of float32 matrices."""
    best = 0.0
    for n in MATRICES:
        a, b = torch.randn(n, n), torch.randn(n, n)
        end = time.perf_counter() + seconds / len(MATRICES)
        while (began := time.perf_counter()) < end:
            torch.mm(a, b)
            best = max(best, 2e-9 * n**3 / (time.perf_counter() - began))
    return best


def take_turns(workers: Sequence[Worker], turns: int, steps: int) -> list[list[Burst]]:
    """Bursts of each worker, who begins the round alternating; one round before them does not count."""
    bursts: list[list[Burst]] = [[] for _ in workers]
    for turn in range(turns + 1):
        order = range(len(workers)) if turn % 2 else reversed(range(len(workers)))
        for i in order:
            bursts[i].append(workers[i].steps(steps))
    return [own[1:] for own in bursts]


def compare(name: str, arguments: argparse.Namespace) -> tuple[Pair, float]:
    """Measure a pair; also the machine's rate as it was then."""
    names = PAIRS[name]
    told = ["--size", arguments.size, "--data", str(arguments.data)]
    workers = [Worker([sys.executable, str(OWN), "--worker", n, *told], arguments.threads) for n in names]
    try:
        rates = [gemm_rate(arguments.seconds)]
        bursts = take_turns(workers, arguments.turns, arguments.steps)
        rates.append(gemm_rate(arguments.seconds))
        said = [worker.end() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    rate, images = max(rates), SIZES[arguments.size].batch * arguments.steps
    sides = []
    for loop, own, last in zip(names, bursts, said, strict=True):
        speed = statistics.median(images / burst.wall for burst in own)
        share = last["gflop"] * speed / SIZES[arguments.size].batch / rate
        sides.append(Side(loop, speed, last["peak"], last["peak"] - last["before"], last["gflop"], share))
    ours, theirs = bursts
    return (
        Pair(
            name,
            (sides[0], sides[1]),
            Spread.of([b.wall / a.wall for a, b in zip(ours, theirs, strict=True)]),
            Spread.of([b.cpu / a.cpu for a, b in zip(ours, theirs, strict=True)]),
            max(sides[0].training_mb, 1.0) / max(sides[1].training_mb, 1.0),  # below 1 MB nothing is seen
        ),
        rate,
    )


def table(pairs: Sequence[Pair], rate: float, arguments: argparse.Namespace) -> Table:
    """What was measured, for people."""
    title = (
        f"batch {SIZES[arguments.size].batch}, {arguments.threads} threads, {arguments.turns} turns of "
        f"{arguments.steps} steps; products of matrices: {rate:.0f} GFLOP/s"
    )
    made = Table(title=title)
    made.add_column("loop")
    for head in (
        "images/s",
        "faster by",
        "in CPU time",
        "peak MB",
        "of it training",
        "GFLOP/step",
        "of GEMM",
    ):
        made.add_column(head, justify="right")
    for pair in pairs:
        for i, side in enumerate(pair.sides):
            ratios = ("1", "1") if i else (str(pair.speed), str(pair.cpu))
            made.add_row(
                side.name,
                f"{side.images_per_second:.2f}",
                *ratios,
                f"{side.peak_mb:.0f}",
                f"{side.training_mb:.0f}",
                f"{side.gflop:.1f}",
                f"{side.gemm_share:.0%}",
                end_section=bool(i),
            )
    return made


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), help="what to compare")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--turns", type=int, default=15, help="of each loop; 15")
    parser.add_argument("--steps", type=int, default=4, help="of a turn; 4")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch; all cores")
    parser.add_argument("--seconds", type=float, default=3.0, help="for the rate of matrix products; 3")
    parser.add_argument("--data", type=Path, default=Path("data/openmoji"), help="pictures, for 'cache'")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--worker", choices=LOOPS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(command: Sequence[str] | None = None) -> None:
    """Measure the pairs, one after the other, and print the table."""
    arguments = parse(command)
    if arguments.worker:
        answers, sys.stdout = sys.stdout, sys.stderr  # whatever else prints must not come in between
        work(arguments, sys.stdin, answers)
        return
    if "cache" in arguments.pairs and not arguments.data.is_dir():
        sys.exit(
            f"there are no pictures in {arguments.data}; `sfumato data openmoji` makes them, or give --data"
        )
    torch.set_num_threads(arguments.threads)
    measured = [compare(name, arguments) for name in arguments.pairs]
    pairs, rate = [pair for pair, _ in measured], max(rate for _, rate in measured)
    Console(width=None if sys.stdout.isatty() else 140).print(table(pairs, rate, arguments))
    if arguments.json:
        settings = {"size": arguments.size, "turns": arguments.turns, "steps": arguments.steps}
        report = {
            **settings,
            "threads": arguments.threads,
            "torch": torch.__version__,
            "gemm_gflops": rate,
            "pairs": [asdict(pair) for pair in pairs],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
