"""The single checks of the doctor: each measures one part of a stage and says what it should be."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sfumato.core.random import Noise
from sfumato.core.types import Inputs
from sfumato.data.datasets import ImageFolder
from sfumato.diffusion.guidance import CFG
from sfumato.diffusion.parameterization import target
from sfumato.evaluation.measures import psnr
from sfumato.evaluation.specimen import Specimen, answer_errors, level_at, misfits
from sfumato.systems.config import CodecConfig, LatentsConfig
from sfumato.text.tokenizers import Tokenizer

__all__ = [
    "Check",
    "check_captions",
    "check_classes",
    "check_codec",
    "check_denoising",
    "check_guidance",
    "check_labels",
    "check_learning",
    "check_parameterization",
    "check_samples",
    "check_scale",
    "check_text",
]

MIDDLE = (0.3, 1.0, 3.0)  # sigma / alpha, in units of the latents' spread, where parameterizations differ
HIGH = (9.0, 19.0, 99.0)  # where hardly anything but the conditioning tells what is to be drawn
SURE = 2.0  # standard errors from which a mean difference counts


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding.

    Attributes:
        name: what was measured.
        part: of the system, or of the data, that is broken if the check failed.
        passed: None if there was nothing to measure.
        found, wanted: in words.
        verdict: what is wrong and what to do, if the check failed.
    """

    name: str
    part: str
    passed: bool | None
    found: str
    wanted: str
    verdict: str = ""


def check_captions(tokenizer: Tokenizer, captions: list[str]) -> Check:
    """How many words of the captions the tokenizer never saw whole."""
    words = [word for caption in captions for word in caption.split()]
    strange = [word for caption in captions for word in tokenizer.unknown(caption) if caption]
    empty = sum(not caption for caption in captions)
    share = len(strange) / max(len(words), 1)
    most = ", ".join(map(repr, sorted(set(strange))[:3]))
    bare = empty > len(captions) / 2
    verdict = (
        f"{empty} of {len(captions)} pictures have no caption"
        if bare
        else (f"{share:.0%} of the words are unknown to the tokenizer, such as {most}; it learned others")
    )
    return Check(
        name="caption coverage",
        part="captions",
        passed=not bare and share <= 0.5,
        found=f"{share:.1%} of {len(words)} words unknown, {empty} of {len(captions)} without caption",
        wanted="at most half",
        verdict=verdict,
    )


def check_classes(num_classes: int, folder: ImageFolder) -> Check:
    """Whether every label is one of the system's classes."""
    labels = [entry.label for entry in folder.entries]
    given = [label for label in labels if label is not None]
    outside = sorted({label for label in given if not 0 <= label < num_classes})
    bare = len(labels) - len(given)
    found = f"{min(given)}..{max(given)}" if given else "none"
    shifted = given and min(given) == 1 and max(given) == num_classes
    if bare:
        verdict = f"{bare} of {len(labels)} pictures have no label"
    elif shifted:
        verdict = f"off by one: labels run from 1 to {num_classes}, the system counts from 0; subtract 1"
    else:
        verdict = f"labels {', '.join(map(str, outside[:5]))} are outside 0..{num_classes - 1}"
    return Check(
        name="label coverage",
        part="labels",
        passed=not bare and not outside,
        found=f"{found}, {len(set(given) - set(outside))} of {num_classes} classes occur",
        wanted=f"within 0..{num_classes - 1}",
        verdict=verdict,
    )


def check_codec(specimen: Specimen) -> Check:
    """decode(encode) against the pictures: 20 dB, or a quarter of the error of each picture's mean color."""
    codec, images = specimen.stage.codec, specimen.images
    decoded = torch.cat([codec.decode(part) for part in specimen.clean.split(specimen.batch)])
    found = float(psnr(decoded, images).clamp_max(99).mean())
    plain = float(psnr(images.mean((2, 3), keepdim=True).expand_as(images), images).clamp_max(99).mean())
    wanted = min(20.0, plain + 6.0)
    return Check(
        name="decode(encode) PSNR",
        part="autoencoder",
        passed=found >= wanted,
        found=f"{found:.1f} dB",
        wanted=f"at least {wanted:.1f} dB",
        verdict=f"it gives pictures back at {found:.1f} dB only; its weights are not trained or not loaded",
    )


