"""Stable Diffusion beside diffusers: a guided step, decoding, texts, loading, the start of a process, memory.

    python benchmarks/sd.py [--size sd15|sdxl] [--parts step decode ...] [--folder DIR] [--json FILE]

Both read one folder of random weights at the published shapes, which is written first (SD 1.5: 4 GB). Every
loop runs in a process of its own; they take turns, and a ratio is made of one turn of each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from pacing import Done, Pacer, Worker, peak_mb
from rich.console import Console
from rich.table import Table
from torch import Tensor
from train import Spread, gemm_rate, take_turns

OWN = Path(__file__).resolve()
SCALE, STEPS = 7.5, 50
PROMPT, READY = "a red heart on a table", "ready"
Pace = Callable[[], None]
Loop = Callable[[Path, Pace], Tensor]
"""Does its work for ever, pacing itself; the answer is what its network says to one input."""


@dataclass(frozen=True)
class Row:
    """One part of one library.

    Attributes:
        seconds: median of the turns.
        slower, cpu: than sfumato, by the wall and in CPU time: ratios within each turn.
        peak_mb: most memory that its process held.
        gemm_share: of the machine's rate of matrix products, reached with everything else in the turn.
        difference: of its answer from sfumato's, relative.
    """

    part: str
    library: str
    seconds: float
    slower: Spread
    cpu: Spread | None = None
    peak_mb: float | None = None
    gemm_share: float | None = None
    difference: float | None = None


def _setting(folder: Path) -> tuple[Tensor, dict[str, Any]]:
    """A latent (1, 4, H, W), and the conditioning of the row with the prompt and the one without (2, ...)."""
    config = json.loads((folder / "unet/config.json").read_text())
    noise = torch.Generator().manual_seed(1)
    side = config["sample_size"]
    told: dict[str, Any] = {"tokens": torch.randn(2, 77, config["cross_attention_dim"], generator=noise)}
    if config.get("addition_embed_type"):
        width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        told["pooled"] = torch.randn(2, width, generator=noise)
        told["micro"] = torch.tensor([[8.0 * side, 8.0 * side, 0, 0, 8.0 * side, 8.0 * side]] * 2)
    return torch.randn(1, 4, side, side, generator=noise), told


def our_step(folder: Path, pace: Pace) -> Tensor:
    """Guided DDIM steps as a system takes them."""
    import sfumato
    from sfumato.core.types import Conditioning
    from sfumato.diffusion import PARAMETERIZATIONS, SAMPLERS, SPACINGS, Denoiser, Discrete, Run, integrate
    from sfumato.diffusion.guidance import CFG

    net, (x, told) = sfumato.load_nets(folder / "unet")["net"], _setting(folder)
    schedule = Discrete(formula="scaled_linear", start=0.00085, end=0.012)
    grid = SPACINGS["trailing"](schedule, STEPS)
    denoiser = Denoiser(net, schedule, PARAMETERIZATIONS["eps"]).planned(grid)
    cond, null = (Conditioning(**{k: v[i : i + 1] for k, v in told.items()}) for i in range(2))
    with torch.no_grad():
        answer = net(x.repeat(2, 1, 1, 1), torch.full((2,), 500.0), Conditioning(**told))
        with contextlib.suppress(Done):
            pace()
            while True:
                guided = CFG(SCALE).bind(denoiser, cond, null)
                integrate(SAMPLERS["ddim"], Run(guided, grid, torch.randn_like), x, observe=lambda *_: pace())
    return answer


def their_step(folder: Path, pace: Pace) -> Tensor:
    """The loop of StableDiffusionPipeline."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    net, (x, told) = UNet2DConditionModel.from_pretrained(folder / "unet").eval(), _setting(folder)
    more: dict[str, Any] = {"encoder_hidden_states": told["tokens"]}
    if "pooled" in told:
        more["added_cond_kwargs"] = {"text_embeds": told["pooled"], "time_ids": told["micro"]}
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(STEPS)
    with torch.no_grad():
        answer = net(x.repeat(2, 1, 1, 1), torch.full((2,), 500.0), **more).sample
        with contextlib.suppress(Done):
            while True:
                h = x
                for t in scheduler.timesteps:
                    pace()
                    cond, null = net(h.repeat(2, 1, 1, 1), t, **more).sample.chunk(2)
                    h = scheduler.step(null + SCALE * (cond - null), t, h).prev_sample
    return answer


