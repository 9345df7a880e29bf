"""Folders of diffusers' UNet2DModel: DDPM's networks."""

from __future__ import annotations

from typing import Any

from sfumato.checkpoints.layouts.layout import LAYOUTS, OURS, Layout, Part, Settings, Shapes, shape_of
from sfumato.checkpoints.layouts.unet import names_of, stack_of
from sfumato.checkpoints.layouts.unet_diffusers import DIALECT
from sfumato.nets.attention import AttentionConfig
from sfumato.nets.blocks import BlockConfig
from sfumato.nets.embedding import EmbedderConfig, EmbeddingConfig, Feature
from sfumato.nets.unet import LevelConfig, UNet, UNetConfig

__all__: list[str] = []  # everything is reached through LAYOUTS

CLASS, SHIFT = "UNet2DModel", "resnet_time_scale_shift"
# Arguments whose one value the nets of this family have; another is refused.
FIXED: Settings = {
    "act_fn": "silu",
    "attn_norm_num_groups": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_type": "conv",
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "upsample_type": "conv",
}
# Of which tensors tell nothing, and the class's defaults.
FREE: Settings = {
    "sample_size": None,
    "attention_head_dim": 8,
    "downsample_padding": 1,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    SHIFT: "default",
}


def _settings(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of UNet2DModel."""
    for name, value in FIXED.items():
        if given.get(name, value) != value:
            raise ValueError(f"{name} {given[name]} is not supported for a {CLASS}; allowed: {value}")
    if (
        "mid_block.attentions.0.to_q.weight" in shapes
        and "mid_block.attentions.0.group_norm.weight" not in shapes
    ):
        raise ValueError(
            f"the attention in the middle has no norm ({SHIFT} {given.get(SHIFT)}); this is not supported"
        )
    config = _config({**FREE, **given, OURS: shapes})
    read = _published(config, given)
    for name, value in given.items():
        found, said = read.get(name, value), list(value) if isinstance(value, tuple) else value
        if name in read and said != found and not (name == "mid_block_type" and config.middle is None):
            raise ValueError(f"the config says {name} {value}, the tensors say {found}")
    return {**read, OURS: config}


def _config(settings: Settings) -> UNetConfig:
    """Our config of settings, and of shapes or the config that was found in them."""
    s: Any = settings
    known = settings[OURS]
    if isinstance(known, UNetConfig):
        return known
    shapes: Shapes = s[OURS]
    stack, width = stack_of(shapes, DIALECT), s["attention_head_dim"]
    attention = AttentionConfig(heads=1) if width is None else AttentionConfig(head_dim=width)
    *levels, middle = (attention if place else None for place in stack.places)
    embed, time = shape_of(shapes, "time_embedding.linear_1.weight", 2)
    rows = shapes.get("class_embedding.weight")
    labels = (
        ()
        if rows is None
        else (EmbedderConfig(kind="table", features=(Feature(field="label", dim=rows[0]),)),)
    )
    return UNetConfig(
        in_channels=shape_of(shapes, "conv_in.weight", 4)[1],
        out_channels=shape_of(shapes, "conv_out.weight", 4)[0],
        levels=tuple(
            LevelConfig(channels=c, blocks=n, attention=a)
            for c, n, a in zip(stack.widths, stack.blocks, levels, strict=True)
        ),
        middle=middle,
        embedding=EmbeddingConfig(
            time_dim=time,
            dim=embed,
            cos_first=s["flip_sin_to_cos"],
            shift=float(s["freq_shift"]),
            extras=labels,
        ),
        block=BlockConfig(
            film=s[SHIFT] == "scale_shift",
            resample="conv" if s["downsample_padding"] else "conv_asymmetric",
            norm_groups=s["norm_num_groups"],
            norm_eps=float(s["norm_eps"]),
            dropout=s["dropout"],
        ),
    )


def _published(c: UNetConfig, extra: Settings) -> dict[str, object]:
    """Arguments of UNet2DModel; `extra` has what the net does not know. Raises: ValueError if it has none."""
    e, blocks = c.embedding, {level.blocks for level in c.levels}
    own = {level.attention for level in c.levels if level.attention} | ({c.middle} if c.middle else set())
    attention = next(iter(own), AttentionConfig(heads=1))
    widths = {c.embedding.time_dim, c.levels[0].channels}
    if (
        len(own) > 1
        or attention.kind != "self"
        or attention.heads > 1
        or len(blocks) > 1
        or len(widths) > 1
        or c.tokens
        or [x.features[0].field for x in e.extras] not in ([], ["label"])
        or c.block.resample not in ("conv", "conv_asymmetric")
    ):
        raise ValueError(f"diffusers' {CLASS} computes no U-Net of this kind; save it as a sfumato system")
    at = ["Attn" * (level.attention is not None) for level in c.levels]
    return {
        **FIXED,
        "sample_size": extra.get("sample_size"),
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "block_out_channels": [level.channels for level in c.levels],
        "layers_per_block": c.levels[0].blocks,
        "down_block_types": [f"{a}DownBlock2D" for a in at],
        "up_block_types": [f"{a}UpBlock2D" for a in reversed(at)],
        "add_attention": c.middle is not None,
        "attention_head_dim": attention.head_dim or None,
        "downsample_padding": int(c.block.resample == "conv"),
        "dropout": c.block.dropout,
        "flip_sin_to_cos": e.cos_first,
        "freq_shift": int(e.shift),
        "norm_eps": c.block.norm_eps,
        "norm_num_groups": c.block.norm_groups,
        SHIFT: "scale_shift" if c.block.film else "default",
        "num_class_embeds": e.extras[0].features[0].dim if e.extras else None,
    }


SHAPE = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "add_attention")
OLD = ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0."))
"""Names in the oldest files, those of google/ddpm-* among them."""
NET = Part(
    name="net",
    build=UNet,
    settings=_settings,
    config=_config,
    names=lambda config: names_of(config, DIALECT),
    published=_published,
    aliases=OLD,
    known=(*FIXED, *FREE, *SHAPE, "down_block_types", "up_block_types", "num_class_embeds"),
)
MARKS = (
    "down_blocks.0.resnets.0.time_emb_proj.weight",
    "mid_block.resnets.0.conv1.weight",
    "conv_out.weight",
)
LAYOUTS("unet2d-diffusers")(Layout((NET,), MARKS, CLASS))
