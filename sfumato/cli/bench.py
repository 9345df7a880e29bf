"""The verb for benchmarks: bench scenes, bench compare, bench reader."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tyro.conf import Positional, arg

from sfumato.api import load, load_nets
from sfumato.cli.output import check_writable
from sfumato.cli.parsing import parse
from sfumato.core.chart import Curve, chart
from sfumato.core.config import from_json, to_json
from sfumato.core.png import save_png, write_whole
from sfumato.core.registry import unknown
from sfumato.core.world import ALONE, World, joined
from sfumato.evaluation.measures import Proportion
from sfumato.evaluation.scenes.benchmark import (
    REVISION,
    Protocol,
    Result,
    evaluate,
    refuse_other_protocol,
    sheet,
)
from sfumato.evaluation.scenes.facts import FACTS
from sfumato.evaluation.scenes.oracle import BLURS, NOISES, Accuracy, accuracy
from sfumato.evaluation.watching import watch
from sfumato.nets.autoencoder import Autoencoder
from sfumato.systems.codec import Codec, Latents
from sfumato.systems.system import System

__all__ = ["bench", "progress"]

WAIT = 600.0  # seconds that processes wait for each other
WIDTH = 110  # columns where the output is no terminal
PERCENT = "% of pictures"
FEWEST = 12  # a fact has a curve if at least one caption in so many speaks of it


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Ask a system for scenes, read its pictures back, and score every fact that the captions bind.

    Writes scenes.json and scenes.png, the first pictures of each split: framed green if all is right, red if
    a fact is wrong, black if the picture is no scene. With --watch also curve.jsonl and curve.png.
    """

    system: Positional[Path | None] = None
    """Folder of a system, or of the run that made it; by default the system that comes with sfumato."""
    protocol: Annotated[Protocol, arg(name="")] = field(default_factory=Protocol)
    out: Path = Path("bench-scenes")
    """Folder to write."""
    watch: bool = False
    """Follow a run, and score each system that it publishes until it ends."""
    batch: int = 50
    """Pictures made at a time; it does not change them."""
    device: str = "auto"
    """cpu, cuda ...; auto takes an accelerator if there is one."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Put the results of several systems side by side; they must be of one protocol."""

    results: Positional[tuple[Path, ...]]
    """Files scenes.json that `sfumato bench scenes` wrote."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Measure the reader itself on true scenes, on blurred and noisy ones, and through an autoencoder."""

    out: Path
    """Folder to write reader.json and reader.png."""
    count: int = 10_000
    """Undamaged scenes of each size."""
    damaged: int = 1000
    """Damaged scenes of each level, at 64 pixels."""
    autoencoders: tuple[Path, ...] = ()
    """Folders of systems or autoencoders that the scenes are sent through."""


def bench(args: list[str]) -> int:
    """`sfumato bench`."""
    if not args or args[0] in ("-h", "--help"):
        print(
            "usage: sfumato bench {scenes,compare,reader} ...\n\n"
            "  scenes SYSTEM      Score how exactly a system draws what captions say.\n"
            "  compare A B ...    Put results of one protocol side by side.\n"
            "  reader --out DIR   Measure the reader that scores the pictures.\n\n"
            "More about one: sfumato bench scenes --help"
        )
        return 0
    if args[0] not in TASKS:
        raise ValueError(unknown("benchmark", args[0], list(TASKS)))
    return TASKS[args[0]](args[1:])


def scenes(args: list[str]) -> int:
    """`sfumato bench scenes`."""
    flags = parse(Scenes, "bench scenes", args)
    with joined(flags.device, seconds=WAIT) as world:
        world.lead(lambda: check_writable(flags.out / "scenes.png"))
        device = world.device(flags.device)
        if flags.watch:
            if flags.system is None or world.size > 1:
                raise world.fail("--watch follows a run in one process; give its folder, without torchrun")
            for published in watch(flags.system):
                system = load(published.folder, device=device)
                _append(flags.out, _measure(flags, system, flags.system, published.images))
            return 0
        folder = flags.system
        run = folder is not None and (folder / "recipe.json").is_file() and (folder / "system").is_dir()
        place = folder / "system" if folder is not None and run else folder
        system = world.agree(lambda: load(place, device=device))
        result = _measure(flags, system, folder, None, world)
        if world.leads:
            _print(_table({system.about.name: result}))
    return 0


