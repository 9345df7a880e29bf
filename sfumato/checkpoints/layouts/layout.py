"""What a table of a published layout says: marks, the settings behind the tensors, and their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor, nn

from sfumato.checkpoints.keymap import KeyMap
from sfumato.core.registry import Registry, unknown

__all__ = [
    "LAYOUTS",
    "OURS",
    "Layout",
    "Part",
    "Settings",
    "Shapes",
    "indices",
    "one_or_all",
    "settled",
    "shape_of",
]

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape, which is all that a table looks at before the net is built."""
Settings = Mapping[str, object]
"""Constructor arguments of the reference, by the reference's own names."""
OURS = "(config)"
"""Where settings carry what the tensors say of a net in our words."""
C = TypeVar("C")
V = TypeVar("V", int, float)


def _none(_: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Part(Generic[C]):
    """One network of a layout.

    Attributes:
        name: of the part in what `load_nets` returns: "net" for the denoiser, "vae", "text".
        build: our net of our config.
        settings: the reference's settings of the tensors' shapes and those that were given; ValueError where
            the two disagree.
        config: our config of settled settings.
        names: the rows of our config.
        published: the settings of our config, for writing; ValueError if the reference cannot compute it. A
            second argument has what the net does not know, such as the size of its pictures.
        prefix: of its names in the file; a file of one net, or its copy by others, may lack it.
        constants: tensors of the file that follow from the settings; written, and compared when read.
        aliases: (old, new) pieces of names: what older files say, and what the rows say.
        known: names that settings may have; others in a config.json are passed over.
        renumbered: the rows of our config and the settings, where the settings say the order of rows.
    """

    name: str
    build: Callable[[C], nn.Module]
    settings: Callable[[Shapes, Settings], Settings]
    config: Callable[[Settings], C]
    names: Callable[[C], KeyMap]
    published: Callable[[C, Settings], Settings]
    prefix: str = ""
    constants: Callable[[Settings], dict[str, Tensor]] = _none
    aliases: tuple[tuple[str, str], ...] = ()
    known: tuple[str, ...] = ()
    renumbered: Callable[[C, Settings], KeyMap] | None = None

    def rows(self, config: C, settings: Settings) -> KeyMap:
        """The rows of a net."""
        return self.names(config) if self.renumbered is None else self.renumbered(config, settings)

    def renamed(self, name: str) -> str:
        """A name without aliases."""
        for old, new in self.aliases:
            name = name.replace(old, new)
        return name


@dataclass(frozen=True)
class Layout:
    """A kind of file.

    Attributes:
        parts: the networks in it.
        marks: names that together tell it from the other layouts.
        absent: prefixes of names that tell that it is another layout.
        files: stem of a published file -> settings that its tensors do not tell.
        diffusers: the class that a diffusers folder names in its config.json, which makes the layout one of
            folders; "" = it is one of files.
        library: which that class is from; or the pipelines of diffusers that it is part of.
        pads: name of a tokenizer -> what fills its short texts, where the file has text towers of CLIP; their
            vocabulary lies beside it.
        markers: names of tensors that say something of the denoiser -> that setting.
        vocabulary: "gpt2", "clip" or "bert" if it is of one of these, in a length that the tower tells.
        beside: what tensors beside the networks say of the system, as the JSON files of a diffusers pipeline
            would: by subfolder.
        averages: whether one draws with the averages of the denoiser's weights, if the file has them.
    """

    parts: tuple[Part[Any], ...]
    marks: tuple[str, ...]
    diffusers: str = ""
    library: Literal["diffusers", "transformers", "stable_diffusion"] = "diffusers"
    absent: tuple[str, ...] = ()
    files: Mapping[str, Settings] = field(default_factory=dict)
    pads: Mapping[str, str] = field(default_factory=dict)
    markers: Mapping[str, Settings] = field(default_factory=dict)
    vocabulary: Literal["", "bert", "clip", "gpt2"] = ""
    beside: Callable[[Mapping[str, Tensor]], Mapping[str, Mapping[str, object]]] = _none
    averages: bool = False

    def fits(self, shapes: Shapes) -> bool:
        """Whether the tensors are named so."""
        names = {part.renamed(name) for part in self.parts for name in shapes}
        names |= {name.removeprefix(part.prefix) for part in self.parts for name in names}
        others = bool(self.absent) and any(name.startswith(self.absent) for name in names)
        return all(mark in names for mark in self.marks) and not others


LAYOUTS: Registry[Layout] = Registry("layout")
"""Name -> Layout; of two that fit a file the first is meant."""


def settled(given: Settings, read: Settings, defaults: Settings) -> dict[str, object]:
    """One value per setting: what the tensors say, else what was given, else the default.

    Raises: ValueError if a given name is unknown, or a given value is not what the tensors say.
    """
    known = {**defaults, **read}
    for name, value in given.items():
        if name not in known:
            raise ValueError(unknown("setting", name, list(known)))
        if name in read and read[name] != value:
            raise ValueError(f"the config says {name} {value}, the tensors say {read[name]}")
    return {**defaults, **given, **read}


def shape_of(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    """Shape of a tensor that every file of the layout has.

    Raises: ValueError if it is missing or has another number of axes.
    """
    shape = shapes.get(name)
    if shape is None:
        raise ValueError(f"tensor {name!r} is missing")
    if len(shape) != axes:
        raise ValueError(f"tensor {name!r} has shape {shape}, expected {axes} axes")
    return shape


def indices(shapes: Shapes, prefix: str) -> int:
    """One more than the largest n of names `prefix.n.`; 0 if there is none."""
    start = f"{prefix}."
    numbers = [name[len(start) :].partition(".")[0] for name in shapes if name.startswith(start)]
    return max((int(n) + 1 for n in numbers if n.isdecimal()), default=0)


def one_or_all(values: Sequence[V]) -> V | list[V]:
    """The value of all levels, or a list of all where they differ, as references are told them."""
    return values[0] if len(set(values)) == 1 else list(values)
