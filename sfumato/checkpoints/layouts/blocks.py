"""U-Nets whose file has input_blocks, middle_block and output_blocks: their structure and their names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from sfumato.checkpoints.keymap import KeyMap, Leaf, LeafTable, Op, regrouped, squeezed, stacked
from sfumato.checkpoints.layouts.layout import Settings, Shapes, indices, one_or_all, shape_of
from sfumato.nets.attention import AttentionConfig, SpatialAttention
from sfumato.nets.blocks import BlockConfig, Downsample, ResBlock, Upsample
from sfumato.nets.embedding import EmbeddingConfig
from sfumato.nets.unet import Encoder, LevelConfig, UNet, UNetConfig

__all__ = [
    "agreed",
    "attention_of",
    "encoder_rows",
    "first_blocks",
    "normalized",
    "same",
    "structure",
    "told",
    "unet_config",
    "unet_map",
]

RES: LeafTable = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "embed",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}
ONLY: Settings = {"conv_resample": True, "dims": 2}
RESOLUTIONS = ("attention_resolutions", "disable_self_attentions")
TIME: LeafTable = {"time_embed.0": "time.linear1", "time_embed.2": "time.linear2"}


def structure(shapes: Shapes, blocks: Sequence[int] | None = None) -> dict[str, object]:
    """What names and shapes say of the net, by the names of the reference's constructor.

    Args:
        blocks: residual blocks of every level; None = counted in output_blocks.

    Raises: ValueError if the names make no U-Net, or the blocks are not as said.
    """
    width = shape_of(shapes, "time_embed.0.weight", 2)[1]
    blocks = _counted(shapes) if blocks is None else blocks
    total, wanted = indices(shapes, "input_blocks"), sum(blocks) + len(blocks)
    if total != wanted:
        levels = ", ".join(map(str, blocks))
        raise ValueError(f"levels of {levels} residual blocks have {wanted} input_blocks, the file {total}")
    names = first_blocks(blocks)
    channels = [shape_of(shapes, f"{name}.0.out_layers.3.weight", 4)[0] for name in names]
    rows = shape_of(shapes, f"{names[0]}.0.emb_layers.1.weight", 2)[0]
    return {
        "model_channels": width,
        "num_res_blocks": one_or_all(blocks),
        "channel_mult": [_mult(c, width) for c in channels],
        "attention_resolutions": [2**i for i, name in enumerate(names) if f"{name}.1.qkv.weight" in shapes],
        "use_scale_shift_norm": rows == 2 * channels[0],
        "resblock_updown": not any(name.endswith(".0.op.weight") for name in shapes),
    }


def _mult(channels: int, width: int) -> float:
    return channels // width if channels % width == 0 else channels / width


def first_blocks(blocks: Sequence[int]) -> list[str]:
    """Name of the first residual block of every level; a change of resolution stands before all but one."""
    return [f"input_blocks.{1 + sum(blocks[:i]) + i}" for i in range(len(blocks))]


def _counted(shapes: Shapes) -> tuple[int, ...]:
    """Residual blocks per level: the decoder has one more, and a change of resolution ends each level."""
    sizes = [0]
    for i in range(indices(shapes, "output_blocks")):
        sizes[-1] += 1
        ends = [f"output_blocks.{i}.{n}.{layer}.weight" for n in (1, 2) for layer in ("conv", "in_layers.2")]
        if any(end in shapes for end in ends):
            sizes.append(0)
    return tuple(size - 1 for size in reversed(sizes))


def unet_config(
    settings: Settings, attention: AttentionConfig, only: AttentionConfig | None = None
) -> UNetConfig:
    """The U-Net of settled settings, without what one family alone has.

    Args:
        only: attention where disable_self_attentions says so.
    """
    s: Any = settings
    width, mults, counts = s["model_channels"], s["channel_mult"], s["num_res_blocks"]
    counts = [counts] * len(mults) if isinstance(counts, int) else counts
    alone = s.get("disable_self_attentions") or []

    def at(level: int) -> AttentionConfig:
        return only if only is not None and 2**level in alone else attention

    return UNetConfig(
        in_channels=s["effective_in_channels"],
        out_channels=s["out_channels"],
        levels=tuple(
            LevelConfig(
                channels=int(width * mult),
                blocks=n,
                attention=at(i) if 2**i in s["attention_resolutions"] else None,
            )
            for i, (mult, n) in enumerate(zip(mults, counts, strict=True))
        ),
        middle=at(len(mults) - 1),
        embedding=EmbeddingConfig(time_dim=width, dim=4 * width),
        block=BlockConfig(
            film=s["use_scale_shift_norm"],
            resample="residual" if s["resblock_updown"] else "conv",
            dropout=s["dropout"],
        ),
    )


def told(config: UNetConfig) -> dict[str, object]:
    """The inverse of `unet_config`, of the heads too; whoever calls it compares what comes of it."""
    levels, width, a = config.levels, config.embedding.time_dim, config.middle
    blocks = [level.blocks for level in levels]
    at = [level.attention for level in levels]
    return {
        "effective_in_channels": config.in_channels,
        "in_channels": config.in_channels,
        "model_channels": width,
        "out_channels": config.out_channels,
        "num_res_blocks": one_or_all(blocks),
        "channel_mult": [
            v.channels // width if v.channels % width == 0 else v.channels / width for v in levels
        ],
        "attention_resolutions": [2**i for i, one in enumerate(at) if one],
        "disable_self_attentions": [
            2**i for i, one in enumerate([*at[:-1], at[-1] or a]) if one and not one.to_pixels
        ],
        "num_heads": a.heads or None if a else None,
        "num_head_channels": a.head_dim or -1 if a else -1,
        "use_scale_shift_norm": config.block.film,
        "resblock_updown": config.block.resample == "residual",
        "dropout": config.block.dropout,
    }


def same(config: UNetConfig, again: UNetConfig, whose: str) -> None:
    """Raises: ValueError if a reference's class would compute another net than ours."""
    for name, value in vars(config).items():
        if value != getattr(again, name):
            raise ValueError(
                f"{whose} has no U-Net with this {name}: written so it would draw other pictures; save it as "
                "a sfumato system"
            )


