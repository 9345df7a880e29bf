"""DeepFloyd IF in folders of diffusers: the UNet2DConditionModel that pools its text."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from sfumato.checkpoints.keymap import KeyMap, Leaf, LeafTable
from sfumato.checkpoints.layouts.layout import (
    LAYOUTS,
    OURS,
    Layout,
    Part,
    Settings,
    Shapes,
    one_or_all,
    shape_of,
)
from sfumato.checkpoints.layouts.unet import names_of, stack_of
from sfumato.checkpoints.layouts.unet_diffusers import CLASS
from sfumato.checkpoints.layouts.unet_diffusers import FIXED as OF_STABLE
from sfumato.checkpoints.layouts.unet_residual import RESIDUAL, appended, kinds
from sfumato.core.registry import unknown
from sfumato.nets.blocks import ACTIVATIONS, BlockConfig
from sfumato.nets.embedding import EmbedderConfig, EmbeddingConfig, Feature, TokensConfig
from sfumato.nets.unet import LevelConfig, UNet, UNetConfig

__all__: list[str] = []  # everything is reached through LAYOUTS

OPEN = (  # arguments that Stable Diffusion has at one value
    *("act_fn", "cross_attention_norm", "encoder_hid_dim", "encoder_hid_dim_type", "mid_block_type"),
    *("mid_block_scale_factor", "resnet_out_scale_factor", "resnet_skip_time_act"),
    *("resnet_time_scale_shift", "time_embedding_act_fn", "time_embedding_dim"),
)
FIXED: dict[str, object] = {
    **{name: value for name, value in OF_STABLE.items() if name not in OPEN},
    "addition_embed_type": "text",
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
}
FREE: dict[str, object] = {
    "sample_size": None,
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "addition_embed_type_num_heads": 64,
    "resnet_out_scale_factor": 1.0,
    "mid_block_scale_factor": 1,
    "resnet_skip_time_act": False,
    "time_embedding_act_fn": None,
}
"""Arguments of which tensors tell nothing, and their defaults."""
READ = (  # what the tensors tell, and a config must not contradict
    *("in_channels", "out_channels", "block_out_channels", "layers_per_block", "down_block_types"),
    *("cross_attention_dim", "cross_attention_norm", "encoder_hid_dim", "class_embed_type"),
    "resnet_time_scale_shift",
)
ALSO = ("up_block_types", "only_cross_attention", "mid_block_only_cross_attention", "time_embedding_dim")


def _extra(e: EmbedderConfig) -> LeafTable:
    if e.kind == "mlp":
        return {f"class_embedding.linear_{i}": f"proj.linear{i}" for i in (1, 2)}
    return {
        **{f"add_embedding.{name}": f"pool.{name}" for name in ("norm1", "proj", "norm2")},
        **{f"add_embedding.pool.{name}_proj": f"pool.{name}" for name in "qkv"},
        "add_embedding.pool.positional_embedding": Leaf("pool.position", tensors=()),
    }


OWN = replace(RESIDUAL, extra=_extra)


def _names(c: UNetConfig) -> KeyMap:
    top: LeafTable = {"encoder_hid_proj": "encoder.tokens.proj"} if c.tokens and c.tokens.width else {}
    return names_of(c, replace(OWN, top={**OWN.top, **top}))


def _settings(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of UNet2DConditionModel, and our config of them."""
    for name, value in FIXED.items():
        if given.get(name, value) != value:
            raise ValueError(f"{name} {given[name]} is not supported for this {CLASS}; allowed: {value}")
    free: dict[str, Any] = {**FREE, **{name: given[name] for name in FREE if name in given}}
    if not math.isclose(free["mid_block_scale_factor"], free["resnet_out_scale_factor"]):
        raise ValueError("mid_block_scale_factor and resnet_out_scale_factor differ; both must be the same")
    if free["time_embedding_act_fn"] != (free["act_fn"] if free["resnet_skip_time_act"] else None):
        raise ValueError("time_embedding_act_fn must be act_fn beside resnet_skip_time_act, else None")
    if free["act_fn"] not in ACTIVATIONS:
        raise ValueError(unknown("act_fn", str(free["act_fn"]), list(ACTIVATIONS)))
    config = _read(shapes, free)
    read = _published(config, free)
    for name in READ:
        value, found = given.get(name, read[name]), read[name]
        said = list(value) if isinstance(value, tuple) else value
        if said != found and [said] * len(config.levels) != found and said != [found] * len(config.levels):
            raise ValueError(f"the config says {name} {value}, the tensors say {found}")
    return {**read, OURS: config}


