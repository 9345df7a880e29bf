"""The report on pixel systems: thresholds, noise on what is enlarged, and guides, each over its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.core.config import to_json
from sfumato.core.device import device_of
from sfumato.core.image import to_float
from sfumato.core.types import Inputs, Level
from sfumato.diffusion.constraints import Dynamic, Static
from sfumato.diffusion.guidance import CFG, Guided
from sfumato.evaluation.measures import Proportion, psnr
from sfumato.evaluation.metrics.manifold import manifold
from sfumato.nets.perceptual import PerceptualNet
from sfumato.reports.sweeps import Cell, Figure, Measured, Report, Sweep
from sfumato.reports.truth import Asked, Truth, columns, drawn, nets_at, size_of, strip, system_at
from sfumato.systems.cascade import joined
from sfumato.systems.guiding import guided_by
from sfumato.systems.system import System
from sfumato.training.jobs.job import trained
from sfumato.training.jobs.sources import pooled

__all__ = ["NAME", "Plan", "report_on"]

NAME = "cascades"
Part = Literal["thresholds", "aug", "classifier", "clip"]
RUNS = Path("runs")
PIXELS = "`top-1` is the share nearest in pixels to the true picture among all."


@dataclass(frozen=True, kw_only=True)
class Plan(Asked):
    """What is measured, and of which runs; only those of the parts that are asked for must be there."""

    parts: tuple[Part, ...] = get_args(Part)
    """thresholds: static and dynamic over guidance. aug: noise on what is enlarged. classifier: its scale.
    clip: classifier-free guidance and that by a noised CLIP."""
    guidance: tuple[float, ...] = (1.0, 2.0, 4.0, 7.0, 10.0, 15.0)
    """Of thresholds."""
    levels: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
    """Of aug, 0 to 1."""
    classifier_scales: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
    cfg_scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 5.0)
    """1 = off."""
    clip_scales: tuple[float, ...] = (0.0, 1.0, 2.0, 3.0, 5.0)
    """0 = off."""
    base: Path = RUNS / "openmoji-imagen-base"
    upsampler: Path = RUNS / "openmoji-imagen-upsampler"
    adm: Path = RUNS / "openmoji-adm"
    classifier: Path = RUNS / "openmoji-classifier"
    perceptual: Path | None = None
    """Run of openmoji-perceptual, whose features tell how near pictures are; else their pixels do."""
    glide: Path = RUNS / "openmoji-glide-fill"
    """Trained with empty captions, or it has no guidance without a guide."""
    noised_clip: Path = RUNS / "openmoji-noised-clip"


def report_on(plan: Plan) -> Report:
    """The parts of the plan, their systems read.

    Raises: ValueError in one line if a run is missing, with the command that trains it, or does not fit.
    """
    sweeps = tuple(PARTS[part](plan) for part in dict.fromkeys(plan.parts))
    title = "Cascades and guides on OpenMoji"
    return Report(name=NAME, title=title, plan=to_json(plan), sweeps=sweeps, notice=plan.notice)


def _thresholds(plan: Plan) -> Sweep:
    base = system_at(plan.base, "openmoji-imagen-base", plan.device)
    truth, stage = Truth.of(plan, size_of(base)), base.stages[-1]

    def measure(guidance: float, threshold: Static | Dynamic) -> Measured:
        options = {stage.name: replace(stage.defaults, guidance=CFG(guidance), threshold=threshold)}
        pictures = drawn(base, plan, truth.texts, options=options)
        figures: dict[str, Figure] = {"saturated": _saturated(pictures), "top-1": truth.top1(pictures)}
        return Measured(figures, strip(pictures))

    def true() -> Measured:
        pictures = truth.pixels[truth.rows]
        return Measured({"saturated": _saturated(pictures)}, strip(pictures))

    cells = [Cell(name="true pictures", told=truth.told(), measure=true)]
    for name, threshold in (("static", Static()), ("dynamic", Dynamic())):
        for guidance in plan.guidance:
            told = truth.told(base.fingerprint, threshold=to_json(threshold))
            found = partial(measure, guidance, threshold)
            cells.append(Cell(name=name, x=guidance, told=told, measure=found))
    note = (
        f"{truth.scope}, drawn by the base. `saturated` is the share of values that are 0 or 255. {PIXELS} "
        f"{columns(truth.texts)}"
    )
    return Sweep(name="thresholds", title="Thresholds", x="guidance", note=note, cells=tuple(cells))


def _aug(plan: Plan) -> Sweep:
    base = system_at(plan.base, "openmoji-imagen-base", plan.device)
    upsampler = system_at(plan.upsampler, "openmoji-imagen-upsampler", plan.device)
    whole = joined([base, upsampler])
    truth = Truth.of(plan, size_of(whole))

    def small() -> Tensor:  # as the upsampler saw them in training
        return F.interpolate(truth.real, size=size_of(base), mode="bilinear", antialias=True)

    def measure(level: float) -> Measured:
        enlarged = drawn(upsampler, plan, truth.texts, low_res=small(), aug=level)
        pictures = drawn(whole, plan, truth.texts, aug=level)
        figures: dict[str, Figure] = {
            "PSNR": _mean_psnr(to_float(enlarged), truth.real),
            "top-1": truth.top1(pictures),
        }
        return Measured(figures, strip(torch.stack([enlarged, pictures], 1).flatten(0, 1)))

    def plain() -> Measured:
        enlarged = F.interpolate(small(), size=size_of(whole), mode="bilinear")
        return Measured({"PSNR": _mean_psnr(enlarged, truth.real)})

    told = truth.told(base.fingerprint, upsampler.fingerprint)
    pairs = [f"{text} ({what})" for text in truth.texts for what in ("enlarged", "drawn")]
    cells = [Cell(name="upsampler", x=x, told=told, measure=partial(measure, x)) for x in plan.levels]
    note = (
        f"{truth.scope}. `PSNR`, in dB, is of true pictures made small and enlarged again. {PIXELS[:-1]}, "
        f"of those that the cascade draws. {columns(pairs)}"
    )
    cells.append(Cell(name="bilinear", told=told, measure=plain))
    title = "Noise on what is enlarged"
    return Sweep(name="aug", title=title, x="level", note=note, cells=tuple(cells))


def _classifier(plan: Plan) -> Sweep:
    adm = system_at(plan.adm, "openmoji-adm", plan.device)
    judge = nets_at(plan.classifier, "openmoji-classifier", plan.device)
    guided = guided_by(adm, judge.parts.nets)
    space, features = _features(plan)
    truth = Truth.of(replace(plan, split="held_out"), size_of(adm), label="group")
    classes = torch.tensor(truth.folder.labels)
    asked = classes[truth.rows]

    def measure(scale: float) -> Measured:
        pictures = drawn(guided, plan, label=asked.tolist(), guidance=scale)
        real, fake = features(truth.pixels), features(pictures)
        found = manifold(real[truth.rows], fake)
        right = classes[torch.cdist(fake, real).argmin(1)] == asked
        figures: dict[str, Figure] = {
            "precision": found.precision,
            "recall": found.recall,
            "asked class": Proportion.of(int(right.sum()), len(right)),
        }
        return Measured(figures, strip(pictures))

    told = truth.told(adm.fingerprint, judge.fingerprint, space=space)
    cells = [
        Cell(name="classifier", x=x, told=told, measure=partial(measure, x)) for x in plan.classifier_scales
    ]
    note = (
        f"A picture for each of {len(truth.rows)} held-out pictures, of its class. `precision` and "
        "`recall` are by 3 neighbors between the two sets, and mean something from about 1,000. `asked "
        f"class` is the share whose nearest true picture has it. Features: {_named(space)}. "
        f"{columns([truth.folder.classes[i] for i in asked.tolist()])}"
    )
    title = "The scale of the classifier"
    return Sweep(name="classifier", title=title, x="scale", note=note, cells=tuple(cells))


def _clip(plan: Plan) -> Sweep:
    glide = system_at(plan.glide, "openmoji-glide-fill", plan.device)
    judge = nets_at(plan.noised_clip, "openmoji-noised-clip", plan.device)
    guided = guided_by(glide, judge.parts.nets, judge.parts.tokenizers.get("clip"))
    truth = Truth.of(plan, size_of(glide))

    def measure(guidance: CFG | Guided) -> Measured:
        pictures = drawn(guided, plan, truth.texts, guidance=guidance)
        figures: dict[str, Figure] = {
            "top-1": truth.top1(pictures),
            "CLIP score": _score(guided, pictures, truth.texts),
        }
        return Measured(figures, strip(pictures))

    told = truth.told(glide.fingerprint, judge.fingerprint)
    ways: list[tuple[str, float, CFG | Guided]] = [
        *(("classifier-free", x, CFG(x)) for x in plan.cfg_scales),
        *(("CLIP", x, Guided(x)) for x in plan.clip_scales),
    ]
    cells = [Cell(name=name, x=x, told=told, measure=partial(measure, way)) for name, x, way in ways]
    note = (
        f"{truth.scope}. {PIXELS} `CLIP score` is 100 times the mean cosine that the noised CLIP sees at t "
        "= 0. CLIP guidance optimizes it, so it is no judge between the two. Off is 1 of classifier-free "
        f"and 0 of CLIP guidance. {columns(truth.texts)}"
    )
    title = "Classifier-free guidance against CLIP"
    return Sweep(name="clip", title=title, x="scale", note=note, cells=tuple(cells))


PARTS: Mapping[Part, Callable[[Plan], Sweep]] = {
    "thresholds": _thresholds,
    "aug": _aug,
    "classifier": _classifier,
    "clip": _clip,
}


def _saturated(pixels: Tensor) -> float:
    return float(((pixels == 0) | (pixels == 255)).double().mean())


def _mean_psnr(made: Tensor, real: Tensor) -> float:
    return float(psnr(made, real).mean())


@torch.no_grad()
def _score(guided: System, pictures: Tensor, texts: list[str]) -> float:
    """What the guide says of clean pictures, the mean over them."""
    stage, zero = guided.stages[0], torch.zeros(())
    assert stage.guide is not None
    judged = stage.guide(Inputs(n=len(texts), text=texts), stage.shape)
    return float(judged(to_float(pictures).to(stage.device), Level(zero, zero + 1, zero)).double().mean())


def _features(plan: Plan) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Which features, in one word that decides them, and pictures uint8 -> (n, D)."""
    if plan.perceptual is None:
        return "pixels", lambda pixels: to_float(pixels).flatten(1)
    recipe, device = "openmoji-perceptual", device_of(plan.device)
    net = trained(plan.perceptual, PerceptualNet, recipe, device)
    name = nets_at(plan.perceptual, recipe, plan.device).fingerprint
    return name, lambda pixels: torch.cat([pooled(net, to_float(part)) for part in pixels.split(64)])


def _named(space: str) -> str:
    return "the pixels" if space == "pixels" else f"spatial means of the perceptual net {space}"
