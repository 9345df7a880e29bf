"""Guidance: how a denoiser and its conditioning become the function that a sampler calls.

Convention throughout: reference + scale * (guided - reference), so that scale 1 is off. Mixing acts on x0 and
eps alike; both are affine in the network's output with the same coefficients on either side, so this is the
published rule for any parameterization.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor

from sfumato.core.types import Conditioning, Denoised, Level, expand
from sfumato.diffusion.denoiser import DenoiseFn, Denoiser
from sfumato.diffusion.parameterization import Parameterization, target

__all__ = [
    "CFG",
    "AutoGuidance",
    "Embedded",
    "Guidance",
    "GuidanceConfig",
    "Guided",
    "InstructPix2Pix",
    "LogitCFG",
    "noise_fraction",
]

Interval = tuple[float, float]
"""(low, high]: where guidance acts, in fractions sigma / (alpha + sigma) from 0 = clean to 1 = noise."""


class Guidance(Protocol):
    """Binds a denoiser to what it is told (cond) and to the same without what guidance amplifies (null)."""

    def bind(self, denoiser: Denoiser, cond: Conditioning, null: Conditioning) -> DenoiseFn:
        """The function of (x_t, level) for one walk; the conditioning is prepared here, once."""
        ...


@dataclass(frozen=True)
class CFG:
    """Classifier-free guidance: null + scale * (cond - null), with cond and null in one batched network call.

    Ho & Salimans 2022 (arXiv:2207.12598), whose w is scale - 1. A learned variance comes from the conditional
    half.

    Attributes:
        scale: 1 = off, and then null is not evaluated at all.
        channels: guide only the first n channels, the rest are conditional; None = all. DiT: 3 of 4.
        rescale: phi in [0, 1] of Lin et al. 2023 (arXiv:2305.08891, eqs. 15 and 16): mix in the guided
            network output scaled to the per-sample standard deviation of the conditional one, against
            over-exposure.
        interval: guide where low < sigma / (alpha + sigma) <= high, a measure that does not depend on the
            schedule; null is not evaluated outside. EDM's (a, b] in sigma / alpha is (a/(1+a), b/(1+b)] here.
            Kynkaanniemi et al. 2024 (arXiv:2404.07724).

    Raises: ValueError if a value is out of range.
    """

    scale: float = 1.0
    channels: int | None = None
    rescale: float = 0.0
    interval: Interval = (0.0, 1.0)
    kind: Literal["cfg"] = "cfg"

    def __post_init__(self) -> None:
        _check_scale("scale", self.scale)
        _check_interval(self.interval)
        if self.channels is not None and self.channels < 1:
            raise ValueError(f"channels {self.channels}: guide at least 1 channel, or None for all of them")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale {self.rescale} is outside [0, 1]; 0 = off, 0.7 is usual")

    def bind(self, denoiser: Denoiser, cond: Conditioning, null: Conditioning) -> DenoiseFn:
        """See Guidance."""
        if self.scale == 1:
            return _conditional(denoiser, cond)
        told, left = dict(cond.items()), dict(null.items())
        if told and all(left.get(name) is v for name, v in told.items()):
            raise ValueError(
                f"classifier-free guidance {self.scale:g} needs something to leave out, and this network is "
                "told nothing that it can do without; set guidance 1, or guide it by a classifier"
            )
        both = denoiser.prepare(Conditioning.cat([cond, null]))
        alone = both.map(lambda v: v[: len(v) // 2])

        def guided(x_t: Tensor, level: Level) -> Denoised:
            scale = _inside(self.interval, level, self.scale, 1.0)
            if scale is None:
                return denoiser(x_t, level, alone)
            positive, negative = _rows(denoiser, x_t, level, both, 2)
            mixed = _mix(negative, positive, self._weight(scale, x_t))
            phi = _inside(self.interval, level, self.rescale, 0.0) if self.rescale else None
            if phi is None:
                return mixed
            return _rescaled(mixed, positive, x_t, level, denoiser.parameterization, phi)

        return guided

    def _weight(self, scale: Tensor | float, x_t: Tensor) -> Tensor | float:
        """The scale by row and channel of x_t: 1 in the channels that are not guided."""
        if self.channels is None:
            return _by_row(scale, x_t)
        weight = expand(torch.as_tensor(scale, dtype=torch.float64), x_t)
        among = torch.arange(x_t.shape[1], device=x_t.device) < self.channels
        return torch.where(among.reshape(1, -1, *[1] * (x_t.ndim - 2)), weight, torch.ones_like(weight))


@dataclass(frozen=True)
class Embedded:
    """A scale that the network is told, having learned what guidance would do; null is never evaluated.

    Luo et al. 2023 (arXiv:2310.04378), section 4.1, whose w is scale - 1.
    """

    scale: float = 8.5
    kind: Literal["embedded"] = "embedded"

    def __post_init__(self) -> None:
        _check_scale("scale", self.scale)

    def bind(self, denoiser: Denoiser, cond: Conditioning, null: Conditioning) -> DenoiseFn:
        """See Guidance."""
        first = next(v for _, v in cond.items())
        w = torch.full((len(first),), self.scale - 1, device=first.device)
        return _conditional(denoiser, replace(cond, guidance=w))


@dataclass(frozen=True)
class InstructPix2Pix:
    """Two scales, for the picture to edit (`cond.concat`) and for the instruction.

    none + image * (image-only - none) + text * (full - image-only), three rows per sample in one network
    call. null keeps the picture and drops the text; the row "none" has zeros for the picture as well. Brooks
    et al. 2023 (arXiv:2211.09800), eq. 3.

    Raises: ValueError if there is no picture.
    """

    text: float = 7.5
    image: float = 1.5
    kind: Literal["instruct_pix2pix"] = "instruct_pix2pix"

    def __post_init__(self) -> None:
        _check_scale("text", self.text)
        _check_scale("image", self.image)

    def bind(self, denoiser: Denoiser, cond: Conditioning, null: Conditioning) -> DenoiseFn:
        """See Guidance."""
        if null.concat is None:
            raise ValueError(
                "InstructPix2Pix guidance needs a picture to edit in the conditioning's field 'concat'"
            )
        if self.text == 1 and self.image == 1:
            return _conditional(denoiser, cond)
        none = replace(null, concat=torch.zeros_like(null.concat))
        rows = denoiser.prepare(Conditioning.cat([cond, null, none]))

        def guided(x_t: Tensor, level: Level) -> Denoised:
            full, picture, nothing = _rows(denoiser, x_t, level, rows, 3)
            base = _mix(nothing, picture, self.image)
            x0 = base.x0 + self.text * (full.x0 - picture.x0)
            return Denoised(x0, base.eps + self.text * (full.eps - picture.eps), full.var)

        return guided


@dataclass(frozen=True)
class AutoGuidance:
    """bad + scale * (good - bad): away from a smaller or less trained denoiser that is told the same.

    Karras et al. 2024 (arXiv:2406.02507), eq. 3. The two may differ in net and parameterization, not in
    schedule. null is not used. It holds a network, so it is not part of a JSON configuration.

    Attributes:
        interval: as in CFG; the bad denoiser is not evaluated outside.
    """

    bad: Denoiser
    scale: float = 2.0
    interval: Interval = (0.0, 1.0)

    def __post_init__(self) -> None:
        _check_scale("scale", self.scale)
        _check_interval(self.interval)

    def bind(self, denoiser: Denoiser, cond: Conditioning, null: Conditioning) -> DenoiseFn:
        """See Guidance."""
        good = _conditional(denoiser, cond)
        if self.scale == 1:
            return good
        bad = _conditional(self.bad, cond)

        def guided(x_t: Tensor, level: Level) -> Denoised:
            scale = _inside(self.interval, level, self.scale, 1.0)
            positive = good(x_t, level)
            return positive if scale is None else _mix(bad(x_t, level), positive, _by_row(scale, x_t))

        return guided


@dataclass(frozen=True)
class Guided:
    """By the classifier or CLIP of the stage: scale * grad log p(y | x_t), see `score.ScoreGuidance`.

    It says how strongly; the stage puts its guide in. Dhariwal & Nichol 2021 (arXiv:2105.05233).

    Attributes:
        scale: 0 = off.
        inner: guidance of the denoiser itself.
    """

    scale: float = 1.0
    inner: CFG = field(default_factory=CFG)
    kind: Literal["guide"] = "guide"

    def __post_init__(self) -> None:
        _check_scale("scale", self.scale)

    def bind(self, denoiser: Denoiser, cond: Conditioning, null: Conditioning) -> DenoiseFn:
        """Raises: ValueError, for this is called where there is no guide."""
        raise ValueError(
            "this stage has no classifier or CLIP that could guide it; load the system with guide=..."
        )


@runtime_checkable
class Drawer(Protocol):
    """A net that does not denoise: it draws a sample, (B, ...), from normal numbers of the same shape."""

    def draw(
        self,
        noise: Tensor,
        cond: Conditioning,
        null: Conditioning | None = None,
        *,
        scale: float = 1.0,
        temperature: float = 1.0,
    ) -> Tensor: ...


@dataclass(frozen=True)
class LogitCFG:
    """Classifier-free guidance of a net that draws tokens: its logits are null + scale * (cond - null).

    The first evaluation of a walk draws the sample from the noise, x_t / sigma at alpha = 0, and all later
    ones say the same x0: one step does, and more of them change nothing.

    Attributes:
        scale: 1 = off, and then null is not evaluated at all.
        temperature: by which logits are divided; below 1 the likely tokens gain.
    """

    scale: float = 1.0
    temperature: float = 1.0
    kind: Literal["logits"] = "logits"

    def __post_init__(self) -> None:
        _check_scale("scale", self.scale)
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature:g}; allowed: above 0, 1 = as learned")

    def bind(self, denoiser: Denoiser, cond: Conditioning, null: Conditioning) -> DenoiseFn:
        """See Guidance. Raises: ValueError in one line if the net denoises."""
        net, drawn = denoiser.net, list[Tensor]()
        if not isinstance(net, Drawer):
            raise ValueError("guidance of kind logits is for a net that draws tokens; take cfg for this one")
        untold = null if self.scale != 1 else None

        def guided(x_t: Tensor, level: Level) -> Denoised:
            alpha, sigma = expand(level.alpha, x_t), expand(level.sigma, x_t)
            if not drawn:
                drawn.append(
                    net.draw(x_t / sigma, cond, untold, scale=self.scale, temperature=self.temperature)
                )
            return Denoised(drawn[0], (x_t - alpha * drawn[0]) / sigma)

        return guided


GuidanceConfig = Annotated[CFG | Embedded | InstructPix2Pix | Guided | LogitCFG, Field(discriminator="kind")]
"""The guidances that hold numbers only and therefore serialize to JSON."""


def noise_fraction(level: Level) -> Tensor:
    """sigma / (alpha + sigma), of the level's shape: 0 = clean, 1 = noise; the time of the flow schedule."""
    return level.sigma / (level.alpha + level.sigma)