def check_scale(specimen: Specimen, config: CodecConfig) -> Check:
    """Mean and standard deviation of the normalised latents, pooled over channels: they should be 0 and 1."""
    channels = specimen.clean.double().transpose(0, 1).flatten(1)
    mean, std = channels.mean(1), channels.std(1, correction=0)
    offset, scale = float(mean.square().mean().sqrt()), float(std.square().mean().sqrt())
    passed = 0.75 <= scale <= 1.33 and offset <= 0.75
    verdict = ""
    if isinstance(config, LatentsConfig):
        own = (torch.tensor(v, dtype=torch.float64).to(std) for v in (config.mean, config.std))
        center, unit = own
        means, stds = center + unit * mean, unit * std
        listed = " and ".join(f"{name} ({_list(v)})" for name, v in (("mean", means), ("std", stds)))
        verdict = f"latents have standard deviation {scale:.3g} and offset {offset:.2g}; set {listed}"
    return Check(
        name="latent mean and std",
        part="latent scale",
        passed=passed if isinstance(config, LatentsConfig) else None,
        found=f"offset {offset:.2f}, std {scale:.2f}",
        wanted="offset at most 0.75, std 0.75 to 1.33",
        verdict=verdict,
    )


def check_parameterization(specimen: Specimen, declared: str) -> Check:
    """Which parameterization the network's output fits best, at levels where they differ."""
    found = misfits(specimen, [ratio * specimen.spread for ratio in MIDDLE])
    best = min(found, key=lambda name: found[name])
    wrong = best != declared and found[best] < 0.8 * found[declared] and found[best] < 0.9
    return Check(
        name="prediction",
        part="parameterization",
        passed=not wrong,
        found=f"fits {best} (error {found[best]:.2f}), {declared}: {found[declared]:.2f}",
        wanted=f"{declared}, as declared",
        verdict=f"the net predicts like {best}, declared {declared}; declare {best}",
    )


def check_denoising(specimen: Specimen, towers: Sequence[nn.Module] = ()) -> Check:
    """x0 at low noise against the noisy latent itself, and at middle noise against a linear filter.

    Args:
        towers: that tell the denoiser of texts; noise for words can be all that is wrong with it.
    """
    low, middle = (_mistake(specimen, ratio * specimen.spread) for ratio in (0.1, 1.0))
    net = specimen.stage.denoiser.net
    learned = isinstance(net, nn.Module) and _as_begun(net) is False
    if learned and any(_as_begun(tower) for tower in towers):
        part = "text encoder"
        verdict = "its norms are as training begins them, and the denoiser makes nothing of what it says; "
        verdict += "its weights are not trained or not loaded"
    else:
        part = "denoiser"
        verdict = "it does not remove noise, whatever it predicts; its weights are not trained or not loaded"
    return Check(
        name="x0 from noise",
        part=part,
        passed=low < 1.0 and middle < 0.9,
        found=f"{low:.2f} of the noise left at low noise, {middle:.2f} of a linear filter's error at equal",
        wanted="below 1 and 0.9",
        verdict=verdict,
    )


def _as_begun(module: nn.Module) -> bool | None:
    """Whether every norm has gains of one and offsets of zero, as no trained net has; None without norms."""
    norms = [m for m in module.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm)]
    pairs = [(name == "weight", p) for norm in norms for name, p in norm.named_parameters()]
    return all(bool((p == (1.0 if gain else 0.0)).all()) for gain, p in pairs) if pairs else None


