"""What the cells of the report on DiT show: means over seeds, their spread, and the images to a loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sfumato.evaluation.measures import Proportion
from sfumato.reports.plan import BASELINE, Part, Plan
from sfumato.reports.running import Costs, Outcome

__all__ = ["Findings", "Row", "Series", "correlation", "findings", "images_to", "series_of"]


@dataclass(frozen=True, kw_only=True)
class Series:
    """A curve over images, the mean of the seeds."""

    part: Part
    name: str
    images: tuple[int, ...]
    losses: tuple[float, ...]
    velocities: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one name of a part reached.

    Attributes:
        seeds: cells behind the numbers.
        images: seen by each.
        parameters, gflop: see `cost.Cost`.
        loss: at the end, the mean of the seeds: the run's own objective, or of improvements the error that
            compares objectives.
        low, high: the lowest and the highest of the seeds.
        joint, nearest: by split, over the pictures of all seeds; see `running.Outcome`.
        needed: improvements only: images to the baseline's final loss, mean of the seeds that reached it.
        reached: how many did.
    """

    name: str
    seeds: int
    images: int
    parameters: int
    gflop: float
    loss: float
    low: float
    high: float
    joint: dict[str, Proportion]
    nearest: dict[str, Proportion]
    needed: float | None = None
    reached: int | None = None


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All parts that were run.

    Attributes:
        designs: in the order of their losses.
        scaling: in the order of their operations.
        by_gflop, by_parameters: correlation of the loss with the logarithm of either over `scaling`; None for
            fewer than three pairs.
        improvements: in the order of the images needed; those that never reached the target at the end.
        target: the baseline's final loss, the mean of its seeds.
    """

    designs: tuple[Row, ...] = ()
    scaling: tuple[Row, ...] = ()
    by_gflop: float | None = None
    by_parameters: float | None = None
    improvements: tuple[Row, ...] = ()
    target: float | None = None


def findings(plan: Plan, outcomes: Sequence[Outcome], costs: Costs) -> Findings:
    """The rows of each part of the plan, in the order that answers its question."""
    found: dict[Part, list[Row]] = {part: list(_rows(part, outcomes, costs)) for part in plan.parts}
    scaling = sorted(found.get("scaling", []), key=lambda row: row.gflop)
    improvements = found.get("improvements", [])
    losses = [row.loss for row in scaling]
    return Findings(
        designs=tuple(sorted(found.get("designs", []), key=lambda row: row.loss)),
        scaling=tuple(scaling),
        by_gflop=correlation([math.log(row.gflop) for row in scaling], losses),
        by_parameters=correlation([math.log(row.parameters) for row in scaling], losses),
        improvements=tuple(sorted(improvements, key=_rank)),
        target=_target(outcomes) if improvements else None,
    )


def series_of(outcomes: Sequence[Outcome]) -> Iterator[Series]:
    """A curve for every name of every part."""
    for (part, name), group in _groups(outcomes).items():
        yield Series(
            part=part,
            name=name,
            images=group[0].images,
            losses=tuple(map(statistics.fmean, zip(*(one.losses for one in group), strict=True))),
            velocities=tuple(map(statistics.fmean, zip(*(one.velocities for one in group), strict=True))),
        )


def images_to(target: float, images: Sequence[int], losses: Sequence[float]) -> float | None:
    """Images at which a curve is first at `target` or below, on lines between its points; None = never."""
    if losses[0] <= target:
        return float(images[0])
    for (x0, y0), (x1, y1) in pairwise(zip(images, losses, strict=True)):
        if y1 <= target:
            return x0 + (x1 - x0) * (y0 - target) / (y0 - y1)
    return None


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's; None for fewer than three points, or where nothing varies."""
    if len(x) < 3 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    return statistics.correlation(x, y)


def _rows(part: Part, outcomes: Sequence[Outcome], costs: Costs) -> Iterator[Row]:
    target = _target(outcomes) if part == "improvements" else None
    for (of, name), group in _groups(outcomes).items():
        if of != part:
            continue
        cost, last = (
            costs[part, name],
            [(one.losses if target is None else one.velocities)[-1] for one in group],
        )
        needed = [] if target is None else [images_to(target, one.images, one.velocities) for one in group]
        reached = [images for images in needed if images is not None]
        yield Row(
            name=name,
            seeds=len(group),
            images=group[0].images[-1],
            parameters=cost.parameters,
            gflop=cost.gflop,
            loss=statistics.fmean(last),
            low=min(last),
            high=max(last),
            joint=_pooled([one.joint for one in group]),
            nearest=_pooled([one.nearest for one in group]),
            needed=statistics.fmean(reached) if reached else None,
            reached=None if target is None else len(reached),
        )


def _rank(row: Row) -> tuple[int, float, float]:
    """Those that all seeds reached first, then by images, then by loss."""
    return -(row.reached or 0), math.inf if row.needed is None else row.needed, row.loss


def _target(outcomes: Sequence[Outcome]) -> float:
    group = _groups(outcomes)["improvements", BASELINE]
    return statistics.fmean(one.velocities[-1] for one in group)


def _pooled(seeds: Sequence[Mapping[str, Proportion]]) -> dict[str, Proportion]:
    return {
        split: Proportion.of(sum(one[split].hits for one in seeds), sum(one[split].total for one in seeds))
        for split in seeds[0]
    }


def _groups(outcomes: Sequence[Outcome]) -> dict[tuple[Part, str], list[Outcome]]:
    groups: dict[tuple[Part, str], list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault((one.part, one.name), []).append(one)
    return groups
