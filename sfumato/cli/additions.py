"""What is put on top of a system before it draws: adapters, learned words, nets that steer it, guides."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from sfumato.nets.controlled import ControlUse
    from sfumato.systems.system import System

__all__ = ["Additions", "hints_of", "opened"]

CONTROL = re.compile(r"(.+?)=(.+?)(?::([\d.]+)(?::([\d.]+)-([\d.]+))?)?")


@dataclass(frozen=True, kw_only=True)
class Additions:
    """Flags of the verbs that draw."""

    adapter: tuple[Path, ...] = ()
    """adapter.safetensors of a run on this system, or LoRA files of other programs."""
    adapter_scale: tuple[float, ...] = (1.0,)
    """How strongly the adapters act, all alike or each; 1 = as trained."""
    words: tuple[Path, ...] = ()
    """Textual-inversion files: prompts may then say the name of the file, or the word in it."""
    control: tuple[str, ...] = ()
    """NET=PICTURE[:SCALE[:START-STOP]]: a ControlNet or T2I-Adapter and its picture."""
    guess: bool = False
    """The ControlNets steer pictures without a prompt."""
    guide: tuple[Path, ...] = ()
    """What guides the system: file or run of a noisy classifier, or the files of a noised CLIP."""


def opened(flags: Additions, path: Path | None, device: str | torch.device) -> System:
    """The system at a path with what the flags add. Raises: ValueError in one line if it does not fit."""
    from sfumato.api import guided, load
    from sfumato.systems.adapting import controlled
    from sfumato.systems.words import taught

    scales = flags.adapter_scale[0] if len(flags.adapter_scale) == 1 else flags.adapter_scale
    system = load(path, device=device, adapter=flags.adapter or None, adapter_scale=scales)
    for file in flags.words:
        system = taught(system, file)
    for text in flags.control:
        net, _, use = _control(text, flags.guess)
        system = controlled(system, net, use)
    return guided(system, *flags.guide, device=device) if flags.guide else system


def hints_of(flags: Additions) -> list[Image.Image] | None:
    """The pictures that ControlNets and T2I-Adapters follow; None without any."""
    from sfumato.core.image import load

    return [load(_control(text, flags.guess)[1]) for text in flags.control] or None


def _control(text: str, guess: bool) -> tuple[Path, Path, ControlUse]:
    from sfumato.nets.controlled import ControlUse

    match = CONTROL.fullmatch(text)
    if match is None:
        raise ValueError(f"--control {text!r} is not NET=PICTURE[:SCALE[:START-STOP]]: canny=edges.png:0.8")
    net, picture, scale, start, stop = match.groups()
    use = ControlUse(scale=float(scale or 1), start=float(start or 0), stop=float(stop or 1), guess=guess)
    return Path(net), Path(picture), use
