"""The verb that takes hours: train."""

from __future__ import annotations

import logging
import os
import signal
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from sfumato.cli.parsing import parse
from sfumato.families import RECIPES
from sfumato.training.recipe import Recipe
from sfumato.training.run import train as run
from sfumato.training.signals import Stopped

__all__ = ["code_of", "train"]

RESUMABLE, INTERRUPTED = 75, 130  # exit codes after SIGTERM (EX_TEMPFAIL of sysexits.h) and after Ctrl-C


@dataclass(frozen=True, kw_only=True)
class Flags:
    """A recipe, whose run is continued if its folder holds it already.

    Attributes:
        recipe: what to train.
        force: remove a run of another recipe from the run folder and begin again; without it such a folder is
            refused.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    force: bool = False


def train(args: list[str]) -> int:
    """`sfumato train RECIPE`; 75 after SIGTERM and 130 after Ctrl-C, when the same command goes on."""
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, RECIPES)) + 2
        rows = [f"  {name:<{width}}{(make.__doc__ or '').splitlines()[0]}" for name, make in RECIPES.items()]
        usage = "usage: sfumato train RECIPE --data.path DIR ..."
        print("\n".join([usage, "", *rows, "", "All settings of one: sfumato train RECIPE --help"]))
        return 0
    flags = parse(Flags, f"train {args[0]}", args[1:], default=Flags(recipe=RECIPES[args[0]]()))
    leads = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, one does the talking
    logging.basicConfig(level=logging.INFO if leads else logging.ERROR, format="sfumato: %(message)s")
    try:
        system = run(flags.recipe, force=flags.force)
        if leads:
            print(system)
    except Stopped as stopped:
        if leads:
            print(f"sfumato: {stopped}; the same command goes on from here", file=sys.stderr)
        return code_of(stopped)
    return 0


def code_of(stopped: Stopped) -> int:
    """The exit code of a run that a signal stopped and the same command goes on with."""
    return INTERRUPTED if stopped.signum == signal.SIGINT else RESUMABLE
