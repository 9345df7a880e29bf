"""Pictures: reading files by stated rules, uint8 <-> [-1, 1], resizing, cropping, grids.

Everywhere else a picture is a float tensor (B, C, H, W) in [-1, 1]; uint8 and Pillow images exist only
between here and the disk. Writing is in `sfumato.core.png`.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

__all__ = [
    "EXTENSIONS",
    "PictureFile",
    "center_crop",
    "contents",
    "cover",
    "decode",
    "edges",
    "extended",
    "from_pil",
    "grid",
    "load",
    "resize",
    "size_of",
    "to_float",
    "to_pil",
    "to_rgb",
    "to_uint8",
]

EXTENSIONS = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}
)
"""Lower-case file endings that count as pictures."""

BOMB = "it has more than 178 million pixels, or claims so to fill the memory; make it smaller"
WHITE = (255, 255, 255)
ORIENTATION = 0x0112  # EXIF tag; 5 and more exchange height and width


class PictureFile(Protocol):
    """A file on disk (a `Path`) or within an archive; `str` names it in messages."""

    def read_bytes(self) -> bytes: ...


def edges(image: Tensor, threshold: float = 0.25) -> Tensor:
    """White edges on black: where the gradient of the brightness (Sobel) exceeds a threshold.

    Args:
        image: (B, 3, H, W) in [-1, 1].
        threshold: per pixel; from black to white is 2.

    Returns: (B, 3, H, W), -1 or 1.
    """
    gray = F.pad(image.float().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = gray.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    kernels = torch.stack([across, across.T])[:, None]
    steep = F.conv2d(gray, kernels).square().sum(1, keepdim=True).sqrt() > threshold
    return (2 * steep.to(image) - 1).expand_as(image)


def to_float(pixels: Tensor) -> Tensor:
    """(..., C, H, W) uint8 -> float32 in [-1, 1]: p / 127.5 - 1.

    Raises: ValueError if `pixels` is not uint8.
    """
    if pixels.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8 in 0..255, not {pixels.dtype}")
    return pixels.float() / 127.5 - 1


def to_uint8(image: Tensor) -> Tensor:
    """(..., C, H, W) float -> uint8: (x + 1) * 127.5 in float32, clamped, rounded to nearest, halves to even.

    The inverse of `to_float` on all 256 values.

    Raises: ValueError if a value is NaN or infinite: a broken network must not become a black picture.
    """
    if not image.is_floating_point():
        raise ValueError(f"an image must be floating point in [-1, 1], not {image.dtype}")
    if not torch.isfinite(image).all():
        raise ValueError(
            "the image has values that are not finite (NaN or inf): broken weights or sampler settings"
        )
    return ((image.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def from_pil(image: Image.Image) -> Tensor:
    """Pillow image, made RGB by `to_rgb` -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1).contiguous()


