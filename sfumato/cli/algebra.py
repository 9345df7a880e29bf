"""The verb that computes with pictures: variations, paths, differences, and where embeddings come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from sfumato.cli.output import check_writable
from sfumato.cli.parsing import parse

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.systems.algebra import Space

__all__ = ["algebra"]

Kind = Literal["vary", "interpolate", "difference", "sources", "truncate"]


@dataclass(frozen=True, kw_only=True)
class Algebra:
    """Compute with pictures in the space of CLIP, and write the results on one sheet.

    vary = other pictures of the same content; interpolate = from picture to picture, or all mixed; difference
    = the first picture moved from text --base towards --text; sources = a text as its embedding, the prior's
    and the picture's draw it; truncate = with fewer and fewer principal axes of the pictures.
    """

    kind: Positional[Kind]
    pictures: Positional[tuple[Path, ...]]
    """Picture files."""
    system: Path
    """Folder of an unCLIP system."""
    text: str = ""
    base: str = ""
    """Text that `difference` leaves behind."""
    n: int = 5
    """Pictures in a row."""
    eta: float | None = None
    """Of variations: begin with the picture's own noise, found by DDIM, and add this share of fresh noise."""
    theta: float = 0.4
    """How far `difference` goes."""
    seed: int = 0
    steps: int | None = None
    out: Path = Path("out/algebra.png")
    device: str = "auto"


def algebra(args: list[str]) -> int:
    """`sfumato algebra`: see Algebra."""
    from sfumato.api import load
    from sfumato.core import image as pictures
    from sfumato.core.png import save_png
    from sfumato.systems.algebra import Space

    asked = parse(Algebra, "algebra", args)
    check_writable(asked.out)
    if asked.n < 2 or not asked.pictures:
        raise ValueError(f"n {asked.n} and {len(asked.pictures)} pictures; give at least 2 and 1")
    import torch

    space = Space(load(asked.system, device=asked.device))
    side = space.decoder.pixels or (64, 64)
    files = [pictures.center_crop(pictures.load(path).convert("RGB"), side) for path in asked.pictures]
    images = torch.stack([pictures.to_float(pictures.from_pil(file)) for file in files])
    rows, columns = _drawn(space, asked, images)
    save_png(asked.out, pictures.grid(pictures.to_uint8(rows.cpu()), columns=columns))
    print(asked.out)
    return 0


def _drawn(space: Space, asked: Algebra, images: Tensor) -> tuple[Tensor, int]:
    """The pictures of a sheet, and how many stand in a row."""
    import torch

    from sfumato.systems.algebra import Axes, difference, slerp, spherical_mean

    z, n = space.pictures(images), asked.n
    where, texts = [i / (n - 1) for i in range(n)], [asked.text] * n
    if asked.kind == "vary":
        made, noise = z[:1].expand(n, -1), None
        if asked.eta is not None:
            noise = space.inverted(images[:1], z[:1], steps=asked.steps).expand(n, -1, -1, -1)
        return space.decode(made, seed=asked.seed, noise=noise, eta=asked.eta or 0.0, steps=asked.steps), n
    if asked.kind == "interpolate":
        between = [slerp(z[i], z[i + 1], t) for i in range(len(z) - 1) for t in where]
        if len(z) > 2:
            between.append(spherical_mean(z, [1.0] * len(z)))
        made = torch.stack(between or list(z))
    elif asked.kind == "difference":
        text, base = space.texts([asked.text]), space.texts([asked.base])
        made = torch.cat([difference(z[:1], text, base, asked.theta * t) for t in where])
    elif asked.kind == "sources":
        prior = space.drawn_by_prior(texts, asked.seed)
        made = torch.cat([space.texts(texts), prior, z[:1].expand(n, -1)])
        return space.decode(made, texts=texts * 3, seed=asked.seed, steps=asked.steps), n
    else:
        axes, most = Axes.of(z), min(len(z) - 1, z.shape[1])
        made = torch.cat([axes.truncated(z[:1], round(most * t)) for t in where])
    one = [space.decode(row[None], seed=asked.seed, steps=asked.steps) for row in made]  # with one noise
    return torch.cat(one), n
