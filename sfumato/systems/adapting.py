"""A system with an adapter merged into its nets, for drawing."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from torch import nn

from sfumato.checkpoints.adapters import read_adapters
from sfumato.checkpoints.files import sha256
from sfumato.checkpoints.native import Parts
from sfumato.nets.lora import attach, detach, merged_copy, restore
from sfumato.systems.conditioning import TokenTextConfig
from sfumato.systems.system import System, assemble

__all__ = ["adapted"]


def adapted(system: System, path: str | Path, *, scale: float = 1.0) -> System:
    """The system as the adapter in a file changes it; the one that is given stays as it is.

    Args:
        path: adapter.safetensors of a run.
        scale: factor on the change; 1 = as trained, 0 = none.

    Returns: a system whose fingerprint is of the base, the file and the scale.
    Raises: ValueError in one line if the file is no adapter, or that of another system.
    """
    path = Path(path)
    file = read_adapters(path)
    if file.base != system.fingerprint:
        raise ValueError(
            f"{path} adapts a system with the fingerprint {file.base or 'unknown'}, and {system.about.name} "
            f"has {system.fingerprint or 'none'}; choose the system that it was trained on"
        )
    (stage,) = system.config.stages  # no other system can be adapted
    towers = [c.encoder for c in stage.conditioners if isinstance(c, TokenTextConfig)]
    names = {"denoiser": stage.net, **({"text": towers[0]} if towers else {})}
    nets: dict[str, nn.Module] = dict(system.parts.nets)
    for name, tensors in file.tensors.items():
        if name not in names:
            raise ValueError(f"{path} adapts a net {name!r}; {system.about.name} has {', '.join(names)}")
        net = nets[names[name]]
        attach(net, restore(net, tensors), weight=scale)
        nets[names[name]] = merged_copy(net).eval()
        detach(net)
    mark = hashlib.sha256(f"{system.fingerprint} {sha256(path)} {scale!r}".encode()).hexdigest()[:16]
    about = replace(system.about, name=f"{system.about.name} with {path.name}")
    parts = Parts(nets, system.parts.tokenizers)
    return assemble(system.config, parts, about=about, card=system.card, fingerprint=mark)
