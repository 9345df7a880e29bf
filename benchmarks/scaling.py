"""How training scales: one process against two on this machine, and a plan for many GPUs from formulas.

    python benchmarks/scaling.py measure --data data/openmoji
    python benchmarks/scaling.py plan dit-xl-2 --gpus 8 64 512

The plan counts parameters, operations and saved activations of the very nets (nothing is allocated); what it
cannot count are the rates of a machine, which are given: docs/scaling.md has the formulas.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sfumato.core.types import Conditioning
from sfumato.nets.dit import DiT
from sfumato.nets.presets.latent import sd15
from sfumato.nets.presets.transformers import DITS
from sfumato.nets.tags import entrances_of
from sfumato.nets.unet import UNet
from sfumato.training.compute import blocks_of, recompute

GIB, GB, TERA = 2**30, 1e9, 1e12
KINDS = ("dit-xl-2", "sd15")


@dataclass(frozen=True)
class Cost:
    """What training a net takes.

    Attributes:
        weights: parameters.
        block: those of the largest part that is gathered at a time.
        gathers: how often all weights are gathered in a step: for the forward and the backward pass, and once
            more if blocks are entered beside their forward (`nets.tags.entrances_of`).
        flops: of forward and backward pass per picture, without recomputation.
        activations: bytes kept per picture from forward to backward pass.
    """

    weights: int
    block: int
    gathers: int
    flops: float
    activations: float


@dataclass(frozen=True)
class Machine:
    """Rates of the GPUs: operations per second that training reaches, and bytes per second between two."""

    rate: float
    inside: float
    between: float
    gpus_per_node: int = 8

    def bandwidth(self, gpus: int) -> float:
        """Of the slowest link that a ring over all of them has, as one GPU's share of it."""
        return self.inside if gpus <= self.gpus_per_node else self.between


def example(kind: str, batch: int) -> tuple[nn.Module, tuple[Tensor, Tensor, Conditioning]]:
    """A published net and one batch of its input, 256x256 for DiT and 512x512 for SD 1.5."""
    t = torch.zeros(batch)
    if kind == "dit-xl-2":
        net = DiT(DITS[kind]())
        net.__dict__["_check_label"] = lambda cond: None  # which looks at values, and there are none
        return net, (torch.zeros(batch, 4, 32, 32), t, Conditioning(label=torch.zeros(batch).long()))
    return UNet(sd15()), (torch.zeros(batch, 4, 64, 64), t, Conditioning(tokens=torch.zeros(batch, 77, 768)))