def compare(args: list[str]) -> int:
    """`sfumato bench compare`."""
    flags = parse(Compare, "bench compare", args)
    if len(flags.results) < 2:
        raise ValueError(f"{len(flags.results)} result to compare; give at least two files scenes.json")
    results = {str(path): _read(path) for path in flags.results}
    refuse_other_protocol(results)
    _print(_table(results))
    return 0


def reader(args: list[str]) -> int:
    """`sfumato bench reader`."""
    flags = parse(Reader, "bench reader", args)
    check_writable(flags.out / "reader.png")
    codecs = [_codec(path) for path in flags.autoencoders]
    plan: list[tuple[str, float, int, int, Codec | None]]
    plan = [("none", 0.0, size, flags.count, None) for size in (32, 64, 128)]
    plan += [("blur", level, 64, flags.damaged, None) for level in BLURS]
    plan += [("noise", level, 64, flags.damaged, None) for level in NOISES]
    plan += [("codec", float(i), 64, flags.damaged, codec) for i, codec in enumerate(codecs, 1)]
    found = []
    with progress() as told:
        for done, (damage, level, size, count, codec) in enumerate(plan, 1):
            found.append(accuracy(count, size, damage, level, codec=codec))
            told("reading", done, len(plan))
    text = json.dumps([to_json(one) for one in found], indent=1) + "\n"
    write_whole(flags.out / "reader.json", text.encode())
    save_png(flags.out / "reader.png", _reader_chart(found))
    for one in found:
        ratio = "" if one.psnr is None else f", {one.psnr:.1f} dB"
        print(f"{one.size} px, {one.damage} {one.level:g}{ratio}: exact {one.exact}; wrong {one.wrong}")
    return 0


TASKS: dict[str, Callable[[list[str]], int]] = {"scenes": scenes, "compare": compare, "reader": reader}


def _measure(
    flags: Scenes, system: System, folder: Path | None, images: int | None, world: World = ALONE
) -> Result:
    """Score a system, and write the result and the sheet."""
    with progress() as bar:
        told, ema = bar if world.leads else None, _decay(folder)
        result, shown = world.agree(
            lambda: evaluate(
                system,
                flags.protocol,
                batch=flags.batch,
                ema=ema,
                images=images,
                progress=told,
                world=world,
            )
        )
    text = json.dumps(to_json(result), indent=1) + "\n"
    world.lead(lambda: write_whole(flags.out / "scenes.json", text.encode()))
    world.lead(lambda: save_png(flags.out / "scenes.png", sheet(shown), text=system.about.notice))
    return result


def _decay(folder: Path | None) -> float | None:
    """Of the moving average of a run's weights; None if the folder is that of no run."""
    if folder is None or not (folder / "recipe.json").is_file():
        return None
    return float(json.loads((folder / "recipe.json").read_text("utf-8"))["trainer"]["ema"])


def _append(out: Path, result: Result) -> None:
    """A line for curve.jsonl, which is drawn again, and one for the reader of the terminal."""
    file = out / "curve.jsonl"
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    known = {f"line {i}": _result(line, f"{file}:{i}") for i, line in enumerate(lines, 1)}
    refuse_other_protocol({**known, "this run": result})
    write_whole(file, ("\n".join([*lines, json.dumps(to_json(result))]) + "\n").encode())
    save_png(out / "curve.png", _curve([*known.values(), result]))
    first = next(iter(result.splits))
    joint = result.splits[first].facts["joint"]
    print(f"{result.images:,} images: all facts of {first} {joint}", flush=True)


def _curve(results: list[Result]) -> Image.Image:
    """Each fact of the first split against the images seen: of nearest scenes, and all of valid ones.

    Facts that few of the captions speak of, such as binding, are left out: their shares jump.
    """
    first = next(iter(results[0].splits))
    rows = [(result.images or 0, result.splits[first]) for result in results]
    least = results[0].protocol.pictures / FEWEST
    facts = [f for f in FACTS[1:-1] if f in rows[0][1].chance and rows[0][1].chance[f].total >= least]
    curves = [
        _line(f"{fact}, nearest", [(x, scores.nearest.get(fact)) for x, scores in rows]) for fact in facts
    ]
    curves += [
        _line(fact, [(x, scores.facts.get(fact)) for x, scores in rows], dashed=True)
        for fact in ("valid", "joint")
    ]
    title = f"{results[-1].name}: {first}"
    return chart([c for c in curves if c.x], title=title, labels=("images seen", PERCENT), scale="linear")


