"""Recipe: everything that decides how a run goes, as one tree of frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from sfumato.core.config import to_json
from sfumato.systems.config import About
from sfumato.training.batches import DataConfig
from sfumato.training.held_out import ValidationConfig
from sfumato.training.optim import OptimConfig
from sfumato.training.tasks.autoencoding import AutoencodingConfig
from sfumato.training.tasks.classifying import ClassifyingConfig
from sfumato.training.tasks.contrastive import ContrastiveConfig
from sfumato.training.tasks.denoising import DenoisingConfig
from sfumato.training.tasks.noised_contrastive import NoisedContrastiveConfig
from sfumato.training.tasks.perceptual import CaptionWordsConfig
from sfumato.training.tasks.predicting import PredictingConfig
from sfumato.training.trainer import TrainerConfig

__all__ = ["Recipe", "TaskConfig", "differences", "retuned"]

TaskConfig = Annotated[
    AutoencodingConfig
    | CaptionWordsConfig
    | ClassifyingConfig
    | ContrastiveConfig
    | DenoisingConfig
    | NoisedContrastiveConfig
    | PredictingConfig,
    Field(discriminator="kind"),
]

# What may change when a run is continued: it decides where and how long, not what is computed.
FREE = frozenset(
    {
        "out",
        "data.path",
        "data.cache",
        "data.cache_gb",
        "data.ahead",
        "trainer.images",
        "trainer.patience",
        "trainer.recompute",
        "trainer.log_every",
        "trainer.preview_every",
        "trainer.save_every",
        "trainer.keep",
        "trainer.device",
        "trainer.parallel",
        "trainer.timeout",
        "trainer.quiet",
        "trainer.trackers",
        "trainer.validate_every",
        "validation.draws",
        "validation.pictures",
        "validation.velocity",
        "task.latents",
    }
)

# What may change too, though it changes what is computed: all that helps a run whose losses were not finite.
TUNED = frozenset(
    f"{optim}.{name}"
    for optim in ("optim", "task.discriminator_optim")
    for name in ("lr", "muon_lr", "warmup", "clip")
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run: `sfumato train NAME --a.b value` overrides any field of any part.

    Attributes:
        name: of the recipe; the run folder is runs/NAME unless `out` says otherwise.
        task: what is trained, and by which loss.
        data: which pictures.
        trainer: how long, and what is written when.
        optim: of the phases of the task that bring none of their own.
        validation: which pictures are kept from training, to measure it.
        about: goes into what the run produces; an ATTRIBUTION.txt beside the data is added to it.
        out: run folder: recipe.json, log.jsonl, previews/, checkpoints/, system/, the result, and best/, what
            had the lowest validation loss.
    """

    name: str
    task: TaskConfig
    data: DataConfig
    trainer: TrainerConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    about: About = field(default_factory=About)
    out: Path | None = None

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.out if self.out is not None else Path("runs") / self.name


def differences(old: Mapping[str, object], new: Recipe) -> list[str]:
    """What makes another run of a recipe than the one that it was begun with.

    Args:
        old: the earlier recipe as JSON data.

    Returns: "a.b: old -> new", sorted; empty if the run may go on. A switch that the earlier recipe did not
    know and that is off changes nothing.
    """
    return [change for key, change in _changes(old, new).items() if key not in FREE | TUNED]


def retuned(old: Mapping[str, object], new: Recipe) -> list[str]:
    """What a run that may go on computes differently from here, as `differences` tells it."""
    return [change for key, change in _changes(old, new).items() if key in TUNED]


def _changes(old: Mapping[str, object], new: Recipe) -> dict[str, str]:
    """By setting, sorted."""
    before, after = _flat(old), _flat(to_json(new))
    before = {k: False for k, v in after.items() if v is False} | before
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    return {k: f"{k}: {before.get(k)} -> {after.get(k)}" for k in changed}


def _flat(tree: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
