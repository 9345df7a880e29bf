"""What a caller of `System.generate` may ask for, and how it becomes inputs and options."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import TypedDict

import torch
from PIL import Image
from torch import Tensor

from sfumato.conditioners.image import checked_level, enlarging, told_level
from sfumato.core.image import center_crop, from_pil, to_float
from sfumato.core.registry import unknown
from sfumato.core.types import Inputs, Reading
from sfumato.diffusion.guidance import CFG, Embedded, Guidance, Guided, InstructPix2Pix, LogitCFG
from sfumato.systems.options import Knob, SampleOptions
from sfumato.systems.stage import Stage
from sfumato.systems.start import FromImage, FromNoise, Start

__all__ = ["Request", "classes_of", "entered", "inputs_for", "options_for", "seeds_for"]

Size = tuple[int, int]
Texts = str | Sequence[str]


class Request(TypedDict, total=False):
    """Keyword arguments of `System.generate`; what is left out is the system's own choice."""

    n: int
    """Pictures per prompt."""
    reading: Reading
    """Weights of words, long prompts and CLIP's last blocks; the system's own choice if not given."""
    negative: Texts
    """What to keep away from: one for all, or one per prompt."""
    label: Sequence[int | str]
    """Classes by number or name, for class-conditional systems and guides, in place of prompts."""
    size: int | Size
    """Side of a square, or (height, width), in pixels."""
    original_size: Size
    crop: Size
    target_size: Size
    """What SDXL is told of its picture besides: see Inputs."""
    aesthetic: float
    """Score that SDXL's refiner is told."""
    image: Image.Image | Tensor
    """Picture to start from: a Pillow image, or (n, 3, H, W) in [-1, 1]."""
    mask: Image.Image | Tensor
    """White, or 1, where `image` is to be repainted; of the same size."""
    low_res: Image.Image | Tensor
    """Picture to enlarge, or (n, 3, h, w) in [-1, 1]: the first stage that runs is the one that reads it."""
    aug: float
    """Noise on the picture to enlarge, or on the embedding of `image`, 0 to 1; else the stage's own."""
    hint: Image.Image | Tensor | Sequence[Image.Image] | None
    """A picture for each ControlNet or T2I-Adapter, or how near things are, brighter = nearer; or all side by
    side, (n, K, H, W) in [-1, 1]."""
    strength: float
    """How much of the walk an edit of `image` repeats, in (0, 1]; 1 if not given. All steps are in it."""
    only: Collection[str]
    """Names of the stages to run."""
    options: Mapping[str, SampleOptions]
    """By stage; the ones below are applied on top, to every stage that runs."""
    steps: int
    sampler: str
    knobs: Mapping[str, Knob]
    spacing: str
    spacing_knobs: Mapping[str, Knob]
    guidance: float | Guidance
    """A number is the scale of the stage's own guidance; 1 = off."""
    window: tuple[float, float]
    start: Start
    tile: int | None


def inputs_for(
    text: Texts | None, request: Request, default_size: Size | None, names: Sequence[str] = ()
) -> Inputs:
    """The inputs of all pictures of a request, prompt by prompt.

    Args:
        names: of the classes, which labels may be given by.

    Raises: ValueError in one line for an empty list, lists whose lengths differ, or an unknown class.
    """
    prompts = [text] if isinstance(text, str) else text
    n, labels = request.get("n", 1), request.get("label")
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n is {n!r}; allowed: a whole number of at least 1 pictures per prompt")
    if prompts is not None and not len(prompts):
        raise ValueError('the list of prompts is empty; give at least one, "" draws without a prompt')
    count = len(prompts) if prompts is not None else len(labels) if labels is not None else 1
    size = _size(request.get("size"))
    target = size or default_size
    _check_mask(request.get("image"), request.get("mask"))
    return Inputs(
        n=count * n,
        text=None if prompts is None else _each(prompts, n),
        negative=_negatives(request.get("negative"), count, n),
        label=None if labels is None else torch.tensor(classes_of(labels, names)).repeat_interleave(n),
        size=size,
        reading=request.get("reading"),
        original_size=request.get("original_size"),
        crop=request.get("crop", (0, 0)),
        target_size=request.get("target_size"),
        aesthetic=request.get("aesthetic"),
        image=_picture(request.get("image"), target, count * n),
        mask=_mask(request.get("mask"), target, count * n),
        strength=request.get("strength", 1.0),
        low_res=_picture(request.get("low_res"), None, count * n),
        aug=None if "aug" not in request else torch.full((count * n,), float(request["aug"])),
        hint=_hint(request.get("hint"), target, count * n),
    )


