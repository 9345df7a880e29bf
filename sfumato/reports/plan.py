"""The cells of the report on DiT: which recipe answers which part of the question."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from sfumato.core.registry import unknown
from sfumato.diffusion.objective import Objective
from sfumato.diffusion.schedules import Discrete, Flow
from sfumato.diffusion.times import LogitNormal
from sfumato.diffusion.weights import EDMWeight
from sfumato.evaluation.scenes.benchmark import Protocol
from sfumato.families import RECIPES
from sfumato.nets.dit import DiTConfig
from sfumato.nets.dit_block import MODULATIONS, Design
from sfumato.training.held_out import ValidationConfig
from sfumato.training.recipe import Recipe
from sfumato.training.tasks.denoising import DenoisingConfig

__all__ = ["BASELINE", "IMPROVEMENTS", "PARTS", "SIZES", "Cell", "Part", "Plan", "cells"]

Part = Literal["designs", "scaling", "improvements"]
PARTS: tuple[Part, ...] = get_args(Part)
BASELINE = "baseline"
SIZES: Mapping[str, tuple[int, int, int]] = {
    "XS": (64, 3, 4),
    "S": (96, 4, 4),
    "M": (144, 5, 4),
    "L": (192, 6, 4),
}
"""Width, depth and heads."""
REGISTERS = 4
Change = Callable[[DenoisingConfig], DenoisingConfig]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the report runs; a cell is one recipe with one seed."""

    parts: tuple[Part, ...] = PARTS
    """designs: at equal compute. scaling: sizes and patches. improvements: images to the baseline's loss."""
    designs: tuple[Design, ...] = tuple(MODULATIONS)
    """The first one sees `images`, the others as many as cost the same."""
    sizes: tuple[str, ...] = ("S", "M", "L")
    """XS S M L."""
    patches: tuple[int, ...] = (2, 4, 8)
    """With every size."""
    improvements: tuple[str, ...] = ()
    """Names of what is compared with the baseline; empty = all."""
    images: int = 40_000
    """Seen by each cell, but for the designs."""
    seeds: int = 2
    """Cells of everything, seeds 0, 1 ..."""
    validations: int = 20
    """Points of a curve."""
    validation: ValidationConfig = field(
        default_factory=lambda: ValidationConfig(share=0.01, pictures=128, draws=2)
    )
    """Which scenes are held out."""
    protocol: Protocol = field(
        default_factory=lambda: Protocol(pictures=100, splits=("seen", "combinations"))
    )
    """How designs are scored."""
    recipe: str = "scenes-dit"
    """What every cell derives from; its autoencoder must have been trained."""
    runs: Path = Path("runs/report-dit-designs")
    """Folder of the cells' runs."""
    device: str = "auto"
    """cpu, cuda ...; auto takes an accelerator if there is one."""

    def __post_init__(self) -> None:
        for name in ("images", "seeds", "validations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: a whole number from 1")
        for name in ("parts", "designs", "sizes", "patches"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)}: name at least one, each once")
        if self.validation.share is None:
            raise ValueError("validation.share is None; the report measures held-out scenes: 0.01 is usual")
        for kind, given, known in (
            ("size", self.sizes, SIZES),
            ("improvement", self.improvements, IMPROVEMENTS),
        ):
            for name in given:
                if name not in known:
                    raise ValueError(unknown(kind, name, list(known)))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the report; `name` is what is compared, the same for every seed."""

    part: Part
    name: str
    recipe: Recipe

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.recipe.trainer.seed


def cells(plan: Plan) -> list[Cell]:
    """Every cell at `plan.images`, seed by seed, so that a report that was stopped has some of everything.

    Raises: ValueError in one line if the plan's recipe trains no DiT.
    """
    found = []
    for seed in range(plan.seeds):
        for part in plan.parts:
            for name, recipe in _VARIANTS[part](plan):
                found.append(Cell(part=part, name=name, recipe=_run(plan, part, name, seed, recipe)))
    return found


def _designs(plan: Plan) -> Iterator[tuple[str, Recipe]]:
    """The recipe with each block; without the shared modulation, which two of them cannot have."""
    recipe, task, net = _base(plan)
    for block in plan.designs:
        yield (
            block,
            replace(recipe, task=replace(task, net=replace(net, block=block, shared_modulation=False))),
        )


def _scaling(plan: Plan) -> Iterator[tuple[str, Recipe]]:
    recipe, task, net = _base(plan)
    for size in plan.sizes:
        width, depth, heads = SIZES[size]
        for patch in plan.patches:
            shaped = replace(net, width=width, depth=depth, heads=heads, patch=patch)
            yield f"{size}/{patch}", replace(recipe, task=replace(task, net=shaped))


def _improvements(plan: Plan) -> Iterator[tuple[str, Recipe]]:
    """The paper's DiT, and that with one change each.

    The learning rate is constant after the warm-up: with a decay, no point of a curve but the last would tell
    what a run of that length reaches.
    """
    recipe, task, net = _base(plan)
    plain = DiTConfig(**{name: getattr(net, name) for name in _SHAPE})
    task = replace(task, net=plain, schedule=Discrete(), prediction="eps", objective=Objective())
    recipe = replace(recipe, optim=replace(recipe.optim, lr_schedule="constant"))
    yield BASELINE, replace(recipe, task=task)
    for name in plan.improvements or IMPROVEMENTS:
        yield name, replace(recipe, task=IMPROVEMENTS[name](task))


_VARIANTS: Mapping[Part, Callable[[Plan], Iterator[tuple[str, Recipe]]]] = {
    "designs": _designs,
    "scaling": _scaling,
    "improvements": _improvements,
}
_SHAPE = (
    *("in_channels", "out_channels", "patch", "width", "depth", "heads", "mlp_ratio"),
    *("text_dim", "pooled_dim"),
)


def _base(plan: Plan) -> tuple[Recipe, DenoisingConfig, DiTConfig]:
    recipe = RECIPES[plan.recipe]()
    task, net = recipe.task, getattr(recipe.task, "net", None)
    if not isinstance(task, DenoisingConfig) or not isinstance(net, DiTConfig):
        raise ValueError(f"recipe {plan.recipe!r} trains no DiT; the report needs one, such as scenes-dit")
    if task.autoencoder is not None:  # encoded once for all cells
        task = replace(task, latents=plan.runs / "latents")
    return recipe, task, net


def _run(plan: Plan, part: Part, name: str, seed: int, recipe: Recipe) -> Recipe:
    """The recipe as a run of the report, in its own folder."""
    batch = recipe.trainer.batch
    images = max(1, plan.images // batch) * batch
    trainer = replace(
        recipe.trainer,
        images=images,
        seed=seed,
        log_every=max(batch, images // (5 * plan.validations)),
        preview_every=0,
        validate_every=max(batch, images // plan.validations),
        save_every=max(batch, images // 4),
        keep=1,
        quiet=True,
        device=plan.device,
    )
    optim = replace(recipe.optim, warmup=min(recipe.optim.warmup, images // 10))
    out = plan.runs / part / f"{name.replace('/', '-')}-{seed}"
    validation = replace(plan.validation, velocity=True)
    return replace(recipe, trainer=trainer, optim=optim, validation=validation, out=out)


def _net(task: DenoisingConfig, **changes: bool | int) -> DenoisingConfig:
    assert isinstance(task.net, DiTConfig)
    return replace(task, net=replace(task.net, **changes))  # type: ignore[arg-type]


def _flow(task: DenoisingConfig) -> DenoisingConfig:
    return replace(task, schedule=Flow(multiplier=1000.0), prediction="flow")


def _clean(task: DenoisingConfig) -> DenoisingConfig:
    weighted = replace(task.objective, weight=EDMWeight(sigma_data=1.0))
    return replace(task, prediction="x0", objective=weighted)


def _logit_normal(task: DenoisingConfig) -> DenoisingConfig:
    return replace(task, objective=replace(task.objective, times=LogitNormal()))


def _learned_sigma(task: DenoisingConfig) -> DenoisingConfig:
    assert isinstance(task.net, DiTConfig)
    wider = _net(task, out_channels=2 * task.net.in_channels)
    return replace(wider, learned_var=True, objective=replace(task.objective, vlb=0.001))


def _combined(task: DenoisingConfig) -> DenoisingConfig:
    """All of the others; but the variance, which is learned on the discrete schedule alone."""
    for name, change in IMPROVEMENTS.items():
        if name not in ("learned_sigma", "combined"):
            task = change(task)
    return task


IMPROVEMENTS: Mapping[str, Change] = {
    "qk_norm": partial(_net, qk_norm=True),
    "rope": partial(_net, rope=True),
    "swiglu": partial(_net, swiglu=True),
    "shared_modulation": partial(_net, shared_modulation=True),
    "registers": partial(_net, registers=REGISTERS),
    "flow": _flow,
    "clean": _clean,
    "logit_normal": _logit_normal,
    "learned_sigma": _learned_sigma,
    "combined": _combined,
}
"""Each is one change of the baseline: DiT as published, told texts, eps on 1000 linear steps."""
