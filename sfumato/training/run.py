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
from sfumato.core.png import write_whole
from sfumato.core.world import World, joined
from sfumato.data.datasets import ImageFolder
from sfumato.systems.config import About
from sfumato.training.ahead import ReadAhead, batches_ahead
from sfumato.training.batches import open_folder
from sfumato.training.distributed import check_shares
from sfumato.training.folder import claim, forget, held, settled, tidy
from sfumato.training.held_out import HeldOut, hold_out
from sfumato.training.jobs.build import build
from sfumato.training.jobs.job import Job, Place
from sfumato.training.log import RunLog, SilentLog
from sfumato.training.preview import PreviewFiles
from sfumato.training.recipe import Recipe
from sfumato.training.signals import Stop
from sfumato.training.state import Checkpoints
from sfumato.training.tasks.autoencoding import Autoencoding
from sfumato.training.tasks.contrastive import Contrastive
from sfumato.training.tasks.denoising import Denoising
from sfumato.training.tasks.predicting import Predicting
from sfumato.training.trackers import Tracked, open_trackers
from sfumato.training.trainer import Trainer
from sfumato.training.validation import (
    DenoisingLoss,
    ReconstructionLoss,
    RetrievalLoss,
    TokenLoss,
    Validation,
)

__all__ = ["train"]

LOGGER = logging.getLogger(__name__)


def train(recipe: Recipe, *, force: bool = False) -> Path:
    """Run a recipe, or continue the run that its folder holds, and publish the result.

    The run folder gets recipe.json, log.jsonl, previews/, checkpoints/, and with every checkpoint system/: a
    folder that `sfumato.load` reads, or whose nets a later recipe builds upon, holding the averaged weights.
    With pictures held out, best/ is such a folder too: that of the lowest validation loss.

    Args:
        force: remove a run of another recipe from the folder. A run of the same one is continued anyway.

    Returns: the folder system/.

    Raises:
        ValueError: in one line for anything wrong with recipe, data or folder, before the first step; or if
            losses are not finite, or something cannot be written.
        Stopped: after SIGTERM or Ctrl-C, when there is a checkpoint; the same call goes on from there.
    """
    with joined(recipe.trainer.device, seconds=recipe.trainer.timeout) as world:
        return _train(recipe, world, force=force)


def _train(recipe: Recipe, world: World, *, force: bool) -> Path:
    stop = Stop()
    with stop, stop.interruptible():  # a long list of pictures
        pictures, kept_out = world.agree(
            lambda: hold_out(open_folder(recipe.data), recipe.validation, recipe.data)
        )
        check_shares(pictures, recipe.trainer.batch, world)
        place = _place(recipe, pictures, world)
    tracked = Tracked(name=place.about.name, folder=place.out, settings=to_json(recipe))
    trackers = world.agree(lambda: open_trackers(recipe.trainer.trackers, tracked) if world.leads else [])
    devices = [place.device] if place.device.type == "cuda" else []
    with (
        contextlib.ExitStack() as stack,
        stop,
        _one_line(place.out),
        _damage_listed(place),
        torch.random.fork_rng(devices=devices),
    ):
        world.agree(lambda: stack.enter_context(held(place.out)) if world.leads else None)
        new = world.lead(lambda: _claimed(recipe, force=force))
        torch.manual_seed(recipe.trainer.seed)
        try:
            with stop.interruptible():
                trainer = world.agree(lambda: _assembled(recipe, place, kept_out, stop))
        except ValueError:
            if new and world.leads:  # the mistake must not stand in the way of the corrected recipe
                forget(place.out)
            raise
        stop.alone = world.size == 1
        world.lead(lambda: settled(place.out))
        trainer.log.trackers += trackers
        with trainer.log, world.watched(), _read_ahead(recipe, trainer, place) as trainer.batches:
            trainer.fit()
    return place.out / "system"


def _claimed(recipe: Recipe, *, force: bool) -> bool:
    new = claim(recipe, force=force)
    tidy(recipe.folder)
    return new


def _assembled(recipe: Recipe, place: Place, kept_out: ImageFolder | None, stop: Stop) -> Trainer:
    job = build(recipe, place)
    trainer = _trainer(recipe, job, place, stop)
    if (validation := _validation(recipe, job, kept_out, trainer, place.world)) is not None:
        trainer.validate = validation
    return trainer


