"""From the networks of a foreign file to a system, and back: a function per family, by layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sfumato.checkpoints.foreign import INDEX, Foreign, write_nets
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.checkpoints.native import staging
from sfumato.core.registry import Registry
from sfumato.systems.system import System

__all__ = ["ASSEMBLIES", "PUBLICATIONS", "Publication", "system_of", "write_system"]

ASSEMBLIES: Registry[Callable[[Foreign], System]] = Registry("layout of a system")
"""Layout of the denoiser -> what makes a system of everything that was found."""


@dataclass(frozen=True)
class Publication:
    """How a system is written in a layout.

    Attributes:
        parts: name of a net of the system -> its layout, and its subfolder in a diffusers pipeline.
        extra: settings that the nets do not know, such as the size of a picture, by the same name.
        index: of a diffusers pipeline: the content of model_index.json besides the models.
        extras: of a diffusers pipeline: other JSON files by their path.
    """

    parts: Mapping[str, tuple[str, str]]
    extra: Mapping[str, Mapping[str, object]]
    index: Mapping[str, object]
    extras: Mapping[str, Mapping[str, object]]


PUBLICATIONS: Registry[Callable[[System], Publication]] = Registry("layout that systems are written in")


def system_of(found: Foreign) -> System:
    """The system of the nets that were found. Raises: ValueError if they make none."""
    if "net" not in found.nets:
        raise ValueError(f"there is no denoiser among {', '.join(found.nets)}; load it with load_nets")
    return ASSEMBLIES[found.layouts["net"]](found)


def write_system(system: System, path: str | Path, layout: str, *, dtype: torch.dtype | None = None) -> None:
    """Write a system in a published layout: a file, or a diffusers pipeline folder, whole or not at all.

    Raises: ValueError in one line if the layout cannot hold it, or `path` is a folder that is not empty.
    """
    path, plan = Path(path), PUBLICATIONS[layout](system)
    if not LAYOUTS[layout].diffusers:
        for name, (kind, _) in plan.parts.items():
            write_nets({name: system.parts.nets[name]}, path, kind, extra=plan.extra.get(name), dtype=dtype)
        return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not empty; choose a new folder, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    with staging(path) as folder:
        index = dict(plan.index)
        for name, (kind, subfolder) in plan.parts.items():
            extra = plan.extra.get(name)
            write_nets({name: system.parts.nets[name]}, folder / subfolder, kind, extra=extra, dtype=dtype)
            index[subfolder] = ["diffusers", LAYOUTS[kind].diffusers]
        for name, content in {**plan.extras, INDEX: index}.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        if path.exists():
            path.rmdir()
        shutil.move(folder, path)
