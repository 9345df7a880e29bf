"""Folders of diffusers' UNet2DConditionModel: Stable Diffusion 1 and 2 with their relatives, SDXL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from sfumato.checkpoints.keymap import Leaf, LeafTable
from sfumato.checkpoints.layouts.layout import LAYOUTS, OURS, Layout, Part, Settings, Shapes, one_or_all
from sfumato.checkpoints.layouts.unet import (
    Dialect,
    Stack,
    attentions,
    config_of,
    names_of,
    stack_of,
    supported,
)
from sfumato.nets.attention import AttentionConfig
from sfumato.nets.blocks import BlockConfig
from sfumato.nets.embedding import EmbedderConfig, Feature
from sfumato.nets.unet import UNet, UNetConfig

__all__ = ["DIALECT"]  # all else is reached through LAYOUTS

CLASS = "UNet2DConditionModel"
# Arguments whose one value the nets of this family have; another is refused.
FIXED: dict[str, object] = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
# Arguments of which tensors tell nothing, and their defaults.
FREE: dict[str, object] = {"sample_size": None, "upcast_attention": False, "dropout": 0.0}
NORMS: dict[str, object] = {"norm_num_groups": 32, "norm_eps": 1e-5}
# One value for all levels, or one for each; those of the second line are without effect beside no attention.
BY_LEVEL = ("layers_per_block", "down_block_types")
BY_ATTENTION = ("attention_head_dim", "transformer_layers_per_block", "only_cross_attention")
SIZES = 256  # sines and cosines of each size, crop and score of SDXL


def _extra(e: EmbedderConfig) -> LeafTable:
    if e.kind == "table":
        return {"class_embedding": Leaf("table", tensors=("weight",))}
    name = "class_embedding" if e.features[0].field == "image_embed" else "add_embedding"
    return {f"{name}.linear_{i}": f"proj.linear{i}" for i in (1, 2)}


DIALECT = Dialect(
    down=(
        "down_blocks.{i}.resnets.{j}",
        "down_blocks.{i}.attentions.{j}",
        "down_blocks.{i}.downsamplers.0.conv",
    ),
    up=("up_blocks.{i}.resnets.{j}", "up_blocks.{i}.attentions.{j}", "up_blocks.{i}.upsamplers.0.conv"),
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    top={
        **{f"time_embedding.linear_{i}": f"encoder.embedding.time.linear{i}" for i in (1, 2)},
        "conv_in": "encoder.conv_in",
        "conv_norm_out": "norm_out",
        "conv_out": "conv_out",
    },
    guidance="time_embedding.cond_proj",
    block={**{n: n for n in ("norm1", "conv1", "norm2", "conv2")}, "time_emb_proj": "embed"},
    skip="conv_shortcut",
    extra=_extra,
)


def _settings(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of UNet2DConditionModel."""
    for name, value in FIXED.items():
        if name in given and given[name] != value:
            raise ValueError(f"{name} {given[name]} is not supported for a {CLASS}; allowed: {value}")
    stack = stack_of(shapes, DIALECT)
    heads = _levelled(given.get("num_attention_heads") or given.get("attention_head_dim", 8), stack)
    tokens_only = [bool(v) for v in _levelled(given.get("only_cross_attention", False), stack)]
    tokens_only[-1] = False  # the class builds its middle so, whatever it is told
    numbers = [h if isinstance(h, int) else 0 for h in heads]
    attention = attentions(shapes, stack, numbers, tokens_only)
    norms = {name: given.get(name, value) for name, value in NORMS.items()}
    groups, eps = norms["norm_num_groups"], norms["norm_eps"]
    assert isinstance(groups, int)
    assert isinstance(eps, float | int)
    block = BlockConfig(norm_groups=groups, norm_eps=float(eps))
    bare = config_of(shapes, DIALECT, attention, (), block)
    embedding = replace(bare.embedding, extras=_extras(shapes, given, bare.token_dim))
    config = replace(bare, embedding=embedding)
    read = _published(config, given)
    _agree(given, read, stack)
    return {**read, OURS: config}


