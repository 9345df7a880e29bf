"""Flags from dataclasses, with errors in one line."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from typing import TypeVar

import tyro

from sfumato.cli.variants import choices, choose

__all__ = ["parse", "size_of"]

T = TypeVar("T")
RULE = re.compile(r"|[-─]+|[╭╰].*")
SIZE = re.compile(r"(\d+)(?:x(\d+))?")


def parse(kind: type[T], verb: str, args: Sequence[str], *, default: T | None = None) -> T:
    """The flags of `sfumato VERB` as a dataclass `kind`, whose fields' docstrings are the help.

    Args:
        default: values of the fields that the flags leave out.

    Raises: ValueError in one line for flags that do not fit; SystemExit after --help.
    """
    said = io.StringIO()
    if default is not None:
        default, args = choose(default, args)
    try:
        with contextlib.redirect_stderr(said):
            start = tyro.MISSING_NONPROP if default is None else default
            config = [tyro.conf.FlagCreatePairsOff, tyro.conf.AvoidSubcommands]
            if default is None:
                config.append(
                    tyro.conf.DisallowNone
                )  # None stands for "not given"; in a default it is a value
            return tyro.cli(kind, prog=f"sfumato {verb}", args=list(args), config=config, default=start)
    except SystemExit as stop:
        if not stop.code:
            if default is not None and (lines := list(choices(default))):
                print("\n".join(["Choices, each with settings of its own:", *(f"  {x}" for x in lines)]))
            raise
        raise ValueError(f"{_condensed(said.getvalue())}; see: sfumato {verb} --help") from None


def size_of(text: str | None) -> tuple[int, int] | None:
    """(height, width) of "64" or "WIDTHxHEIGHT". Raises: ValueError for any other text."""
    if text is None:
        return None
    match = SIZE.fullmatch(text.lower())
    if match is None:
        raise ValueError(f"size {text!r} is neither a side nor WIDTHxHEIGHT; write 64, or 96x64")
    width = int(match[1])
    return int(match[2] or width), width


def _condensed(box: str) -> str:
    """The parser's message, up to its first rule or empty line, and the flag that it suggests.

    Its box is drawn with lines; where the output is not UTF-8, with dashes and the title in a row of its own.
    """
    parts: list[list[str]] = [[]]
    for line in box.splitlines():
        text = line.strip("│| ")
        if RULE.fullmatch(text):
            parts.append([])
        else:
            parts[-1].append(text)
    said = [part for part in parts if part][0 if box.startswith("╭") else 1 :]
    if not said:
        return "these flags cannot be read"
    first = " ".join(said[0]).rstrip(".")
    hints = [part[1].split()[0] for part in said[1:] if part[0].startswith("Perhaps") and len(part) > 1]
    return f"{first}; did you mean {hints[0]}?" if hints else first
