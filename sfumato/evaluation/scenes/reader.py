"""Pictures of scenes read back: which objects, of which kind, where; or why a picture shows no scene."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sfumato.data.scenes.draw import PIXELS, palette, window
from sfumato.data.scenes.graph import BACKGROUNDS, COLORS, MOST, SHAPES, SIZES, TEXTURES, Object, Scene
from sfumato.evaluation.scenes.components import components
from sfumato.evaluation.scenes.templates import templates

__all__ = ["Reading", "read"]

Array = NDArray[np.float32]
CHUNK = 256  # pictures read at a time, which bounds the memory
NEAR = 40.0  # distance in RGB within which a pixel of the border counts as that background
BORDER = 0.75  # share of the border that must be background
FAR = 45.0  # distance in RGB from the background beyond which a pixel belongs to something
FULL = 94.0  # least distance of a color from a background: where that is reached, a pixel counts in full
NOISE = 2.5  # or this many times the median distance on the border, if pictures are noisy
SPECK = 0.35  # regions below this share of the smallest object's area are specks
SPECKS = 0.5  # share of that area that all specks of a picture may have together
MISFIT = 0.15  # largest squared error of an object, in units of the energy of its template
SMALLEST = 45.0 / 64**2  # area of the smallest object, in units of the picture's


@dataclass(frozen=True, slots=True)
class Reading:
    """What a picture shows.

    Attributes:
        scene: None if it is invalid.
        fault: why it is: "background", "specks", "object" (something that is none) or "count"; "" if valid.
        nearest: the scene that an invalid picture comes nearest to: the background that most of its border
            is near to, and of each of the MOST largest regions the kind that fits it best, however badly.
            The scene itself if the picture is valid.
    """

    scene: Scene | None
    fault: str = ""
    nearest: Scene | None = None

    def __post_init__(self) -> None:
        if self.scene is not None:
            object.__setattr__(self, "nearest", self.scene)


def read(pictures: NDArray[np.uint8]) -> list[Reading]:
    """The scenes of pictures (N, S, S, 3).

    The background is that of the border. What differs from it is cut into connected regions. Each region's
    color is the one whose mixtures with background and ink its pixels are nearest to, and its look the
    template with the smallest squared error, which must be small.

    Raises: ValueError in one line if the pictures are not uint8 or their size is none of PIXELS.
    """
    size = pictures.shape[1] if pictures.ndim == 4 else 0
    if pictures.dtype != np.uint8 or pictures.shape[1:] != (size, size, 3) or size not in PIXELS:
        allowed = ", ".join(f"(N, {s}, {s}, 3)" for s in PIXELS)
        raise ValueError(f"cannot read pictures {pictures.dtype} {pictures.shape}; allowed: uint8 {allowed}")
    return [r for i in range(0, len(pictures), CHUNK) for r in _read(pictures[i : i + CHUNK], size)]


def _read(pictures: NDArray[np.uint8], size: int) -> list[Reading]:
    image = pictures.astype(np.float32)
    ground, paint, threshold, plain = _background(image)
    away = image - paint[:, None, None]  # (N, S, S, 3)
    far = np.sqrt(np.einsum("nhwc,nhwc->nhw", away, away))
    labels = components(far > threshold[:, None, None])
    area = np.bincount(labels.ravel())
    least = SMALLEST * size**2
    at = np.flatnonzero(labels)
    owner = np.zeros(len(area), np.int64)
    owner[labels.ravel()[at]] = at // size**2
    big = area >= SPECK * least
    big[0] = False
    small = ~big
    small[0] = False
    specks = np.bincount(owner[small], weights=area[small], minlength=len(image))
    count = np.bincount(owner[big], minlength=len(image))
    found = _objects(away, far, labels, np.flatnonzero(big), owner, paint)
    faults = np.select(
        [~plain, specks > SPECKS * least, (count < 1) | (count > MOST)], ["background", "specks", "count"], ""
    )
    regions: list[list[Region]] = [[] for _ in image]
    for picture, pixels, (item, misfit) in zip(owner[big].tolist(), area[big].tolist(), found, strict=True):
        regions[picture].append(Region(item, misfit, pixels))
    names = tuple(BACKGROUNDS)
    return [
        _reading(names[number], there, wrong)
        for wrong, number, there in zip(faults.tolist(), ground.tolist(), regions, strict=True)
    ]


class Region(NamedTuple):
    """A connected part of a picture: the object nearest to it, how badly that fits, its area in pixels."""

    item: Object
    misfit: float
    pixels: int


def _reading(background: str, regions: list[Region], fault: str) -> Reading:
    fault = fault or ("object" if any(r.misfit > MISFIT for r in regions) else "")
    if not fault:
        return Reading(Scene(background, tuple(r.item for r in regions)))
    largest = sorted(regions, key=lambda r: -r.pixels)[:MOST]
    return Reading(None, fault, Scene(background, tuple(r.item for r in regions if r in largest)))


def _background(image: Array) -> tuple[NDArray[np.int64], Array, Array, NDArray[np.bool_]]:
    """Of each picture: index of the background, its color there, the threshold, whether it is one."""
    _, grounds, _ = palette()
    ring = np.concatenate([image[:, 0], image[:, -1], image[:, 1:-1, 0], image[:, 1:-1, -1]], axis=1)
    distance = np.linalg.norm(ring[:, :, None] - grounds, axis=3)  # (N, ring, 4)
    votes = (distance < NEAR).mean(1)
    number = votes.argmax(1)
    paint = np.median(ring, axis=1)
    spread = np.median(np.linalg.norm(ring - paint[:, None], axis=2), axis=1)
    return number, paint, np.maximum(FAR, NOISE * spread), votes.max(1) >= BORDER


def _objects(
    away: Array,
    far: Array,
    labels: NDArray[np.int64],
    chosen: NDArray[np.int64],
    owner: NDArray[np.int64],
    paint: Array,
) -> list[tuple[Object, float]]:
    """The object that each chosen region is nearest to, and how badly it fits."""
    if not len(chosen):
        return []
    size = labels.shape[1]
    place = np.full(len(owner), -1)
    place[chosen] = np.arange(len(chosen))
    at = np.flatnonzero(labels)
    region = place[labels.ravel()[at]]
    at, region = at[region >= 0], region[region >= 0]
    pixels = away.reshape(-1, 3)[at]
    color = _colors(pixels, region, paint[owner[chosen]])
    x, y = _centers(far.ravel()[at], at, region, len(chosen), size)
    left, top = np.rint(x).astype(int), np.rint(y).astype(int)
    patches = _patches(away, labels, chosen, owner[chosen], left, top)
    best, misfit = _match(patches, color, paint[owner[chosen]], size)
    t, names = templates(size), tuple(COLORS)
    places = (left + t.x[best]) / size, (top + t.y[best]) / size
    return [
        (Object(SHAPES[t.shape[k]], names[c], SIZES[t.size[k]], TEXTURES[t.texture[k]], x, y), wrong)
        for k, c, x, y, wrong in zip(best, color, *(place.tolist() for place in places), misfit, strict=True)
    ]


def _colors(pixels: Array, region: NDArray[np.int64], paint: Array) -> NDArray[np.int64]:
    """(R,) the color whose mixtures with background or with ink explain a region's pixels best.

    Args:
        pixels: (K, 3) differences from the background. region: (K,) of each. paint: (R, 3).
    """
    colors, _, black = palette()
    error = np.empty((len(colors), len(paint)))
    own = paint[region]
    inked = _off_segment(pixels, black - own)
    for number, color in enumerate(colors):
        bare = _off_segment(pixels, color - own)
        mixed = _off_segment(pixels - (color - own), black - color)
        least = np.minimum(np.minimum(bare, mixed), inked)
        error[number] = np.bincount(region, weights=least, minlength=len(paint))
    return error.argmin(0)


def _off_segment(point: Array, end: Array) -> Array:
    """(K,) squared distances of points (K, 3) from the segment between 0 and `end`, (K, 3) or (3,)."""
    share = np.sum(point * end, axis=1) / np.sum(end * end, axis=-1)
    rest = point - share.clip(0, 1)[:, None] * end
    return np.asarray(np.einsum("kc,kc->k", rest, rest))


def _centers(
    far: Array, at: NDArray[np.int64], region: NDArray[np.int64], count: int, size: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(R,) centroids in pixels; pixels at the edge count by how far they are from the background."""
    weight = np.minimum(far / FULL, 1)
    total = np.bincount(region, weights=weight, minlength=count)
    row, column = np.divmod(at % size**2, size)
    x, y = (np.bincount(region, weights=weight * (v + 0.5), minlength=count) / total for v in (column, row))
    return x, y


