"""The verbs that make pictures: generate, rerun, reconstruct."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from sfumato.cli.additions import Additions, hints_of, opened
from sfumato.cli.editing import Edit, EditFlags, tile_for
from sfumato.cli.output import check_writable, paths_for
from sfumato.cli.parsing import parse, size_of

if TYPE_CHECKING:
    from PIL import Image

    from sfumato.cli.drawing import Drawing
    from sfumato.core.world import World
    from sfumato.systems.request import Request
    from sfumato.systems.system import System

__all__ = ["generate", "reconstruct", "rerun"]

WAIT = 600.0  # seconds that processes wait for each other
DIFFERENT = 1  # exit code of a rerun that did not give the same file


@dataclass(frozen=True, kw_only=True)
class Generate(Additions):
    """Draw pictures of a prompt.

    Writes PNG files that carry how they were made, and prints their paths.
    """

    prompt: Positional[str]
    """What to draw; "" draws without a prompt."""
    negative: str = ""
    """What to keep away from."""
    label: int | None = None
    """Class, for systems that are told one or guided to one."""
    seed: int = 0
    """Of the first picture; the next ones use the following numbers."""
    n: int = 1
    """Number of pictures."""
    steps: int | None = None
    """Steps of the sampler; if not given, the system's own choice, as for the next four."""
    sampler: str | None = None
    """euler, heun, dpmpp_2m, ddim ..."""
    guidance: float | None = None
    """How closely to follow the prompt, or the guide; 1 = not amplified."""
    size: str | None = None
    """Side, or WIDTHxHEIGHT, in pixels."""
    prompt_weights: bool = False
    """Let (word:1.3), (word) and [word] count more or less, where CLIP reads the prompt."""
    prompt_chunks: int = 1
    """How many times 75 tokens CLIP reads; what is longer is cut, and said."""
    clip_skip: int = 0
    """Blocks of CLIP to leave out at the end; 1 here is 2 where the layer is counted."""
    edit: Annotated[EditFlags, arg(name="")] = field(default_factory=EditFlags)
    out: Path | None = None
    """File that ends in .png, or folder; by default out/PROMPT-SEED.png. Files there are replaced."""
    grid: bool = False
    """Also write all pictures on one sheet."""
    json: bool = False
    """Print JSON instead of paths."""
    system: Path | None = None
    """Folder of the system; by default the one that comes with sfumato."""
    device: str = "auto"
    """cpu, cuda ...; auto takes an accelerator if there is one."""


@dataclass(frozen=True, kw_only=True)
class Rerun(Additions):
    """Draw a picture again from what its file says, and compare.

    Exit code 0 if the new file has the same bytes, 1 if not.
    """

    image: Positional[Path]
    """PNG that `sfumato generate` wrote."""
    out: Path | None = None
    """New file; by default NAME-rerun.png beside the old one."""
    json: bool = False
    """Print JSON."""
    system: Path | None = None
    """Folder of the system; by default the one that comes with sfumato."""
    device: str = "auto"
    """cpu, cuda ...; auto takes an accelerator if there is one."""


@dataclass(frozen=True, kw_only=True)
class Reconstruct:
    """Send a picture through a system's codec and back: the best that the system could ever draw."""

    image: Positional[Path]
    """Picture file."""
    size: str | None = None
    """Side, or WIDTHxHEIGHT, that it is scaled and cropped to; by default its own."""
    out: Path | None = None
    """New file; by default out/NAME-reconstruction.png."""
    json: bool = False
    """Print JSON."""
    system: Path | None = None
    """Folder of the system; by default the one that comes with sfumato."""
    device: str = "auto"
    """cpu, cuda ...; auto takes an accelerator if there is one."""


def generate(args: list[str]) -> int:
    """`sfumato generate`; the processes that torchrun starts share the pictures."""
    flags = parse(Generate, "generate", args)

    from sfumato.core.world import joined

    with joined(flags.device, seconds=WAIT) as world:
        return _generate(flags, world)


def _generate(flags: Generate, world: World) -> int:
    size = size_of(flags.size)
    if flags.n < 1:
        raise ValueError(f"--n is {flags.n}; allowed: 1 or more pictures")
    seeds = list(range(flags.seed, flags.seed + flags.n))
    paths = paths_for(flags.out, flags.prompt, seeds)
    sheet = paths[0].with_stem(f"{paths[0].stem}-grid") if flags.grid else None
    for path in (*paths, *([sheet] if sheet else [])):
        check_writable(path)
    started = time.perf_counter()
    system = world.agree(lambda: opened(flags, flags.system, world.device(flags.device)))
    hints = hints_of(flags)
    drawings = _drawings(flags, system, size, seeds)
    images = _draw_all(system, drawings, paths, world, hints=hints, show=None if flags.json else _print_path)
    if not world.leads:
        return 0
    if sheet is not None:
        _write_sheet(sheet, images, system)
    unknown = system.unknown_words(f"{flags.prompt} {flags.negative}")
    if flags.json:
        from sfumato.cli.drawing import record_of

        said = [{"path": str(p), **record_of(d, system)} for p, d in zip(paths, drawings, strict=True)]
        rest = {"grid": sheet and str(sheet), "unknown_words": unknown}
        seconds = round(time.perf_counter() - started, 3)
        print(json.dumps({"pictures": said, **rest, "seconds": seconds}, indent=1))
        return 0
    if sheet is not None:
        print(sheet)
    if unknown:
        words = ", ".join(map(repr, unknown))
        print(f"sfumato: {system.about.name} was not trained on the words {words}", file=sys.stderr)
    return 0