def to_pil(pixels: Tensor) -> Image.Image:
    """(3, H, W) or (1, H, W) uint8 -> Pillow image, "RGB" or "L".

    Raises: ValueError for another shape or dtype.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise ValueError(
            f"a picture is uint8 of shape (3, H, W) or (1, H, W), not {pixels.dtype} {tuple(pixels.shape)}"
        )
    array = pixels.cpu().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0])


def load(file: str | PictureFile) -> Image.Image:
    """Read a picture as "RGB" by the rules of `decode`.

    Raises: ValueError in one line with the path, if the file is absent, damaged or of an unknown format.
    """
    return decode(contents(file), name=str(file))


def contents(file: str | PictureFile) -> bytes:
    """The bytes of a picture's file.

    Raises: ValueError in one line with the path, if it is absent or cannot be read.
    """
    try:
        return (Path(file) if isinstance(file, str) else file).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"there is no picture at {file}") from None
    except OSError as error:
        raise ValueError(f"cannot read the picture {file}: {error.strerror or error}") from None


def size_of(source: bytes | Path) -> tuple[int, int] | None:
    """(height, width) that `decode` gives, from the header alone; None if there is no header of a picture.

    Args:
        source: the bytes of a picture file, or its path, of which only the beginning is read.

    A PNG whose EXIF chunk comes after its pixels is taken to be upright.
    """
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
            known = image.format != "PNG" or "exif" in image.info  # else Pillow decodes the file to find it
            turned = known and image.getexif().get(ORIENTATION, 1) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except MemoryError:
        raise
    except Exception:  # Pillow raises a dozen types on damaged files; `decode` tells the reason
        return None


def decode(data: bytes, *, name: str = "picture") -> Image.Image:
    """Read the bytes of a picture file as "RGB".

    Rules: the EXIF orientation is applied; of an animation the first frame is taken; then the rules of
    `to_rgb`. Color profiles are not applied: the numbers are taken as sRGB. A damaged or truncated file is an
    error, never a picture with a gray part, even where the decoder itself would fill in gray.

    Raises: ValueError in one line with `name`.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.format == "JPEG" and _ends_early(data, image):
                raise ValueError("the JPEG data end before the last block")
            return to_rgb(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        raise ValueError(f"cannot read the picture {name}: {BOMB}") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"cannot read the picture {name}: not a picture of a known format") from None
    except Exception as error:  # Pillow raises a dozen types on damaged files, SyntaxError among them
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"cannot read the picture {name}: {reason}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image -> "RGB", 8 bits, opaque.

    Rules: alpha (a channel or a transparent palette entry) is composited on white; 16 bits become 8 by
    dropping the low byte (v >> 8); gray, 1-bit and palette pictures take their colors; CMYK becomes
    (255 - C)(255 - K) / 255.

    Raises: ValueError for floating-point pixels and for 32-bit ones above 65535, whose white point nobody
    states.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bits(image)
    if image.mode == "F":
        raise ValueError(
            "32-bit floating-point pixels have no stated range; convert the file to 8 or 16 bits"
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (*WHITE, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """RGB image -> (height, width) without regard to its proportions.

    Halved with BOX while both sides stay at least as large as asked, then BICUBIC, which Pillow antialiases.
    """
    height, width = _checked(size)
    return _halved(image, height, width).resize((width, height), Image.Resampling.BICUBIC)


def cover(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """Resize with its proportions to the smallest picture that covers (height, width), as `resize` does."""
    height, width = _checked(size)
    image = _halved(image, height, width)
    factor = max(height / image.height, width / image.width)
    covering = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    return image.resize(covering, Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int | tuple[int, int]) -> Image.Image:
    """`cover`, then the middle: the preparation of ADM (Dhariwal & Nichol 2021, arXiv:2105.05233) and DiT.

    Args:
        size: side of a square, or (height, width), in pixels.
    """
    height, width = _checked(size)
    image = cover(image, size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def extended(image: Image.Image, sides: tuple[int, int, int, int]) -> tuple[Image.Image, Image.Image]:
    """A larger canvas for outpainting, and a mask that is white where it is new.

    Args:
        sides: pixels beyond the left, top, right and bottom; they repeat the picture's borders.
    """
    left, top, right, bottom = sides
    around = ((top, bottom), (left, right))
    canvas = np.pad(np.asarray(image.convert("RGB")), (*around, (0, 0)), mode="edge")
    mask = np.pad(np.zeros((image.height, image.width), np.uint8), around, constant_values=255)
    return Image.fromarray(canvas), Image.fromarray(mask)


def grid(images: Tensor, *, columns: int | None = None, gap: int = 2, background: int = 255) -> Tensor:
    """(N, C, H, W) uint8 -> one picture (C, H', W'), row by row, `gap` pixels between.

    Empty cells are background.

    Args:
        columns: pictures per row; by default the smallest square holds them all.

    Raises: ValueError if there are no images or `columns` < 1.
    """
    if images.ndim != 4 or images.dtype != torch.uint8 or not len(images):
        raise ValueError(
            f"a grid takes uint8 images (N, C, H, W), N >= 1, not {images.dtype} {tuple(images.shape)}"
        )
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1 or gap < 0:
        raise ValueError(f"a grid needs columns >= 1 and gap >= 0, not {columns} and {gap}")
    columns = min(columns, len(images))
    n, channels, height, width = images.shape
    rows = math.ceil(n / columns)
    shape = (channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    sheet = torch.full(shape, background, dtype=torch.uint8, device=images.device)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[:, top : top + height, left : left + width] = image
    return sheet


def _checked(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"a picture's size must be at least 1 pixel, not {height}x{width}")
    return height, width


def _halved(image: Image.Image, height: int, width: int) -> Image.Image:
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return image


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Pillow's own conversion clips at 255 instead of scaling."""
    values = np.asarray(image).astype(np.int64)
    if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise ValueError(
            "32-bit pixels outside 0..65535 have no stated white point; convert the file to 8 or 16 bits"
        )
    gray = (values >> 8).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        gray = np.where(values == transparent, np.uint8(255), gray)
    return Image.fromarray(gray).convert("RGB")


def _ends_early(data: bytes, image: Image.Image) -> bool:
    """Whether a JPEG's end marker came before its last block; libjpeg then fills the rest with flat gray.

    If the last pixels are that gray, decode again with more entropy-coded data before the end marker: a
    complete file ignores it, an incomplete one takes it for the blocks that are missing.
    """
    corner = np.asarray(image)[-4:, -4:]
    end = data.rfind(b"\xff\xd9")
    if end < 0 or corner.min() < 127 or corner.max() > 128:
        return False
    longer = data[:end] + bytes(range(250)) * 8 + data[end:]  # begins with 0: after a lone 0xFF, no marker
    with Image.open(io.BytesIO(longer)) as again:
        return not np.array_equal(np.asarray(image), np.asarray(again))
