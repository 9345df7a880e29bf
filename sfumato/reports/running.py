"""Running the cells of a plan: costs first, then every cell that is not finished, and what each reached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sfumato.core.config import from_json, to_json
from sfumato.core.png import write_whole
from sfumato.evaluation.measures import Proportion
from sfumato.evaluation.scenes.benchmark import evaluate
from sfumato.reports.cost import Cost, cost_of
from sfumato.reports.plan import Cell, Part, Plan, cells
from sfumato.systems.system import load_system
from sfumato.training.batches import open_folder
from sfumato.training.history import read_log
from sfumato.training.run import train
from sfumato.training.validation import LOSS, VELOCITY

__all__ = ["Costs", "Outcome", "budgeted", "run"]

DONE = "cell.json"  # within the run folder of a cell that is finished
Costs = Mapping[tuple[Part, str], Cost]
Tell = Callable[[str, int, int], None]
"""Told (what, done, in all)."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a cell reached.

    Attributes:
        images: seen at each validation.
        losses: the run's own objective, on the held-out scenes.
        velocities: the error that compares objectives, see `training.validation.DenoisingLoss`.
        joint: split of the benchmark -> pictures in which everything that the caption says holds; designs
            only.
        nearest: the same of the scenes that pictures come nearest to.
        identity: of the recipe and the protocol, which decide all this.
    """

    part: Part
    name: str
    seed: int
    images: tuple[int, ...]
    losses: tuple[float, ...]
    velocities: tuple[float, ...]
    joint: Mapping[str, Proportion]
    nearest: Mapping[str, Proportion]
    identity: str


def budgeted(plan: Plan, tell: Tell) -> tuple[list[Cell], Costs]:
    """The cells, those of the designs at equal compute, and what each name costs.

    The first design sees `plan.images`; the others as many whole batches as fit into its operations.

    Raises: ValueError in one line for whatever is wrong with the plan, its recipe or its data.
    """
    found = cells(plan)
    names = list({(cell.part, cell.name): cell.recipe for cell in found}.items())
    batch = names[0][1].trainer.batch
    pictures = open_folder(names[0][1].data)
    pictures.entries = pictures.entries[:batch]
    costs: dict[tuple[Part, str], Cost] = {}
    for done, (key, recipe) in enumerate(names, 1):
        costs[key] = cost_of(recipe, pictures)
        tell("measuring", done, len(names))
    return [_equalized(cell, plan, costs) for cell in found], costs


def run(plan: Plan, planned: Sequence[Cell], tell: Tell, recorded: Sequence[Outcome] = ()) -> list[Outcome]:
    """Train and score the cells in their order; those that are finished are read.

    Args:
        recorded: outcomes of an earlier report, whose runs may be gone; those of the same cells are taken.

    Raises:
        ValueError: in one line, as `train` does; also where the folder of a cell holds another recipe's run.
        Stopped: after SIGTERM or Ctrl-C, when there is a checkpoint; the same call goes on from there.
    """
    known = {(one.part, one.name, one.seed, one.identity): one for one in recorded}
    outcomes = []
    for done, cell in enumerate(planned):
        tell("running", done, len(planned))
        key = cell.part, cell.name, cell.seed, _identity(cell, plan)
        outcomes.append(known.get(key) or _finished(cell, plan) or _run(cell, plan))
    tell("running", len(planned), len(planned))
    return outcomes


def _equalized(cell: Cell, plan: Plan, costs: Costs) -> Cell:
    if cell.part != "designs":
        return cell
    trainer = cell.recipe.trainer
    factor = costs["designs", plan.designs[0]].gflop / costs["designs", cell.name].gflop
    images = max(1, int(trainer.images * factor) // trainer.batch) * trainer.batch
    return replace(cell, recipe=replace(cell.recipe, trainer=replace(trainer, images=images)))


def _run(cell: Cell, plan: Plan) -> Outcome:
    system = train(cell.recipe)
    curve = {row["images"]: row for row in read_log(cell.recipe.folder / "log.jsonl") if VELOCITY in row}
    rows = [curve[images] for images in sorted(curve)]
    joint, nearest = _scored(system, cell, plan) if cell.part == "designs" else ({}, {})
    outcome = Outcome(
        part=cell.part,
        name=cell.name,
        seed=cell.seed,
        images=tuple(int(row["images"]) for row in rows),
        losses=tuple(row[LOSS] for row in rows),
        velocities=tuple(row[VELOCITY] for row in rows),
        joint=joint,
        nearest=nearest,
        identity=_identity(cell, plan),
    )
    write_whole(cell.recipe.folder / DONE, (json.dumps(to_json(outcome), indent=1) + "\n").encode())
    return outcome


def _scored(folder: Path, cell: Cell, plan: Plan) -> tuple[dict[str, Proportion], dict[str, Proportion]]:
    system = load_system(folder, device=cell.recipe.trainer.device)
    splits = evaluate(system, plan.protocol, images=cell.recipe.trainer.images)[0].splits
    joint = {split: scores.facts["joint"] for split, scores in splits.items()}
    return joint, {split: scores.nearest["joint"] for split, scores in splits.items()}


def _finished(cell: Cell, plan: Plan) -> Outcome | None:
    """What a cell reached, if it was finished by the same recipe and protocol."""
    path = cell.recipe.folder / DONE
    if not path.is_file():
        return None
    outcome = from_json(Outcome, path.read_text("utf-8"), where=str(path))
    return outcome if outcome.identity == _identity(cell, plan) else None


def _identity(cell: Cell, plan: Plan) -> str:
    told = json.dumps([to_json(cell.recipe), to_json(plan.protocol)], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]
