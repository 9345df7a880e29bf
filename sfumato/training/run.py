"""train: from a recipe to a finished run folder."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sfumato.checkpoints.native import write_folder
from sfumato.core.config import to_json
from sfumato.core.device import device_of
from sfumato.core.png import write_whole
from sfumato.systems.config import About
from sfumato.training.batches import open_folder
from sfumato.training.jobs.build import build
from sfumato.training.jobs.job import Job, Place
from sfumato.training.log import RunLog
from sfumato.training.preview import PreviewFiles
from sfumato.training.recipe import Recipe, differences
from sfumato.training.state import Checkpoints
from sfumato.training.trainer import Trainer

__all__ = ["train"]

LOGGER = logging.getLogger(__name__)


def train(recipe: Recipe) -> Path:
    """Run a recipe, or continue the run that its folder holds, and publish the result.

    The run folder gets recipe.json, log.jsonl, previews/, checkpoints/, and with every checkpoint system/: a
    folder that `sfumato.load` reads, or whose nets a later recipe builds upon, holding the averaged weights.

    Returns: the folder system/.
    Raises: ValueError in one line for anything wrong with recipe, data or folder, before the first step;
        or if a loss is not finite.
    """
    place = _place(recipe)
    _claim(recipe)
    devices = [place.device] if place.device.type == "cuda" else []
    with _damage_listed(place), torch.random.fork_rng(devices=devices):
        torch.manual_seed(recipe.trainer.seed)
        job = build(recipe, place)
        trainer = _trainer(recipe, job, place)
        with trainer.log:
            trainer.fit()
    return place.out / "system"


def _place(recipe: Recipe) -> Place:
    pictures = open_folder(recipe.data)
    note = recipe.data.path / "ATTRIBUTION.txt"
    about = replace(recipe.about, name=recipe.about.name if recipe.about.name != "unnamed" else recipe.name)
    if note.is_file():
        about = replace(about, attribution=note.read_text("utf-8").strip())
    return Place(recipe.folder, device_of(recipe.trainer.device), pictures, about, _card(recipe, about))


def _claim(recipe: Recipe) -> None:
    """Write recipe.json, or check that the run in the folder is this one.

    Raises: ValueError in one line with what differs.
    """
    path = recipe.folder / "recipe.json"
    if path.is_file():
        try:
            old = json.loads(path.read_text("utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON ({error}); choose another --out") from None
        if changed := differences(old, recipe):
            raise ValueError(
                f"{recipe.folder} holds a run of another recipe ({'; '.join(changed)}); "
                "choose another --out, or remove the folder"
            )
    write_whole(path, (json.dumps(to_json(recipe), indent=1) + "\n").encode())


def _trainer(recipe: Recipe, job: Job, place: Place) -> Trainer:
    config = recipe.trainer

    def publish(averaged: Mapping[str, nn.Module]) -> None:
        write_folder(place.out / "system", job.result(averaged))
        job.beside(averaged)

    trainer = Trainer(
        job.task,
        job.batches,
        config,
        optim=recipe.optim,
        log=RunLog(place.out / "log.jsonl", config.images, config.log_every, quiet=config.quiet),
        checkpoints=Checkpoints(place.out / "checkpoints", config.keep),
        publish=publish,
    )
    trainer.preview = PreviewFiles(place.out, lambda: job.task.preview(trainer.average.modules))
    return trainer


def _card(recipe: Recipe, about: About) -> str:
    """Model card: what it is, how it was made, whose data; folders of this machine stay out of it."""
    settings = to_json(recipe)
    del settings["out"], settings["about"], settings["data"]["path"]
    for name in ("autoencoder", "perceptual_net", "lpips_trunk", "lpips_heads", "embedder", "init"):
        settings["task"].pop(name, None)
    lines = [f"# {about.name}", "", about.summary, "", "## Recipe", ""]
    lines += ["```json", json.dumps(settings, indent=1), "```"]
    if about.license:
        lines += ["", "## License", "", about.license]
    if about.attribution:
        lines += ["", "## Data", "", about.attribution]
    return "\n".join(lines) + "\n"


@contextlib.contextmanager
def _damage_listed(place: Place) -> Iterator[None]:
    """List the files that were passed over, if any, also when they were too many to go on."""
    try:
        yield
    finally:
        _list_damage(place)


def _list_damage(place: Place) -> None:
    if skipped := place.pictures.skipped:
        write_whole(place.out / "skipped.json", (json.dumps(skipped, indent=1) + "\n").encode())
        LOGGER.warning(
            "%d of %d pictures were damaged and passed over; listed in %s",
            len(skipped),
            len(place.pictures),
            place.out / "skipped.json",
        )
