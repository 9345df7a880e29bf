"""A system whose U-Net is steered by ControlNets."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sfumato.checkpoints.foreign import read_foreign
from sfumato.checkpoints.native import MANIFEST, Parts, read_folder
from sfumato.core.config import to_json
from sfumato.nets.controlnet import ControlNet, ControlUse
from sfumato.systems.config import ControlConfig
from sfumato.systems.system import System, assemble

__all__ = ["controlled"]


def controlled(system: System, net: nn.Module | str | Path, use: ControlUse | None = None) -> System:
    """The system with one ControlNet more; the one that is given stays as it is, and shares its networks.

    Its pictures are given as `hint`, one for each ControlNet in the order in which they were added.

    Args:
        net: a ControlNet, or its folder or file.
        use: how strongly and when it acts.

    Raises: ValueError in one line if it is no ControlNet, or one for another base.
    """
    device = system.stages[0].device
    control = net if isinstance(net, nn.Module) else _read(Path(net), device)
    if not isinstance(control, ControlNet):
        raise ValueError(f"a {type(control).__name__} is no ControlNet")
    first, *rest = system.config.stages
    name = f"control{len(first.controls) + 1}"
    controls = (*first.controls, ControlConfig(net=name, use=use or ControlUse()))
    config = replace(system.config, stages=(replace(first, controls=controls), *rest))
    parts = Parts({**system.parts.nets, name: control}, system.parts.tokenizers)
    mark = hashlib.sha256(f"{system.fingerprint} {json.dumps(to_json(controls[-1]))}".encode())
    for key, value in control.state_dict().items():
        mark.update(key.encode() + value.float().cpu().numpy().tobytes())
    return assemble(config, parts, about=system.about, card=system.card, fingerprint=mark.hexdigest()[:16])


def _read(path: Path, device: torch.device) -> ControlNet:
    """The ControlNet of a file or folder, of ours or of another program."""
    native = (path / MANIFEST).is_file()
    nets = read_folder(path, device=device).parts.nets if native else read_foreign(path, device=device).nets
    found = [net for net in nets.values() if isinstance(net, ControlNet)]
    if len(found) != 1:
        kinds = ", ".join(type(net).__name__ for net in nets.values())
        raise ValueError(f"{path} holds {kinds}, not one ControlNet")
    return found[0]
