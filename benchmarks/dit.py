"""One guided step of a DiT: sfumato beside diffusers and a plain loop, in turns, with the same weights.

    python benchmarks/dit.py [--size xl] [--json FILE]

Every loop draws one picture by classifier-free guidance, conditional and unconditional row in one batch, in
a process of its own. It also times the sampling driver alone, over 250 steps of a network that costs nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TextIO

import torch
from pacing import Done, Pacer, Worker, peak_mb
from plain_dit import PlainDiT
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from train import Spread, gemm_rate, take_turns

from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.core.types import Conditioning
from sfumato.diffusion import PARAMETERIZATIONS, SAMPLERS, SPACINGS, Denoiser, Discrete, Run, integrate
from sfumato.diffusion.guidance import CFG
from sfumato.nets.dit import DiT, DiTConfig
from sfumato.nets.presets import DITS

__all__ = ["main"]

OWN = Path(__file__).resolve()
SIDE, SCALE, STEPS = 32, 4.0, 250
TINY = DiTConfig(width=32, depth=2, heads=2, num_classes=1000, out_channels=8, patch=4)
SIZES = {"xl": DITS["dit-xl-2"], "s": DITS["dit-s-2"], "tiny": lambda: TINY}
Pace = Callable[[], None]
PLAIN_NAMES = {
    "x_embedder.proj": "x_embedder",
    "t_embedder.mlp": "t_embedder",
    "y_embedder.embedding_table": "y_embedder",
    "attn.qkv": "qkv",
    "attn.proj": "proj",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "final_layer.": "",
    "adaLN_modulation": "adaln",
}


@dataclass(frozen=True)
class Side:
    """One loop.

    Attributes:
        seconds: of a step, median over its turns.
        slower, cpu: than ours, by the wall and in CPU time: ratios within each turn.
        peak_mb: most memory that its process held.
        gflop: of a step, as products of matrices cost; exact.
        gemm_share: of the machine's rate, that these reach with everything else in the step.
        answer: mean of |output| of the network for one input, the same for every loop.
    """

    name: str
    seconds: float
    slower: Spread
    cpu: Spread
    peak_mb: float
    gflop: float
    gemm_share: float
    answer: float


def weights(config: DiTConfig) -> DiT:
    """A network of random weights, the same wherever it is made."""
    torch.manual_seed(0)
    net = DiT(config)
    for p in net.parameters():
        if not p.any():  # what starts at zero
            nn.init.normal_(p, std=0.02)
    return net.eval()


def sample() -> tuple[Tensor, Tensor]:
    """Noise (1, 4, 32, 32), and the class and the null class."""
    return torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(1)), torch.tensor(
        [207, 1000]
    )


def ours(config: DiTConfig, pace: Pace) -> float:
    """The system's own way: planned net, guidance, ancestral steps with a learned variance."""
    net, (x, labels) = weights(config), sample()
    grid = SPACINGS["respaced"](Discrete(), STEPS)
    denoiser = Denoiser(net, Discrete(), PARAMETERIZATIONS["eps"], learned_var=True).planned(grid)
    with torch.no_grad():
        answer = net(x.repeat(2, 1, 1, 1), torch.full((2,), 500.0), Conditioning(label=labels)).abs().mean()
        denoise = CFG(SCALE, channels=3).bind(
            denoiser, Conditioning(label=labels[:1]), Conditioning(label=labels[1:])
        )
        with contextlib.suppress(Done):
            pace()
            while True:
                integrate(
                    SAMPLERS["ddpm"], Run(denoise, grid, torch.randn_like), x, observe=lambda *_: pace()
                )
    return float(answer)


def plain(config: DiTConfig, pace: Pace) -> float:
    """The paper's way: guidance inside the network's batch, an ancestral step of tables."""
    state = {}
    part = LAYOUTS["dit"].parts[0]
    for name, value in part.names(config).save(weights(config).state_dict(), where="plain").items():
        for theirs, own in PLAIN_NAMES.items():
            name = name.replace(theirs, own)  # noqa: PLW2901
        state[name] = value
    net, (x, labels) = PlainDiT(config, SIDE), sample()
    state["positions"] = part.constants({**part.published(config, {"input_size": SIDE})})["pos_embed"]
    net.load_state_dict(state, assign=True)
    net.eval()
    del state
    bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()
    kept = [round(i * 999 / (STEPS - 1)) for i in range(STEPS)]
    with torch.no_grad():
        answer = net(x.repeat(2, 1, 1, 1), torch.full((2,), 500.0), labels).abs().mean()
        with contextlib.suppress(Done):
            while True:
                h = x
                for i in reversed(range(STEPS)):
                    pace()
                    now, before = bar[kept[i]], bar[kept[i - 1]] if i else torch.ones(())
                    out = net(h.repeat(2, 1, 1, 1), torch.full((2,), float(kept[i])), labels)
                    cond, null = out.chunk(2)
                    eps = torch.cat([null[:, :3] + SCALE * (cond[:, :3] - null[:, :3]), cond[:, 3:4]], dim=1)
                    beta = 1 - now / before
                    small = torch.log((beta * (1 - before) / (1 - now)).clamp_min(1e-20))
                    x0 = (h - (1 - now).sqrt() * eps) / now.sqrt()
                    mean = (before.sqrt() * beta * x0 + (beta.neg() + 1).sqrt() * (1 - before) * h) / (
                        1 - now
                    )
                    share = (cond[:, 4:] + 1) / 2
                    spread = torch.exp(0.5 * (share * beta.log() + (1 - share) * small))
                    h = mean + spread * torch.randn_like(h) if i else mean
    return float(answer)