def _line(name: str, points: list[tuple[int, Proportion | None]], *, dashed: bool = False) -> Curve:
    known = [(x, 100 * share.share) for x, share in points if share is not None]
    return Curve(name, [x for x, _ in known], [y for _, y in known], dashed)


def _codec(path: Path) -> Codec:
    found = [net for net in load_nets(path).values() if isinstance(net, Autoencoder)]
    if len(found) != 1:
        raise ValueError(f"{path} holds {len(found)} autoencoders; give a folder with one")
    return Latents(found[0])


def _reader_chart(found: list[Accuracy]) -> Image.Image:
    """All damages on one axis, the similarity to the true scene."""
    curves = []
    for damage, name in (("blur", "blur"), ("noise", "noise"), ("codec", "autoencoders")):
        rows = sorted(
            (one.psnr, one.exact.share, one.wrong.share) for one in found if one.damage == damage and one.psnr
        )
        if rows:
            x, exact, wrong = zip(*rows, strict=True)
            curves.append(Curve(f"exact, {name}", x, [100 * y for y in exact]))
            curves.append(Curve(f"wrong, {name}", x, [100 * y for y in wrong], dashed=True))
    title = "The reader on damaged scenes of 64 pixels"
    return chart(curves, title=title, labels=("PSNR to the true scene, dB", PERCENT), scale="linear")


def _read(path: Path) -> Result:
    return _result(path.read_text("utf-8"), str(path))


def _result(text: str, where: str) -> Result:
    try:
        made = json.loads(text)["protocol"]["revision"]
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{where} is no result of `sfumato bench scenes`") from None
    if made != REVISION:
        raise ValueError(
            f"{where} was made by revision {made} of the benchmark, and this is {REVISION}: measure it again"
        )
    return from_json(Result, text, where=where)


def _table(results: Mapping[str, Result]) -> list[Table | str]:
    """The figures of results of one protocol, and the protocol, to print."""
    p = next(iter(results.values())).protocol
    which = "" if p.difficulty is None else f", {p.difficulty} facts each"
    parts: list[Table | str] = [
        f"{p.pictures} pictures of each split{which}, seed {p.seed}; {p.sampler}, {p.steps} steps, "
        f"guidance {p.guidance:g}; percent, with intervals of 95 %"
    ]
    for name, result in results.items():
        table = Table("fact", *result.splits, title=_title(name, result))
        for prefix, part in (("", "facts"), ("nearest: ", "nearest"), ("by chance: ", "chance")):
            for fact in FACTS:
                row = [_cell(getattr(scores, part).get(fact)) for scores in result.splits.values()]
                if any(row) and (fact != "valid" or not prefix):
                    table.add_row(prefix + fact, *row)
        levels = sorted({level for scores in result.splits.values() for level in scores.difficulty})
        for level in levels if p.difficulty is None else []:
            row = [_cell(scores.difficulty.get(level)) for scores in result.splits.values()]
            table.add_row(f"joint, {level} facts", *row)
        parts.append(table)
        free = [f"{n} {d.bits:.2f} of {d.true_bits:.2f}" for n, d in result.diversity.items()]
        parts += [f"bits of what captions leave free: {', '.join(free)}"] if free else []
        parts.append(
            f"scenes of training: {_cell(result.memorized)}; by chance {_cell(result.memorized_by_chance)}"
        )
    return parts


def _title(name: str, result: Result) -> str:
    ema = "" if result.ema is None else f", EMA {result.ema:g}"
    return f"{name}: system {result.system or '(not saved)'}, {result.size} px{ema}, sfumato {result.version}"


def _cell(share: Proportion | None) -> str:
    return "" if share is None else f"{100 * share.share:.1f} ({100 * share.low:.0f}-{100 * share.high:.0f})"


def _print(parts: list[Table | str]) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for part in parts:
        console.print(part, highlight=False)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on the terminal, if there is one, for each part of the work."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks = {}

        def told(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield told