def classes_of(labels: Sequence[int | str], names: Sequence[str]) -> list[int]:
    """Numbers of classes. A name may be one of several that stand in a class's name with commas between.

    Raises: ValueError in one line for a name of no class, or of several.
    """
    known: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        for one in {name, *name.split(",")}:
            known.setdefault(one.strip().casefold(), []).append(number)
    numbers = []
    for label in labels:
        if not isinstance(label, str) or label.strip().isdecimal():
            numbers.append(int(label))
            continue
        found = known.get(label.strip().casefold(), [])
        if len(found) != 1:
            raise ValueError(f"label {label!r}{_advice(label, known, found)}")
        numbers += found
    return numbers


def entered(request: Request, stages: Sequence[Stage]) -> Request:
    """The request with the stages and the size that a picture to enlarge means; without one itself.

    Raises: ValueError in one line if no stage that runs enlarges, or `aug` is of no effect or out of range.
    """
    asked = request.copy()
    only, low = request.get("only"), request.get("low_res")
    running = [s for s in stages if only is None or s.name in only]
    reading = [s for s in running if enlarging(s.conditioner) is not None]
    if "aug" in request:
        checked_level(torch.tensor([float(request["aug"])]))
        if not any(told_level(s.conditioner) for s in running):
            raise ValueError("aug is given, and no stage that runs is told such a level; leave it out")
    if low is None:
        return asked
    if not reading or (only is not None and running[0] is not reading[0]):
        names = ", ".join(repr(s.name) for s in running)
        raise ValueError(f"low_res is a picture to enlarge, and {names} would begin without it; leave it out")
    first, last = reading[0], next(s for s in reversed(stages) if s.pixels is not None)
    reader = enlarging(first.conditioner)
    assert reader is not None
    factor = reader.factor * first.codec.factor  # from the picture to the pixels of this stage
    assert first.pixels is not None
    assert last.pixels is not None
    asked["only"] = [s.name for s in running[running.index(first) :]]
    if isinstance(low, Image.Image):
        wanted = _size(request.get("size"))
        if wanted is not None:  # the same part of the picture that the sides of the stages are
            own = [s * p // (q * factor) for s, p, q in zip(wanted, first.pixels, last.pixels, strict=True)]
            low = center_crop(low.convert("RGB"), (own[0], own[1]))
        asked["low_res"] = low = to_float(from_pil(low))
    if "size" not in request:
        sides = [
            s * factor * q // p for s, p, q in zip(low.shape[-2:], first.pixels, last.pixels, strict=True)
        ]
        asked["size"] = sides[0], sides[1]
    return asked


def options_for(defaults: SampleOptions, request: Request, *, told: bool = False) -> SampleOptions:
    """The options of a stage with what the request overrides.

    Args:
        told: whether the stage's network is told the picture, so that it can begin with noise.

    Raises: ValueError in one line for a name that is no option, or a value out of range.
    """
    allowed = {*Request.__annotations__, *(f.name for f in fields(SampleOptions))}
    for name in request:
        if name not in allowed:
            raise ValueError(unknown("option", name, list(allowed)))
    given = {f.name: request[f.name] for f in fields(SampleOptions) if f.name in request}  # type: ignore[literal-required]
    if "guidance" in given:
        given["guidance"] = _guidance(defaults.guidance, given["guidance"])
    if "sampler" in given and given["sampler"] != defaults.sampler:
        given.setdefault("knobs", {})  # another sampler's knobs would be unknown to this one
    if "spacing" in given and given["spacing"] != defaults.spacing:
        given.setdefault("spacing_knobs", {})
    knobs = defaults.spacing_knobs
    if "steps" in given and "sections" in knobs and not given.keys() & {"spacing", "spacing_knobs"}:
        given["spacing_knobs"] = {name: v for name, v in knobs.items() if name != "sections"}
    begins = "image" in request and (not told or "strength" in request)
    if begins and "start" not in given and isinstance(defaults.start, FromNoise):
        given["start"] = FromImage(blend=not told)
    return replace(defaults, **given) if given else defaults


def seeds_for(seed: int, n: int) -> list[int]:
    """seed, seed + 1, ... Raises: ValueError if one is negative or has more than 63 bits."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63 - n:
        raise ValueError(f"seed is {seed!r}; allowed: a whole number from 0 to 2^63 - 1")
    return list(range(seed, seed + n))


def _advice(label: str, known: Mapping[str, list[int]], found: list[int]) -> str:
    if not known:
        return ": the classes of this system have no names; give a number"
    if found:
        return f" is the name of classes {found}; give a number"
    near = difflib.get_close_matches(label.casefold(), list(known), n=3)
    nearest = f"the nearest names are {', '.join(near)}" if near else "`sfumato info` lists their names"
    return f" is no class of this system; {nearest}"


def _guidance(default: Guidance, asked: object) -> object:
    if not isinstance(asked, int | float):
        return asked
    if isinstance(default, InstructPix2Pix):
        return replace(default, text=float(asked))
    kinds = CFG | Embedded | Guided | LogitCFG
    return replace(default, scale=float(asked)) if isinstance(default, kinds) else CFG(float(asked))


def _each(values: Sequence[str], n: int) -> list[str]:
    return [value for value in values for _ in range(n)]


def _negatives(negative: Texts | None, count: int, n: int) -> list[str] | None:
    if negative is None:
        return None
    texts = [negative] * count if isinstance(negative, str) else negative
    if len(texts) != count:
        raise ValueError(
            f"negative has {len(texts)} texts for {count} prompts; give one for all, or one for each"
        )
    return _each(texts, n)


def _size(size: int | Size | None) -> Size | None:
    return (size, size) if isinstance(size, int) else size


def _picture(image: Image.Image | Tensor | None, size: Size | None, n: int) -> Tensor | None:
    if isinstance(image, Image.Image):
        image = to_float(from_pil(image if size is None else center_crop(image.convert("RGB"), size)))
    return None if image is None else _rows(image, n)


def _hint(
    hint: Image.Image | Tensor | Sequence[Image.Image] | None, size: Size | None, n: int
) -> Tensor | None:
    """One picture after the other in the channels."""
    if hint is None or isinstance(hint, Image.Image | Tensor):
        return _picture(hint, size, n)
    return torch.cat([one for picture in hint if (one := _picture(picture, size, n)) is not None], dim=1)


def _check_mask(image: Image.Image | Tensor | None, mask: Image.Image | Tensor | None) -> None:
    if mask is not None and image is None:
        raise ValueError("a mask says where a picture is to be repainted, and there is none; give an image")
    if image is not None and mask is not None and _sides(image) != _sides(mask):
        (height, width), (own, across) = _sides(image), _sides(mask)
        raise ValueError(
            f"the mask is {across}x{own} pixels and the image {width}x{height}; give a mask of that size"
        )


def _sides(picture: Image.Image | Tensor) -> Size:
    if isinstance(picture, Image.Image):
        return picture.height, picture.width
    return picture.shape[-2], picture.shape[-1]


def _mask(mask: Image.Image | Tensor | None, size: Size | None, n: int) -> Tensor | None:
    if isinstance(mask, Image.Image):
        rgb = mask.convert("L").convert("RGB")
        mask = from_pil(rgb if size is None else center_crop(rgb, size))[:1].float() / 255
    return None if mask is None else (_rows(mask, n) > 0.5).float()


def _rows(picture: Tensor, n: int) -> Tensor:
    rows = picture if picture.ndim == 4 else picture[None]
    return rows.expand(n, *rows.shape[1:]) if len(rows) == 1 else rows
