"""A system with adapters merged into its nets, or steered by ControlNets and T2I-Adapters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from sfumato.checkpoints.adapters import FORMAT, read_adapters
from sfumato.checkpoints.files import read_metadata, sha256
from sfumato.checkpoints.foreign import read_foreign
from sfumato.checkpoints.lora_files import read_lora
from sfumato.checkpoints.native import MANIFEST, Parts, read_folder
from sfumato.core.config import to_json
from sfumato.nets.controlled import ControlUse
from sfumato.nets.controlnet import ControlNet
from sfumato.nets.lora import Adapter, attach, detach, merged_copy, restore
from sfumato.nets.t2i_adapter import T2IAdapter
from sfumato.nets.unet import UNet
from sfumato.systems.conditioning import ClipTextConfig, TokenTextConfig
from sfumato.systems.config import ControlConfig
from sfumato.systems.system import System, assemble

__all__ = ["adapted", "controlled", "read_for"]


def adapted(
    system: System,
    path: str | Path | Sequence[str | Path],
    *,
    scale: float | Sequence[float] = 1.0,
) -> System:
    """The system as the adapters in one or several files change it; the one given stays as it is.

    Args:
        path: adapter.safetensors of a run, or LoRA files of kohya's scripts, PEFT or diffusers.
        scale: factor on the change; 1 = as trained, 0 = none; one for all files or one for each.

    Returns: a system whose fingerprint is of the base, the files and the scales.
    Raises: ValueError in one line if a file is no adapter, or that of another system.
    """
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(one) for one in path]
    scales = list(scale) if isinstance(scale, Sequence) else [scale] * len(paths)
    if len(scales) != len(paths):
        raise ValueError(f"{len(scales)} scales for {len(paths)} adapters; give one for all, or one for each")
    found = [read_for(system, file) for file in paths]  # all of them before any net is touched
    nets: dict[str, nn.Module] = dict(system.parts.nets)
    for name in dict.fromkeys(name for adapters in found for name in adapters):
        net = nets[name]
        for i, (adapters, factor) in enumerate(zip(found, scales, strict=True)):
            if name in adapters:
                attach(net, adapters[name], name=str(i), weight=factor)
        nets[name] = merged_copy(net).eval()
        detach(net)
    named = " with ".join([system.about.name, *(file.name for file in paths)])
    files = " ".join(f"{sha256(_weights(file))} {one!r}" for file, one in zip(paths, scales, strict=True))
    mark = hashlib.sha256(f"{system.fingerprint} {files}".encode()).hexdigest()[:16]
    parts = Parts(nets, system.parts.tokenizers)
    return assemble(
        system.config, parts, about=replace(system.about, name=named), card=system.card, fingerprint=mark
    )


def read_for(system: System, path: Path) -> dict[str, Adapter]:
    """The adapters of a file by the name of the system's net, not attached: for `nets.lora.attach`.

    Raises: ValueError as `adapted` does.
    """
    stage = system.config.stages[0]
    nets = system.parts.nets
    own = path.suffix == ".safetensors" and read_metadata(path).get("format") == FORMAT
    if not own and isinstance(nets[stage.net], UNet):
        towers = [t.encoder for c in stage.conditioners if isinstance(c, ClipTextConfig) for t in c.towers]
        names = {"unet": stage.net, **dict(zip(("text_encoder", "text_encoder_2"), towers, strict=False))}
        read = read_lora(path, {slot: nets[name] for slot, name in names.items()})
        return {names[slot]: adapter for slot, adapter in read.items()}
    file = read_adapters(path)
    if file.base != system.fingerprint:
        raise ValueError(
            f"{path} adapts a system with the fingerprint {file.base or 'unknown'}, and {system.about.name} "
            f"has {system.fingerprint or 'none'}; choose the system that it was trained on"
        )
    texts = [c.encoder for c in stage.conditioners if isinstance(c, TokenTextConfig)]
    names = {"denoiser": stage.net, **({"text": texts[0]} if texts else {})}
    for name in file.tensors:
        if name not in names:
            raise ValueError(f"{path} adapts a net {name!r}; {system.about.name} has {', '.join(names)}")
    return {names[name]: restore(nets[names[name]], tensors) for name, tensors in file.tensors.items()}


def _weights(path: Path) -> Path:
    """The file that was read, of a folder the one in it."""
    return next(path.glob("adapter_model.*")) if path.is_dir() else path


def controlled(system: System, net: nn.Module | str | Path, use: ControlUse | None = None) -> System:
    """The system with one ControlNet or T2I-Adapter more; the one that is given stays as it is.

    They share networks. The pictures are given as `hint`, one for each in the order in which they were added.

    Args:
        net: a ControlNet or T2I-Adapter, or its folder or file.
        use: how strongly and when it acts.

    Raises: ValueError in one line if it is none of them, or one for another base.
    """
    device = system.stages[0].device
    control = net if isinstance(net, nn.Module) else _read(Path(net), device)
    if not isinstance(control, ControlNet | T2IAdapter):
        raise ValueError(f"a {type(control).__name__} is no ControlNet or T2I-Adapter")
    first, *rest = system.config.stages
    name = f"control{len(first.controls) + 1}"
    controls = (*first.controls, ControlConfig(net=name, use=use or ControlUse()))
    config = replace(system.config, stages=(replace(first, controls=controls), *rest))
    parts = Parts({**system.parts.nets, name: control}, system.parts.tokenizers)
    mark = hashlib.sha256(f"{system.fingerprint} {json.dumps(to_json(controls[-1]))}".encode())
    for key, value in control.state_dict().items():
        mark.update(key.encode() + value.float().cpu().numpy().tobytes())
    return assemble(config, parts, about=system.about, card=system.card, fingerprint=mark.hexdigest()[:16])


def _read(path: Path, device: torch.device) -> nn.Module:
    """The ControlNet or T2I-Adapter of a file or folder, of ours or of another program."""
    native = (path / MANIFEST).is_file()
    nets = read_folder(path, device=device).parts.nets if native else read_foreign(path, device=device).nets
    found = [net for net in nets.values() if isinstance(net, ControlNet | T2IAdapter)]
    if len(found) != 1:
        kinds = ", ".join(type(net).__name__ for net in nets.values())
        raise ValueError(f"{path} holds {kinds}, not one ControlNet or T2I-Adapter")
    return found[0]
