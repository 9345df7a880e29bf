"""The report on unCLIP: what its CLIP finds, what a prior is good for, and computing with pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.core.config import to_json
from sfumato.core.image import grid, to_uint8
from sfumato.core.types import Inputs
from sfumato.evaluation.openmoji import References, captioned
from sfumato.evaluation.retrieval import embedded, likeness, recalls
from sfumato.families import RECIPES
from sfumato.nets.clip import CLIP
from sfumato.reports.sweeps import Cell, Figure, Measured, Report, Sweep
from sfumato.reports.truth import Asked, Truth, columns, drawn, nearest, nets_at, size_of, strip, system_at
from sfumato.systems.algebra import Space, difference, slerp
from sfumato.systems.cascade import joined
from sfumato.systems.system import System
from sfumato.text.tokenizers import Tokenizer

__all__ = ["NAME", "Plan", "report_on"]

NAME = "unclip"
Part = Literal["clip", "priors", "algebra", "others"]
RUNS = Path("runs")
ROWS, COLUMNS = 4, 6  # of a grid of variations, paths or differences
THETA = 0.5  # how far a difference goes: the paper's largest (arXiv:2204.06125, section 3.3)
FIGURES = (
    "`cosine` is that of the drawn picture's CLIP embedding to the caption's and to the true picture's; "
    "`top-1`, the share nearest to the true picture among all, by that cosine and in pixels. The CLIP is "
    "the one that unCLIP draws by, so between systems the pixels are the fairer judge."
)


@dataclass(frozen=True, kw_only=True)
class Plan(Asked):
    """What is measured, and of which runs; only those of the parts that are asked for must be there."""

    split: Literal["train", "held_out"] = "held_out"
    """Of the captions; CLIP's own figures are of both."""
    parts: tuple[Part, ...] = get_args(Part)
    """clip: retrieval. priors: what the decoder is fed. algebra: grids. others: the systems of --others."""
    clip: Path = RUNS / "openmoji-clip"
    prior: Path = RUNS / "openmoji-prior"
    ar_prior: Path = RUNS / "openmoji-ar-prior"
    decoder: Path = RUNS / "openmoji-unclip-decoder"
    upsampler: Path = RUNS / "openmoji-unclip-upsampler"
    others: tuple[Path, ...] = ()
    """Systems or runs that draw captions, such as runs/openmoji-glide and runs/openmoji-dit."""


@dataclass(frozen=True)
class Judge:
    """The CLIP and the true pictures as it sees them.

    Attributes:
        print: fingerprint of the CLIP.
        truth: at the size that the CLIP reads.
        seen: (N, D) embeddings of all true pictures, of length 1.
    """

    clip: CLIP
    tokenizer: Tokenizer
    print: str
    truth: Truth
    seen: Tensor

    @staticmethod
    def of(plan: Plan) -> Judge:
        """Raises: ValueError in one line if the run is missing, or there are no pictures."""
        found = nets_at(plan.clip, "openmoji-clip", plan.device)
        clip, tokenizer = found.parts.nets.get("clip"), found.parts.tokenizers.get("tokenizer")
        if not isinstance(clip, CLIP) or tokenizer is None:
            raise ValueError(f"{plan.clip} holds no CLIP with its tokenizer; give the run of openmoji-clip")
        truth = Truth.of(plan, clip.config.vision.side)
        seen, _ = embedded(clip, tokenizer, truth.pixels, [""])
        return Judge(clip, tokenizer, found.fingerprint, truth, F.normalize(seen, dim=1))

    def at(self, size: tuple[int, int]) -> Truth:
        """The true pictures at another size."""
        same = tuple(self.truth.pixels.shape[2:]) == size
        return self.truth if same else Truth.of(self.truth.asked, size)

    def figures(self, made: Tensor, truth: Truth) -> dict[str, Figure]:
        """Of pictures drawn for the captions; `truth` is at their size."""
        seen, said = embedded(self.clip, self.tokenizer, made, truth.texts)
        own = References(self.seen, self.truth.references.alike, torch.zeros(0))
        return {
            "cosine, text": float(likeness(seen, said).diagonal().mean()),
            "cosine, picture": float(likeness(seen, self.seen[truth.rows]).diagonal().mean()),
            "top-1, CLIP": nearest(F.normalize(seen, dim=1), own, truth.rows),
            "top-1, pixels": truth.top1(made),
        }


def report_on(plan: Plan) -> Report:
    """The parts of the plan, their systems read.

    Raises: ValueError in one line if a run is missing, with the command that trains it, or does not fit.
    """
    judge = Judge.of(plan)
    sweeps = tuple(PARTS[part](plan, judge) for part in dict.fromkeys(plan.parts))
    return Report(
        name=NAME, title="unCLIP on OpenMoji", plan=to_json(plan), sweeps=sweeps, notice=plan.notice
    )


def _clip(plan: Plan, judge: Judge) -> Sweep:
    truth, splits = judge.truth, ("train", "held_out")
    rows_of = {split: captioned(truth.folder, split)[: plan.pictures] for split in splits}
    pool = min(map(len, rows_of.values()))

    def measure(split: str) -> Measured:
        rows = rows_of[split][:pool]
        texts = [truth.folder.texts[i] for i in rows]
        pictures, said = embedded(judge.clip, judge.tokenizer, truth.pixels[rows], texts)
        return Measured(recalls(pictures, said, texts))

    told = truth.told(judge.print, pool=pool)
    cells = tuple(Cell(name=split, told=told, measure=partial(measure, split)) for split in splits)
    note = (
        f"Among {pool} pictures and their captions of each split: `text@k` is the share of pictures whose "
        "caption is among the k likeliest, `picture@k` the reverse. A larger pool is harder; both splits "
        "have the same."
    )
    return Sweep(name="clip", title="Retrieval by CLIP", note=note, cells=cells)


