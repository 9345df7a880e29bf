"""`sfumato evaluate SYSTEM --reference DIR`: the field's metrics."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tyro.conf import Positional

from sfumato.api import load
from sfumato.checkpoints.files import sha256
from sfumato.checkpoints.hub import located
from sfumato.checkpoints.layouts.lpips import read_lpips
from sfumato.cli.output import check_writable
from sfumato.core.config import to_json
from sfumato.core.world import ALONE, World
from sfumato.evaluation.evaluate import (
    DEFAULT,
    Instruments,
    Reference,
    Result,
    evaluate,
    nets_of,
    open_reference,
)
from sfumato.evaluation.features import open_net
from sfumato.evaluation.npz import PictureFile, write_statistics
from sfumato.evaluation.pictures import Generated, Pictures, Reconstructed, open_pictures
from sfumato.evaluation.survey import Pair
from sfumato.evaluation.watching import watch
from sfumato.systems.request import Request
from sfumato.systems.system import System

__all__ = ["Flags", "measured"]

SYSTEM = "system.json"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Measure pictures, or those that a system draws, against a reference; metrics are in docs/metrics.md.

    Feature nets are found in the caches of torch.hub and the model hub, or given; nothing is downloaded.
    """

    source: Positional[Path]
    """Folder of a system, of a run (with --watch) or of pictures; tar shards; or an .npz file."""
    reference: Path | None = None
    """Pictures to compare with: a folder, shards or an .npz of pictures or statistics."""
    metrics: tuple[str, ...] = DEFAULT
    """fid fid_inf sfid kid is prdc fd_dinov2 kd_dinov2 prdc_dinov2 copies clip_score psnr ssim lpips."""
    reconstruct: bool = False
    """Send the reference through the system's codec instead of drawing samples: rFID, PSNR, SSIM, LPIPS."""
    n: int = 10_000
    """Samples to draw."""
    seed: int = 0
    """Of the first sample; the next ones use the following numbers."""
    steps: int | None = None
    """Steps of the sampler; if not given, the system's own choice, as for the next two."""
    sampler: str | None = None
    """euler, heun, dpmpp_2m, ddim ..."""
    guidance: float | None = None
    """How closely to follow the captions; 1 = not amplified."""
    batch: int = 32
    """Pictures computed at a time."""
    inception: Path | None = None
    """Weights of FID's Inception."""
    dinov2: Path | None = None
    """Weights of DINOv2: a file, a folder, or ORG/NAME[@REVISION] in the hub's cache."""
    clip: Path | None = None
    """Folder of CLIP with its config.json and tokenizer, or ORG/NAME[@REVISION]."""
    lpips: tuple[Path, Path] | None = None
    """Weights of the trunk (VGG-16 or SqueezeNet of torchvision) and of the heads."""
    save: Path | None = None
    """.npz file for the samples, as the ADM evaluator reads them."""
    statistics: Path | None = None
    """.npz file for the statistics of the reference, to be given as --reference later."""
    json: bool = False
    """Print JSON."""
    watch: bool = False
    """Measure every system that the run in SOURCE publishes, until it ends."""
    out: Path | None = None
    """JSON lines of --watch; by default evaluation.jsonl in the folder of the run."""
    every: float = 10.0
    """Seconds between two looks of --watch."""
    timeout: float = 3600.0
    """Seconds without a new system after which --watch ends."""
    device: str = "auto"
    """cpu, cuda ...; auto takes an accelerator if there is one."""


def measured(flags: Flags, tell: Progress, world: World) -> Iterator[str]:
    """Texts to print, one for each system measured; only the leading process has them."""
    for path in (flags.save, flags.statistics):
        if path is not None:
            world.lead(partial(check_writable, path))
    if flags.n < 1 or flags.batch < 1:
        raise world.fail(f"--n is {flags.n} and --batch {flags.batch}; allowed: 1 or more pictures")
    if world.size > 1 and (flags.watch or flags.save):
        raise world.fail("--watch and --save work in one process; leave them out, or run without torchrun")
    device = world.device(flags.device)
    told: Progress = tell if world.leads else lambda what, done, total: None
    tools = world.agree(lambda: _instruments(flags, device, told))
    yield from _watched(flags, tools, device) if flags.watch else _once(flags, tools, device, world)


def _once(flags: Flags, tools: Instruments, device: torch.device, world: World) -> Iterator[str]:
    samples, reference = world.agree(lambda: _opened(flags, tools, device, world))
    result = _result(flags, samples, reference, tools, world)
    if world.leads:
        yield json.dumps(to_json(result), indent=1) if flags.json else "\n".join(result.lines())