def _mistake(specimen: Specimen, ratio: float) -> float:
    """RMS error of x0 where the noise is `ratio`, relative to that of the best linear filter."""
    denoiser = specimen.stage.denoiser
    level = level_at(denoiser, ratio)
    error = 0.0
    for rows in specimen.rows():
        noisy = specimen.noisy(rows, level)
        x0 = denoiser(noisy.x_t, level, specimen.told(rows)).x0
        error += float((x0 - noisy.x0).double().square().sum())
    noise, spread = (float(level.sigma) / float(level.alpha)) ** 2, specimen.spread**2
    return math.sqrt(error / specimen.clean.numel() / (noise * spread / (noise + spread)))


def check_text(specimen: Specimen) -> Check:
    """Whether a picture's own caption helps more than that of another, at high noise."""
    assert specimen.text is not None
    n, text = len(specimen), specimen.text
    ratios = [ratio * specimen.spread for ratio in HIGH]
    others = [
        next((text[(i + k) % n] for k in range(n // 2 or 1, n) if text[(i + k) % n] != t), t)
        for i, t in enumerate(text)
    ]
    own, other = (answer_errors(s, ratios) for s in (specimen, specimen.otherwise(text=others)))
    differs = torch.tensor([a != b for a, b in zip(text, others, strict=True)])
    gain = (other - own)[differs]
    found = (
        "all captions are alike"
        if len(gain) < 2
        else f"own caption better by {_mean(gain):.2g} ({_z(gain):+.1f} standard errors)"
    )
    return Check(
        name="captions and pictures",
        part="text encoder",
        # A net that ignores captions altogether is no fault of the encoder: the check of guidance names it.
        passed=None if len(gain) < 2 or not bool(gain.any()) else _z(gain) > SURE,
        found=found,
        wanted=f"better by {SURE:g} standard errors",
        verdict="a picture's own caption helps no more than that of another; the encoder's weights are not "
        "loaded, or belong to another denoiser, or the captions are not those of the pictures",
    )


def check_labels(specimen: Specimen, num_classes: int) -> Check:
    """Whether a picture's own label helps more than the ones beside it, at high noise."""
    assert specimen.label is not None
    label, ratios = specimen.label, [ratio * specimen.spread for ratio in HIGH]
    own = answer_errors(specimen, ratios)
    gains = {}
    for shift in (-1, 1):
        beside = (label + shift).clamp(0, num_classes - 1)
        inside = beside == label + shift
        if int(inside.sum()) >= 2:
            gains[shift] = (answer_errors(specimen.otherwise(label=beside), ratios) - own)[inside]
    if not gains:
        return Check(
            name="labels and pictures", part="labels", passed=None, found="one class only", wanted=""
        )
    worst = min(gains, key=lambda shift: _z(gains[shift]))
    off = _z(gains[worst]) < -SURE
    together = torch.cat(list(gains.values()))
    return Check(
        name="labels and pictures",
        part="labels",
        passed=not off and _z(together) > SURE,
        found=", ".join(
            f"own better than label {s:+d} by {_mean(g):.2g} ({_z(g):+.1f} standard errors)"
            for s, g in gains.items()
        ),
        wanted=f"better by {SURE:g} standard errors",
        verdict=f"off by one: label {worst:+d} fits the pictures better than their own"
        if off
        else "a picture's own label helps no more than another; the labels are not those of the pictures, "
        "or numbered in another order",
    )


def check_guidance(specimen: Specimen) -> Check:
    """That cond and null answers differ, and that guidance of scale 1 is the conditional answer."""
    denoiser, rows = specimen.stage.denoiser, specimen.rows()[0]
    level = level_at(denoiser, HIGH[0] * specimen.spread)
    noisy, cond, null = specimen.noisy(rows, level), specimen.told(rows), specimen.null(rows)
    told, untold = (denoiser(noisy.x_t, level, c).x0.double() for c in (cond, null))
    # Scale 1 itself skips null; a hair beside it takes the way of every other scale.
    guided = CFG(1 + 1e-6).bind(denoiser, cond, null)(noisy.x_t, level).x0.double()
    size = float(told.square().mean().sqrt()) + 1e-12
    apart, same = (float((a - told).square().mean().sqrt()) / size for a in (untold, guided))
    verdict = "the denoiser answers alike with and without what it is told; its conditioning is not connected"
    if apart > 1e-3:
        verdict = f"at scale 1 guidance differs from the conditional answer by {same:.1%}"
    return Check(
        name="guidance",
        part="guidance",
        passed=apart > 1e-3 and same < 1e-2,
        found=f"cond and null differ by {apart:.1%}, scale 1 from cond by {same:.1g}",
        wanted="more than 0.1 %, less than 1 %",
        verdict=verdict,
    )


def check_samples(specimen: Specimen) -> Check:
    """A few guided pictures in few steps: finite, and not of one color."""
    n = min(4, len(specimen))
    text = None if specimen.text is None else specimen.text[:n]
    label = None if specimen.label is None else specimen.label[:n]
    stage = specimen.stage
    options = replace(stage.defaults, steps=min(stage.defaults.steps, 8))
    found, passed = "", False
    try:
        drawn = stage.run(Inputs(n=n, text=text, label=label), options, Noise(range(n))).low_res
        picture = specimen.images[:n] if drawn is None else drawn
        contrast = float(picture.double().std((1, 2, 3)).amax())
        passed = bool(picture.isfinite().all()) and contrast > 1e-3
        found = f"standard deviation of pixels {contrast:.2f}"
    except ValueError as error:  # what the sampling loop says of numbers that are not finite
        found = str(error)
    return Check(
        name="guided samples",
        part="sampling",
        passed=passed,
        found=found,
        wanted="finite, and not of one color",
        verdict=f"the system draws nothing: {found}",
    )


def check_learning(specimen: Specimen, steps: int, seconds: float) -> Check:
    """A copy of the network, trained on one batch at fixed times and noise: its loss must fall."""
    net = specimen.stage.denoiser.net
    weights = list(net.parameters()) if isinstance(net, nn.Module) else []
    if not weights:
        return Check(name="one-batch overfit", part="network", passed=None, found="no weights", wanted="")
    with torch.enable_grad():
        losses = _overfit(specimen, steps, seconds)
    first, least = losses[0], min(losses)
    return Check(
        name="one-batch overfit",
        part="network",
        passed=math.isfinite(losses[-1]) and (least <= 0.99 * first or first < 0.01),
        found=f"loss {first:.3g} -> {least:.3g} in {len(losses) - 1} steps",
        wanted="1 % lower, or below 0.01",
        verdict="it does not learn one batch by heart; gradients do not reach its weights",
    )


def _overfit(specimen: Specimen, steps: int, seconds: float) -> list[float]:
    """Losses relative to the target's size: before each step, and after the last."""
    started = time.perf_counter()
    rows = slice(0, min(8, len(specimen)))
    net = copy.deepcopy(specimen.stage.denoiser.net)
    assert isinstance(net, nn.Module)
    net.float().requires_grad_(True)
    denoiser = replace(specimen.stage.denoiser, net=net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-4, weight_decay=0.0)
    cond = specimen.told(rows).map(Tensor.detach)
    low, high = denoiser.schedule.span
    share = (torch.arange(rows.stop, dtype=torch.float64) + 0.5) / rows.stop
    noisy = specimen.noisy(
        rows,
        denoiser.schedule((low + (high - low) * share).floor() if high > 1 else low + (high - low) * share),
    )
    goal = target(denoiser.parameterization, noisy.level, noisy.x0, noisy.eps)
    losses: list[float] = []
    while True:
        loss = (
            denoiser.raw(noisy.x_t, noisy.level, cond).prediction - goal
        ).square().mean() / goal.square().mean()
        losses.append(float(loss.detach()))
        if len(losses) > steps or time.perf_counter() - started > seconds or not math.isfinite(losses[-1]):
            return losses
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _z(values: Tensor) -> float:
    """Mean in standard errors."""
    error = float(values.std()) / math.sqrt(len(values))
    return float(values.mean()) / max(error, 1e-12)


def _list(values: Tensor) -> str:
    return ", ".join(f"{v:.4g}" for v in values.tolist())
