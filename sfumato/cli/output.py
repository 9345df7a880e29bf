"""Where pictures go."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["check_png", "check_writable", "paths_for"]

FOLDER = Path("out")
LONGEST_NAME = 60
OTHER_KINDS = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}


def paths_for(out: Path | None, prompt: str, seeds: list[int]) -> list[Path]:
    """One path per seed.

    Args:
        out: None = out/PROMPT-SEED.png; a name that ends in .png is the file, with the seed added if there
            are several; anything else is the folder.

    Raises: ValueError for the name of another kind of picture.
    """
    if out is not None:
        check_png(out)
    if out is not None and out.suffix.lower() == ".png":
        return [out] if len(seeds) == 1 else [out.with_stem(f"{out.stem}-{seed}") for seed in seeds]
    slug = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")[:LONGEST_NAME].rstrip("-") or "no-prompt"
    return [(out or FOLDER) / f"{slug}-{seed}.png" for seed in seeds]


def check_png(path: Path) -> None:
    """Raise ValueError for the name of another kind of picture."""
    if path.suffix.lower() in OTHER_KINDS:
        raise ValueError(f"cannot write {path}: pictures are PNG files; call it {path.with_suffix('.png')}")


def check_writable(path: Path) -> None:
    """Find out before the work whether `path` can be written after it; nothing is created.

    Raises: ValueError in one line naming the folder, or if the name is that of another kind of picture.
    """
    check_png(path)
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; choose a file name with --out")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"cannot write {path}: {folder} is not a folder; choose another with --out")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write {path}: no permission in {folder}; choose another with --out")
