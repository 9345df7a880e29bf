"""The `sfumato` command: one function per verb, imported when it is called, so that help is instant."""

from __future__ import annotations

import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from sfumato import __version__
from sfumato.core.registry import unknown

__all__ = ["VERBS", "main"]

Verb = Callable[[list[str]], int]


def generate(args: list[str]) -> int:
    """Draw pictures of a prompt."""
    from sfumato.cli.pictures import generate as verb

    return verb(args)


def rerun(args: list[str]) -> int:
    """Draw a picture again from what its file says, and compare."""
    from sfumato.cli.pictures import rerun as verb

    return verb(args)


def reconstruct(args: list[str]) -> int:
    """Send a picture through a system's codec and back."""
    from sfumato.cli.pictures import reconstruct as verb

    return verb(args)


def algebra(args: list[str]) -> int:
    """Vary, mix and move pictures in the space of CLIP."""
    from sfumato.cli.algebra import algebra as verb

    return verb(args)


def info(args: list[str]) -> int:
    """Say what a system consists of, and under which license."""
    from sfumato.cli.about import info as verb

    return verb(args)


def pull(args: list[str]) -> int:
    """Fetch a system from the model hub."""
    from sfumato.cli.pull import pull as verb

    return verb(args)


def data(args: list[str]) -> int:
    """Make the OpenMoji picture set or scenes, or check a folder of pictures."""
    from sfumato.cli.datasets import data as verb

    return verb(args)


def train(args: list[str]) -> int:
    """Train by a recipe."""
    from sfumato.cli.runs import train as verb

    return verb(args)


def runs(args: list[str]) -> int:
    """List runs and draw their loss curves."""
    from sfumato.cli.history import runs as verb

    return verb(args)


def doctor(args: list[str]) -> int:
    """Examine a system with pictures and name its broken part."""
    from sfumato.cli.doctor import doctor as verb

    return verb(args)


def evaluate(args: list[str]) -> int:
    """Measure a system."""
    from sfumato.cli.measuring import evaluate as verb

    return verb(args)


def bench(args: list[str]) -> int:
    """Run a benchmark that scores exactly what a system draws."""
    from sfumato.cli.bench import bench as verb

    return verb(args)


def report(args: list[str]) -> int:
    """Redo a comparison that takes many runs."""
    from sfumato.cli.report import report as verb

    return verb(args)


VERBS: dict[str, Verb] = {
    "generate": generate,
    "rerun": rerun,
    "reconstruct": reconstruct,
    "algebra": algebra,
    "info": info,
    "pull": pull,
    "data": data,
    "train": train,
    "runs": runs,
    "doctor": doctor,
    "evaluate": evaluate,
    "bench": bench,
    "report": report,
}
USAGE, INTERRUPTED = 2, 130
OUT_OF_MEMORY = re.compile("not enough memory|out of memory|can't allocate memory", re.IGNORECASE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 after one line about wrong input, 130 after Ctrl-C.

    SFUMATO_DEBUG=1 in the environment shows the traceback of wrong input too.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _notice
            return _dispatch(args)
    except SystemExit as stop:  # how the flag parser ends after --help
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("sfumato: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, KeyError, OSError) as error:
        return _report(error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        return _report(ValueError("not enough memory; ask for a smaller --size, or choose another --device"))


def _notice(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """What the package itself has to say takes one line; the warnings of others stay as they are."""
    ours = Path(filename).is_relative_to(Path(__file__).parents[1])
    said = f"sfumato: {message}\n" if ours else warnings.formatwarning(message, category, filename, lineno)
    (file or sys.stderr).write(said)


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0
    if args[0] == "--version":
        print(f"sfumato {__version__}")
        return 0
    if args[0] not in VERBS:
        raise ValueError(f"{unknown('command', args[0], list(VERBS))}; see: sfumato --help")
    return VERBS[args[0]](args[1:])


def _report(error: Exception) -> int:
    if getattr(error, "told", False):  # by another process of the same run
        return USAGE
    if os.environ.get("SFUMATO_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(error)
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    print(f"sfumato: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
    return USAGE


def _help() -> str:
    width = max(map(len, VERBS)) + 2
    rows = [f"  {name:<{width}}{(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            "usage: sfumato COMMAND ...",
            "",
            "Text-to-image diffusion on your own machine.",
            "",
            *rows,
            "",
            'Try: sfumato generate "red heart"',
            "More about a command: sfumato COMMAND --help",
        ]
    )
