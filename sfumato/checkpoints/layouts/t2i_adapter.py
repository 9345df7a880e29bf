"""T2I-Adapters: folders of diffusers' T2IAdapter, and the original files with `body.0.block1`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from sfumato.checkpoints.keymap import KeyMap, LeafTable
from sfumato.checkpoints.layouts.layout import (
    LAYOUTS,
    OURS,
    Layout,
    Part,
    Settings,
    Shapes,
    indices,
    settled,
    shape_of,
)
from sfumato.core.registry import unknown
from sfumato.nets.t2i_adapter import T2IAdapter, T2IAdapterConfig

__all__: list[str] = []  # everything is reached through LAYOUTS

KINDS = {"full_adapter": "full", "full_adapter_xl": "xl", "light_adapter": "light"}
KNOWN = ("in_channels", "channels", "num_res_blocks", "downscale_factor", "adapter_type")
LARGE = 16  # downscale_factor of the adapters for SDXL; 8 is that of all others


def _names(c: T2IAdapterConfig, *, original: bool) -> KeyMap:
    """The rows of a config. The original numbers the blocks of all maps in one, unless it is a light one."""
    light = c.kind == "light"
    rows: list[tuple[str, str, LeafTable]] = [] if light else [("conv_in", "conv_in", {"": ""})]
    for i, (cin, width) in enumerate(zip(c.inputs, c.widths, strict=True)):
        theirs, ours = f"body.{i}", f"levels.{i}"
        blocks = [f"{theirs}.{'body' if original else 'resnets'}.{j}" for j in range(c.blocks)]
        if original and not light:
            blocks = [f"body.{c.blocks * i + j}" for j in range(c.blocks)]
            theirs = blocks[0]
        if light or cin != width:
            rows.append((f"{theirs}.in_conv", f"{ours}.conv_in", {"": ""}))
        for j, block in enumerate(blocks):
            rows.append((block, f"{ours}.blocks.{j}", {"block1": "conv1", "block2": "conv2"}))
        if light:
            rows.append((f"{theirs}.out_conv", f"{ours}.conv_out", {"": ""}))
    return KeyMap.of(rows)


def _settings(shapes: Shapes, given: Settings, *, original: bool) -> Settings:
    """Arguments of diffusers' class. What the tensors do not tell is as published, unless it is given."""
    light = "body.0.out_conv.weight" in shapes
    wide = shape_of(shapes, "body.0.in_conv.weight" if light else "conv_in.weight", 4)[1]
    usual = LARGE if wide in (LARGE**2, 3 * LARGE**2) else 8
    factor = given.get("downscale_factor", usual)
    if not isinstance(factor, int) or factor < 1 or wide % factor**2:
        raise ValueError(f"downscale_factor {factor!r} does not fit the {wide} channels of the first tensor")
    kind = str(given.get("adapter_type", "full_adapter_xl" if factor == LARGE else "full_adapter"))
    kind = "light_adapter" if light and "adapter_type" not in given else kind
    if kind not in KINDS:
        raise ValueError(unknown("adapter_type", kind, list(KINDS)))
    if light != (kind == "light_adapter"):
        raise ValueError(f"the config says adapter_type {kind}, and the tensors are of another")
    widths, blocks = _shape(shapes, light=light, original=original)
    config = T2IAdapterConfig(
        hint_channels=wide // factor**2,
        unshuffle=factor,
        widths=widths,
        blocks=blocks,
        kind=KINDS[kind],  # type: ignore[arg-type]
    )
    listed = {name: list(v) if isinstance(v, tuple) else v for name, v in given.items()}
    return {**settled(listed, _published(config, {}), {}), OURS: config}


def _shape(shapes: Shapes, *, light: bool, original: bool) -> tuple[tuple[int, ...], int]:
    """Widths of the maps, and how many blocks are before each."""
    count = indices(shapes, "body")
    if light:
        widths = [shape_of(shapes, f"body.{i}.out_conv.weight", 4)[0] for i in range(count)]
        return tuple(widths), indices(shapes, f"body.0.{'body' if original else 'resnets'}")
    if not original:
        widths = [shape_of(shapes, f"body.{i}.resnets.0.block1.weight", 4)[0] for i in range(count)]
        return tuple(widths), indices(shapes, "body.0.resnets")
    blocks = next((i for i in range(count) if f"body.{i}.in_conv.weight" in shapes), 2)
    return tuple(
        shape_of(shapes, f"body.{i}.block1.weight", 4)[0] for i in range(0, count, blocks or 1)
    ), blocks


def _published(c: T2IAdapterConfig, extra: Settings) -> dict[str, object]:
    light = c.kind == "light"
    if light and c.widths[-2:-1] != c.widths[-1:]:
        raise ValueError(f"a light T2I-Adapter of widths {c.widths}: the last two must be the same")
    return {
        "in_channels": c.hint_channels,
        "channels": list(c.widths[:-1] if light else c.widths),
        "num_res_blocks": c.blocks,
        "downscale_factor": c.unshuffle,
        "adapter_type": next(name for name, kind in KINDS.items() if kind == c.kind),
    }


def _original_published(c: T2IAdapterConfig, extra: Settings) -> dict[str, object]:
    if c.unshuffle != (LARGE if c.kind == "xl" else 8) or c.hint_channels not in (1, 3):
        raise ValueError(
            f"no tensor of the original layout says that a T2I-Adapter of kind {c.kind!r} reads "
            f"{c.hint_channels} channels by squares of {c.unshuffle}: write 't2i-adapter-diffusers'"
        )
    return _published(c, extra)


def _config(settings: Settings) -> T2IAdapterConfig:
    config = settings[OURS]
    assert isinstance(config, T2IAdapterConfig)
    return config


PART = Part(
    name="adapter",
    build=T2IAdapter,
    settings=partial(_settings, original=False),
    config=_config,
    names=partial(_names, original=False),
    published=_published,
    prefix="adapter.",
    known=KNOWN,
)
ORIGINAL = replace(
    PART,
    settings=partial(_settings, original=True),
    names=partial(_names, original=True),
    published=_original_published,
    prefix="",
)
LAYOUTS("t2i-adapter-diffusers")(
    Layout((PART,), ("body.0.resnets.0.block1.weight", "body.0.resnets.0.block2.weight"), "T2IAdapter")
)
LAYOUTS("t2i-adapter")(Layout((ORIGINAL,), ("conv_in.weight", "body.0.block1.weight")))
LAYOUTS("t2i-adapter-light")(Layout((ORIGINAL,), ("body.0.in_conv.weight", "body.0.body.0.block1.weight")))
