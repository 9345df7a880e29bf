"""Frozen dataclasses <-> JSON through pydantic, with one-line errors."""

from __future__ import annotations

import json
import textwrap
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

__all__ = ["from_json", "to_json"]

T = TypeVar("T")


def to_json(value: object, kind: Any = None) -> Any:
    """Plain JSON data (dicts, lists, numbers, strings) of a dataclass; `kind`: its type if a union."""
    return TypeAdapter(kind or type(value)).dump_python(value, mode="json")


def from_json(kind: type[T], data: object, *, where: str = "config") -> T:
    """Validate JSON data, or a JSON text, against a dataclass.

    Raises: ValueError in one line with the path of the first offending field and what it expects.
    """
    try:
        return TypeAdapter(kind).validate_python(json.loads(data) if isinstance(data, str) else data)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(p) for p in first["loc"]) or "(root)"
        short = textwrap.shorten(repr(first["input"]), 200, placeholder=" ...")
        raise ValueError(f"{where}: {path}: {first['msg']} (got {short})") from None
