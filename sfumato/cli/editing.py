"""What `sfumato generate` draws from besides a prompt: pictures, and how much of them stays."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfumato.systems.request import Request
    from sfumato.systems.system import System

__all__ = ["Edit", "EditFlags", "Source", "tile_for"]

WORTH_SAYING = 2**30  # bytes
SMALLEST = 256  # side of a tile in pixels


@dataclass(frozen=True, kw_only=True)
class EditFlags:
    """Flags of `sfumato generate` about pictures."""

    image: Path | None = None
    """Picture to change, or to be told of; scaled and cropped to --size."""
    mask: Path | None = None
    """White where --image is to be repainted; of the same size."""
    strength: float | None = None
    """How much of --image changes, in (0, 1]; 1 if not given, 0.5 for --enlarge."""
    extend: str | None = None
    """Pixels to paint beyond --image: on all sides, or LEFT,TOP,RIGHT,BOTTOM."""
    invert: str | None = None
    """What --image shows: begin with the noise that DDIM draws it from, and change as little as possible."""
    hint: Path | None = None
    """Depth picture, brighter = nearer, for systems that are told one."""
    low_res: Path | None = None
    """Picture to enlarge, for systems that do so."""
    aug: float | None = None
    """How much the picture to enlarge, or to be told of, is noised: 0 to 1, the system's own if not given."""
    enlarge: float | None = None
    """Second pass: enlarge what was drawn so much and draw over it by --strength."""
    tile: int | None = None
    """Side of overlapping tiles, in pixels of the result; if not given, by the memory there is. 0 = none."""


@dataclass(frozen=True)
class Source:
    """A picture file by its content, so that a picture that was drawn from it can be drawn again."""

    path: str
    sha256: str

    @staticmethod
    def of(path: Path) -> Source:
        """Raises: ValueError in one line if the file cannot be read."""
        from sfumato.core.image import contents

        return Source(str(path), hashlib.sha256(contents(str(path))).hexdigest())


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What a picture is drawn from; the fields are those of Request, and of EditFlags."""

    image: Source | None = None
    mask: Source | None = None
    hint: Source | None = None
    low_res: Source | None = None
    strength: float | None = None
    aug: float | None = None
    extend: tuple[int, int, int, int] = (0, 0, 0, 0)
    enlarge: float = 1.0

    @staticmethod
    def of(flags: EditFlags) -> Edit:
        """Raises: ValueError in one line for flags that do not go together, or files that cannot be read."""
        if (flags.extend or flags.invert is not None or flags.mask) and flags.image is None:
            raise ValueError("--mask, --extend and --invert are about a picture; give it as --image")
        if flags.extend and flags.mask:
            raise ValueError("--extend makes a mask of its own; leave out --mask")
        sides = [int(n) for n in (flags.extend or "0").split(",") if re.fullmatch(r"\d+", n)]
        if len(sides) not in (1, 4) or len(sides) != (flags.extend or "0").count(",") + 1:
            raise ValueError(f"--extend is {flags.extend!r}; write one number, or LEFT,TOP,RIGHT,BOTTOM")
        if flags.enlarge is not None and not 1 < flags.enlarge <= 8:
            raise ValueError(f"--enlarge is {flags.enlarge:g}; allowed: more than 1, up to 8")
        left, top, right, bottom = sides * (4 // len(sides))
        given = {n: p for n in ("image", "mask", "hint", "low_res") if (p := getattr(flags, n)) is not None}
        return Edit(
            **{name: Source.of(path) for name, path in given.items()},
            strength=flags.strength,
            aug=flags.aug,
            extend=(left, top, right, bottom),
            enlarge=flags.enlarge or 1.0,
        )

    def request(self) -> Request:
        """Raises: ValueError in one line if a file is not what it was."""
        from sfumato.core.image import contents, decode, extended

        request: Request = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Source):
                data = contents(value.path)
                if hashlib.sha256(data).hexdigest() != value.sha256:
                    raise ValueError(f"{value.path} is not the picture that it was; give the one of then")
                request[field.name] = decode(data, name=value.path)  # type: ignore[literal-required]
            elif field.name in ("strength", "aug") and value is not None:
                request[field.name] = value  # type: ignore[literal-required]
        if any(self.extend):
            request["image"], request["mask"] = extended(request["image"], self.extend)  # type: ignore[arg-type]
        return request

    def size(self, system: System, request: Request) -> tuple[int, int] | None:
        """(height, width) where the pictures decide it; None where the system does."""
        from PIL import Image

        from sfumato.systems.request import entered

        image, size = request.get("image"), entered(request, system.stages).get("size")
        if isinstance(size, tuple):
            return size
        if any(self.extend) and isinstance(image, Image.Image):
            return image.height, image.width
        return None


def tile_for(system: System, size: tuple[int, int], asked: int | None) -> int | None:
    """Side of the tiles in which a picture of (height, width) is decoded; None = all at once.

    Where it takes much memory an estimate is printed, before the work.
    """
    from sfumato.systems.codec import Latents
    from sfumato.systems.tiles import decoding_bytes

    codec = system.stages[-1].codec
    if asked is not None or not isinstance(codec, Latents):
        return asked or None
    needed, free = decoding_bytes(codec.autoencoder.config, size), _free_bytes()
    side = max(size)
    tile = side
    while tile > SMALLEST and decoding_bytes(codec.autoencoder.config, (tile, tile)) > free / 2:
        tile = tile // 2
    tile -= tile % codec.factor
    if needed >= WORTH_SAYING or tile < side:
        how = "all at once" if tile == side else f"in tiles of {tile} pixels"
        said = f"decoding {size[1]}x{size[0]} takes about {needed / 2**30:.1f} GiB of {free / 2**30:.1f} free"
        print(f"sfumato: {said}: {how}", file=sys.stderr)
    return None if tile == side else tile


def _free_bytes() -> float:
    """Memory that the system can give, where it says so."""
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES")) * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows, and not on every Unix
        return float("inf")