def _levelled(value: object, stack: Stack) -> list[object]:
    """One value for every level and for the middle, which has that of the last level."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None
    if values is None:
        return [value] * len(stack.places)
    if len(values) != len(stack.widths):
        raise ValueError(f"the config has {len(values)} values {values} for {len(stack.widths)} levels")
    return [*values, values[-1]]


def _agree(given: Settings, read: Settings, stack: Stack) -> None:
    """Raises: ValueError if the config says something else than the tensors."""
    for name, value in given.items():
        if name not in read:
            continue
        found, said = read[name], value
        if name in (*BY_LEVEL, *BY_ATTENTION):
            counted = [bool(place) or name in BY_LEVEL for place in stack.places]
            found, said = (
                [v for v, counts in zip(_levelled(one, stack), counted, strict=True) if counts]
                for one in (found, value)
            )
        elif isinstance(value, tuple | list):
            said = list(value)
        if said != found:
            raise ValueError(f"the config says {name} {value}, the tensors say {read[name]}")


def _extras(shapes: Shapes, given: Settings, context: int) -> tuple[EmbedderConfig, ...]:
    """What is added to the embedding of time."""
    if (rows := shapes.get("class_embedding.weight")) is not None:
        return (EmbedderConfig(kind="table", features=(Feature(field="aug", dim=rows[0]),)),)
    if (image := shapes.get("class_embedding.linear_1.weight")) is not None:
        half = image[1] // 2
        features = (Feature(field="image_embed", dim=half), Feature(field="aug", dim=1, sinusoid=half))
        return (EmbedderConfig(kind="mlp", features=features),)
    if (vector := shapes.get("add_embedding.linear_1.weight")) is None:
        return ()
    sizes = given.get("addition_time_embed_dim") or SIZES
    assert isinstance(sizes, int)
    return (sized(vector[1], context, sizes),)


def sized(width: int, context: int, sizes: int) -> EmbedderConfig:
    """SDXL's vector: pooled text, then size, crop, target size (6 numbers); or score in its place (5).

    The refiner has one tower, whose tokens are as wide as its pooled text.
    """
    numbers = 5 if width - 5 * sizes == context else 6
    features = (
        Feature(field="pooled", dim=width - numbers * sizes),
        Feature(field="micro", dim=numbers, sinusoid=sizes),
    )
    return EmbedderConfig(kind="mlp", features=features)


def _published(c: UNetConfig, extra: Settings) -> dict[str, object]:
    """Arguments of UNet2DConditionModel; `extra` has what the net does not know."""
    supported(c, f"diffusers' {CLASS}")
    assert c.middle is not None
    last = c.levels[-1].attention
    if not c.middle.to_pixels or (last is not None and replace(last, to_pixels=True) != c.middle):
        raise ValueError(f"diffusers' {CLASS} has the attention of its last level in the middle, too")
    by_level = [level.attention or c.middle for level in c.levels]
    cross = ["CrossAttn" * (level.attention is not None) for level in c.levels]
    depths = [1 if level.attention is None else level.attention.depth for level in c.levels]
    depths[-1] = c.middle.depth
    heads = [_heads(a, level.channels) for a, level in zip(by_level, c.levels, strict=True)]
    only = [level.attention is not None and not level.attention.to_pixels for level in c.levels]
    return {
        **FIXED,
        **FREE,
        **{name: extra[name] for name in FREE if name in extra},
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "block_out_channels": [level.channels for level in c.levels],
        "layers_per_block": one_or_all([level.blocks for level in c.levels]),
        "down_block_types": [f"{a}DownBlock2D" for a in cross],
        "up_block_types": [f"{a}UpBlock2D" for a in reversed(cross)],
        "attention_head_dim": one_or_all(heads),
        "transformer_layers_per_block": one_or_all(depths),
        "only_cross_attention": only if any(only) else False,
        "use_linear_projection": not c.middle.conv_proj,
        "cross_attention_dim": c.token_dim,
        "norm_num_groups": c.block.norm_groups,
        "norm_eps": c.block.norm_eps,
        "time_cond_proj_dim": c.embedding.guidance_dim or None,
        **_embedder(c.embedding.extras),
    }


def _heads(attention: AttentionConfig, width: int) -> int:
    """Heads, which diffusers calls attention_head_dim; of levels without attention any number will do."""
    return attention.heads or max(width // attention.head_dim, 1)


def _embedder(extras: tuple[EmbedderConfig, ...]) -> Mapping[str, object]:
    if not extras:
        return {}
    features = extras[0].features
    if extras[0].kind == "table":
        return {"num_class_embeds": features[0].dim}
    width = {"projection_class_embeddings_input_dim": sum(f.width for f in features)}
    if features[0].field == "image_embed":
        return {"class_embed_type": "projection", **width}
    return {"addition_embed_type": "text_time", "addition_time_embed_dim": features[-1].sinusoid, **width}


def _config(settings: Settings) -> UNetConfig:
    config = settings[OURS]
    assert isinstance(config, UNetConfig)
    return config


KNOWN = (
    *FIXED,
    *FREE,
    *NORMS,
    *BY_LEVEL,
    *BY_ATTENTION,
    *("in_channels", "out_channels", "block_out_channels", "up_block_types", "use_linear_projection"),
    *("cross_attention_dim", "num_attention_heads", "time_cond_proj_dim"),
    *("num_class_embeds", "class_embed_type", "projection_class_embeddings_input_dim"),
    *("addition_embed_type", "addition_time_embed_dim"),
)
LAYOUTS("unet-diffusers")(
    Layout(
        (
            Part(
                name="net",
                build=UNet,
                settings=_settings,
                config=_config,
                names=lambda config: names_of(config, DIALECT),
                published=_published,
                known=KNOWN,
            ),
        ),
        (
            "down_blocks.0.resnets.0.time_emb_proj.weight",
            "mid_block.attentions.0.proj_in.weight",
            "conv_out.weight",
        ),
        CLASS,
    )
)
