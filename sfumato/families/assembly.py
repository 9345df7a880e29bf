"""From the networks of a foreign file to a system, and back: a function per family, by layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from sfumato.checkpoints.foreign import INDEX, Foreign, write_nets
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.checkpoints.native import staging
from sfumato.core.registry import Registry
from sfumato.systems.config import LatentsConfig
from sfumato.systems.system import System

__all__ = ["ASSEMBLIES", "PUBLICATIONS", "Publication", "latents_of", "needed", "system_of", "write_system"]

# What becomes of networks that come without a denoiser.
ALONE = {
    "adapter": "this is a T2I-Adapter: add it to a system of its base with --control, or systems.adapting",
    "control": "this is a ControlNet: add it to a system of its base with --control, or systems.adapting",
    "vae": "this is a first stage: give it as vae with the file of a denoiser",
}
SCALE = 0.18215  # of the latents of Stable Diffusion's autoencoder, which others took over

ASSEMBLIES: Registry[Callable[[Foreign], System]] = Registry("layout of a system")
"""Layout of the denoiser -> what makes a system of everything that was found."""


@dataclass(frozen=True)
class Publication:
    """How a system is written in a layout.

    Attributes:
        parts: name of a net of the system -> its layout, and its subfolder in a diffusers pipeline or which
            part of a file it is.
        extra: settings that the nets do not know, such as the size of a picture, by the same name.
        index: of a diffusers pipeline: the content of model_index.json besides the models.
        extras: of a diffusers pipeline: other JSON files by their path.
        texts: likewise, other files.
        nets: by name, what is written in place of a net of the system.
    """

    parts: Mapping[str, tuple[str, str]]
    extra: Mapping[str, Mapping[str, object]]
    index: Mapping[str, object]
    extras: Mapping[str, Mapping[str, object]]
    texts: Mapping[str, str] = field(default_factory=dict)
    nets: Mapping[str, nn.Module] = field(default_factory=dict)


PUBLICATIONS: Registry[Callable[[System], Publication]] = Registry("layout that systems are written in")


def system_of(found: Foreign) -> System:
    """The system of the nets that were found. Raises: ValueError if they make none."""
    if "net" not in found.nets:
        what = [ALONE[name] for name in found.nets if name in ALONE] or ["load it with load_nets"]
        raise ValueError(f"there is no denoiser among {', '.join(found.nets)}; {what[0]}")
    return ASSEMBLIES[found.layouts["net"]](found)


def write_system(system: System, path: str | Path, layout: str, *, dtype: torch.dtype | None = None) -> None:
    """Write a system in a published layout: a file, or a diffusers pipeline folder, whole or not at all.

    Raises: ValueError in one line if the layout cannot hold it, or `path` is a folder that is not empty.
    """
    if any(stage.controls for stage in system.config.stages):
        raise ValueError(
            f"layout {layout!r} has no place for the ControlNets and T2I-Adapters of this system; save it "
            "without a layout, or its base"
        )
    path, plan = Path(path), PUBLICATIONS[layout](system)
    nets = {**system.parts.nets, **plan.nets}
    if not LAYOUTS[layout].diffusers:
        whole = {part or name: nets[name] for name, (_, part) in plan.parts.items()}
        ((kind, _), *_) = plan.parts.values()
        known = {k: v for told in plan.extra.values() for k, v in told.items()}
        write_nets(whole, path, kind, extra=known, dtype=dtype)
        return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not empty; choose a new folder, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    with staging(path) as folder:
        index = dict(plan.index)
        for name, (kind, subfolder) in plan.parts.items():
            extra = plan.extra.get(name)
            write_nets({name: nets[name]}, folder / subfolder, kind, extra=extra, dtype=dtype)
            index[subfolder] = [LAYOUTS[kind].library, LAYOUTS[kind].diffusers]
        told = {**plan.extras, INDEX: index}
        texts = {name: json.dumps(content, indent=2) + "\n" for name, content in told.items()}
        for name, text in {**texts, **plan.texts}.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, "utf-8")
        if path.exists():
            path.rmdir()
        shutil.move(folder, path)


def needed(found: Foreign, *names: str) -> list[nn.Module]:
    """The nets of these parts. Raises: ValueError if one is missing, or a vocabulary of CLIP is."""
    for name in names:
        if name not in found.nets:
            raise ValueError(
                f"this system needs {', '.join(names)}, and {name} is missing; "
                "give the whole pipeline folder, or load_nets for the networks that there are"
            )
        words = name.replace("text_encoder", "tokenizer")
        if words != name and words not in found.tokenizers:
            raise ValueError(
                "there is no CLIP vocabulary; copy a folder 'tokenizer' with vocab.json and merges.txt "
                "beside the networks, or install open_clip_torch, which carries it"
            )
    return [found.nets[name] for name in names]


def latents_of(settings: Mapping[str, object]) -> LatentsConfig:
    """How the latents of a first stage are scaled: (z - shift) * scale."""
    scale, shift = settings.get("scaling_factor") or SCALE, settings.get("shift_factor") or 0.0
    assert isinstance(scale, float | int)
    assert isinstance(shift, float | int)
    return LatentsConfig(autoencoder="vae", mean=(float(shift),), std=(1 / scale,))
