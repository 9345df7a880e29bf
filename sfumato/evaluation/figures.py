"""The metrics by name: what each needs of the pictures, and the figures that it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from sfumato.core.registry import Registry
from sfumato.evaluation.measures import psnr
from sfumato.evaluation.metrics.frechet import extrapolated, frechet_distance
from sfumato.evaluation.metrics.kernel import kernel_distance
from sfumato.evaluation.metrics.manifold import copies, manifold
from sfumato.evaluation.metrics.pairs import clip_score, ssim
from sfumato.evaluation.survey import Keep, Pair, Summary

__all__ = ["METRICS", "PAIRS", "Figure", "Metric", "mean_figure"]

SURE = 1.959963984540054  # standard errors on each side of a mean's interval of 95 %
CAP = 99.0  # dB that equal pictures count as in a mean


@dataclass(frozen=True)
class Figure:
    """A number, and how sure it is.

    Attributes:
        std: over subsets or splits, as published for the metric; None if it has none.
        low, high: interval of 95 %; None if there is none.
        note: what must be known to read it.
    """

    name: str
    value: float
    std: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""

    def line(self) -> str:
        """To print."""
        spread = "" if self.std is None else f" +- {self.std:.4g}"
        if self.low is not None and self.high is not None:
            spread = f"  (95 % interval {self.low:.4g} to {self.high:.4g})"
        note = f"  [{self.note}]" if self.note else ""
        return f"{self.name:<20} {self.value:>10.4f}{spread}{note}"


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        needs: what of which feature, of the samples.
        of: "reference" if it needs the same of the reference, "pairs" if pictures and references belong
            together one by one, "captions", or "samples" alone.
        figures: of samples and reference.
    """

    needs: Mapping[str, Keep]
    of: str
    figures: Callable[[Summary, Summary], list[Figure]]


METRICS: Registry[Metric] = Registry("metric")


def _frechet(name: str, feature: str) -> Metric:
    def figures(samples: Summary, reference: Summary) -> list[Figure]:
        a, b = samples.gaussians[feature], reference.gaussians[feature]
        return [Figure(name, frechet_distance(a, b), note=_singular(samples, reference, feature))]

    return Metric({feature: "moments"}, "reference", figures)


def _kernel(name: str, feature: str) -> Metric:
    def figures(samples: Summary, reference: Summary) -> list[Figure]:
        found = kernel_distance(samples.rows[feature], reference.rows[feature])
        return [Figure(name, found.mean, std=found.std, note=f"{found.subsets} subsets of {found.size}")]

    return Metric({feature: "rows"}, "reference", figures)


def _neighbors(suffix: str, feature: str) -> Metric:
    def figures(samples: Summary, reference: Summary) -> list[Figure]:
        found = manifold(reference.rows[feature], samples.rows[feature])
        names = ("precision", "recall", "density", "coverage")
        return [Figure(f"{name}{suffix}", getattr(found, name)) for name in names]

    return Metric({feature: "rows"}, "reference", figures)


def _extrapolated(samples: Summary, reference: Summary) -> list[Figure]:
    found = extrapolated(samples.parts["pool"], reference.gaussians["pool"])
    note = f"slope {found.slope:.3g} / N"
    return [Figure("fid_inf", found.value, low=found.low, high=found.high, note=note)]


def _inception_score(samples: Summary, _: Summary) -> list[Figure]:
    assert samples.score is not None
    found = samples.score
    return [Figure("is", found.mean, std=found.std, note=f"{found.splits} splits")]


def _copies(samples: Summary, reference: Summary) -> list[Figure]:
    found = copies(reference.rows["dinov2"], samples.rows["dinov2"])
    nearest = int(found.calibrated.argmin())
    note = f"likest: sample {nearest} and picture {int(found.nearest[nearest])}"
    return [Figure("copies", found.share, note=note)]


def mean_figure(name: str, values: Tensor, note: str = "") -> Figure:
    """Mean of values (n,) with its interval; None if there is one value only."""
    value, n = float(values.double().mean()), len(values)
    half = SURE * float(values.double().std()) / n**0.5 if n > 1 else None
    low, high = (None, None) if half is None else (value - half, value + half)
    return Figure(name, value, low=low, high=high, note=note)


def _captions(samples: Summary, _: Summary) -> list[Figure]:
    score = clip_score(samples.rows["clip"], samples.rows["caption"])
    return [mean_figure("clip_score", score, "100 max(cos, 0)")]


def _paired(name: str) -> Metric:
    return Metric({}, "pairs", lambda samples, _: [mean_figure(name, samples.rows[name])])


def _singular(samples: Summary, reference: Summary, feature: str) -> str:
    """A warning where a covariance has not the rank that it needs."""
    dim = len(samples.gaussians[feature].mean)
    n = min(g.n for g in (s.gaussians[feature] for s in (samples, reference)) if g.n)
    if n > dim:
        return ""
    return f"{n} pictures for {dim} dimensions: far too high; compare at equal N only, or use kid"


PAIRS: dict[str, Pair] = {
    "psnr": lambda image, original: psnr(image, original).clamp_max(CAP),
    "ssim": ssim,
}
"""Measures of pairs that need no network."""
METRICS("fid")(_frechet("fid", "pool"))
METRICS("fid_inf")(Metric({"pool": "parts"}, "reference", _extrapolated))
METRICS("sfid")(_frechet("sfid", "spatial"))
METRICS("kid")(_kernel("kid", "pool"))
METRICS("is")(Metric({"logits": "score"}, "samples", _inception_score))
METRICS("prdc")(_neighbors("", "pool"))
METRICS("fd_dinov2")(_frechet("fd_dinov2", "dinov2"))
METRICS("kd_dinov2")(_kernel("kd_dinov2", "dinov2"))
METRICS("prdc_dinov2")(_neighbors("_dinov2", "dinov2"))
METRICS("copies")(Metric({"dinov2": "rows"}, "reference", _copies))
METRICS("clip_score")(Metric({"clip": "rows", "caption": "rows"}, "captions", _captions))
METRICS("psnr")(_paired("psnr"))
METRICS("ssim")(_paired("ssim"))
METRICS("lpips")(_paired("lpips"))
