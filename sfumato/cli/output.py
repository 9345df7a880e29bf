"""Where pictures go."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["check_writable", "paths_for"]

FOLDER = Path("out")
LONGEST_NAME = 60


def paths_for(out: Path | None, prompt: str, seeds: list[int]) -> list[Path]:
    """One path per seed.

    Args:
        out: None = out/PROMPT-SEED.png; a name that ends in .png is the file, with the seed added if there
            are several; anything else is the folder.
    """
    if out is not None and out.suffix.lower() == ".png":
        return [out] if len(seeds) == 1 else [out.with_stem(f"{out.stem}-{seed}") for seed in seeds]
    slug = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-_")[:LONGEST_NAME].rstrip("-") or "no-prompt"
    return [(out or FOLDER) / f"{slug}-{seed}.png" for seed in seeds]


def check_writable(path: Path) -> None:
    """Find out before the work whether `path` can be written after it; nothing is created.

    Raises: ValueError in one line naming the folder.
    """
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; choose a file name with --out")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"cannot write {path}: {folder} is not a folder; choose another with --out")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write {path}: no permission in {folder}; choose another with --out")
