"""U-Nets of diffusers that change resolution in residual blocks, with pixels and tokens in one attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from sfumato.checkpoints.keymap import KeyMap, Leaf, LeafTable
from sfumato.checkpoints.layouts.blocks import same
from sfumato.checkpoints.layouts.layout import OURS, Settings, Shapes, one_or_all, settled, shape_of
from sfumato.checkpoints.layouts.unet import SELF, Stack, names_of, stack_of
from sfumato.checkpoints.layouts.unet_diffusers import DIALECT
from sfumato.nets.attention import AttentionConfig
from sfumato.nets.blocks import BlockConfig
from sfumato.nets.embedding import EmbeddingConfig, TokensConfig
from sfumato.nets.unet import LevelConfig, UNet, UNetConfig

__all__ = [
    "KNOWN",
    "RESIDUAL",
    "appended",
    "config_of",
    "kinds",
    "one_or_all",
    "published",
    "rows",
    "settings_of",
]

FIXED: dict[str, object] = {"act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0}
FREE: dict[str, object] = {"sample_size": None, "attention_head_dim": 8, "norm_num_groups": 32} | {
    "norm_eps": 1e-5,
    **FIXED,
}
KNOWN = (*FREE, "in_channels", "out_channels", "block_out_channels", "layers_per_block")


def _table(a: AttentionConfig) -> LeafTable:
    table: dict[str | tuple[str, ...], str | Leaf] = {
        **{k: v for k, v in SELF.items() if a.to_pixels or k not in ("to_k", "to_v")},
        **{f"add_{n}_proj": f"attention.token_{n}" for n in ("k", "v")},
    }
    return table | ({"norm_cross": "attention.token_norm"} if a.norm_tokens else {})


RESIDUAL = replace(
    DIALECT,
    down=(*DIALECT.down[:2], "down_blocks.{i}.downsamplers.0"),
    up=(*DIALECT.up[:2], "up_blocks.{i}.upsamplers.0"),
    appended=_table,
)


def appended(shapes: Shapes, stack: Stack, dims: Sequence[int] | int) -> list[AttentionConfig | None]:
    """Attention of every level and of the middle, whose heads are as wide as those of the last level."""
    dims = [dims] * len(stack.widths) if isinstance(dims, int) else list(dims)
    return [
        AttentionConfig(
            kind="appended" if f"{place}.add_k_proj.weight" in shapes else "self",
            head_dim=dim,
            to_pixels=f"{place}.to_k.weight" in shapes,
            norm_tokens=f"{place}.norm_cross.weight" in shapes,
        )
        if place
        else None
        for dim, place in zip([*dims, dims[-1]], stack.places, strict=True)
    ]


def settings_of(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of the class, and our config of the tensors."""
    stack = stack_of(shapes, RESIDUAL)
    read: dict[str, object] = {
        "in_channels": shape_of(shapes, "conv_in.weight", 4)[1],
        "out_channels": shape_of(shapes, "conv_out.weight", 4)[0],
        "block_out_channels": list(stack.widths),
        "layers_per_block": one_or_all(stack.blocks),
    }
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items() if k in KNOWN}
    s: dict[str, Any] = settled(listed, read, FREE)
    for name, value in FIXED.items():
        if s[name] != value:
            raise ValueError(f"{name} {s[name]} is not supported; allowed: {value}")
    attention = appended(shapes, stack, s["attention_head_dim"])
    tokens = shapes.get("mid_block.attentions.0.add_k_proj.weight")
    embed, time = shape_of(shapes, "time_embedding.linear_1.weight", 2)
    rows = shape_of(shapes, "down_blocks.0.resnets.0.time_emb_proj.weight", 2)[0]
    config = UNetConfig(
        in_channels=s["in_channels"],
        out_channels=s["out_channels"],
        levels=tuple(
            LevelConfig(channels=width, blocks=n, attention=one)
            for width, n, one in zip(stack.widths, stack.blocks, attention[:-1], strict=True)
        ),
        middle=attention[-1],
        embedding=EmbeddingConfig(time_dim=time, dim=embed),
        tokens=TokensConfig(dim=tokens[1], masked=True) if tokens else None,
        block=BlockConfig(
            film=rows == 2 * stack.widths[0],
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


def rows(config: UNetConfig) -> KeyMap:
    """The rows of a config."""
    return names_of(config, RESIDUAL)


def published(c: UNetConfig, extra: Settings) -> dict[str, object]:
    """Arguments of UNet2DModel, or of UNet2DConditionModel where tokens are read.

    Raises: ValueError if the classes have no such U-Net.
    """
    told: dict[str, object] = {
        **FREE,
        "sample_size": extra.get("sample_size"),
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "block_out_channels": [level.channels for level in c.levels],
        "layers_per_block": one_or_all([level.blocks for level in c.levels]),
        "norm_num_groups": c.block.norm_groups,
        "norm_eps": c.block.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if c.block.film else "default",
        **kinds(c),
    }
    if c.middle is None:
        told["add_attention"] = False
    else:
        told |= {"attention_head_dim": c.middle.head_dim, "cross_attention_dim": c.token_dim}
        told |= {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "class_embed_type": "identity"}
    with torch.device("meta"):
        state = UNet(c).state_dict()
    shapes = {k: tuple(v.shape) for k, v in rows(c).save(state, where="U-Net").items()}
    same(c, config_of(settings_of(shapes, told)), "diffusers")
    return told


def kinds(c: UNetConfig) -> dict[str, list[str]]:
    """The names of the blocks, by argument."""
    names = ["SimpleCrossAttn{}Block2D" if v.attention else "Resnet{}sampleBlock2D" for v in c.levels]
    return {
        "down_block_types": [name.format("Down") for name in names],
        "up_block_types": [name.format("Up") for name in reversed(names)],
    }
