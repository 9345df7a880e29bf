"""doctor: which part of a system is broken, from a few pictures of its data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sfumato.conditioners.base import Merged
from sfumato.conditioners.label import LabelCond
from sfumato.conditioners.text import TokenText
from sfumato.core.image import to_float
from sfumato.data.datasets import ImageFolder, stack
from sfumato.data.order import Draw
from sfumato.data.transforms import CenterCrop
from sfumato.evaluation.checks import (
    Check,
    check_captions,
    check_classes,
    check_codec,
    check_denoising,
    check_guidance,
    check_labels,
    check_learning,
    check_parameterization,
    check_samples,
    check_scale,
    check_text,
)
from sfumato.evaluation.specimen import Specimen
from sfumato.systems.config import StageConfig
from sfumato.systems.stage import Stage
from sfumato.systems.system import System

__all__ = ["Diagnosis", "Examination", "examine"]


@dataclass(frozen=True, kw_only=True)
class Examination:
    """How thorough it is.

    Attributes:
        pictures: that are looked at, at equal distances in the folder.
        split: only those whose metadata field "split" has this value; None = all.
        batch: that go through a network at a time.
        steps: of training on one batch, on a copy of the network.
        seconds: after which that training ends.
    """

    pictures: int = 64
    split: str | None = None
    batch: int = 16
    steps: int = 30
    seconds: float = 20.0

    def __post_init__(self) -> None:
        for name in ("pictures", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True)
class Diagnosis:
    """The checks in the order of causes: what comes later relies on what comes before."""

    checks: tuple[Check, ...]

    @property
    def broken(self) -> Check | None:
        """The first check that failed, which names the part to mend first."""
        return next((check for check in self.checks if check.passed is False), None)

    def line(self) -> str:
        """The diagnosis in one line."""
        if self.broken is None:
            return "nothing is broken"
        return f"broken: {self.broken.part}: {self.broken.verdict}"


@torch.no_grad()
def examine(
    system: System,
    directory: str | Path,
    *,
    examination: Examination | None = None,
    progress: Callable[[str], None] | None = None,
) -> Diagnosis:
    """Examine every stage of a system that draws from text, labels or nothing.

    Args:
        directory: image folder of the data that the system was trained on, or alike.
        progress: told what is checked next.

    Raises: ValueError in one line if the folder cannot be read, or no stage can be examined.
    """
    plan = examination or Examination()
    found: list[Check] = []
    for config, stage in zip(system.config.stages, system.stages, strict=True):
        if _examinable(stage):
            for name, checks in _checks(system, config, stage, Path(directory), plan):
                if progress is not None:
                    progress(name)
                found += checks()
    if not found:
        raise ValueError(
            "no stage of this system draws pictures from text, labels or nothing: the doctor knows no other"
        )
    return Diagnosis(tuple(found))


def _checks(
    system: System, config: StageConfig, stage: Stage, directory: Path, plan: Examination
) -> Iterator[tuple[str, Callable[[], list[Check]]]]:
    """The checks of a stage by name, to be made one after the other."""
    folder = _folder(stage, directory, plan)
    parts = _parts(stage)
    texts = [part for part in parts if isinstance(part, TokenText)]
    labels = [part for part in parts if isinstance(part, LabelCond)]
    specimen = _specimen(
        stage, folder, plan, texts=bool(texts), classes=labels[0].num_classes if labels else 0
    )
    yield "captions", lambda: [check_captions(text.tokenizer, folder.texts) for text in texts]
    yield "classes", lambda: [check_classes(label.num_classes, folder) for label in labels]
    yield "codec", lambda: [check_codec(specimen)]
    yield "scale", lambda: [check_scale(specimen, config.codec)]
    yield "parameterization", lambda: [check_parameterization(specimen, config.parameterization)]
    yield "denoising", lambda: [check_denoising(specimen, [text.encoder for text in texts])]
    if texts and specimen.text is not None:
        yield "text", lambda: [check_text(specimen)]
    if labels and specimen.label is not None:
        yield "labels", lambda: [check_labels(specimen, labels[0].num_classes)]
    if parts:
        yield "guidance", lambda: [check_guidance(specimen)]
    yield "samples", lambda: [check_samples(specimen)]
    yield "learning", lambda: [check_learning(specimen, plan.steps, plan.seconds)]


def _examinable(stage: Stage) -> bool:
    return len(stage.shape) == 3 and all(isinstance(part, TokenText | LabelCond) for part in _parts(stage))


def _parts(stage: Stage) -> tuple[object, ...]:
    if isinstance(stage.conditioner, Merged):
        return stage.conditioner.parts
    return (stage.conditioner,) if isinstance(stage.conditioner, TokenText | LabelCond) else _strange(stage)


def _strange(stage: Stage) -> tuple[object, ...]:
    """Nothing for a stage that is told nothing, else what it is told by."""
    from sfumato.conditioners.base import Unconditional

    return () if isinstance(stage.conditioner, Unconditional) else (stage.conditioner,)


def _folder(stage: Stage, directory: Path, plan: Examination) -> ImageFolder:
    assert stage.pixels is not None
    where = None if plan.split is None else {"split": plan.split}
    return ImageFolder(directory, transform=CenterCrop(stage.pixels), where=where)


def _specimen(stage: Stage, folder: ImageFolder, plan: Examination, *, texts: bool, classes: int) -> Specimen:
    """Pictures spread over the folder; of a class that the stage does not know there are none."""
    known = [
        i
        for i, entry in enumerate(folder.entries)
        if not classes or (entry.label is not None and 0 <= entry.label < classes)
    ]
    told = classes > 0 and len(known) > 0
    rows = known if told else list(range(len(folder)))
    rows = rows[:: max(1, len(rows) // plan.pictures)][: plan.pictures]
    samples = folder.draw([Draw(i, i, 0) for i in rows])
    images = to_float(stack(samples)).to(stage.device)
    clean = torch.cat([stage.codec.encode(part) for part in images.split(plan.batch)])
    label = torch.tensor([sample.label or 0 for sample in samples]) if told else None
    text = tuple(sample.text or "" for sample in samples) if texts else None
    return Specimen(stage, images, clean, text, label, plan.batch)
