"""evaluate: pictures against a reference by chosen metrics, with the protocol that gave the figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfumato import __version__
from sfumato.core.world import ALONE, World
from sfumato.evaluation.features import FEATURES, FeatureNet
from sfumato.evaluation.figures import METRICS, PAIRS, Figure
from sfumato.evaluation.npz import read_statistics
from sfumato.evaluation.pictures import Pictures, open_pictures
from sfumato.evaluation.survey import Keep, Pair, Summary, survey

__all__ = [
    "DEFAULT",
    "Instruments",
    "Reference",
    "Result",
    "differences",
    "evaluate",
    "nets_of",
    "open_reference",
]

DEFAULT = ("fid", "fid_inf", "sfid", "kid", "is", "prdc")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Instruments:
    """Metrics and what they are measured with.

    Attributes:
        metrics: names in METRICS.
        nets: of `nets_of(metrics)`, by name.
        lpips: perceptual distance with its files' digests, if "lpips" is among the metrics.
        batch: pictures in a feature net at a time.
        tell: told (what, done, in all).
    """

    metrics: Sequence[str]
    nets: Mapping[str, FeatureNet]
    lpips: tuple[Pair, Mapping[str, str]] | None = None
    batch: int = 32
    tell: Progress = lambda what, done, total: None

    def keeps(self, *kinds: str) -> dict[str, frozenset[Keep]]:
        """What is to be kept of each feature, for metrics of these kinds."""
        kept: dict[str, frozenset[Keep]] = {}
        for name in self.metrics:
            if METRICS[name].of in kinds:
                for feature, keep in METRICS[name].needs.items():
                    kept[feature] = kept.get(feature, frozenset()) | {keep}
        return kept

    @property
    def pairs(self) -> dict[str, Pair]:
        """Measures of pairs that are asked for."""
        known = PAIRS if self.lpips is None else {**PAIRS, "lpips": self.lpips[0]}
        return {name: known[name] for name in self.metrics if METRICS[name].of == "pairs"}

    @property
    def protocol(self) -> dict[str, Mapping[str, str]]:
        """Of the nets."""
        found: dict[str, Mapping[str, str]] = {name: net.protocol for name, net in self.nets.items()}
        return found if self.lpips is None else {**found, "lpips": self.lpips[1]}


@dataclass(frozen=True)
class Reference:
    """What samples are compared with; pictures is None if there are statistics alone."""

    summary: Summary
    pictures: Pictures | None
    protocol: Mapping[str, object]


@dataclass(frozen=True)
class Result:
    """Figures and the protocol that gave them."""

    figures: tuple[Figure, ...]
    protocol: Mapping[str, object]

    def lines(self) -> list[str]:
        """To print."""
        rows = [f"{name}: {_said(value)}" for name, value in self.protocol.items()]
        return rows + [figure.line() for figure in self.figures]


def nets_of(metrics: Sequence[str]) -> list[str]:
    """Names of the feature nets that metrics need. Raises: ValueError for an unknown metric."""
    names = [FEATURES[f] for name in metrics for f in METRICS[name].needs if f in FEATURES]
    return list(dict.fromkeys(names))


@torch.no_grad()
def open_reference(
    path: Path | None, size: tuple[int, int], tools: Instruments, *, world: World = ALONE
) -> Reference:
    """The reference at a path, surveyed: a folder, shards, or an .npz of pictures, statistics or both.

    Statistics in a file stand for a larger set than its pictures, as in those of the ADM evaluator, so that
    FID and sFID take them. Processes of a `world` share the pictures, and all get the reference.

    Raises: ValueError in one line if a metric needs what the reference does not have, or it was made by
        another protocol.
    """
    needing = [name for name in tools.metrics if METRICS[name].of in ("reference", "pairs")]
    if path is None:
        if needing:
            raise ValueError(f"{needing[0]} needs a reference; give --reference DIR or FILE.npz")
        return Reference(Summary(0), None, {})
    known, made = read_statistics(path) if path.suffix == ".npz" else ({}, None)
    if made is not None:
        _check_protocol(path, made, tools, size)
    pictures = open_pictures(path, size)
    keeps = tools.keeps("reference")
    if pictures is None:
        lacking = next((n for n in needing if not _suffices(n, set(known))), None)
        if lacking is not None:
            raise ValueError(
                f"{path} holds statistics of {', '.join(known) or 'nothing'} alone, and {lacking} needs "
                "more; give the pictures"
            )
        return Reference(Summary(0, gaussians=known), None, {"kind": "statistics", **(made or {})})
    for feature, keep in keeps.items():
        if keep & {"moments", "parts"}:  # its parts are of no use, nor is it measured where it is known
            sums: frozenset[Keep] = frozenset() if feature in known else frozenset({"moments"})
            keeps[feature] = keep - {"moments", "parts"} | sums
    keeps = {feature: keep for feature, keep in keeps.items() if keep}
    found = survey(
        pictures,
        keeps,
        tools.nets,
        batch=tools.batch,
        tell=lambda done, total: tools.tell("reference", done, total),
        world=world,
    )
    summary = Summary(found.n, found.digest, {**found.gaussians, **known}, found.parts, found.rows)
    held = {"statistics": sorted(known)} if known else {}
    protocol = {**pictures.protocol, "n": found.n, "pixels": found.digest[:16], **held}
    return Reference(summary, pictures, protocol)


@torch.no_grad()
def evaluate(
    samples: Pictures,
    reference: Reference,
    tools: Instruments,
    *,
    seen: Callable[[Tensor], None] = lambda _: None,
    world: World = ALONE,
) -> Result:
    """Figures of samples.

    Args:
        seen: given every batch of samples that this process looks at.
        world: processes that share the samples; all get the result.

    Raises: ValueError in one line if there are too few pictures for a metric, or no pairs or captions.
    """
    if tools.pairs and (reference.pictures is None or len(reference.pictures) != len(samples)):
        n = 0 if reference.pictures is None else len(reference.pictures)
        raise ValueError(
            f"{next(iter(tools.pairs))} compares pictures one by one, and there are {len(samples)} for "
            f"{n} of the reference; give as many, or --reconstruct"
        )
    if "clip_score" in tools.metrics and not samples.texts:
        raise ValueError("clip_score needs captions; give a reference or pictures that have them")
    found = survey(
        samples,
        tools.keeps("reference", "samples", "captions"),
        tools.nets,
        pairs=None if reference.pictures is None else (reference.pictures, tools.pairs),
        batch=tools.batch,
        tell=lambda done, total: tools.tell("samples", done, total),
        seen=seen,
        world=world,
    )
    figures = world.lead(
        lambda: [f for name in tools.metrics for f in METRICS[name].figures(found, reference.summary)]
    )
    protocol = {
        "samples": {
            **samples.protocol,
            "n": len(samples),
            "size": list(samples.size),
            "pixels": found.digest[:16],
        },
        "reference": reference.protocol,
        "nets": tools.protocol,
        "sfumato": __version__,
    }
    return Result(tuple(figures), protocol)


def differences(a: Mapping[str, object], b: Mapping[str, object], within: str = "") -> list[str]:
    """What makes two protocols incomparable, "name: this, that" each.

    What is measured itself is left out, and how a file of weights is called: its digest is there.
    """
    found: list[str] = []
    for name in sorted({*a, *b}):
        x, y, full = a.get(name), b.get(name), f"{within}{name}"
        if full in ("samples.system", "samples.fingerprint", "samples.pixels") or name == "file":
            continue
        if isinstance(x, Mapping) and isinstance(y, Mapping):
            found += differences(x, y, f"{full}.")
        elif x != y:
            found.append(f"{full}: {x}, {y}")
    return found


def _suffices(metric: str, known: set[str]) -> bool:
    """Whether a metric needs Gaussians of these features alone of its reference."""
    chosen = METRICS[metric]
    return chosen.of == "reference" and all(
        feature in known and keep in ("moments", "parts") for feature, keep in chosen.needs.items()
    )


def _check_protocol(
    path: Path, made: Mapping[str, object], tools: Instruments, size: tuple[int, int]
) -> None:
    """Raise ValueError if statistics are of another feature net, another preparation or another size."""
    now = {"size": list(size), "inception": tools.protocol.get("inception", {})}
    then = {name: made.get(name) for name in now}
    if unlike := differences(then, now):
        raise ValueError(
            f"{path} was made by another protocol ({'; '.join(unlike)}); make it anew by this one"
        )


def _said(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(v)}" for name, v in value.items())
    return "x".join(map(str, value[::-1])) if isinstance(value, list) and len(value) == 2 else str(value)