def our_decode(folder: Path, pace: Pace) -> Tensor:
    """Pictures of latents."""
    import sfumato

    vae: Any = sfumato.load_nets(folder / "vae")["vae"]
    x, _ = _setting(folder)
    return _repeated(lambda: vae.decode(x), pace)


def their_decode(folder: Path, pace: Pace) -> Tensor:
    """Pictures of latents."""
    from diffusers import AutoencoderKL

    vae, (x, _) = AutoencoderKL.from_pretrained(folder / "vae").eval(), _setting(folder)
    return _repeated(lambda: vae.decode(x).sample, pace)


def our_text(folder: Path, pace: Pace) -> Tensor:
    """Tokens of a prompt and an empty one, of the first tower."""
    import sfumato

    (net,) = sfumato.load_nets(folder / "text_encoder").values()
    ids = torch.arange(154).reshape(2, 77)
    return _repeated(lambda: net(ids).last, pace)


def their_text(folder: Path, pace: Pace) -> Tensor:
    """Tokens of a prompt and an empty one, of the first tower."""
    from transformers import CLIPTextModel

    net, ids = CLIPTextModel.from_pretrained(folder / "text_encoder").eval(), torch.arange(154).reshape(2, 77)
    return _repeated(lambda: net(ids).last_hidden_state, pace)


def _repeated(call: Callable[[], Tensor], pace: Pace) -> Tensor:
    with torch.no_grad():
        answer = call()
        with contextlib.suppress(Done):
            while True:
                pace()
                call()
    return answer


LOOPS: dict[str, dict[str, Loop]] = {
    "step": {"sfumato": our_step, "diffusers": their_step},
    "decode": {"sfumato": our_decode, "diffusers": their_decode},
    "text": {"sfumato": our_text, "diffusers": their_text},
}
# Programs as users write them, cut off where the first step begins.
STARTS = {
    "sfumato": """
import sys, sfumato
system = sfumato.load(sys.argv[1])
net = system.stages[0].denoiser.net
net.register_forward_pre_hook(lambda *_: print("ready", flush=True))
system.generate(sys.argv[2], steps=1, guidance=7.5)
""",
    "diffusers": """
import sys, diffusers
name = "StableDiffusionXLPipeline" if sys.argv[3] == "sdxl" else "StableDiffusionPipeline"
pipe = getattr(diffusers, name).from_pretrained(sys.argv[1])
pipe.unet.register_forward_pre_hook(lambda *_: print("ready", flush=True))
pipe(sys.argv[2], num_inference_steps=1, guidance_scale=7.5)
""",
}


def work(arguments: argparse.Namespace, asked: TextIO, answers: TextIO) -> None:
    """Be the process of one loop; its answer goes into a file of the folder."""
    part, library = arguments.worker
    pacer = Pacer(asked, answers)
    answer = LOOPS[part][library](arguments.folder, pacer)
    torch.save(answer, arguments.folder / f"{part}-{library}.pt")
    said = {"peak": pacer.peak or peak_mb(), "gflop": pacer.flops / 1e9}
    print(json.dumps(said), file=answers, flush=True)


