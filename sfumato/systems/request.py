"""What a caller of `System.generate` may ask for, and how it becomes inputs and options."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import TypedDict

import torch
from PIL import Image
from torch import Tensor

from sfumato.core.image import center_crop, from_pil, to_float
from sfumato.core.registry import unknown
from sfumato.core.types import Inputs
from sfumato.diffusion.guidance import CFG, Guidance, InstructPix2Pix
from sfumato.systems.options import Knob, SampleOptions
from sfumato.systems.start import FromImage, FromNoise, Start

__all__ = ["Request", "inputs_for", "options_for", "seeds_for"]

Size = tuple[int, int]
Texts = str | Sequence[str]


class Request(TypedDict, total=False):
    """Keyword arguments of `System.generate`; what is left out is the system's own choice."""

    n: int
    """Pictures per prompt."""
    negative: Texts
    """What to keep away from: one for all, or one per prompt."""
    label: Sequence[int]
    """Classes, for class-conditional systems, in place of prompts."""
    size: int | Size
    """Side of a square, or (height, width), in pixels."""
    image: Image.Image | Tensor
    """Picture to start from: a Pillow image, or (n, 3, H, W) in [-1, 1]."""
    mask: Image.Image | Tensor
    """White, or 1, where `image` is to be repainted; of the same size."""
    hint: Image.Image | Tensor
    """What a system is told of the result pixel by pixel: how near things are, brighter = nearer."""
    low_res: Image.Image | Tensor
    """Picture to enlarge; it decides the size."""
    noise_level: float
    """How much `low_res`, or the embedding of `image`, is noised, in times of its schedule."""
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
    text: Texts | None, request: Request, default_size: Size | None, enlargement: int = 1
) -> Inputs:
    """The inputs of all pictures of a request, prompt by prompt.

    Args:
        enlargement: how much larger the system makes `low_res`.

    Raises: ValueError in one line for an empty list, or lists whose lengths differ.
    """
    prompts = [text] if isinstance(text, str) else text
    n, labels = request.get("n", 1), request.get("label")
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"n is {n!r}; allowed: a whole number of at least 1 pictures per prompt")
    if prompts is not None and not len(prompts):
        raise ValueError('the list of prompts is empty; give at least one, "" draws without a prompt')
    count = len(prompts) if prompts is not None else len(labels) if labels is not None else 1
    size, low_res = _size(request.get("size")), _picture(request.get("low_res"), None, count * n)
    if low_res is not None and size is None:
        size = low_res.shape[-2] * enlargement, low_res.shape[-1] * enlargement
    target = size or default_size
    _check_mask(request.get("image"), request.get("mask"))
    hint = _picture(request.get("hint"), target, count * n)
    return Inputs(
        n=count * n,
        text=None if prompts is None else _each(prompts, n),
        negative=_negatives(request.get("negative"), count, n),
        label=None if labels is None else torch.tensor(labels).repeat_interleave(n),
        size=size,
        image=_picture(request.get("image"), target, count * n),
        mask=_mask(request.get("mask"), target, count * n),
        strength=request.get("strength", 1.0),
        hint=hint / 2 + 0.5 if isinstance(request.get("hint"), Image.Image) and hint is not None else hint,
        low_res=low_res,
        noise_level=request.get("noise_level"),
    )


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
    begins = "image" in request and (not told or "strength" in request)
    if begins and "start" not in given and isinstance(defaults.start, FromNoise):
        given["start"] = FromImage(blend=not told)
    return replace(defaults, **given) if given else defaults


def seeds_for(seed: int, n: int) -> list[int]:
    """seed, seed + 1, ... Raises: ValueError if one is negative or has more than 63 bits."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63 - n:
        raise ValueError(f"seed is {seed!r}; allowed: a whole number from 0 to 2^63 - 1")
    return list(range(seed, seed + n))


def _guidance(default: Guidance, asked: object) -> object:
    if not isinstance(asked, int | float):
        return asked
    if isinstance(default, InstructPix2Pix):
        return replace(default, text=float(asked))
    return replace(default, scale=float(asked)) if isinstance(default, CFG) else CFG(float(asked))


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
