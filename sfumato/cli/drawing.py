"""One picture of `sfumato generate`: all that decides what it looks like, in its file too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from sfumato import __version__
from sfumato.cli.editing import Edit
from sfumato.core.config import from_json, to_json
from sfumato.core.png import PARAMETERS, encode_png, parameters
from sfumato.core.types import Reading
from sfumato.systems.options import SampleOptions
from sfumato.systems.request import Request
from sfumato.systems.stage import Observer
from sfumato.systems.system import System

__all__ = ["Drawing", "drawing_of", "encoded", "record_of"]

NAMES = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "dpm2": "DPM2",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "lms": "LMS",
    "plms": "PLMS",
    "unipc": "UniPC",
}
"""How other studios call our samplers."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Everything but the system itself.

    Attributes:
        label: class; None = none.
        size: (height, width).
        options: by stage, nothing left to defaults.
        reading: see Inputs.
        edit: the pictures that it is drawn from.
    """

    prompt: str
    negative: str
    seed: int
    size: tuple[int, int]
    options: Mapping[str, SampleOptions]
    reading: Reading | None = None
    label: int | str | None = None
    edit: Edit = field(default_factory=Edit)

    @property
    def steps(self) -> int:
        """Of all stages and passes."""
        return sum(options.steps for options in self.options.values()) * (1 + (self.edit.enlarge > 1))

    def draw(
        self, system: System, observe: Observer | None = None, hints: list[Image.Image] | None = None
    ) -> Image.Image:
        """The picture. It is made alone, for in a batch of another size it could round differently."""
        # SDXL takes no negative prompt for another thing than an empty one.
        common: Request = {"negative": self.negative} if self.negative else {}
        common |= {"reading": self.reading} if self.reading else {}
        common |= {} if self.label is None else {"label": [self.label]}
        common |= {"hint": hints} if hints else {}
        common |= {"options": self.options}
        told = self.edit.request()
        enlarge, strength = self.edit.enlarge, told.get("strength", 0.5)
        if enlarge > 1:
            told.pop("strength", None)  # it is that of the second pass
        image = self._pass(system, {**common, **told, "size": self.size}, observe)
        if enlarge == 1:
            return image
        height, width = (round(side * enlarge / system.factor) * system.factor for side in self.size)
        second: Request = {**common, "size": (height, width), "image": image, "strength": strength}
        return self._pass(system, second, observe)

    def _pass(self, system: System, request: Request, observe: Observer | None) -> Image.Image:
        return system.generate([self.prompt], seed=self.seed, observe=observe, **request)[0]


def record_of(drawing: Drawing, system: System) -> dict[str, object]:
    """JSON data from which `drawing_of` makes the drawing again, and what its reader should know."""
    about = system.about
    return {
        "sfumato": __version__,
        "system": {"name": about.name, "fingerprint": system.fingerprint},
        "license": about.license,
        "attribution": about.attribution,
        **to_json(drawing),
    }


def drawing_of(record: Mapping[str, object], path: Path) -> Drawing:
    """The drawing that a picture's record describes. Raises: ValueError in one line if it describes none."""
    return from_json(Drawing, record, where=f"the record in {path} is not that of a picture to draw again")


def encoded(image: Image.Image, drawing: Drawing, system: System) -> bytes:
    """The PNG file of a picture, with its record and the text that other studios read."""
    text = {PARAMETERS: _parameters(drawing, system)}
    return encode_png(image, record=record_of(drawing, system), text=text)


def _parameters(drawing: Drawing, system: System) -> str:
    """Of several stages it tells the first, which settles the picture."""
    first = next(iter(drawing.options.values()))
    scale = getattr(first.guidance, "scale", None)
    settings: dict[str, object] = {
        "Steps": first.steps,
        "Sampler": NAMES.get(first.sampler, first.sampler),
        **({} if scale is None else {"CFG scale": f"{scale:g}"}),
        "Seed": drawing.seed,
        "Size": f"{drawing.size[1]}x{drawing.size[0]}",
        "Model hash": system.fingerprint,
        "Model": system.about.name,
        "Version": f"sfumato {__version__}",
    }
    return parameters(drawing.prompt, drawing.negative, settings)
