"""bits: how well a discrete diffusion system predicts pictures, as a bound in bits per dimension.

Ho et al. 2020 (arXiv:2006.11239), section 4.3; Nichol & Dhariwal 2021 (arXiv:2102.09672), section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sfumato import __version__
from sfumato.core.config import to_json
from sfumato.core.image import to_float
from sfumato.core.random import Noise
from sfumato.core.types import Inputs
from sfumato.core.world import ALONE, World
from sfumato.diffusion.constraints import constrained
from sfumato.diffusion.guidance import CFG
from sfumato.diffusion.likelihood import Variance, bound_term, prior_bits
from sfumato.diffusion.schedules import Discrete
from sfumato.evaluation.evaluate import Result
from sfumato.evaluation.figures import Figure, mean_figure
from sfumato.evaluation.pictures import Folder, pixel_digest
from sfumato.evaluation.survey import total_digest
from sfumato.systems.codec import Pixels
from sfumato.systems.conditioning import LabelConfig
from sfumato.systems.stage import Stage
from sfumato.systems.system import System

__all__ = ["Bound", "BoundProtocol", "Part", "bits", "parts_of"]

SHOWN = 10  # parts of the curve that are printed


@dataclass(frozen=True, kw_only=True)
class BoundProtocol:
    """What is measured of each picture.

    Attributes:
        n: pictures, at equal distances in the folder; None = all.
        steps: terms of the bound that are evaluated for each picture: the decoder's, and one from each of
            steps - 1 equal parts of the others, drawn for the picture and counted for its whole part, which
            leaves the mean what it is; None = all.
        seed: picture i has the noise of seed + i.
    """

    n: int | None = None
    steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.n is not None and self.n < 1) or (self.steps is not None and self.steps < 2):
            raise ValueError(
                f"n is {self.n} and steps {self.steps}; allowed: from 1 picture and from 2 steps on"
            )


@dataclass(frozen=True, kw_only=True)
class Part:
    """Terms of the steps first <= t < stop, of which one was drawn for each picture.

    Attributes:
        bits: their sum, in bits per dimension.
        x0_mse, eps_mse: mean squared errors at them.
    """

    first: int
    stop: int
    bits: float
    x0_mse: float
    eps_mse: float


@dataclass(frozen=True)
class Bound(Result):
    """Figures, their protocol, and the curve from the cleanest step to the noisiest."""

    curve: tuple[Part, ...] = field(default_factory=tuple)

    def lines(self) -> list[str]:
        """To print: some of the curve only."""
        shown = self.curve[:: max(1, len(self.curve) // SHOWN)]
        rows = [
            f"{f'{p.first}..{p.stop - 1}':<12}{p.bits / (p.stop - p.first):>12.3e}{p.x0_mse:>12.3e}"
            f"{p.eps_mse:>12.3e}"
            for p in shown
        ]
        head = f"{'steps t':<12}{'bits each':>12}{'x0 mse':>12}{'eps mse':>12}"
        return [*Result.lines(self), head, *rows]


def parts_of(total: int, steps: int) -> Tensor:
    """Bounds (steps + 1,) int64 of parts of 0 .. total - 1: {0}, then equal ones up to rounding.

    Raises: ValueError in one line for more steps than there are.
    """
    if steps > total:
        raise ValueError(f"steps is {steps}, and this system has {total}; allowed: 2 to {total}")
    if steps == 1:
        return torch.tensor([0, 1])
    inner = torch.arange(steps) * (total - 1) // (steps - 1)
    return torch.cat([torch.zeros(1, dtype=torch.int64), 1 + inner])


@torch.no_grad()
def bits(
    system: System,
    directory: Path,
    *,
    protocol: BoundProtocol,
    batch: int = 32,
    tell: Callable[[str, int, int], None] = lambda what, done, total: None,
    world: World = ALONE,
) -> Bound:
    """The bound on the pictures of a folder, cropped to the size of the system.

    What bounds x0 in a walk of the system does so here, and a variance that is not learned is that of its
    sampler. Captions or classes of the pictures are told, without guidance.

    Args:
        batch: pictures in the network at a time.
        tell: told (what, done, in all).
        world: processes that share the batches; all get the result.

    Raises: ValueError in one line if the system is no discrete diffusion of pixels in one stage, or the
        pictures lack captions or classes that it is told.
    """
    stage = _discrete(system)
    walk = _Walk(stage, protocol)
    pictures = Folder(directory, system.size)
    inputs, told = _inputs(system, pictures)
    every = 1 if protocol.n is None else max(1, len(pictures) // protocol.n)
    chosen = range(0, len(pictures), every)[: protocol.n]
    groups = [chosen[i : i + batch] for i in range(0, len(chosen), batch)]
    found = list[_Rows]()

    def go() -> None:
        for done, turn in enumerate(world.share(len(groups)), start=1):
            rows = groups[turn]
            pixels = pictures(rows)
            found.append(_Rows(pixel_digest(pixels), *walk(pixels, inputs.rows(rows), rows)))
            tell("pictures", min(done * batch * world.size, len(chosen)), len(chosen))

    world.agree(go)
    gathered = [rows for part in world.gather(found) for rows in part]
    digest = total_digest(torch.cat([rows.digest for rows in gathered]))
    said = {
        "samples": {"system": system.about.name, "fingerprint": system.fingerprint},
        "pictures": {**pictures.protocol, "n": len(chosen), "pixels": digest[:16]},
        "told": told,
        "bound": to_json(protocol),
        "sfumato": __version__,
    }
    curve = walk.curve(gathered, len(chosen))
    return Bound(walk.figures(gathered, curve), said, curve)


class _Rows(NamedTuple):
    """Of a batch.

    Attributes:
        digest: (B, 32) uint8.
        totals, prior: (B,) float64: the bound, and what of it is L_T.
        sums: (3, k) float64: over the batch, of the bits of each part and of the squared errors.
    """

    digest: Tensor
    totals: Tensor
    prior: Tensor
    sums: Tensor


class _Walk:
    """The terms of one stage."""

    def __init__(self, stage: Stage, protocol: BoundProtocol) -> None:
        self.stage, self.seed = stage, protocol.seed
        schedule = stage.denoiser.schedule
        assert isinstance(schedule, Discrete)
        self.schedule = schedule
        self.bounds = parts_of(schedule.steps, protocol.steps or schedule.steps)
        ancestral = stage.defaults.sampler == "ddpm" and stage.defaults.knobs.get("variance") == "large"
        self.variance: Variance = "large" if ancestral else "small"

    def __call__(self, pixels: Tensor, inputs: Inputs, rows: range) -> tuple[Tensor, Tensor, Tensor]:
        """Fields of _Rows of pictures (B, 3, H, W) uint8."""
        stage, noise = self.stage, Noise([self.seed + i for i in rows])
        x0, size = to_float(pixels).to(stage.device), self.bounds.diff()
        cond = stage.conditioner(inputs, noise.fork("conditioning")).to(stage.device)
        denoise = constrained(CFG().bind(stage.denoiser, cond, cond), threshold=stage.defaults.threshold)
        share = noise.fork("steps").uniform(torch.empty(len(rows), len(size), dtype=torch.float64))
        t = self.bounds[:-1] + (share * size).long()
        terms = [
            bound_term(denoise, self.schedule, at, x0, noise(x0), variance=self.variance)
            for at in t.unbind(1)
        ]
        values = torch.stack([torch.stack(term) for term in terms], dim=2).double().cpu()  # (3, B, k)
        values[0] *= size
        prior = prior_bits(x0, self.schedule(torch.tensor(self.schedule.steps - 1))).double().cpu()
        return values[0].sum(1) + prior, prior, values.sum(1)

    def figures(self, found: Sequence[_Rows], curve: Sequence[Part]) -> tuple[Figure, ...]:
        """The bound, and what it consists of."""
        variance = "learned" if self.stage.denoiser.learned_var else self.variance
        note = f"{len(curve)} of {self.schedule.steps} steps, variance {variance}"
        return (
            mean_figure("bits_per_dim", torch.cat([rows.totals for rows in found]), note),
            Figure("bits_prior", float(torch.cat([rows.prior for rows in found]).mean()), note="L_T"),
            Figure("bits_diffusion", sum(part.bits for part in curve[1:]), note="L_1 to L_T-1"),
            Figure("bits_decoder", curve[0].bits, note="L_0"),
        )

    def curve(self, found: Sequence[_Rows], n: int) -> tuple[Part, ...]:
        """Means over n pictures of each part."""
        sums = torch.stack([rows.sums for rows in found]).sum(0) / n
        ends = zip(self.bounds.tolist(), self.bounds[1:].tolist(), sums.mT.tolist(), strict=False)
        return tuple(
            Part(first=first, stop=stop, bits=bits, x0_mse=x0, eps_mse=eps)
            for first, stop, (bits, x0, eps) in ends
        )


def _discrete(system: System) -> Stage:
    """Its one stage. Raises: ValueError in one line if it is of another kind."""
    stage = system.stages[-1]
    kind = getattr(stage.denoiser.schedule, "kind", type(stage.denoiser.schedule).__name__)
    if len(system.stages) > 1:
        found = f"the stages {', '.join(one.name for one in system.stages)}"
    elif not isinstance(stage.codec, Pixels) or stage.pixels is None:
        found = f"the codec {type(stage.codec).__name__}"
    elif not isinstance(stage.denoiser.schedule, Discrete):
        found = f"a schedule of kind {kind}"
    else:
        return stage
    raise ValueError(
        f"bits per dimension are of one stage on pixels with a discrete schedule, such as DDPM's, and "
        f"{system.about.name} has {found}; choose another system"
    )


def _inputs(system: System, pictures: Folder) -> tuple[Inputs, str]:
    """What is told of all pictures, and how the protocol calls it."""
    if system.reads_text:
        if pictures.texts is None:
            raise ValueError("this system is told captions; give pictures that have them")
        return Inputs(n=len(pictures), text=pictures.texts), "captions"
    if any(isinstance(c, LabelConfig) for c in system.config.stages[0].conditioners):
        return Inputs(n=len(pictures), label=torch.tensor(pictures.labels)), "classes"
    return Inputs(n=len(pictures)), "nothing"