def _conditional(denoiser: Denoiser, cond: Conditioning) -> DenoiseFn:
    ready = denoiser.prepare(cond)
    return lambda x_t, level: denoiser(x_t, level, ready)


def _rows(denoiser: Denoiser, x_t: Tensor, level: Level, cond: Conditioning, count: int) -> list[Denoised]:
    """The same x_t under each of `count` conditionings that are stacked in `cond`, from one network call."""
    if level.t.ndim:
        level = Level(*(torch.cat([v] * count) for v in level))
    out = denoiser(torch.cat([x_t] * count), level, cond)
    var = [None] * count if out.var is None else out.var.chunk(count)
    return [Denoised(*row) for row in zip(out.x0.chunk(count), out.eps.chunk(count), var, strict=True)]


def _mix(reference: Denoised, guided: Denoised, weight: Tensor | float) -> Denoised:
    """reference + weight * (guided - reference); exactly `guided` where the weight is 1."""
    x0 = torch.lerp(reference.x0, guided.x0, weight)
    return Denoised(x0, torch.lerp(reference.eps, guided.eps, weight), guided.var, guided.grad)


def _rescaled(
    mixed: Denoised,
    cond: Denoised,
    x_t: Tensor,
    level: Level,
    parameterization: Parameterization,
    phi: Tensor | float,
) -> Denoised:
    """Scale the guided network output F by 1 - phi + phi std(F_cond) / std(F), std per sample.

    The paper and the code that follows it rescale F itself, whatever it predicts; x0 and eps move with it.
    """
    output = target(parameterization, level, mixed.x0, mixed.eps)
    wanted = target(parameterization, level, cond.x0, cond.eps)
    ratio = wanted.flatten(1).std(dim=1) / output.flatten(1).std(dim=1).clamp_min(1e-12)
    share = expand(torch.as_tensor(phi), ratio)
    change = expand(1 - share + share * ratio, x_t) * output - output
    c = parameterization(level)
    eps_out = -level.alpha * c.out / level.sigma
    x0, eps = mixed.x0 + expand(c.out, x_t) * change, mixed.eps + expand(eps_out, x_t) * change
    return Denoised(x0, eps, mixed.var, mixed.grad)


def _inside(interval: Interval, level: Level, value: float, outside: float) -> Tensor | float | None:
    """`value` if all of a batch is inside the interval, None if nothing is, else (B,) float64 of both.

    A level of shape (), the usual one, costs no tensor operation.
    """
    low, high = interval
    if not level.sigma.ndim:
        alpha, sigma = float(level.alpha), float(level.sigma)
        return value if low < sigma / (alpha + sigma) <= high else None
    fraction = noise_fraction(level)
    inside = (fraction > low) & (fraction <= high)
    if not inside.any():
        return None
    return value if inside.all() else torch.full_like(fraction, outside).masked_fill(inside, value)


def _by_row(scale: Tensor | float, x_t: Tensor) -> Tensor | float:
    """A scale (B,) as it broadcasts against x_t; a number as it is, which no device has to wait for."""
    return expand(scale, x_t) if isinstance(scale, Tensor) else scale


def _check_scale(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"guidance {name} {value} is not a finite number; 1 = off")


def _check_interval(interval: Interval) -> None:
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"guidance interval {interval}: need 0 <= low < high <= 1, fractions sigma / (alpha + sigma)"
        )
