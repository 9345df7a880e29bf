"""The verb that takes hours: train."""

from __future__ import annotations

import logging

from sfumato.cli.parsing import parse
from sfumato.families import RECIPES
from sfumato.training.run import train as run

__all__ = ["train"]


def train(args: list[str]) -> int:
    """`sfumato train RECIPE`."""
    if not args or args[0] in ("-h", "--help"):
        rows = [f"  {name:<22}{(make.__doc__ or '').splitlines()[0]}" for name, make in RECIPES.items()]
        usage = "usage: sfumato train RECIPE --data.path DIR ..."
        print("\n".join([usage, "", *rows, "", "All settings of one: sfumato train RECIPE --help"]))
        return 0
    default = RECIPES[args[0]]()
    recipe = parse(type(default), f"train {args[0]}", args[1:], default=default)
    logging.basicConfig(level=logging.INFO, format="sfumato: %(message)s")
    print(run(recipe))
    return 0
