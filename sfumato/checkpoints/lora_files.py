"""LoRA files of other programs: kohya's scripts, PEFT, and diffusers before it; read, and written.

The names of layers are those of the tables that whole networks are read by. kohya's names have "_" for ".",
which cannot be told apart again: they are made from the tables, not taken apart.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sfumato.checkpoints.files import read_metadata, read_tensors, write_safetensors
from sfumato.checkpoints.foreign import read_json
from sfumato.checkpoints.keymap import SAME, KeyMap
from sfumato.checkpoints.kinds import looks_like
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.checkpoints.layouts.clip import hub_text_map
from sfumato.nets.clip import CLIPText
from sfumato.nets.lora import Adapter, restore, targets
from sfumato.nets.tags import parts_of
from sfumato.nets.unet import UNet

__all__ = ["read_lora", "write_lora"]

# Where a layer is, by the beginning of its name. The towers are numbered only where there are two.
PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
}
# What follows the layer: kohya, PEFT, diffusers' layers, its attention processors.
KEY = re.compile(
    r"(?P<layer>.+?)(?:\.lora_(?P<kohya>down|up)\.weight|\.lora_(?P<peft>[AB])(?:\.\w+)?\.weight"
    r"|\.lora(?:_linear_layer)?\.(?P<layers>down|up)\.weight"
    r"|(?:\.processor)?\.to_(?P<which>[qkv]|out)_lora\.(?P<attention>down|up)\.weight|\.(?P<alpha>alpha))"
)
KOHYA = {"unet": "lora_unet_", "text_encoder_2": "lora_te2_"}
HALVES = {"A": "down", "B": "up"}
PEFT = "base_model.model."
SHOWN = 3  # names that an error lists


class Place(NamedTuple):
    """A layer of ours, which of its equal parts (q, k, v), and whether files have it as a convolution."""

    layer: str
    part: int
    conv: bool


def read_lora(path: Path, nets: Mapping[str, nn.Module]) -> dict[str, Adapter]:
    """The adapters of a file, not attached; of PEFT also a folder with adapter_config.json.

    Args:
        nets: "unet", "text_encoder" and "text_encoder_2", as far as the system has them.

    Raises: ValueError in one line that names the tensors which belong to no layer of these nets.
    """
    state, settings = _content(path)
    tables = {slot: _table(net) for slot, net in nets.items()}
    found: dict[str, dict[str, dict[int, dict[str, Tensor]]]] = {}
    lost = []
    for key, value in state.items():
        match = KEY.fullmatch(key)
        placed = _placed(match, tables) if match else None
        if match is None or placed is None:
            lost.append(key)
            continue
        slot, place, name = placed
        half = match["kohya"] or HALVES.get(match["peft"]) or match["layers"] or match["attention"] or "alpha"
        pair = found.setdefault(slot, {}).setdefault(place.layer, {}).setdefault(place.part, {})
        pair[half] = value
        if match["peft"] == "A" and (alpha := _alpha(settings, slot, name, len(value))) is not None:
            pair.setdefault("alpha", torch.tensor(alpha))
    if lost or not found:
        kinds = ", ".join(f"{slot} {type(net).__name__}" for slot, net in nets.items())
        names = ", ".join(map(repr, lost[:SHOWN])) + (f" and {len(lost) - SHOWN} more" * (len(lost) > SHOWN))
        hint = looks_like(state) or "it is for another base, or of another kind"
        raise ValueError(f"{path}: {len(lost)} tensors fit no layer of {kinds}: {names}; {hint}")
    adapters = {}
    for slot, layers in found.items():
        owners, tensors = targets(nets[slot], ("*",)), dict[str, Tensor]()
        for layer, pairs in layers.items():
            try:
                whole = _pair(tuple(owners[layer].weight.shape), pairs, parts_of(owners[layer]))
            except (KeyError, RuntimeError):
                what = "lacks a half, or has other shapes than this net needs"
                raise ValueError(f"{path}: the pair for {layer!r} {what}") from None
            tensors |= {f"{layer}.{name}": v for name, v in whole.items()}
        adapters[slot] = restore(nets[slot], tensors)
    return adapters


def write_lora(
    path: Path,
    adapters: Mapping[str, Adapter],
    nets: Mapping[str, nn.Module],
    form: Literal["kohya", "peft"] = "kohya",
    dtype: torch.dtype | None = None,
) -> None:
    """Write adapters of `nets`, which are named as for `read_lora`, as a safetensors file.

    PEFT's form has no alpha: there the factor alpha / rank is in the second half of every pair.

    Raises: ValueError in one line if such a file has no name for a layer.
    """
    two = "text_encoder_2" in nets
    state: dict[str, Tensor] = {}
    for slot, adapter in adapters.items():
        first = "lora_te1_" if two else "lora_te_"
        prefix = {**KOHYA, "text_encoder": first}[slot] if form == "kohya" else f"{slot}."
        names = {(p.layer, p.part): (n, p) for n, p in _table(nets[slot], form == "kohya").items()}
        for layer, pair in adapter.pairs.items():
            if (layer, 0) not in names:
                raise ValueError(f"LoRA files have no name for the layer {layer!r} of the adapter")
            for part in range(pair.parts):
                name, place = names[layer, part]
                down, up = (half.weight.detach().chunk(pair.parts)[part] for half in (pair.down, pair.up))
                if place.conv:
                    down, up = down[..., None, None], up[..., None, None]
                if form == "peft":
                    state[f"{prefix}{name}.lora_A.weight"] = down
                    state[f"{prefix}{name}.lora_B.weight"] = up * (pair.alpha / pair.rank)
                    continue
                start = prefix + name.replace(".", "_")
                state |= {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": up}
                state[f"{start}.alpha"] = torch.tensor(pair.alpha)
    try:
        write_safetensors(path, state, dtype)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None


def _content(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Tensors, and the settings of PEFT that are with them."""
    if path.is_dir():
        weights = next(iter(sorted(path.glob("adapter_model.*"))), path / "adapter_model.safetensors")
        return read_tensors(weights), read_json(path / "adapter_config.json")
    told = read_metadata(path) if path.suffix == ".safetensors" else {}
    return read_tensors(path), json.loads(told.get("lora_adapter_metadata", "{}"))