def diffusers(config: DiTConfig, pace: Pace) -> float:
    """The loop of DiTPipeline with its DDIM."""
    from diffusers import DDIMScheduler, DiTTransformer2DModel

    config = replace(config, time_shift=1.0, norm2_eps=1e-5, position_base=SIDE // config.patch)
    part = LAYOUTS["dit-diffusers"].parts[0]
    state = part.names(config).save(weights(config).state_dict(), where="diffusers")
    net = DiTTransformer2DModel(**part.published(config, {})).eval()
    net.load_state_dict(state)
    del state
    x, labels = sample()
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        answer = net(x.repeat(2, 1, 1, 1), torch.full((2,), 500.0), labels).sample.abs().mean()
        with contextlib.suppress(Done):
            while True:
                h = torch.cat([x, x])
                for t in scheduler.timesteps:
                    pace()
                    out = net(
                        torch.cat([h[:1], h[:1]]), timestep=t[None].expand(2), class_labels=labels
                    ).sample
                    eps, rest = out[:, :4], out[:, 4:]
                    guided = eps[1:] + SCALE * (eps[:1] - eps[1:])
                    out = torch.cat([torch.cat([guided, guided]), rest], dim=1)[:, :4]
                    h = scheduler.step(out, t, h).prev_sample
    return float(answer)


LOOPS: dict[str, Callable[[DiTConfig, Pace], float]] = {
    "sfumato": ours,
    "diffusers": diffusers,
    "plain": plain,
}


def work(arguments: argparse.Namespace, asked: TextIO, answers: TextIO) -> None:
    """Be the process of one loop."""
    pacer = Pacer(asked, answers)
    answer = LOOPS[arguments.worker](SIZES[arguments.size](), pacer)
    said = {"peak": pacer.peak or peak_mb(), "gflop": pacer.flops / 1e9, "answer": answer}
    print(json.dumps(said), file=answers, flush=True)


def driver_seconds() -> float:
    """One of 250 guided steps of everything but the network, the best of three walks."""
    x, labels = sample()
    out = torch.randn(2, 8, SIDE, SIDE) / 10
    grid = SPACINGS["respaced"](Discrete(), STEPS)
    still = Denoiser(lambda x, t, cond: out, Discrete(), PARAMETERIZATIONS["eps"], learned_var=True)
    conds = [Conditioning(label=label[None]) for label in labels]
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        denoise = CFG(SCALE, channels=3).bind(still, *conds)
        integrate(SAMPLERS["ddpm"], Run(denoise, grid, torch.randn_like), x)
        best = min(best, time.perf_counter() - began)
    return best / STEPS


def measure(arguments: argparse.Namespace) -> tuple[list[Side], float]:
    """All loops in turns, and the machine's rate as it was then."""
    command = [sys.executable, str(OWN), "--size", arguments.size, "--worker"]
    workers = [Worker([*command, name], arguments.threads) for name in LOOPS]
    try:
        rates = [gemm_rate(arguments.seconds)]
        bursts = take_turns(workers, arguments.turns, arguments.steps)
        rates.append(gemm_rate(arguments.seconds))
        said = [worker.end() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    sides = []
    for name, own, last in zip(LOOPS, bursts, said, strict=True):
        seconds = statistics.median(burst.wall / arguments.steps for burst in own)
        slower = Spread.of([b.wall / a.wall for a, b in zip(bursts[0], own, strict=True)])
        cpu = Spread.of([b.cpu / a.cpu for a, b in zip(bursts[0], own, strict=True)])
        share = last["gflop"] / seconds / max(rates)
        sides.append(Side(name, seconds, slower, cpu, last["peak"], last["gflop"], share, last["answer"]))
    return sides, max(rates)


def table(sides: Sequence[Side], rate: float, driver: float, arguments: argparse.Namespace) -> Table:
    """What was measured, for people."""
    made = Table(
        title=f"DiT {arguments.size}, {arguments.threads} threads, {arguments.turns} turns of "
        f"{arguments.steps} steps; products of matrices: {rate:.0f} GFLOP/s; driver {driver * 1e3:.2f} ms, "
        f"{driver / sides[0].seconds:.2%} of it"
    )
    made.add_column("loop")
    for head in ("s/step", "slower by", "in CPU time", "peak MB", "GFLOP/step", "of GEMM"):
        made.add_column(head, justify="right")
    for side in sides:
        numbers = (
            f"{side.seconds:.4f}",
            str(side.slower),
            str(side.cpu),
            f"{side.peak_mb:.0f}",
            f"{side.gflop:.1f}",
        )
        made.add_row(side.name, *numbers, f"{side.gemm_share:.0%}")
    return made


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="xl")
    parser.add_argument("--turns", type=int, default=7, help="of each loop; 7")
    parser.add_argument("--steps", type=int, default=2, help="of a turn; 2")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch; all cores")
    parser.add_argument("--seconds", type=float, default=3.0, help="for the rate of matrix products; 3")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--worker", choices=LOOPS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(command: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    arguments = parse(command)
    if arguments.worker:
        answers, sys.stdout = sys.stdout, sys.stderr  # whatever else prints must not come in between
        work(arguments, sys.stdin, answers)
        return
    torch.set_num_threads(arguments.threads)
    sides, rate = measure(arguments)
    driver = driver_seconds()
    Console(width=None if sys.stdout.isatty() else 140).print(table(sides, rate, driver, arguments))
    if arguments.json:
        report = {
            "size": arguments.size,
            "threads": arguments.threads,
            "torch": torch.__version__,
            "gemm_gflops": rate,
            "driver_seconds": driver,
            "sides": [asdict(side) for side in sides],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