def rerun(args: list[str]) -> int:
    """`sfumato rerun`."""
    flags = parse(Rerun, "rerun", args)
    out = flags.out or flags.image.with_stem(f"{flags.image.stem}-rerun")

    from sfumato.cli.drawing import drawing_of, encoded
    from sfumato.core.png import read_record, write_whole

    record = read_record(flags.image)
    drawing = drawing_of(record, flags.image)
    check_writable(out)
    system = opened(flags, flags.system, flags.device)
    _compare_systems(flags.image, record.get("system"), system)
    with _progress(drawing.steps) as observe:
        image = drawing.draw(system, observe, hints_of(flags))
    old, new = flags.image.read_bytes(), encoded(image, drawing, system)
    verdict = "same bytes" if old == new else _difference(flags.image, image)
    write_whole(out, new)
    if flags.json:
        print(json.dumps({"path": str(out), "same_bytes": old == new, "verdict": verdict}))
    else:
        print(f"{out}\n{verdict}")
    return 0 if old == new else DIFFERENT


def reconstruct(args: list[str]) -> int:
    """`sfumato reconstruct`."""
    from sfumato.api import load as load_system
    from sfumato.core.image import center_crop, load
    from sfumato.core.png import save_png

    flags = parse(Reconstruct, "reconstruct", args)
    size = size_of(flags.size)
    out = flags.out or Path("out") / f"{flags.image.stem}-reconstruction.png"
    check_writable(out)
    original = load(flags.image)
    system = load_system(flags.system, device=flags.device)
    image = system.reconstruct(original, size=size)
    psnr = _psnr(center_crop(original, (image.height, image.width)), image)
    save_png(out, image, text=system.about.notice)
    if flags.json:
        print(json.dumps({"path": str(out), "psnr_db": None if math.isinf(psnr) else round(psnr, 3)}))
    else:
        print(f"{out}\nPSNR {psnr:.2f} dB")
    return 0


def _print_path(path: Path) -> None:
    print(path, flush=True)


def _drawings(
    flags: Generate, system: System, size: tuple[int, int] | None, seeds: list[int]
) -> list[Drawing]:
    from sfumato.cli.drawing import Drawing
    from sfumato.core.types import Reading
    from sfumato.systems.start import Inverted

    asked: Request = {}
    for name in ("steps", "sampler", "guidance"):
        if (value := getattr(flags, name)) is not None:
            asked[name] = value  # type: ignore[literal-required]
    edit = Edit.of(flags.edit)
    told = edit.request()
    if flags.edit.invert is not None:
        asked = {"sampler": "ddim", "start": Inverted(flags.edit.invert), **asked}
    final = size or edit.size(system, told) or system.size
    if final is not None:
        largest = (round(final[0] * edit.enlarge), round(final[1] * edit.enlarge))
        asked["tile"] = tile_for(system, largest, flags.edit.tile)
    asked |= told
    options = system.resolve(**asked)
    reading = Reading(weights=flags.prompt_weights, chunks=flags.prompt_chunks, skip=flags.clip_skip)
    own = reading == Reading()  # then the system's settings decide
    if final is None:
        raise ValueError(f"system {system.about.name!r} makes no pictures; choose another with --system")
    return [
        Drawing(
            prompt=flags.prompt,
            negative=flags.negative,
            label=flags.label,
            seed=seed,
            size=final,
            options=options,
            reading=None if own else reading,
            edit=edit,
        )
        for seed in seeds
    ]


def _draw_all(
    system: System,
    drawings: list[Drawing],
    paths: list[Path],
    world: World,
    hints: list[Image.Image] | None,
    show: Callable[[Path], None] | None,
) -> list[Image.Image]:
    """Draw and write one picture after the other, so that what is done stays if the rest is interrupted."""
    from sfumato.cli.drawing import encoded
    from sfumato.core.png import write_whole

    images, mine = [], world.share(len(drawings))
    with _progress(sum(drawings[i].steps for i in mine)) as observe:
        for i in mine:
            image = drawings[i].draw(system, observe, hints)
            write_whole(paths[i], encoded(image, drawings[i], system))
            images.append(image)
            if show is not None:
                show(paths[i])
    world.meet()
    return world.together(images, len(drawings))


def _compare_systems(path: Path, then: object, now: System) -> None:
    """Say so if a picture was made with another system."""
    known = then if isinstance(then, dict) else {}
    if known.get("fingerprint") != now.fingerprint:
        was, here = f"{known.get('name')} {known.get('fingerprint')}", f"{now.about.name} {now.fingerprint}"
        print(
            f"sfumato: {path} was made with system {was} and this is {here}: expect another picture, "
            f"or choose the right one with --system and --adapter",
            file=sys.stderr,
        )


def _write_sheet(path: Path, images: list[Image.Image], system: System) -> None:
    import torch

    from sfumato.core.image import from_pil, grid
    from sfumato.core.png import save_png

    save_png(path, grid(torch.stack([from_pil(image) for image in images])), text=system.about.notice)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[Any], None]]:
    """A bar on the terminal, if there is one, that moves with every step."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("drawing", total=total)
        yield lambda _: bar.advance(task)


def _difference(path: Path, image: Image.Image) -> str:
    import numpy as np

    from sfumato.core.image import load

    old, new = (np.asarray(picture, dtype=np.int16) for picture in (load(path), image))
    if old.shape != new.shape:
        return f"different: {old.shape[1]}x{old.shape[0]} before, {new.shape[1]}x{new.shape[0]} now"
    apart = np.abs(old - new)
    if not apart.any():
        return "same pixels, but the files differ in what they say"
    return f"different: {(apart > 0).mean():.2%} of the values, by at most {apart.max()} of 255"


def _psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures of one size, in dB."""
    import numpy as np

    error = np.square(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).mean()
    return math.inf if error == 0 else float(10 * np.log10(255**2 / error))
