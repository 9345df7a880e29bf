"""Line charts as pictures, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from PIL import Image, ImageDraw, ImageFont

__all__ = ["Curve", "Scale", "chart", "short", "ticks"]

Scale = Literal["log", "linear"]
Spot = tuple[float, float]

# Okabe & Ito's colors, which color-blind people tell apart; their yellow is too pale for lines on white. Then
# some of Tol's, for more than seven curves.
COLORS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"),
    *("#882255", "#999933", "#332288", "#aaaaaa", "#44aa99"),
)
INK, GRID = "#333333", "#dddddd"
FINE = 2  # drawn this much larger and reduced, which smooths the lines
DASH = (9.0, 6.0)  # pixels drawn and left out
MARGINS = (76, 24, 52)  # pixels left of, right of and below the axes
LINE = 20  # pixels per line of text
DIGITS = (range(1, 10), (1, 2, 5), (1, 3), (1,))  # of the ticks of a logarithmic axis, the most first


@dataclass(frozen=True)
class Curve:
    """A named line through points; values that are not finite leave a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


@dataclass(frozen=True)
class Axes:
    """Where a value lies: within (left, top, right, bottom), in pixels."""

    box: tuple[float, float, float, float]
    x: tuple[float, float]
    y: tuple[float, float]
    scale: Scale

    def spot(self, x: float, y: float) -> Spot:
        """The pixel of a point."""
        left, top, right, bottom = self.box
        rise: Callable[[float], float] = math.log if self.scale == "log" else float
        low, high = map(rise, self.y)
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        return left + across * (right - left), bottom - (rise(y) - low) / (high - low) * (bottom - top)


def chart(
    curves: Sequence[Curve],
    *,
    title: str = "",
    labels: tuple[str, str] = ("", ""),
    scale: Scale | None = None,
    size: tuple[int, int] = (960, 600),
) -> Image.Image:
    """A line chart with ticks, grid and legend.

    Args:
        labels: of the x axis, below it, and of the y axis, above it.
        scale: of the y axis; None = logarithmic if every value is positive.
        size: (width, height) in pixels.

    Raises: ValueError in one line if there is nothing to draw, or a value that has no logarithm.
    """
    points = [p for curve in curves for p in zip(curve.x, curve.y, strict=True) if math.isfinite(p[1])]
    if not points:
        raise ValueError("there is no finite value to draw")
    lowest = min(y for _, y in points)
    if scale == "log" and lowest <= 0:
        raise ValueError(f"the value {lowest:g} has no place on a logarithmic scale; choose the linear one")
    scale = scale or ("log" if lowest > 0 else "linear")
    image = Image.new("RGB", (size[0] * FINE, size[1] * FINE), "white")
    pen = ImageDraw.Draw(image)
    top = _heading(pen, curves, title, size[0])
    left, right, below = MARGINS
    box = (left * FINE, (top + LINE) * FINE, (size[0] - right) * FINE, (size[1] - below) * FINE)
    axes = Axes(box, _across([x for x, _ in points]), _padded([y for _, y in points], scale), scale)
    _frame(pen, axes, labels)
    for i, curve in enumerate(curves):
        _line(pen, axes, curve, COLORS[i % len(COLORS)])
    return image.resize(size, Image.Resampling.LANCZOS)