def cost(kind: str, *, recomputed: bool, half: bool) -> Cost:
    """Counted on tensors without content: the difference between batches of two and of one."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        flops = [operations(kind, batch) for batch in (1, 2)]
        kept = [activations(kind, batch, recomputed=recomputed, half=half) for batch in (1, 2)]
        net, _ = example(kind, 1)
        blocks = list(blocks_of(net))
        parts = [sum(p.numel() for p in block.parameters()) for block in blocks]
        weights = sum(p.numel() for p in net.parameters())
    gathers = 3 if any(entrances_of(block) for block in blocks) else 2
    return Cost(weights, max(*parts, weights - sum(parts)), gathers, flops[1] - flops[0], kept[1] - kept[0])


def operations(kind: str, batch: int) -> int:
    """Of the products of matrices and the convolutions of a forward and backward pass."""
    net, inputs = example(kind, batch)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # the counter does not know the fused attention of CPUs
        net(*inputs).sum().backward()
    return int(counter.get_total_flops())


def activations(kind: str, batch: int, *, recomputed: bool, half: bool) -> int:
    """Bytes that the graph keeps besides weights."""
    net, inputs = example(kind, batch)
    if recomputed:
        recompute({"net": net})
    own = {id(p.untyped_storage()) for p in net.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            kept[id(storage)] = storage  # and so it lives on, and its id is its own
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=half),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        net(*inputs)
    return sum(storage.nbytes() for storage in kept.values())


def rows(
    cost: Cost, machine: Machine, gpus: int, batch: int, *, copies: int, recomputed: bool
) -> Iterator[str]:
    """Memory per GPU and images per second, replicated and sharded."""
    again = 4 / 3 if recomputed else 1.0
    compute = again * cost.flops * batch / machine.rate
    ring = (gpus - 1) / gpus / machine.bandwidth(gpus)
    states = 4 * (4 + copies) * cost.weights  # weights, gradients, two moments of AdamW, averages
    for name, memory, sent in (
        ("replicate", states, 2 * 4 * cost.weights),  # gradients: reduced, then sent to all
        ("shard", states / gpus + 2 * 4 * cost.block, (cost.gathers + 1) * 4 * cost.weights),  # and gradients
    ):
        total = memory + cost.activations * batch
        wait = sent * ring
        # Gradients are sent while the backward pass, two thirds of the work, goes on; weights at any time.
        hidden = compute * (2 / 3 if name == "replicate" else 1)
        step = compute + max(0.0, wait - hidden)
        yield (
            f"| {gpus} | {name} | {batch} | {total / GIB:.1f} | {gpus * batch / step:,.0f} "
            f"| {compute / step:.0%} | {wait / compute:.0%} |"
        )


def plan(args: argparse.Namespace) -> None:
    """Print the table."""
    found = cost(args.net, recomputed=args.recompute, half=not args.float32)
    machine = Machine(args.tflops * args.mfu * TERA, args.inside * GB, args.between * GB, args.per_node)
    print(
        f"{args.net}: {found.weights:,} weights, {found.flops / 1e9:,.0f} GFLOP and "
        f"{found.activations / GIB:.3f} GiB of activations per picture\n"
    )
    print("| GPUs | parallel | batch per GPU | GiB per GPU | images/s | efficiency | sent / computed |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for gpus in args.gpus:
        for row in rows(found, machine, gpus, args.batch, copies=args.copies, recomputed=args.recompute):
            print(row)


def measure(args: argparse.Namespace) -> None:
    """Run the same training in one and in two processes of one thread, in turn."""
    rates: dict[str, list[float]] = {"1 process": [], "2 processes": [], "2 processes, sharded": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.pairs):
            for name, found in rates.items():
                found.append(
                    rate(args, Path(folder), int(name[0]), "shard" if "sharded" in name else "replicate")
                )
                print(f"{name}: {found[-1]:.1f} images/s", flush=True)
    for name, found in rates.items():
        share = [b / a / int(name[0]) for a, b in zip(rates["1 process"], found, strict=True)]
        print(
            f"{name}: median {statistics.median(found):.1f} images/s; efficiency min {min(share):.2f}, "
            f"median {statistics.median(share):.2f}, max {max(share):.2f}"
        )


def rate(args: argparse.Namespace, folder: Path, processes: int, parallel: str) -> float:
    """Images per second of a run of openmoji-dit on the latents of the bundled system, start-up apart."""
    for path in folder.iterdir():  # but the latents, which are computed once
        if path.is_file():
            path.unlink()
        elif path.name != "latents":
            shutil.rmtree(path)
    images = args.batch * args.steps * processes
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "-m", "sfumato"]
    flags = {
        "data.path": args.data,
        "out": folder,
        "task.autoencoder": "sfumato/assets/default",
        "trainer.images": images,
        "trainer.batch": args.batch * processes,
        "trainer.log-every": images // 4,
        "trainer.preview-every": 0,
        "trainer.save-every": 0,
        "trainer.parallel": parallel,
        "trainer.device": "cpu",
    }
    settings = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*launch, "train", "openmoji-dit", *settings, "--trainer.quiet"]
    subprocess.run(command, check=True, capture_output=True, env=env)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return statistics.median(line["images_per_second"] for line in lines[1:])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("plan")
    one.add_argument("net", choices=KINDS)
    one.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    one.add_argument("--batch", type=int, default=32, help="pictures per GPU and step")
    one.add_argument("--copies", type=int, default=1, help="moving averages, in float32")
    one.add_argument("--recompute", action="store_true")
    one.add_argument("--float32", action="store_true", help="no bfloat16")
    one.add_argument("--tflops", type=float, default=989, help="of one GPU in the dtype of the work")
    one.add_argument("--mfu", type=float, default=0.4, help="share of it that a step reaches; measure it")
    one.add_argument("--inside", type=float, default=450, help="GB/s of a GPU to others of its machine")
    one.add_argument("--between", type=float, default=50, help="GB/s of a GPU to other machines")
    one.add_argument("--per-node", type=int, default=8)
    one.set_defaults(run=plan)
    two = verbs.add_parser("measure")
    two.add_argument("--data", default="data/openmoji")
    two.add_argument("--batch", type=int, default=32, help="pictures per process and step")
    two.add_argument("--steps", type=int, default=80)
    two.add_argument("--pairs", type=int, default=3)
    two.set_defaults(run=measure)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