def _patches(
    away: Array,
    labels: NDArray[np.int64],
    chosen: NDArray[np.int64],
    owner: NDArray[np.int64],
    left: NDArray[np.int64],
    top: NDArray[np.int64],
) -> Array:
    """(R, P, P, 3) windows around the regions, without what belongs to others and outside of the picture."""
    size, half = labels.shape[1], window(labels.shape[1]) // 2
    reach = np.arange(-half, half)
    rows, columns = top[:, None] + reach, left[:, None] + reach  # (R, P)
    inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None]
    at = owner[:, None, None], rows.clip(0, size - 1)[:, :, None], columns.clip(0, size - 1)[:, None]
    there = labels[at]
    kept = inside & ((there == 0) | (there == chosen[:, None, None]))
    return np.asarray(away[at] * kept[..., None])


def _match(
    patches: Array, color: NDArray[np.int64], paint: Array, size: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(R,) template of the smallest squared error |D - C u - I v|^2, and that error over |C u + I v|^2.

    D is the patch less the background; C and I are the template's shares of color and ink; u and v are what
    color and ink differ from the background by.
    """
    colors, _, black = palette()
    t = templates(size)
    u, v = colors[color] - paint, black - paint  # (R, 3)
    flat = patches.reshape(len(patches), -1, 3)
    along = [np.einsum("rpc,rc->rp", flat, w) for w in (u, v)]
    uu, uv, vv = (np.sum(a * b, axis=1)[:, None] for a, b in ((u, u), (u, v), (v, v)))
    energy = uu * t.color2 + 2 * uv * t.both + vv * t.ink2  # (R, K)
    error = energy - 2 * (along[0] @ t.color + along[1] @ t.ink)
    best = error.argmin(1)
    rows = np.arange(len(best))
    whole = np.einsum("rpc,rpc->r", flat, flat)
    return best, (error[rows, best] + whole) / energy[rows, best]
