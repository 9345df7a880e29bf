"""EDM2: the tensors of NVlabs/edm2's `Precond`, as a state dict; its pickled modules are not read."""

from __future__ import annotations

import torch
from torch import nn

from sfumato.checkpoints.keymap import KeyMap, Leaf, LeafTable
from sfumato.checkpoints.layouts.layout import (
    LAYOUTS,
    Layout,
    Part,
    Settings,
    Shapes,
    indices,
    settled,
    shape_of,
)
from sfumato.nets.edm2 import EDM2, EDM2Config

__all__: list[str] = []  # everything is reached through LAYOUTS

WEIGHT = ("weight",)
BUFFERS = ("freqs", "phases")
FREE: Settings = {
    "channels_per_head": 64,
    "dropout": 0.0,
    "sigma_data": 0.5,
    "use_fp16": False,
    "label_balance": 0.5,
    "concat_balance": 0.5,
    "res_balance": 0.3,
    "attn_balance": 0.3,
    "clip_act": 256,
}
"""What the tensors do not tell."""


def _settings(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of Precond(...) and of the UNet inside it."""
    sides = sorted({int(n.split(".")[2].partition("x")[0]) for n in shapes if n.startswith("unet.enc.")})
    if not sides:
        raise ValueError("there is no encoder among its tensors")
    full = sides[-1]
    width, channels = shape_of(shapes, f"unet.enc.{full}x{full}_conv.weight", 4)[:2]
    first = {side: f"unet.enc.{side}x{side}_block0" for side in reversed(sides)}
    rows = [shape_of(shapes, f"{name}.conv_res1.weight", 4)[0] for name in first.values()]
    at_full = {name.replace(f"{full}x{full}_block", "block."): shape for name, shape in shapes.items()}
    read = {
        "img_resolution": full,
        "img_channels": channels - 1,
        "label_dim": shapes.get("unet.emb_label.weight", (0, 0))[1],
        "model_channels": width,
        "channel_mult": [row // width for row in rows],
        "num_blocks": indices(at_full, "unet.enc.block"),
        "attn_resolutions": [s for s, name in first.items() if f"{name}.attn_qkv.weight" in shapes],
        "logvar_channels": shape_of(shapes, "logvar_linear.weight", 2)[1],
    }
    settings = settled(given, read, FREE)
    if settings["res_balance"] != settings["attn_balance"]:
        raise ValueError("res_balance and attn_balance differ; allowed: the same value for both")
    return settings


def _config(settings: Settings) -> EDM2Config:
    s, mults, at = settings, settings["channel_mult"], settings["attn_resolutions"]
    full = s["img_resolution"]
    assert isinstance(mults, list)
    assert isinstance(at, list)
    assert isinstance(full, int)
    return EDM2Config(
        channels=_int(s, "img_channels"),
        width=_int(s, "model_channels"),
        mults=tuple(mults),
        blocks=_int(s, "num_blocks"),
        attention_levels=tuple(level for level in range(len(mults)) if full >> level in at),
        head_dim=_int(s, "channels_per_head"),
        num_classes=_int(s, "label_dim") or None,
        resolution=full,
        logvar_features=_int(s, "logvar_channels"),
        dropout=_float(s, "dropout"),
        residual=_float(s, "res_balance"),
        label=_float(s, "label_balance"),
        concat=_float(s, "concat_balance"),
        clip=_float(s, "clip_act"),
    )


def _published(c: EDM2Config, extra: Settings) -> Settings:
    return {
        "img_resolution": c.resolution,
        "img_channels": c.channels,
        "label_dim": c.num_classes or 0,
        "model_channels": c.width,
        "channel_mult": list(c.mults),
        "num_blocks": c.blocks,
        "attn_resolutions": [c.resolution >> level for level in c.attention_levels],
        "logvar_channels": c.logvar_features,
        "channels_per_head": c.head_dim,
        "dropout": c.dropout,
        "res_balance": c.residual,
        "attn_balance": c.residual,
        "label_balance": c.label,
        "concat_balance": c.concat,
        "clip_act": c.clip,
    }


def _names(c: EDM2Config) -> KeyMap:
    side, levels = c.resolution, range(len(c.mults))
    with torch.device("meta"):
        net = EDM2(c)
    top: LeafTable = {
        "unet.out_gain": Leaf("gain", tensors=()),
        "unet.emb_fourier": Leaf("fourier", tensors=BUFFERS),
        "unet.emb_noise": Leaf("noise", tensors=WEIGHT),
        f"unet.enc.{side}x{side}_conv": Leaf("conv_in", tensors=WEIGHT),
        "unet.out_conv": Leaf("conv_out", tensors=WEIGHT),
        "logvar_fourier": Leaf("logvar_fourier", tensors=BUFFERS),
        "logvar_linear": Leaf("logvar", tensors=WEIGHT),
        **({"unet.emb_label": Leaf("label", tensors=WEIGHT)} if net.label is not None else {}),
    }
    rows: list[tuple[str, str, LeafTable]] = [("", "", top)]
    for name, ours, blocks, order in (
        ("enc", "encoder", net.encoder, levels),
        ("dec", "decoder", net.decoder, reversed(levels)),
    ):
        theirs = [
            f"{side >> level}x{side >> level}_{block}" for level in order for block in _blocks(c, name, level)
        ]
        for i, (place, block) in enumerate(zip(theirs, blocks, strict=True)):
            rows.append((f"unet.{name}.{place}", f"{ours}.{i}", _table(block)))
    return KeyMap.of(rows)


def _blocks(c: EDM2Config, side: str, level: int) -> list[str]:
    """Names of the blocks of a level."""
    if side == "enc":
        return [*(["down"] if level else []), *(f"block{i}" for i in range(c.blocks))]
    first = ["in0", "in1"] if level == len(c.mults) - 1 else ["up"]
    return [*first, *(f"block{i}" for i in range(c.blocks + 1))]


def _table(block: nn.Module) -> LeafTable:
    names = {
        "conv_res0": "conv1",
        "emb_linear": "embed",
        "conv_res1": "conv2",
        "conv_skip": "conv_skip",
        "attn_qkv": "qkv",
        "attn_proj": "out",
    }
    table: dict[str | tuple[str, ...], str | Leaf] = {
        theirs: Leaf(ours, tensors=WEIGHT)
        for theirs, ours in names.items()
        if getattr(block, ours) is not None
    }
    return {**table, "emb_gain": Leaf("gain", tensors=())}


def _int(settings: Settings, name: str) -> int:
    value = settings[name]
    assert isinstance(value, int)
    return value


def _float(settings: Settings, name: str) -> float:
    return float(str(settings[name]))


PRECOND = Part(name="net", build=EDM2, settings=_settings, config=_config, names=_names, published=_published)
_MARKS = ("unet.emb_fourier.freqs", "unet.emb_noise.weight", "logvar_linear.weight")
LAYOUTS("edm2")(Layout((PRECOND,), _MARKS))
