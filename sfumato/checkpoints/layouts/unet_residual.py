"""U-Nets of diffusers that change resolution in residual blocks, with pixels and tokens in one attention."""

from __future__ import annotations

from typing import Any

import torch

from sfumato.checkpoints.keymap import KeyMap, LeafTable
from sfumato.checkpoints.layouts.blocks import same
from sfumato.checkpoints.layouts.layout import OURS, Settings, Shapes, indices, settled, shape_of
from sfumato.nets.attention import AttentionConfig
from sfumato.nets.blocks import BlockConfig, ResBlock
from sfumato.nets.embedding import EmbeddingConfig, TokensConfig
from sfumato.nets.unet import LevelConfig, UNet, UNetConfig

__all__ = ["KNOWN", "config_of", "names_of", "published", "settings_of"]

TOP: LeafTable = {
    **{f"time_embedding.linear_{i}": f"encoder.embedding.time.linear{i}" for i in (1, 2)},
    **{"conv_in": "encoder.conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"},
}
RES: LeafTable = {**{n: n for n in ("norm1", "conv1", "norm2", "conv2")}, "time_emb_proj": "embed"}
ATTENTION: LeafTable = {
    "group_norm": "norm",
    **{f"to_{n}": f"attention.{n}" for n in ("q", "k", "v")},
    **{f"add_{n}_proj": f"attention.token_{n}" for n in ("k", "v")},
    "to_out.0": "attention.out",
}
FIXED: dict[str, object] = {"act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0}
FREE: dict[str, object] = {"sample_size": None, "attention_head_dim": 8, "norm_num_groups": 32} | {
    "norm_eps": 1e-5,
    **FIXED,
}
KNOWN = (*FREE, "in_channels", "out_channels", "block_out_channels", "layers_per_block")


def settings_of(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of the class, and our config of the tensors."""
    widths, blocks, at = list[int](), list[int](), list[bool]()
    for i in range(indices(shapes, "down_blocks")):
        widths.append(shape_of(shapes, f"down_blocks.{i}.resnets.0.conv1.weight", 4)[0])
        blocks.append(indices(shapes, f"down_blocks.{i}.resnets"))
        at.append(f"down_blocks.{i}.attentions.0.to_q.weight" in shapes)
    read: dict[str, object] = {
        "in_channels": shape_of(shapes, "conv_in.weight", 4)[1],
        "out_channels": shape_of(shapes, "conv_out.weight", 4)[0],
        "block_out_channels": widths,
        "layers_per_block": blocks[0] if len(set(blocks)) == 1 else blocks,
    }
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items() if k in KNOWN}
    s: dict[str, Any] = settled(listed, read, FREE)
    for name, value in FIXED.items():
        if s[name] != value:
            raise ValueError(f"{name} {s[name]} is not supported; allowed: {value}")
    tokens = shapes.get("mid_block.attentions.0.add_k_proj.weight")
    attention = AttentionConfig(kind="appended" if tokens else "self", head_dim=s["attention_head_dim"])
    embed, time = shape_of(shapes, "time_embedding.linear_1.weight", 2)
    rows = shape_of(shapes, "down_blocks.0.resnets.0.time_emb_proj.weight", 2)[0]
    config = UNetConfig(
        in_channels=s["in_channels"],
        out_channels=s["out_channels"],
        levels=tuple(
            LevelConfig(channels=width, blocks=n, attention=attention if one else None)
            for width, n, one in zip(widths, blocks, at, strict=True)
        ),
        middle=attention if "mid_block.attentions.0.to_q.weight" in shapes else None,
        embedding=EmbeddingConfig(time_dim=time, dim=embed),
        tokens=TokensConfig(dim=tokens[1], masked=True) if tokens else None,
        block=BlockConfig(
            film=rows == 2 * widths[0],
            resample="residual",
            norm_groups=s["norm_num_groups"],
            norm_eps=s["norm_eps"],
        ),
    )
    return {**s, OURS: config}


def config_of(settings: Settings) -> UNetConfig:
    """Our config."""
    config = settings[OURS]
    assert isinstance(config, UNetConfig)
    return config


def names_of(config: UNetConfig) -> KeyMap:
    """The rows of a config, in the order in which our blocks stand."""
    with torch.device("meta"):
        net = UNet(config)
    rows: list[tuple[str, str, LeafTable]] = [("", "", TOP)]

    def add(theirs: str, j: int, ours: str, block: Any, change: str = "") -> None:
        for name, place in (
            ("res", f"resnets.{j}"),
            ("attention", f"attentions.{j}"),
            ("resample", f"{change}samplers.0"),
        ):
            part = getattr(block, name)
            if part is not None:
                rows.append((f"{theirs}.{place}", f"{ours}.{name}", _table(part)))

    n = 0
    for i, level in enumerate(config.levels):
        for j in range(level.blocks + (i + 1 < len(config.levels))):
            add(f"down_blocks.{i}", j, f"encoder.blocks.{n}", net.encoder.blocks[n], "down")
            n += 1
    for j, block in enumerate(net.encoder.middle):
        add("mid_block", j, f"encoder.middle.{j}", block)
    n = 0
    for i, level in enumerate(reversed(config.levels)):
        for j in range(level.blocks + 1):
            add(f"up_blocks.{i}", j, f"decoder.{n}", net.decoder[n], "up")
            n += 1
    return KeyMap.of(rows)


def _table(part: Any) -> LeafTable:
    """Of a residual block or an attention, without what this one lacks."""
    if isinstance(part, ResBlock):
        return RES if isinstance(part.skip, torch.nn.Identity) else {**RES, "conv_shortcut": "skip"}
    return {k: v for k, v in ATTENTION.items() if part.attention.token_dim or not str(k).startswith("add_")}


def published(c: UNetConfig, extra: Settings) -> dict[str, object]:
    """Arguments of UNet2DModel, or of UNet2DConditionModel where tokens are read.

    Raises: ValueError if the classes have no such U-Net.
    """
    blocks = [level.blocks for level in c.levels]
    kinds = ["SimpleCrossAttn" if level.attention else "Resnet" for level in c.levels]
    told: dict[str, object] = {
        **FREE,
        "sample_size": extra.get("sample_size"),
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "block_out_channels": [level.channels for level in c.levels],
        "layers_per_block": blocks[0] if len(set(blocks)) == 1 else blocks,
        "norm_num_groups": c.block.norm_groups,
        "norm_eps": c.block.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if c.block.film else "default",
        "down_block_types": [_kind(k, "Down") for k in kinds],
        "up_block_types": [_kind(k, "Up") for k in reversed(kinds)],
    }
    if c.middle is None:
        told["add_attention"] = False
    else:
        told |= {"attention_head_dim": c.middle.head_dim, "cross_attention_dim": c.token_dim}
        told |= {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "class_embed_type": "identity"}
    shapes = {k: tuple(v.shape) for k, v in names_of(c).save(_meta(c), where="U-Net").items()}
    same(c, config_of(settings_of(shapes, told)), "diffusers")
    return told


def _kind(kind: str, way: str) -> str:
    return f"{kind}{way}{'sample' if kind == 'Resnet' else ''}Block2D"


def _meta(config: UNetConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return UNet(config).state_dict()