def _opened(
    flags: Flags, tools: Instruments, device: torch.device, world: World
) -> tuple[Pictures, Reference]:
    if (flags.source / SYSTEM).is_file():
        system = load(flags.source, device=device)
        reference = _reference(flags, system, tools, world)
        return _samples(flags, system, reference), reference
    if flags.reconstruct:
        raise ValueError(f"--reconstruct needs a system, and there is no {SYSTEM} in {flags.source}")
    samples = open_pictures(flags.source)
    if samples is None:
        raise ValueError(f"{flags.source} holds statistics alone; give pictures, or a system")
    return samples, open_reference(flags.reference, samples.size, tools, world=world)


def _watched(flags: Flags, tools: Instruments, device: torch.device) -> Iterator[str]:
    out = flags.out or flags.source / "evaluation.jsonl"
    reference: Reference | None = None
    for published in watch(flags.source, every=flags.every, timeout=flags.timeout):
        system = load(published.folder, device=device)
        reference = reference or _reference(flags, system, tools)
        result = _result(flags, _samples(flags, system, reference), reference, tools)
        row = {"images": published.images, **to_json(result)}
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        figures = ", ".join(f"{f.name} {f.value:.4g}" for f in result.figures)
        yield json.dumps(row) if flags.json else f"{published.images:,} images: {figures}"


def _reference(flags: Flags, system: System, tools: Instruments, world: World = ALONE) -> Reference:
    if system.size is None:
        raise ValueError(f"system {system.about.name!r} makes no pictures, so it cannot be evaluated")
    return open_reference(flags.reference, system.size, tools, world=world)


def _samples(flags: Flags, system: System, reference: Reference) -> Pictures:
    if flags.reconstruct:
        if reference.pictures is None:
            raise ValueError("--reconstruct needs the pictures of a reference; give --reference DIR")
        return Reconstructed(system, reference.pictures)
    request: Request = {}
    if flags.steps is not None:
        request["steps"] = flags.steps
    if flags.sampler is not None:
        request["sampler"] = flags.sampler
    if flags.guidance is not None:
        request["guidance"] = flags.guidance
    texts = None if reference.pictures is None else reference.pictures.texts
    if system.reads_text and not texts:
        raise ValueError("this system draws from captions; give a --reference with captions")
    return Generated(system, flags.n, flags.seed, texts if system.reads_text else None, request, flags.batch)


def _result(
    flags: Flags, samples: Pictures, reference: Reference, tools: Instruments, world: World = ALONE
) -> Result:
    with contextlib.ExitStack() as stack:
        seen: Callable[[Tensor], None] = lambda pixels: None  # noqa: E731
        if flags.save is not None:
            seen = stack.enter_context(PictureFile(flags.save, (len(samples), *samples.size))).add
        result = world.agree(lambda: evaluate(samples, reference, tools, seen=seen, world=world))
    if (path := flags.statistics) is not None:
        made = {
            "size": list(samples.size),
            "inception": tools.protocol.get("inception", {}),
            **reference.protocol,
        }
        world.lead(lambda: write_statistics(path, reference.summary.gaussians, made))
    if flags.reconstruct:
        figures = (replace(f, name=f"r{f.name}") if "fid" in f.name else f for f in result.figures)
        result = replace(result, figures=tuple(figures))
    return result


def _instruments(flags: Flags, device: torch.device, tell: Progress) -> Instruments:
    nets = {name: open_net(name, getattr(flags, name), device=device) for name in nets_of(flags.metrics)}
    lpips = _lpips(flags.lpips, device) if "lpips" in flags.metrics else None
    return Instruments(flags.metrics, nets, lpips, flags.batch, tell)


def _lpips(given: tuple[Path, Path] | None, device: torch.device) -> tuple[Pair, dict[str, str]]:
    if given is None:
        package = importlib.util.find_spec("lpips")  # its heads are read as data
        if package is None or package.origin is None:
            raise ValueError("the heads of LPIPS are not on this machine; give --lpips TRUNK HEADS")
        trunk = located(None, "LPIPS' VGG-16", files=("vgg16-397923af.pth",))
        given = trunk, Path(package.origin).parent / "weights" / "v0.1" / "vgg.pth"
    net = read_lpips(*given).to(device).eval()

    def distance(image: Tensor, original: Tensor) -> Tensor:
        found: Tensor = net(image.to(device), original.to(device))
        return found.cpu()

    return distance, {name: sha256(path) for name, path in zip(("trunk", "heads"), given, strict=True)}