def attention_of(
    settings: Settings, kind: Literal["self", "appended"] = "self", **options: bool
) -> AttentionConfig:
    """Attention by num_heads and num_head_channels.

    Raises: ValueError if the heads are not known, or other ones are wanted in the decoder.
    """
    s: Any = settings
    heads, width, upsample = s["num_heads"], s["num_head_channels"], s["num_heads_upsample"]
    if width != -1:
        return AttentionConfig(kind=kind, head_dim=width, **options)
    if heads is None:
        raise ValueError(
            "no tensor tells the attention heads: give config={'num_head_channels': ...} or 'num_heads', or "
            "the file the name under which it was published"
        )
    if upsample not in (-1, heads):
        raise ValueError(f"num_heads_upsample {upsample} is not supported; allowed: -1, or num_heads {heads}")
    return AttentionConfig(kind=kind, heads=heads, **options)


def normalized(given: Settings, size: object = None) -> dict[str, object]:
    """Given settings as `structure` tells them: numbers for "1,2,3", downsamplings for "32,16,8" pixels.

    Args:
        size: of the side of the pictures, by which pixels become downsamplings.

    Raises: ValueError for pixels without a size, or for what no published net has.
    """
    rest: dict[str, Any] = dict(given)
    for name, value in ONLY.items():
        if rest.get(name, value) != value:
            raise ValueError(f"{name} {rest[name]} is not supported; allowed: {value}")
    for name in ("channel_mult", "num_res_blocks"):
        value = rest.get(name)
        if value == "":  # the scripts' word for "as usual at this size"
            del rest[name]
        elif isinstance(value, str | tuple | list):
            rest[name] = [float(one) for one in (value.split(",") if isinstance(value, str) else value)]
    blocks = rest.get("num_res_blocks")
    if isinstance(blocks, list) and len(set(blocks)) == 1:
        rest["num_res_blocks"] = blocks[0]
    for name in RESOLUTIONS:
        if isinstance(rest.get(name), str | list | tuple | set):
            rest[name] = _downsamplings(name, rest[name], size)
    return rest


