"""The benchmark: pictures of a system for captions of every split, read back and scored under a protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato import __version__
from sfumato.core.image import grid
from sfumato.core.registry import unknown
from sfumato.core.world import ALONE, World
from sfumato.data.scenes.captions import Caption, describe
from sfumato.data.scenes.draw import PIXELS
from sfumato.data.scenes.graph import Scene
from sfumato.data.scenes.sampling import draw_scenes
from sfumato.data.scenes.splits import SPLITS, Split
from sfumato.evaluation.measures import Proportion
from sfumato.evaluation.scenes.facts import judge
from sfumato.evaluation.scenes.reader import Reading, read
from sfumato.evaluation.scenes.scores import (
    Diversity,
    SplitScores,
    diversity,
    memorized,
    score,
    training_keys,
)
from sfumato.systems.system import System

__all__ = [
    "REVISION",
    "Case",
    "Protocol",
    "Result",
    "Shown",
    "cases",
    "evaluate",
    "refuse_other_protocol",
    "sheet",
]

REVISION = 2  # of the scenes, captions, reader and scores; results of different ones are not compared
SEARCHED = 2048  # scenes looked through at a time for captions of one difficulty
RARE = 40  # a difficulty has at least one caption in so many
SHOWN = 24  # pictures of each split on the sheet
FRAME = 3  # pixels
Progress = Callable[[str, int, int], None]
"""Told (what, done, in all)."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is asked and how pictures are made; results under different ones are not compared.

    Attributes:
        pictures: of each split.
        splits: see `data.scenes.splits`.
        difficulty: captions that bind this many facts; None = all.
        seed: of the captions; picture i of a split has seed i.
        sampler: by name.
        steps: of the sampler; what is not named here is the system's own.
        guidance: scale.
        train: scenes of training with which the pictures are compared, seed 0.
        revision: of the benchmark.
    """

    pictures: int = 200
    splits: tuple[Split, ...] = SPLITS[1:]
    difficulty: int | None = None
    seed: int = 0
    sampler: str = "euler"
    steps: int = 20
    guidance: float = 2.0
    train: int = 60_000
    revision: int = REVISION

    def __post_init__(self) -> None:
        for name, least in (("pictures", 1), ("train", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: a whole number from {least}")
        if not self.splits or len(set(self.splits)) < len(self.splits):
            raise ValueError(f"splits {', '.join(self.splits) or '(none)'}: name at least one, each once")
        for split in self.splits:
            if split not in SPLITS[1:]:
                raise ValueError(unknown("split", split, list(SPLITS[1:])))
        if self.difficulty is not None and not 1 <= self.difficulty <= 10:
            raise ValueError(f"difficulty is {self.difficulty}; allowed: 1 to 10 bound facts")


@dataclass(frozen=True)
class Case:
    """A caption and the scene from which it was made."""

    caption: Caption
    scene: Scene


@dataclass(frozen=True)
class Shown:
    """What a system made of the cases of one split; `pictures` (N, S, S, 3) uint8."""

    cases: Sequence[Case]
    pictures: NDArray[np.uint8]
    readings: Sequence[Reading]

    @property
    def captions(self) -> list[Caption]:
        """What was asked."""
        return [case.caption for case in self.cases]

    @property
    def truth(self) -> list[Scene]:
        """The scenes from which the captions were made."""
        return [case.scene for case in self.cases]

    def scores(self) -> SplitScores:
        """See `scores.score`."""
        return score(self.captions, self.readings, self.truth)

    def diversity(self) -> dict[str, Diversity]:
        """See `scores.diversity`."""
        return diversity(self.captions, self.readings, self.truth)


@dataclass(frozen=True, kw_only=True)
class Result:
    """All figures of one evaluation, with the protocol that gave them.

    Attributes:
        system: fingerprint of the checkpoint, "" if it was never saved.
        name: of the system.
        version: of sfumato.
        ema: decay of the averaged weights, if the system lies in the run that made it.
        images: seen in training when the system was published, if that is known.
        size: of the pictures.
        splits: by name.
        diversity: over the split "seen", see `scores.diversity`.
        memorized: share of valid pictures that are scenes of training, and of their true scenes by chance.
    """

    protocol: Protocol
    system: str
    name: str
    version: str
    size: int
    ema: float | None = None
    images: int | None = None
    splits: Mapping[str, SplitScores]
    diversity: Mapping[str, Diversity]
    memorized: Proportion | None
    memorized_by_chance: Proportion | None


def cases(split: Split, count: int, *, seed: int = 0, difficulty: int | None = None) -> list[Case]:
    """The first cases of a split, or the first of a difficulty.

    Raises: ValueError in one line if the split has hardly any of that difficulty.
    """
    if difficulty is None:
        scenes = draw_scenes(split, count, seed=seed)
        return [Case(*pair) for pair in zip(describe(scenes, split, seed=seed), scenes.unpack(), strict=True)]
    found: list[Case] = []
    for first in range(0, max(RARE * count, 4 * SEARCHED), SEARCHED):
        scenes = draw_scenes(split, SEARCHED, seed=seed, first=first)
        pairs = zip(describe(scenes, split, seed=seed, first=first), scenes.unpack(), strict=True)
        found += [Case(*pair) for pair in pairs if pair[0].difficulty == difficulty]
        if len(found) >= count:
            return found[:count]
    raise ValueError(
        f"the split {split!r} has {len(found)} captions of difficulty {difficulty} among {first + SEARCHED}, "
        f"and {count} were asked for; choose another difficulty, or fewer pictures"
    )


def evaluate(
    system: System,
    protocol: Protocol | None = None,
    *,
    batch: int = 50,
    ema: float | None = None,
    images: int | None = None,
    progress: Progress | None = None,
    world: World = ALONE,
) -> tuple[Result, dict[Split, Shown]]:
    """Score a text-to-image system.

    Args:
        batch: pictures made at a time; it does not change them.
        ema, images: see Result.
        progress: told after every batch.
        world: processes that share the pictures; all get the result.

    Raises: ValueError in one line if the system makes no pictures of a size that can be read, or they are
        not finite.
    """
    protocol = protocol or Protocol()
    size = system.size
    if size is None or size[0] != size[1] or size[0] not in PIXELS:
        made = "no pictures" if size is None else f"pictures of {size[1]}x{size[0]}"
        raise ValueError(
            f"this system makes {made}; scenes are read at sides of {', '.join(map(str, PIXELS))}"
        )
    shown: dict[Split, Shown] = {}
    for split in protocol.splits:
        asked = cases(split, protocol.pictures, seed=protocol.seed, difficulty=protocol.difficulty)
        tell = partial(progress, split) if progress else lambda done, total: None
        pictures = _pictures(system, [c.caption.text for c in asked], protocol, batch, tell, world)
        shown[split] = Shown(asked, pictures, read(pictures))
    known = training_keys(protocol.train)
    everything = [pair for part in shown.values() for pair in zip(part.cases, part.readings, strict=True)]
    seen = shown.get("seen")
    return Result(
        protocol=protocol,
        system=system.fingerprint,
        name=system.about.name,
        version=__version__,
        size=size[0],
        ema=ema,
        images=images,
        splits={name: part.scores() for name, part in shown.items()},
        diversity={} if seen is None else seen.diversity(),
        memorized=memorized((r.scene for _, r in everything if r.scene is not None), known),
        memorized_by_chance=memorized((case.scene for case, _ in everything), known),
    ), shown


def refuse_other_protocol(results: Mapping[str, Result]) -> None:
    """Raise ValueError in one line naming what differs, unless all results are of one protocol."""
    (first, result), *others = results.items()
    for name, other in others:
        for field in fields(Protocol):
            a, b = (getattr(r.protocol, field.name) for r in (result, other))
            if a != b:
                raise ValueError(
                    f"{first} and {name} cannot be compared: {field.name} is {a} in the one and {b} in the "
                    "other; measure both under one protocol"
                )


def sheet(shown: Mapping[Split, Shown], each: int = SHOWN) -> Tensor:
    """A picture (3, H, W) of the first pictures of each split, a row or two each.

    The frame is green where all facts hold, red where one does not, black where the picture is invalid.
    """
    cells = []
    for part in shown.values():
        for case, picture, reading in zip(part.cases[:each], part.pictures, part.readings, strict=False):
            good = judge(case.caption, reading.scene)["joint"]
            color = (0, 170, 0) if good else (230, 0, 0) if reading.scene is not None else (0, 0, 0)
            side = len(picture) + 2 * FRAME
            cell = np.empty((side, side, 3), np.uint8)
            cell[:] = color
            cell[FRAME:-FRAME, FRAME:-FRAME] = picture
            cells.append(torch.from_numpy(cell).permute(2, 0, 1))
        cells += [torch.full_like(cells[0], 255)] * (-len(cells) % 12)
    return grid(torch.stack(cells), columns=12)


def _pictures(
    system: System,
    text: Sequence[str],
    protocol: Protocol,
    batch: int,
    tell: Callable[[int, int], None],
    world: World,
) -> NDArray[np.uint8]:
    made: list[NDArray[np.uint8]] = []
    for start in range(0, len(text), batch * world.size):
        images = system.generate(
            text[start : start + batch * world.size],
            seed=start,
            batch=batch,
            steps=protocol.steps,
            guidance=protocol.guidance,
            sampler=protocol.sampler,
            world=world,
        )
        made += [np.asarray(image) for image in images]
        tell(len(made), len(text))
    return np.stack(made)
