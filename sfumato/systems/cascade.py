"""Several systems as one whose stages run in order, with their weights in memory all at once or by turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import pairwise
from typing import Any

from torch import nn

from sfumato.checkpoints.native import Parts
from sfumato.conditioners.base import Conditioner, Merged
from sfumato.conditioners.image import Inpaint, enlarging
from sfumato.core.random import Noise
from sfumato.core.types import Inputs
from sfumato.systems.codec import Pixels
from sfumato.systems.config import About, StageConfig, SystemConfig
from sfumato.systems.options import SampleOptions
from sfumato.systems.stage import Observer, Stage
from sfumato.systems.system import System

__all__ = ["check_order", "deferred", "joined"]

NAMING = ("net", "encoder", "autoencoder", "classifier")  # fields of settings that name a network


@dataclass(frozen=True, kw_only=True)
class Deferred(Stage):
    """A stage whose weights are read when it runs and dropped when it has run; until then they are shapes.

    Attributes:
        load: reads its system.
        index: its place there.
    """

    load: Callable[[], System]
    index: int

    def run(
        self, inputs: Inputs, options: SampleOptions, noise: Noise, observe: Observer | None = None
    ) -> Inputs:
        """See Stage."""
        return replace(self.load().stages[self.index], name=self.name).run(inputs, options, noise, observe)


def deferred(load: Callable[[], System]) -> System:
    """A system that holds no weights between runs; `load` is called now and for every run."""
    system = load()
    for net in system.parts.nets.values():
        net.to("meta")
    kept = [{f.name: getattr(stage, f.name) for f in fields(Stage)} for stage in system.stages]
    return replace(system, stages=tuple(Deferred(**k, load=load, index=i) for i, k in enumerate(kept)))


def joined(systems: Sequence[System]) -> System:
    """The stages of all systems in order, each with what is its own; what is one object is held once.

    A stage or part whose name is taken gets a number behind it.

    Raises: ValueError in one line if there is no system, or a stage cannot take what the one before it makes.
    """
    if not systems:
        raise ValueError("a cascade of no systems; give at least one")
    nets: dict[str, nn.Module] = {}
    tokenizers: dict[str, Any] = {}
    stages: list[Stage] = []
    configs: list[StageConfig] = []
    for system in systems:
        renamed = {
            **_merge(nets, system.parts.nets, "net"),
            **_merge(tokenizers, system.parts.tokenizers, "tokenizer"),
        }
        for stage, config in zip(system.stages, system.config.stages, strict=True):
            name = _free(config.name, [one.name for one in stages])
            stages.append(replace(stage, name=name))
            configs.append(replace(_renamed(config, renamed), name=name))
    check_order(stages)
    names = " + ".join(system.about.name for system in systems)
    summary = " ".join(system.about.summary for system in systems)
    about = replace(systems[0].about if len(systems) == 1 else About(), name=names, summary=summary)
    return System(tuple(stages), SystemConfig(stages=tuple(configs)), Parts(nets, tokenizers), about)


def check_order(stages: Sequence[Stage]) -> None:
    """Raises: ValueError in one line if a stage cannot take the picture that the one before it makes."""
    for before, stage in pairwise(stages):
        if before.emits != "image" or before.pixels is None or stage.pixels is None:
            continue
        reads = enlarging(stage.conditioner)
        join = f"stage {stage.name!r} cannot follow {before.name!r}"
        if reads is None:
            raise ValueError(f"{join}: it reads no picture; put first what draws, then what enlarges")
        wanted = tuple(side // reads.factor for side in stage.pixels)
        if wanted != before.pixels:
            sizes = ["x".join(map(str, reversed(size))) for size in (wanted, stage.pixels, before.pixels)]
            raise ValueError(
                f"{join}: it enlarges {sizes[0]} to {sizes[1]} and is given {sizes[2]}; choose others"
            )
        room = getattr(getattr(stage.denoiser.net, "config", None), "in_channels", None)
        if room is None or not isinstance(before.codec, Pixels):
            continue
        taken = stage.shape[0] + any(isinstance(c, Inpaint) for c in _each(stage.conditioner)) * (
            stage.shape[0] + 1
        )
        if room - taken != before.shape[0]:
            raise ValueError(
                f"{join}: it reads a picture of {room - taken} channels and is given one of {before.shape[0]}"
            )


def _each(conditioner: Conditioner) -> tuple[Conditioner, ...]:
    return conditioner.parts if isinstance(conditioner, Merged) else (conditioner,)


def _merge(into: dict[str, Any], parts: Mapping[str, object], kind: str) -> dict[tuple[str, str], str]:
    """Add parts under free names; the names by kind and old name."""
    names = {}
    for name, part in parts.items():
        same = next((other for other, one in into.items() if one is part), None)
        names[kind, name] = new = same or _free(name, into)
        into[new] = part
    return names


def _free(name: str, taken: Sequence[str] | Mapping[str, object]) -> str:
    new, n = name, 2
    while new in taken:
        new, n = f"{name}-{n}", n + 1
    return new


def _renamed(value: Any, names: Mapping[tuple[str, str], str]) -> Any:
    """Settings with other names of parts."""
    if isinstance(value, tuple):
        return tuple(_renamed(one, names) for one in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    changed: dict[str, Any] = {}
    for f in fields(value):
        old = getattr(value, f.name)
        kind = "net" if f.name in NAMING else f.name
        changed[f.name] = names.get((kind, old), old) if isinstance(old, str) else _renamed(old, names)
    return replace(value, **changed)