@contextlib.contextmanager
def _one_line(out: Path) -> Iterator[None]:
    """An error of the file system that nobody has put into words yet, as one line."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ValueError(
            f"the run in {out} cannot go on: {error.strerror or error}{where}; free space or choose another "
            "--out; the last checkpoint stays"
        ) from None


def _place(recipe: Recipe, pictures: ImageFolder, world: World) -> Place:
    note = recipe.data.path / "ATTRIBUTION.txt"
    about = replace(recipe.about, name=recipe.about.name if recipe.about.name != "unnamed" else recipe.name)
    if note.is_file():
        about = replace(about, attribution=note.read_text("utf-8").strip())
    device = world.device(recipe.trainer.device)
    return Place(recipe.folder, device, pictures, about, _card(recipe, about), world)


def _trainer(recipe: Recipe, job: Job, place: Place, stop: Stop) -> Trainer:
    config = recipe.trainer

    def publish(averaged: Mapping[str, nn.Module]) -> None:
        write_folder(place.out / "system", job.result(averaged))
        job.beside(averaged)

    log = RunLog if place.world.leads else SilentLog
    trainer = Trainer(
        job.task,
        job.batches,
        config,
        optim=recipe.optim,
        log=log(place.out / "log.jsonl", config.images, config.log_every, quiet=config.quiet),
        checkpoints=Checkpoints(place.out / "checkpoints", config.keep, place.world),
        stop=stop,
        publish=publish,
    )
    files = PreviewFiles(place.out, lambda: job.task.preview(trainer.average.whole()), place.about.notice)
    trainer.preview = lambda images: trainer.log.picture(images, files(images, write=place.world.leads))
    return trainer


def _read_ahead(recipe: Recipe, trainer: Trainer, place: Place) -> ReadAhead:
    count = batches_ahead(recipe.data.ahead, place.device)
    return ReadAhead(trainer.batches, count, step=recipe.trainer.batch, end=recipe.trainer.images)


def _validation(
    recipe: Recipe, job: Job, held: ImageFolder | None, trainer: Trainer, world: World
) -> Validation | None:
    """What measures the held-out pictures, if any. Raises: ValueError if the task has no measure."""
    if held is None:
        return None
    task = job.task
    measure: DenoisingLoss | ReconstructionLoss | RetrievalLoss | TokenLoss
    if isinstance(task, Denoising):
        sampled, velocity = task.posterior == "sample", recipe.validation.velocity
        measure = DenoisingLoss(
            task.objective, sampled=sampled, embed=task.embed, complete=task.complete, velocity=velocity
        )
    elif isinstance(task, Autoencoding):
        measure = ReconstructionLoss(task.config, task.perceptual)
    elif isinstance(task, Contrastive):
        measure = RetrievalLoss()
    elif isinstance(task, Predicting):
        measure = TokenLoss(task.embed)
    else:
        raise ValueError(
            f"validation.split and share do not work with a {recipe.task.kind} task; leave them out: only "
            "denoisers, priors, autoencoders and CLIPs have a validation loss"
        )
    pictures = HeldOut(held, recipe.trainer.batch // world.size, recipe.validation.draws, world)
    return Validation(measure, lambda: job.result(trainer.average.whole()), pictures, recipe.folder)


def _card(recipe: Recipe, about: About) -> str:
    """Model card: what it is, how it was made, whose data; folders of this machine stay out of it."""
    settings = to_json(recipe)
    del settings["out"], settings["about"], settings["data"]["path"]
    local = (
        "autoencoder",
        "perceptual_net",
        "lpips_trunk",
        "lpips_heads",
        "embedder",
        "clip",
        "init",
        "latents",
    )
    for name in local:
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
        path = place.out / ("skipped.json" if place.world.leads else f"skipped-{place.world.rank}.json")
        write_whole(path, (json.dumps(skipped, indent=1) + "\n").encode())
        LOGGER.warning(
            "%d of %d pictures were damaged and passed over; listed in %s",
            len(skipped),
            len(place.pictures),
            path,
        )
