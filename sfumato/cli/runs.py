"""The verbs that take hours: train, and evaluate."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from sfumato.cli.parsing import parse
from sfumato.core.registry import unknown

__all__ = ["evaluate", "train"]


@dataclass(frozen=True, kw_only=True)
class OpenMoji:
    """Reconstruction PSNR and retrieval accuracy on the OpenMoji set."""

    directory: Positional[Path]
    """Folder that `sfumato data openmoji` wrote."""
    system: Path | None = None
    """Folder of the system; by default the one that comes with sfumato."""
    json: bool = False
    """Print JSON."""
    device: str = "auto"
    """cpu, cuda ...; auto takes an accelerator if there is one."""


def train(args: list[str]) -> int:
    """`sfumato train RECIPE`."""
    from sfumato.families import RECIPES

    if not args or args[0] in ("-h", "--help"):
        rows = [f"  {name:<24}{_first_line(make)}" for name, make in RECIPES.items()]
        print("\n".join(["usage: sfumato train RECIPE --data.path DIR ...", "", *rows, "", TRAIN_HINT]))
        return 0
    default = RECIPES[args[0]]()
    recipe = parse(type(default), f"train {args[0]}", args[1:], default=default)

    from sfumato.training.run import train as run

    run(recipe)
    return 0


def evaluate(args: list[str]) -> int:
    """`sfumato evaluate`."""
    if not args or args[0] in ("-h", "--help"):
        print(
            "usage: sfumato evaluate openmoji DIR ...\n\n"
            "  openmoji DIR  Reconstruction PSNR and retrieval accuracy on the OpenMoji set.\n\n"
            "More about it: sfumato evaluate openmoji --help"
        )
        return 0
    if args[0] not in TASKS:
        raise ValueError(unknown("evaluation", args[0], list(TASKS)))
    return TASKS[args[0]](args[1:])


def openmoji(args: list[str]) -> int:
    """`sfumato evaluate openmoji`."""
    flags = parse(OpenMoji, "evaluate openmoji", args)

    from sfumato.api import load
    from sfumato.core.config import to_json
    from sfumato.evaluation.openmoji import evaluate as measure

    result = measure(load(flags.system, device=flags.device), flags.directory)
    print(json.dumps(to_json(result), indent=1) if flags.json else "\n".join(result.lines()))
    return 0


TASKS: dict[str, Callable[[list[str]], int]] = {"openmoji": openmoji}
TRAIN_HINT = "All settings of a recipe: sfumato train RECIPE --help"


def _first_line(make: object) -> str:
    return ((make.__doc__ or "").strip().splitlines() or [""])[0]
