"""Adapter files: the low-rank pairs of one or several nets, in one safetensors file that describes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from sfumato.checkpoints.files import read_metadata, read_safetensors
from sfumato.checkpoints.kinds import looks_like
from sfumato.core.config import from_json, to_json
from sfumato.core.png import write_whole
from sfumato.nets.lora import Adapter, LoraConfig, extract

__all__ = ["FORMAT", "AdapterFile", "read_adapters", "write_adapters"]

FORMAT = "sfumato-adapter"


@dataclass(frozen=True)
class AdapterFile:
    """Content of an adapter file.

    Attributes:
        tensors: by net ("denoiser", "text"), what `lora.restore` takes.
        lora: rank, alpha and targets by net.
        base: fingerprint of the system that was adapted.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    lora: Mapping[str, LoraConfig] = field(default_factory=dict)
    base: str = ""


def write_adapters(
    path: Path, adapters: Mapping[str, Adapter], lora: Mapping[str, LoraConfig], *, base: str
) -> None:
    """Write a file, whole or not at all: tensors NET.LAYER.down.weight, .up.weight and .alpha.

    Raises: ValueError in one line if it cannot be written.
    """
    tensors = {
        f"{net}.{name}": value.cpu().contiguous()
        for net, adapter in adapters.items()
        for name, value in extract(adapter).items()
    }
    about = {"format": FORMAT, "base": base, "lora": json.dumps({k: to_json(v) for k, v in lora.items()})}
    write_whole(path, save(tensors, about))


def read_adapters(path: Path) -> AdapterFile:
    """Inverse of `write_adapters`.

    Raises: ValueError in one line if the file is missing or damaged, or holds something else.
    """
    tensors, about = read_safetensors(path), read_metadata(path)
    if about.get("format") != FORMAT:
        hint = looks_like(tensors) or "if these are whole weights, load them as a system"
        first = next(iter(tensors), "none")
        raise ValueError(
            f"{path} is no adapter of sfumato: it holds {len(tensors)} tensors such as {first!r}; {hint}"
        )
    nets: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        net, _, rest = name.partition(".")
        nets.setdefault(net, {})[rest] = value
    settings = json.loads(about["lora"])
    lora = {net: from_json(LoraConfig, one, where=f"{path}: {net}") for net, one in settings.items()}
    return AdapterFile(nets, lora, about["base"])