def _read(shapes: Shapes, free: dict[str, Any]) -> UNetConfig:
    """Our config of the tensors and of what they do not tell."""
    stack = stack_of(shapes, OWN)
    embed, width = shape_of(shapes, "time_embedding.linear_1.weight", 2)
    pool = shape_of(shapes, "add_embedding.norm1.weight", 1)[0]
    tokens = shape_of(shapes, "mid_block.attentions.0.add_k_proj.weight", 2)[1]
    film = shape_of(shapes, "down_blocks.0.resnets.0.time_emb_proj.weight", 2)[0] == 2 * stack.widths[0]
    attention = appended(shapes, stack, free["attention_head_dim"])
    text = Feature(field="tokens", dim=pool)
    extras = [EmbedderConfig(kind="pool", features=(text,), heads=free["addition_embed_type_num_heads"])]
    if "class_embedding.linear_1.weight" in shapes:
        aug = Feature(field="aug", dim=1, sinusoid=shape_of(shapes, "class_embedding.linear_1.weight", 2)[1])
        extras.append(EmbedderConfig(kind="mlp", features=(aug,)))
    scale = float(free["resnet_out_scale_factor"])
    return UNetConfig(
        in_channels=shape_of(shapes, "conv_in.weight", 4)[1],
        out_channels=shape_of(shapes, "conv_out.weight", 4)[0],
        levels=tuple(
            LevelConfig(channels=w, blocks=n, attention=a)
            for w, n, a in zip(stack.widths, stack.blocks, attention[:-1], strict=True)
        ),
        middle=attention[-1],
        embedding=EmbeddingConfig(time_dim=width, dim=embed, extras=tuple(extras)),
        tokens=TokensConfig(dim=pool, width=tokens if "encoder_hid_proj.weight" in shapes else 0),
        block=BlockConfig(
            film=film,
            resample="residual",
            activation=free["act_fn"],
            dropout=float(free["dropout"]),
            residual_scale=1.0 if scale == 1 else 1 / scale,
        ),
    )


def _published(c: UNetConfig, extra: Settings) -> dict[str, object]:
    """Arguments of UNet2DConditionModel; `extra` has what the net does not know."""
    attentions = [level.attention for level in c.levels]
    used = [a for a in (*attentions, c.middle) if a is not None]
    pools = [e for e in c.embedding.extras if e.kind == "pool"]
    augs = [e for e in c.embedding.extras if e.kind == "mlp" and e.features[0].field == "aug"]
    if (
        c.middle is None
        or c.tokens is None
        or c.block.resample != "residual"
        or any(a.kind != "appended" or not a.head_dim or a.norm_tokens != c.middle.norm_tokens for a in used)
        or len(pools) != 1
        or c.block.skip_scale != 1
        or any(level.once or not level.blocks for level in c.levels)
        or len(pools) + len(augs) != len(c.embedding.extras)
        or (c.block.norm_groups, c.block.norm_eps) != (FIXED["norm_num_groups"], FIXED["norm_eps"])
    ):
        raise ValueError(f"diffusers' {CLASS} has no such U-Net of IF; save it as a sfumato system")
    factor = 1.0 if c.block.residual_scale == 1 else 1 / c.block.residual_scale
    only = [a is not None and not a.to_pixels for a in attentions]
    act, once = c.block.activation, bool(extra.get("resnet_skip_time_act", factor != 1))
    return {
        **FIXED,
        **FREE,
        **{name: extra[name] for name in ("sample_size", "dropout") if name in extra},
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "block_out_channels": [level.channels for level in c.levels],
        "layers_per_block": one_or_all([level.blocks for level in c.levels]),
        **kinds(c),
        "attention_head_dim": [c.middle.head_dim if a is None else a.head_dim for a in attentions],
        "only_cross_attention": only,
        "mid_block_only_cross_attention": not c.middle.to_pixels,
        "cross_attention_dim": c.token_dim,
        "cross_attention_norm": "group_norm" if c.middle.norm_tokens else None,
        "encoder_hid_dim": c.tokens.dim if c.tokens.width else None,
        "encoder_hid_dim_type": "text_proj" if c.tokens.width else None,
        "addition_embed_type_num_heads": pools[0].heads,
        "class_embed_type": "timestep" if augs else None,
        "act_fn": act,
        "resnet_time_scale_shift": "scale_shift" if c.block.film else "default",
        "time_embedding_dim": c.embedding.dim,
        "resnet_out_scale_factor": factor,
        "mid_block_scale_factor": factor,
        "resnet_skip_time_act": once,
        "time_embedding_act_fn": act if once else None,
    }


def _config(settings: Settings) -> UNetConfig:
    config = settings[OURS]
    assert isinstance(config, UNetConfig)
    return config


UNET = Part(
    name="net",
    build=UNet,
    settings=_settings,
    config=_config,
    names=_names,
    published=_published,
    known=(*FIXED, *FREE, *READ, *ALSO),
)
MARKS = ("add_embedding.pool.positional_embedding", "mid_block.attentions.0.add_k_proj.weight")
LAYOUTS("deepfloyd-diffusers")(Layout((UNET,), MARKS, CLASS))
