"""One pass over pictures, shared by the processes, which gathers what the chosen metrics need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from sfumato.core.world import ALONE, World
from sfumato.evaluation.features import FEATURES, CLIPFeatures, FeatureNet
from sfumato.evaluation.metrics.frechet import GROUPS, Gaussian, Moments
from sfumato.evaluation.metrics.inception_score import InceptionScore, Score
from sfumato.evaluation.pictures import Pictures, pixel_digest

__all__ = ["Keep", "Pair", "Summary", "Survey", "survey", "total_digest"]

Keep = Literal["moments", "parts", "rows", "score"]
"""Of a feature: its mean and covariance, those of GROUPS parts, every row, or the Inception score."""
Pair = Callable[[Tensor, Tensor], Tensor]
"""Pictures and their references, (B, 3, H, W) in [-1, 1] -> (B,)."""
BLOCK = 32  # consecutive pictures of one part at most: a part's sums are touched once per batch


@dataclass(frozen=True)
class Summary:
    """Of a set of pictures, by feature.

    Attributes:
        n: pictures; 0 if that is not known.
        digest: of all pixels, whatever the order of the pictures; "" if it is not known.
    """

    n: int
    digest: str = ""
    gaussians: Mapping[str, Gaussian] = field(default_factory=dict)
    parts: Mapping[str, Sequence[Moments]] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    score: Score | None = None


class Survey:
    """What is gathered in this process.

    Args:
        n: pictures in all.
        keeps: what of each feature.
    """

    def __init__(self, n: int, keeps: Mapping[str, frozenset[Keep]]) -> None:
        self.n, self.keeps = n, keeps
        self._moments: dict[str, list[Moments]] = {}
        self._rows: dict[str, list[Tensor]] = {}
        self._positions: dict[str, list[Tensor]] = {}
        self._score: InceptionScore | None = None

    def add(self, feature: str, values: Tensor, position: Tensor) -> None:
        """Values (B, D) of the pictures at `position` (B,). Raises: ValueError if one is not finite."""
        keep = self.keeps[feature]
        if values.is_floating_point() and not values.isfinite().all():
            raise ValueError(f"{feature}: not finite (NaN or inf): broken pictures or a broken feature net")
        if keep & {"moments", "parts"}:
            groups = GROUPS if "parts" in keep else 1
            sums = self._moments.setdefault(feature, [Moments(values.shape[1]) for _ in range(groups)])
            block = min(max(self.n // (10 * groups), 1), BLOCK)
            part = position // block % groups
            for group in part.unique().tolist():
                sums[group].update(values[part == group])
        if "rows" in keep:
            self._rows.setdefault(feature, []).append(values)
            self._positions.setdefault(feature, []).append(position)
        if "score" in keep:
            self._score = self._score or InceptionScore(self.n, values.shape[1])
            self._score.update(values, position)

    def summary(self, world: World = ALONE) -> Summary:
        """Over all processes, which must all call."""
        sums = {name: [part.over(world) for part in parts] for name, parts in self._moments.items()}
        rows = {
            name: world.rows(torch.cat(parts), torch.cat(self._positions[name]))
            for name, parts in self._rows.items()
        }
        digest = rows.pop("digest", None)
        return Summary(
            n=self.n,
            digest="" if digest is None else total_digest(digest),
            gaussians={name: _added(parts).gaussian() for name, parts in sums.items()},
            parts={name: parts for name, parts in sums.items() if "parts" in self.keeps[name]},
            rows=rows,
            score=None if self._score is None else self._score.score(world),
        )


def survey(
    pictures: Pictures,
    keeps: Mapping[str, frozenset[Keep]],
    nets: Mapping[str, FeatureNet],
    *,
    pairs: tuple[Pictures, Mapping[str, Pair]] | None = None,
    batch: int = 32,
    tell: Callable[[int, int], None] = lambda done, total: None,
    seen: Callable[[Tensor], None] = lambda pixels: None,
    world: World = ALONE,
) -> Summary:
    """Go over the pictures once; of n processes each takes every n-th batch.

    Args:
        keeps: what of each feature.
        nets: by name, of all those features.
        pairs: originals, and measures of a picture and the original at the same place.
        batch: pictures at a time.
        tell: told how many are done, and of how many.
        seen: given every batch of this process.
        world: processes that share the batches; all get the summary.

    Raises: ValueError in one line if there are fewer batches than processes.
    """
    originals, measures = pairs or (None, {})
    keeps = {**keeps, "digest": frozenset({"rows"}), **dict.fromkeys(measures, frozenset({"rows"}))}
    starts = range(0, len(pictures), batch)
    if len(starts) < world.size:
        raise world.fail(
            f"{len(pictures)} pictures in batches of {batch} do not occupy {world.size} processes; give a "
            "smaller --batch, or start fewer processes"
        )
    found = Survey(len(pictures), keeps)
    used = {name: net for name, net in nets.items() if any(FEATURES.get(f) == name for f in keeps)}

    def go() -> None:
        for turn in world.share(len(starts)):
            rows = range(starts[turn], min(starts[turn] + batch, len(pictures)))
            pixels, position = pictures(rows), torch.arange(rows.start, rows.stop)
            seen(pixels)
            found.add("digest", pixel_digest(pixels), position)
            for net in used.values():
                for feature, values in net(pixels).items():
                    if feature in keeps:
                        found.add(feature, values, position)
                if "caption" in keeps and isinstance(net, CLIPFeatures) and pictures.texts:
                    texts = [pictures.texts[i % len(pictures.texts)] for i in rows]
                    found.add("caption", net.texts(texts), position)
            if measures and originals is not None:
                image, original = (v.float() / 127.5 - 1 for v in (pixels, originals(rows)))
                for name, measure in measures.items():
                    found.add(name, measure(image, original), position)
            tell(min(rows.stop * world.size, len(pictures)), len(pictures))

    world.agree(go)
    return found.summary(world)


def _added(parts: Sequence[Moments]) -> Moments:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def total_digest(digests: Tensor) -> str:
    """Sum of digests as numbers, modulo 2^256, in hex."""
    total = sum(int.from_bytes(bytes(row), "big") for row in digests.tolist())
    return f"{total % 2**256:064x}"