def _priors(plan: Plan, judge: Judge) -> Sweep:
    space, prints = _decoder(plan)
    truth = judge.at(size_of(space.system))
    texts = truth.texts
    diffusion = system_at(plan.prior, "openmoji-prior", plan.device)
    tokens = system_at(plan.ar_prior, "openmoji-ar-prior", plan.device)
    sources: dict[str, tuple[str, Callable[[], Tensor]]] = {
        "text embedding": ("", lambda: space.texts(texts)),
        "diffusion prior": (diffusion.fingerprint, partial(_prior, diffusion, texts, plan)),
        "autoregressive prior": (tokens.fingerprint, partial(_prior, tokens, texts, plan)),
        "the picture's own": ("", lambda: space.pictures(judge.truth.real)),
    }

    def measure(embeddings: Callable[[], Tensor]) -> Measured:
        z, parts = embeddings(), []
        for at in range(0, len(texts), plan.batch):
            part = slice(at, at + plan.batch)
            parts.append(space.decode(z[part], texts=texts[part], seed=plan.seed + at).cpu())
        made = to_uint8(torch.cat(parts))
        return Measured(judge.figures(made, truth), strip(made))

    cells = [
        Cell(name=name, told=truth.told(judge.print, *prints, own), measure=partial(measure, embeddings))
        for name, (own, embeddings) in sources.items()
    ]
    note = (
        f"{truth.scope}, which the decoder reads in every row, with an embedding from where the row says. "
        f"{FIGURES} {columns(texts)}"
    )
    return Sweep(name="priors", title="What the decoder is fed", note=note, cells=tuple(cells))


def _algebra(plan: Plan, judge: Judge) -> Sweep:
    space, prints = _decoder(plan)
    few = judge.truth.rows[: ROWS + 1]
    truth, theirs = (replace(t, rows=few) for t in (judge.at(size_of(space.system)), judge.truth))
    steps = [i / (COLUMNS - 1) for i in range(COLUMNS)]
    texts = truth.texts

    def seen() -> Tensor:
        return space.pictures(theirs.real)

    def variations() -> Iterator[Tensor]:
        for i, z in enumerate(seen()[:ROWS]):
            yield truth.real[i : i + 1]
            yield space.decode(z.expand(COLUMNS - 1, -1), seed=plan.seed)

    def between(path: Callable[[Tensor, int, float], Tensor]) -> Iterator[Tensor]:
        z = seen()
        for i in range(len(texts) - 1):
            for t in steps:  # with one noise
                yield space.decode(path(z, i, t), seed=plan.seed)

    def towards(z: Tensor, i: int, t: float) -> Tensor:
        text, base = space.texts([texts[i + 1]]), space.texts([texts[i]])
        return difference(z[i : i + 1], text, base, THETA * t)

    def measure(pictures: Callable[[], Iterator[Tensor]]) -> Measured:
        return Measured({}, grid(to_uint8(torch.cat([p.cpu() for p in pictures()])), columns=COLUMNS))

    grids: dict[str, Callable[[], Iterator[Tensor]]] = {
        "variations": variations,
        "interpolations": partial(between, lambda z, i, t: slerp(z[i : i + 1], z[i + 1 : i + 2], t)),
        "differences": partial(between, towards),
    }
    told = truth.told(*prints, rows=ROWS, columns=COLUMNS, theta=THETA)
    cells = tuple(Cell(name=name, told=told, measure=partial(measure, one)) for name, one in grids.items())
    note = (
        f"Of {', '.join(texts)}, split {plan.split}; no caption is read. Variations: the true picture, "
        "then others of its embedding. Interpolations: from each picture to the next. Differences: each "
        f"picture moved from its own caption towards the next one's, by theta from 0 to {THETA:g}."
    )
    return Sweep(name="algebra", title="Computing with pictures", note=note, cells=cells)


def _others(plan: Plan, judge: Judge) -> Sweep:
    def measure(system: System, truth: Truth) -> Measured:
        made = drawn(system, plan, truth.texts)
        size: dict[str, Figure] = {"side": float(made.shape[-1])}
        return Measured(size | judge.figures(made, truth), strip(made))

    cells = []
    for path in plan.others:
        name = path.parent.name if path.name == "system" else path.name
        system = system_at(path, name if name in RECIPES else "RECIPE", plan.device)
        truth = judge.at(size_of(system))
        told = truth.told(judge.print, system.fingerprint)
        cells.append(Cell(name=name, told=told, measure=partial(measure, system, truth)))
    note = (
        f"Systems that draw captions, measured as the priors are, at their own size: `side`. {FIGURES} "
        "What training each took is not measured here: see `sfumato runs`."
    )
    return Sweep(name="others", title="Other systems", note=note, cells=tuple(cells))


PARTS: Mapping[Part, Callable[[Plan, Judge], Sweep]] = {
    "clip": _clip,
    "priors": _priors,
    "algebra": _algebra,
    "others": _others,
}


def _decoder(plan: Plan) -> tuple[Space, tuple[str, ...]]:
    """The decoder with its upsampler behind it, and their fingerprints."""
    systems = [
        system_at(plan.decoder, "openmoji-unclip-decoder", plan.device),
        system_at(plan.upsampler, "openmoji-unclip-upsampler", plan.device),
    ]
    return Space(joined(systems)), tuple(system.fingerprint for system in systems)


def _prior(prior: System, texts: Sequence[str], plan: Plan) -> Tensor:
    z = prior.run(Inputs(n=len(texts), text=texts), seed=plan.seed).image_embed
    if z is None:
        raise ValueError(f"{prior.about.name} draws no image embeddings; give the run of a prior")
    return z