def _alpha(settings: Mapping[str, Any], slot: str, name: str, rank: int) -> float | None:
    """What PEFT's settings say of a layer; None = they say nothing."""

    def told(key: str) -> Any:
        return settings.get(f"{slot}.{key}", settings.get(key))

    own = [v for k, v in (told("alpha_pattern") or {}).items() if name == k or name.endswith(f".{k}")]
    alpha = own[0] if own else told("lora_alpha")
    if alpha is None:
        return None
    return float(alpha) * (math.sqrt(rank) if told("use_rslora") else 1.0)


def _table(net: nn.Module, kohya: bool | None = None) -> dict[str, Place]:
    """Names of layers in files -> ours: all in use, with "_" for "." too, or those to be written."""
    table: dict[str, Place] = {}
    layers = targets(net, ("*",))
    for keymap in _maps(net, kohya):
        for row in keymap.rows:
            (ours, *more) = row.ours
            layer = ours.removesuffix(".weight")
            if layer == ours or more or layer not in layers:
                continue
            conv = row.op is not SAME and len(row.theirs) == 1 and isinstance(net, UNet)
            for part, name in enumerate(row.theirs):
                table[name.removesuffix(".weight")] = Place(layer, part, conv)
    return table if kohya is not None else {n.replace(".", "_"): p for n, p in table.items()} | table


def _maps(net: nn.Module, kohya: bool | None) -> list[KeyMap]:
    if isinstance(net, CLIPText):
        return [hub_text_map(net.config)]
    if not isinstance(net, UNet):
        raise ValueError(f"LoRA files are for U-Nets and CLIP's text towers, not for a {type(net).__name__}")
    maps = [LAYOUTS[name].parts[0].names(net.config) for name in ("unet-diffusers", "unet-compvis")]
    if kohya is None:
        return maps
    large = any(f.field == "micro" for e in net.config.embedding.extras for f in e.features)
    return maps[1:] if kohya and large else maps[:1]  # kohya's scripts name SDXL's layers as its own files do


def _placed(match: re.Match[str], tables: Mapping[str, Mapping[str, Place]]) -> tuple[str, Place, str] | None:
    """Net, layer and the layer's name in the table; None if there is none of that name."""
    name = match["layer"]
    prefix = next((p for p in PREFIXES if name.startswith(p)), "")
    slots = [PREFIXES[prefix]] if prefix else list(tables)
    name = name.removeprefix(prefix).replace(PEFT, "")
    if which := match["which"]:
        wanted = [f"{name}.to_{'out.0' if which == 'out' else which}", f"{name}.{which}_proj"]
    else:
        wanted = [name]
    wanted += [f"text_model.{name}" for name in wanted]
    places = ((slot, tables[slot], one) for slot in slots if slot in tables for one in wanted)
    return next(((slot, table[one], one) for slot, table, one in places if one in table), None)


def _pair(shape: tuple[int, ...], found: Mapping[int, Mapping[str, Tensor]], parts: int) -> dict[str, Tensor]:
    """The pair of a layer from those of its parts, which may be missing, or differ in rank and alpha."""
    rows, tail = shape[0] // parts, (1,) * (len(shape) - 2)
    ranks = {i: len(pair["down"]) for i, pair in found.items()}
    alphas = {i: float(pair.get("alpha", ranks[i])) for i, pair in found.items()}
    rank = max(ranks.values())
    alike = len(found) == parts and len(set(ranks.values())) == len(set(alphas.values())) == 1
    downs, ups = [], []
    for i in range(parts):
        down, up = torch.zeros(rank, *shape[1:]), torch.zeros(rows, rank, *tail)
        if i in found:
            r, factor = ranks[i], 1.0 if alike else alphas[i] / ranks[i]
            down[:r] = found[i]["down"].reshape(r, *shape[1:])
            up[:, :r] = factor * found[i]["up"].reshape(rows, r, *tail)
        downs.append(down)
        ups.append(up)
    alpha = next(iter(alphas.values())) if alike else float(rank)
    return {"down.weight": torch.cat(downs), "up.weight": torch.cat(ups), "alpha": torch.tensor(alpha)}