def ticks(low: float, high: float, scale: Scale, most: int = 8) -> list[float]:
    """Round numbers within [low, high], at most `most` of them, and at least two unless `most` is small."""
    if scale == "log":
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        for digits in DIGITS:
            # A decimal read back, for 3 * 10**-2 is not 0.03.
            found = [v for p in powers for d in digits if low <= (v := float(f"{d}e{p}")) <= high]
            if 2 <= len(found) <= most:
                return found
        if len(found) > most:
            return found[:: math.ceil(len(found) / most)]
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def short(value: float) -> str:
    """A number for an axis: 0.002, 1.5, 200k, 3M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _across(values: Sequence[float]) -> tuple[float, float]:
    """The range of the x axis: from 0, unless the values begin far from it."""
    low, high = min(values), max(values)
    if 0 <= low <= 0.5 * high:
        low = 0.0
    return (low, high) if high > low else (low - 1, high + 1)


def _padded(values: Sequence[float], scale: Scale) -> tuple[float, float]:
    """The range of the y axis, a little larger than that of the values, and never empty."""
    low, high = min(values), max(values)
    if scale == "log":
        room = max((high / low) ** 0.05, 1.05)
        return low / room, high * room
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - room, high + room


def _heading(pen: ImageDraw.ImageDraw, curves: Sequence[Curve], title: str, width: int) -> int:
    """Title and legend at the top; returns the height that they take."""
    y = 12
    if title:
        _text(pen, (MARGINS[0], y + 8), title, size=17, anchor="lm")
        y += LINE + 8
    x = MARGINS[0]
    for i, curve in enumerate(curves):
        needed = 34 + int(_font(14).getlength(curve.name) / FINE) + 22
        if x > MARGINS[0] and x + needed > width - MARGINS[1]:
            x, y = MARGINS[0], y + LINE
        color = COLORS[i % len(COLORS)]
        _stroke(pen, (x * FINE, (y + 8) * FINE), ((x + 27) * FINE, (y + 8) * FINE), color, curve.dashed, 0.0)
        _text(pen, (x + 34, y + 8), curve.name, anchor="lm")
        x += needed
    return y + LINE + 6


def _frame(pen: ImageDraw.ImageDraw, axes: Axes, labels: tuple[str, str]) -> None:
    left, top, right, bottom = axes.box
    for value in ticks(*axes.x, "linear"):
        x, _ = axes.spot(value, axes.y[0])
        pen.line([(x, top), (x, bottom)], fill=GRID, width=FINE)
        _text(pen, (x / FINE, bottom / FINE + 14), short(value), anchor="mm")
    for value in ticks(*axes.y, axes.scale):
        _, y = axes.spot(axes.x[0], value)
        pen.line([(left, y), (right, y)], fill=GRID, width=FINE)
        _text(pen, (left / FINE - 8, y / FINE), short(value), anchor="rm")
    pen.rectangle(axes.box, outline=INK, width=FINE)
    kind = " (log scale)" if axes.scale == "log" else ""
    _text(pen, ((left + right) / 2 / FINE, bottom / FINE + 36), labels[0], anchor="mm")
    _text(pen, (left / FINE, top / FINE - 11), f"{labels[1]}{kind}", anchor="lm")


def _line(pen: ImageDraw.ImageDraw, axes: Axes, curve: Curve, color: str) -> None:
    walked = 0.0
    spots = [axes.spot(x, y) if math.isfinite(y) else None for x, y in zip(curve.x, curve.y, strict=True)]
    for start, end in pairwise(spots):
        if start is not None and end is not None:
            _stroke(pen, start, end, color, curve.dashed, walked)
            walked += math.dist(start, end)
    for spot in spots:
        # A dashed curve has few points, and a single point no line.
        if spot is not None and (curve.dashed or len(spots) == 1):
            radius = 3 * FINE
            pen.ellipse([spot[0] - radius, spot[1] - radius, spot[0] + radius, spot[1] + radius], fill=color)


def _stroke(
    pen: ImageDraw.ImageDraw, start: Spot, end: Spot, color: str, dashed: bool, walked: float
) -> None:
    """A straight piece of a line, the pattern of its dashes continued from what was walked before."""
    width = 2 * FINE
    if not dashed:
        pen.line([start, end], fill=color, width=width, joint="curve")
        return
    length, (drawn, gap) = math.dist(start, end), (v * FINE for v in DASH)
    begin = -(walked % (drawn + gap))
    while begin < length:
        low, high = max(begin, 0.0), min(begin + drawn, length)
        if high > low:
            pen.line([_between(start, end, part / length) for part in (low, high)], fill=color, width=width)
        begin += drawn + gap


def _between(start: Spot, end: Spot, share: float) -> Spot:
    return start[0] + (end[0] - start[0]) * share, start[1] + (end[1] - start[1]) * share


def _text(pen: ImageDraw.ImageDraw, spot: Spot, text: str, *, anchor: str, size: int = 14) -> None:
    pen.text((spot[0] * FINE, spot[1] * FINE), text, fill=INK, font=_font(size), anchor=anchor)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * FINE)
