"""A named table whose lookup errors list what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

__all__ = ["Registry", "unknown"]

T = TypeVar("T")


def unknown(kind: str, name: str, allowed: list[str]) -> str:
    """One line: what was asked for, the nearest name if there is one, and all allowed names."""
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {kind} {name!r}; {hint}allowed: {', '.join(sorted(allowed))}"


class Registry(Mapping[str, T]):
    """A table name -> T, filled by decoration: `@SAMPLERS("ddim")`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._table: dict[str, T] = {}

    def __call__(self, name: str) -> Callable[[T], T]:
        """Decorator that registers its argument under `name`; ValueError if the name is taken."""

        def register(item: T) -> T:
            if name in self._table:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._table[name] = item
            return item

        return register

    def __getitem__(self, name: str) -> T:
        if name not in self._table:
            raise ValueError(unknown(self.kind, name, list(self._table)))
        return self._table[name]

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)
