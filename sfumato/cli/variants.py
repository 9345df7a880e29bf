"""Choosing among the kinds of a part of a recipe by flags, before the parser sees it.

`--task.objective.weight.kind min_snr` puts a MinSNR with its defaults in place; `--task.lora.rank 4` makes a
part that is None; `--task.text None` takes one away.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

from sfumato.core.registry import unknown

__all__ = ["choices", "choose"]

T = TypeVar("T")


class Part(NamedTuple):
    """A field that holds a dataclass, or may.

    Attributes:
        flag: its name in flags; "" if its own fields stand in its place.
        kinds: its dataclasses that can be made from nothing, by their tag; "" if they have none.
        optional: whether it may be None.
    """

    name: str
    flag: str
    kinds: dict[str, type]
    optional: bool


def choose(value: T, args: Sequence[str], prefix: str = "") -> tuple[T, list[str]]:
    """The value with the kinds that the flags ask for, and the flags that are left to parse.

    Raises: ValueError in one line for a kind that there is not.
    """
    left = list(args)
    changes: dict[str, Any] = {}
    for part in _parts(value):
        path = f"{prefix}{part.flag}"
        current = getattr(value, part.name)
        found = _given(left, f"{path}.kind")
        if found is not None and prefix and part.kinds.keys() - {""}:  # the task is the recipe's own
            if found not in part.kinds:
                raise ValueError(unknown(f"--{path}.kind", found, list(part.kinds)))
            if getattr(current, "kind", None) != found:
                current = part.kinds[found]()
        elif part.optional and (_given(left, path) or "").lower() == "none":
            current, left = None, _without(left, path)
        elif current is None and len(part.kinds) == 1 and any(_flag(a).startswith(f"{path}.") for a in left):
            (kind,) = part.kinds.values()
            current = kind()
        if current is not None:
            current, left = choose(current, left, f"{path}." if path else "")
        if current is not getattr(value, part.name):
            changes[part.name] = current
    return (replace(value, **changes) if changes else value), left  # type: ignore[type-var]


def choices(value: object, prefix: str = "") -> Iterator[str]:
    """A line of help for every part of which there are several kinds, or that may be made or taken away."""
    for part in _parts(value):
        path, current = f"--{prefix}{part.flag}".replace("_", "-"), getattr(value, part.name)
        tags = [tag for tag in part.kinds if tag]
        if len(tags) > 1 and prefix:
            yield f"{path}.kind {{{','.join(tags)}}}"
        if part.optional and current is not None:
            yield f"{path} None"
        elif current is None and len(part.kinds) == 1:
            (kind,) = part.kinds.values()
            yield f"{path}.{{{','.join(f.name.replace('_', '-') for f in fields(kind))}}}"
        if current is not None:
            yield from choices(current, f"{prefix}{part.flag}." if part.flag else prefix)


def _parts(value: object) -> Iterator[Part]:
    hints = typing.get_type_hints(type(value), include_extras=True)
    for field in fields(value):  # type: ignore[arg-type]
        members = list(_members(hints[field.name]))
        kinds: list[Any] = [m for m in members if is_dataclass(m)]
        if kinds:
            ready = {_tag(kind): kind for kind in kinds if _bare(kind)}
            shown = [m.name for m in _notes(hints[field.name]) if getattr(m, "name", None) is not None]
            yield Part(field.name, shown[0] if shown else field.name, ready, type(None) in members)


def _members(hint: Any) -> Iterator[Any]:
    """The members of a union, and of unions within it."""
    if typing.get_origin(hint) is typing.Annotated:
        yield from _members(typing.get_args(hint)[0])
    elif typing.get_origin(hint) in (typing.Union, types.UnionType):
        for member in typing.get_args(hint):
            yield from _members(member)
    else:
        yield hint


def _notes(hint: Any) -> tuple[Any, ...]:
    """What is annotated to a type: `tyro.conf.arg(name="")` among it."""
    return getattr(hint, "__metadata__", ())


def _bare(kind: Any) -> bool:
    return all(f.default is not MISSING or f.default_factory is not MISSING for f in fields(kind))


def _tag(kind: Any) -> str:
    tag = next((f.default for f in fields(kind) if f.name == "kind"), "")
    return tag if isinstance(tag, str) else ""


def _flag(arg: str) -> str:
    """The name in "--a.b-c" or "--a.b-c=value", with underscores; "" for what is no flag."""
    return arg[2:].partition("=")[0].replace("-", "_") if arg.startswith("--") else ""


def _given(args: Sequence[str], path: str) -> str | None:
    """The value of a flag, None if it is absent or has none."""
    for i, arg in enumerate(args):
        if _flag(arg) == path:
            return arg.partition("=")[2] if "=" in arg else next(iter(args[i + 1 : i + 2]), None)
    return None


def _without(args: Sequence[str], path: str) -> list[str]:
    i = next(i for i, arg in enumerate(args) if _flag(arg) == path)
    return [*args[:i], *args[i + (1 if "=" in args[i] else 2) :]]