def paced(part: str, arguments: argparse.Namespace) -> list[Row]:
    """Both libraries in turns."""
    loops = LOOPS[part]
    command = [sys.executable, str(OWN), "--folder", str(arguments.folder), "--worker", part]
    workers = [Worker([*command, name], arguments.threads) for name in loops]
    try:
        rates = [gemm_rate(arguments.seconds)]
        bursts = take_turns(workers, arguments.turns, 1)
        rates.append(gemm_rate(arguments.seconds))
        said = [worker.end() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    answers = [torch.load(arguments.folder / f"{part}-{name}.pt") for name in loops]
    rows = []
    for name, own, last, answer in zip(loops, bursts, said, answers, strict=True):
        seconds = statistics.median(burst.wall for burst in own)
        rows.append(
            Row(
                part=part,
                library=name,
                seconds=seconds,
                slower=Spread.of([b.wall / a.wall for a, b in zip(bursts[0], own, strict=True)]),
                cpu=Spread.of([b.cpu / a.cpu for a, b in zip(bursts[0], own, strict=True)]),
                peak_mb=last["peak"],
                gemm_share=last["gflop"] / seconds / max(rates),
                difference=float((answer - answers[0]).norm() / answers[0].norm()),
            )
        )
    return rows


def started(arguments: argparse.Namespace) -> list[Row]:
    """From the start of a process to its first step: imports, loading, and reading the prompt."""
    walls: dict[str, list[float]] = {name: [] for name in STARTS}
    for turn in range(arguments.turns + 1):
        for name in sorted(STARTS, reverse=bool(turn % 2)):
            walls[name].append(_start(STARTS[name], arguments))
    ours = walls["sfumato"][1:]
    return [
        Row(
            part="start",
            library=name,
            seconds=statistics.median(own[1:]),
            slower=Spread.of([b / a for a, b in zip(ours, own[1:], strict=True)]),
        )
        for name, own in walls.items()
    ]


def _start(program: str, arguments: argparse.Namespace) -> float:
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, str(arguments.folder), PROMPT, arguments.size]
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        said = process.stdout.readline().strip()
        wall = time.perf_counter() - began
        process.kill()
        if said != READY:
            assert process.stderr is not None
            raise RuntimeError(f"no first step: {process.stderr.read()[-2000:]}")
    return wall


def table(rows: Sequence[Row], arguments: argparse.Namespace) -> Table:
    """What was measured, for people."""
    made = Table(title=f"{arguments.size}, {arguments.threads} threads, {arguments.turns} turns")
    made.add_column("part")
    made.add_column("library")
    for head in ("seconds", "slower by", "in CPU time", "peak MB", "of GEMM", "difference"):
        made.add_column(head, justify="right")
    for row in rows:
        made.add_row(
            row.part,
            row.library,
            f"{row.seconds:.3f}",
            str(row.slower),
            "" if row.cpu is None else str(row.cpu),
            "" if row.peak_mb is None else f"{row.peak_mb:.0f}",
            "" if row.gemm_share is None else f"{row.gemm_share:.0%}",
            "" if row.difference is None else f"{row.difference:.1e}",
        )
    return made


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    from sd_folder import SIZES

    parts = [*LOOPS, "start"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="sd15")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--turns", type=int, default=5, help="of each library; 5")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch; all cores")
    parser.add_argument("--seconds", type=float, default=3.0, help="for the rate of matrix products; 3")
    parser.add_argument("--folder", type=Path, help="of the weights, kept for another time; else temporary")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    return parser.parse_args(arguments)


def measure(arguments: argparse.Namespace) -> list[Row]:
    """All parts, one after the other."""
    from sd_folder import write

    write(arguments.size, arguments.folder)
    found = [paced(part, arguments) for part in arguments.parts if part != "start"]
    return [
        row for rows in [*found, started(arguments) if "start" in arguments.parts else []] for row in rows
    ]


def main(command: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    if "--worker" in (command or sys.argv):
        inner = argparse.ArgumentParser()
        inner.add_argument("--folder", type=Path)
        inner.add_argument("--worker", nargs=2)
        answers, sys.stdout = sys.stdout, sys.stderr  # whatever else prints must not come in between
        work(inner.parse_args(command), sys.stdin, answers)
        return
    arguments = parse(command)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        arguments.folder = arguments.folder or Path(temporary) / arguments.size
        arguments.folder.parent.mkdir(parents=True, exist_ok=True)
        rows = measure(arguments)
    Console(width=None if sys.stdout.isatty() else 140).print(table(rows, arguments))
    if arguments.json:
        told: dict[str, Any] = {
            "size": arguments.size,
            "threads": arguments.threads,
            "turns": arguments.turns,
        }
        report = {**told, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
