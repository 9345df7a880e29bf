"""PNG files that carry how they were made, written whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, PngImagePlugin
from torch import Tensor

from sfumato.core.image import to_pil

__all__ = [
    "PARAMETERS",
    "RECORD",
    "encode_png",
    "parameters",
    "read_record",
    "read_text",
    "save_png",
    "write_whole",
]

RECORD = "sfumato"
"""Text key of our own JSON."""
PARAMETERS = "parameters"
"""Text key that other studios read and write."""


def save_png(
    path: str | Path,
    image: Tensor | Image.Image,
    *,
    record: Mapping[str, object] | None = None,
    text: Mapping[str, str] | None = None,
) -> Path:
    """Write a picture: same arguments, same bytes; an interrupted write leaves no file behind.

    Args:
        path: missing folders are made.
        image: (3, H, W) or (1, H, W) uint8, or a Pillow image.
        record: JSON data kept under the key "sfumato"; read back by `read_record`.
        text: further text chunks, such as {"parameters": parameters(...)}.

    Raises: ValueError in one line if the folder cannot be written, or the record is no JSON.
    """
    return write_whole(path, encode_png(image, record=record, text=text))


def encode_png(
    image: Tensor | Image.Image,
    *,
    record: Mapping[str, object] | None = None,
    text: Mapping[str, str] | None = None,
) -> bytes:
    """The bytes that `save_png` writes."""
    chunks = dict(text or {})
    if record is not None:
        chunks[RECORD] = _dump(record)
    info = PngImagePlugin.PngInfo()
    for key, value in chunks.items():
        if "\0" in value or not 1 <= len(key.encode("latin-1", "replace")) <= 79 or not key.isascii():
            raise ValueError(
                f"PNG text {key[:79]!r} needs an ASCII key of 1 to 79 characters and a value without NUL"
            )
        info.add_text(key, value)  # a tEXt chunk if Latin-1 can say it, else iTXt: what other programs expect
    out = io.BytesIO()
    picture = to_pil(image) if isinstance(image, Tensor) else image
    picture.save(out, "PNG", pnginfo=info, compress_level=6)
    return out.getvalue()


def read_text(path: str | Path) -> dict[str, str]:
    """All text chunks of a PNG file, in their order.

    Raises: ValueError in one line if the file is absent, damaged or no PNG.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            assert isinstance(image, PngImagePlugin.PngImageFile)
            return {key: str(value) for key, value in image.text.items()}
    except FileNotFoundError:
        raise ValueError(f"there is no picture at {path}") from None
    except (OSError, SyntaxError, ValueError) as error:
        reason = "it is not a PNG file" if isinstance(error, Image.UnidentifiedImageError) else f"{error}"
        raise ValueError(f"cannot read the text of {path}: {' '.join(reason.split())}") from None


def read_record(path: str | Path) -> dict[str, object]:
    """The JSON under the key "sfumato" of a PNG that `save_png` wrote.

    Raises: ValueError in one line if there is none.
    """
    text = read_text(path).get(RECORD)
    if text is None:
        raise ValueError(
            f"{path} has no {RECORD!r} text: it was not made by sfumato, or a program removed it on saving"
        )
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: its {RECORD!r} text is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: its {RECORD!r} text is JSON but not an object")
    return data


def parameters(prompt: str, negative: str = "", settings: Mapping[str, object] | None = None) -> str:
    """The text that AUTOMATIC1111's web UI puts under "parameters", which most studios and galleries read.

    Three lines: the prompt; "Negative prompt: ..." if there is one; "Steps: 20, Sampler: Euler, CFG scale:
    3".

    Args:
        settings: in the order wanted; a value with a comma, colon or newline is quoted as JSON.
    """
    lines = [prompt]
    if negative:
        lines.append(f"Negative prompt: {negative}")
    lines.append(", ".join(f"{key}: {_quote(str(value))}" for key, value in (settings or {}).items()))
    return "\n".join(lines).rstrip("\n")


def write_whole(path: str | Path, data: bytes) -> Path:
    """Write a file by way of a temporary one beside it, so that nobody ever sees half of it.

    Raises: ValueError in one line with the path if it cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(data)
            os.replace(part, path)
        except BaseException:  # Ctrl-C too
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror or error}; choose a folder you may write to"
        ) from None
    return path


def _dump(data: Mapping[str, object]) -> str:
    try:
        return json.dumps(data, sort_keys=True, allow_nan=False)  # ASCII, so always a plain tEXt chunk
    except (TypeError, ValueError) as error:
        raise ValueError(f"a picture's record must be JSON data: {error}") from None


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ",:\n") else value
