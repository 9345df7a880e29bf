"""How well the reader reads: true scenes as they are, and blurred, noisy, or sent through an autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from sfumato.core.image import to_float, to_uint8
from sfumato.data.scenes.draw import render
from sfumato.data.scenes.graph import Scene, Scenes
from sfumato.data.scenes.sampling import draw_scenes
from sfumato.evaluation.measures import Proportion, psnr
from sfumato.evaluation.scenes.reader import Reading, read
from sfumato.systems.codec import Codec

__all__ = ["BLURS", "NOISES", "Accuracy", "accuracy", "exact", "through"]

BLURS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
"""Standard deviations of a Gaussian blur, in pixels of a picture of 64."""
NOISES = (0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 40.0, 50.0)
"""Standard deviations of Gaussian noise, of 255."""
SEED = 0  # of the noise
NEAR = 1 / 64  # of the side: how far a place may be off
PART = 256  # pictures at a time
Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class Accuracy:
    """How pictures were read that were damaged in one way.

    Attributes:
        damage: "none", "blur", "noise" or "codec". level: of it. size: side of the pictures.
        exact: share read as what they show, in everything.
        wrong: share read as something else; the rest was found invalid.
        psnr: dB to the undamaged pictures, mean; None for undamaged ones.
    """

    damage: str
    level: float
    size: int
    exact: Proportion
    wrong: Proportion
    psnr: float | None


def accuracy(
    count: int, size: int, damage: str = "none", level: float = 0.0, *, codec: Codec | None = None
) -> Accuracy:
    """Read the first scenes of the split "seen".

    Raises: ValueError in one line for a damage that there is not.
    """
    harm: dict[str, Callable[[Pictures], Pictures]] = {
        "none": lambda pictures: pictures,
        "blur": lambda pictures: _blurred(pictures, level * size / 64),
        "noise": lambda pictures: _noisy(pictures, level),
    }
    if codec is not None:
        harm["codec"] = lambda pictures: through(codec, pictures)
    if damage not in harm:
        raise ValueError(f"unknown damage {damage!r}; allowed: {', '.join(harm)}")
    right = wrong = 0
    ratios = []
    for first in range(0, count, PART):
        scenes: Scenes = draw_scenes("seen", min(PART, count - first), first=first)
        clean = render(scenes, size)
        harmed = harm[damage](clean)
        pairs = list(zip(scenes.unpack(), read(harmed), strict=True))
        right += sum(exact(scene, reading) for scene, reading in pairs)
        wrong += sum(reading.scene is not None and not exact(scene, reading) for scene, reading in pairs)
        ratios.append(psnr(*(to_float(torch.from_numpy(p)) for p in (harmed, clean))))
    quality = None if damage == "none" or (level == 0 and codec is None) else float(torch.cat(ratios).mean())
    return Accuracy(damage, level, size, Proportion.of(right, count), Proportion.of(wrong, count), quality)


def exact(scene: Scene, reading: Reading) -> bool:
    """Whether a scene was read in full: background, every object's kind, places within 1/64 of the side."""
    if reading.scene is None or reading.scene.background != scene.background:
        return False
    left = list(reading.scene.objects)
    for item in scene.objects:
        near = [o for o in left if o.kind == item.kind and max(abs(o.x - item.x), abs(o.y - item.y)) <= NEAR]
        if not near:
            return False
        left.remove(near[0])
    return not left


def through(codec: Codec, pictures: Pictures) -> Pictures:
    """Pictures (N, S, S, 3) encoded and decoded."""
    x = to_float(torch.from_numpy(pictures).permute(0, 3, 1, 2))
    with torch.no_grad():
        parts: Sequence[torch.Tensor] = [codec.decode(codec.encode(part)) for part in x.split(32)]
    return np.ascontiguousarray(to_uint8(torch.cat(list(parts))).permute(0, 2, 3, 1).cpu().numpy())


def _blurred(pictures: Pictures, radius: float) -> Pictures:
    if not radius:
        return pictures
    kernel = ImageFilter.GaussianBlur(radius)
    return np.stack([np.asarray(Image.fromarray(picture).filter(kernel)) for picture in pictures])


def _noisy(pictures: Pictures, sigma: float) -> Pictures:
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(SEED)).numpy()
    return (pictures + sigma * noise).round().clip(0, 255).astype(np.uint8)