def _downsamplings(name: str, value: str | Collection[int], size: object) -> list[int]:
    """In order; of a string of sides in pixels."""
    if isinstance(value, str):
        if not isinstance(size, int):
            raise ValueError(f"{name} {value!r} is in pixels: give image_size as well")
        value = [size // int(one) for one in value.split(",") if one]
    return sorted({int(one) for one in value})


def agreed(given: Settings, read: Settings) -> dict[str, object]:
    """Given settings without resolutions that the net does not reach."""
    rest: dict[str, Any] = dict(given)
    mults: Any = read["channel_mult"]
    for name in RESOLUTIONS:
        if isinstance(rest.get(name), list):
            rest[name] = [one for one in rest[name] if one < 2 ** len(mults)]
    return rest


def unet_map(config: UNetConfig, top: LeafTable, *, new_order: bool = False) -> KeyMap:
    """Names of such a file to those of UNet.

    Args:
        top: layers beside the blocks, of this family alone.
        new_order: rows of the attention are by q, k, v and then by head, not by head first.
    """
    with torch.device("meta"):
        net = UNet(config)
    heads: LeafTable = {"out.0": "norm_out", "out.2": "conv_out", **top}
    rows = [("", "", heads), *encoder_rows(net.encoder, "encoder", new_order=new_order)]
    for i, block in enumerate(net.decoder):
        rows += _rows(f"output_blocks.{i}", {f"decoder.{i}": block}, new_order)
    return KeyMap.of(rows)


def encoder_rows(encoder: Encoder, ours: str, *, new_order: bool = False) -> list[tuple[str, str, LeafTable]]:
    """Of the descending half with time and middle, which is at `ours` in the net."""
    rows: list[tuple[str, str, LeafTable]] = [
        ("", f"{ours}.embedding", TIME),
        ("", ours, {"input_blocks.0.0": "conv_in"}),
    ]
    for i, block in enumerate(encoder.blocks):
        rows += _rows(f"input_blocks.{i + 1}", {f"{ours}.blocks.{i}": block}, new_order)
    middle = {f"{ours}.middle.{i}": block for i, block in enumerate(encoder.middle)}
    return rows + list(_rows("middle_block", middle, new_order))


def _rows(
    theirs: str, blocks: Mapping[str, nn.Module], new_order: bool
) -> Iterator[tuple[str, str, LeafTable]]:
    """The parts of some blocks in their order, numbered as one sequence in the file."""
    parts = [
        (f"{ours}.{name}", part)
        for ours, block in blocks.items()
        for name in ("res", "attention", "resample")
        if (part := getattr(block, name)) is not None
    ]
    for i, (ours, part) in enumerate(parts):
        yield f"{theirs}.{i}", ours, _table(part, new_order)


def _table(part: nn.Module, new_order: bool) -> LeafTable:
    if isinstance(part, Downsample):
        return {"op": "conv"}
    if isinstance(part, Upsample):
        return {"conv": "conv"}
    if isinstance(part, ResBlock):
        return RES if isinstance(part.skip, nn.Identity) else {**RES, "skip_connection": "skip"}
    assert isinstance(part, SpatialAttention)
    return _attention(part, new_order)


def _attention(part: SpatialAttention, new_order: bool) -> LeafTable:
    a = part.attention

    def rows(count: int) -> Op:
        flat = squeezed(2) if new_order else squeezed(2).then(regrouped(a.heads, count))
        return flat.then(stacked(count).inverse)

    inner = ("attention.q", "attention.k", "attention.v")
    table: dict[str | tuple[str, ...], str | Leaf] = {
        "norm": "norm",
        "qkv": Leaf(inner, rows(3)) if a.to_self else Leaf("attention.q", squeezed(2)),
        "proj_out": Leaf("attention.out", squeezed(2)),
    }
    if a.token_dim:
        table["encoder_kv"] = Leaf(("attention.token_k", "attention.token_v"), rows(2))
        if a.token_norm is not None:
            table["norm_encoder"] = "attention.token_norm"
    return table
