"""The U-Net in single files of CompVis and Stability: `model.diffusion_model.*`."""

from __future__ import annotations

from dataclasses import replace

from sfumato.checkpoints.keymap import Leaf, LeafTable
from sfumato.checkpoints.layouts.layout import OURS, Part, Settings, Shapes
from sfumato.checkpoints.layouts.unet import (
    Dialect,
    Stack,
    attentions,
    config_of,
    names_of,
    stack_of,
    supported,
)
from sfumato.checkpoints.layouts.unet_diffusers import SIZES, sized
from sfumato.nets.attention import AttentionConfig
from sfumato.nets.embedding import EmbedderConfig, Feature
from sfumato.nets.presets import UNETS
from sfumato.nets.unet import UNet, UNetConfig

__all__ = ["UNET", "published_heads"]

REFERENCE = "the layout of CompVis"
ASKED = ("num_heads", "num_head_channels", "parameterization", "zero_snr")
PREDICTIONS = ("eps", "v")


def _extra(e: EmbedderConfig) -> LeafTable:
    if e.kind == "table":
        return {"label_emb": Leaf("table", tensors=("weight",))}
    return {"label_emb.0.0": "proj.linear1", "label_emb.0.2": "proj.linear2"}


DIALECT = Dialect(
    down=("input_blocks.{n}.0", "input_blocks.{n}.1", "input_blocks.{n}.0.op"),
    up=("output_blocks.{n}.0", "output_blocks.{n}.1", "output_blocks.{n}.{k}.conv"),
    middle=("middle_block.0", "middle_block.1", "middle_block.2"),
    top={
        "time_embed.0": "encoder.embedding.time.linear1",
        "time_embed.2": "encoder.embedding.time.linear2",
        "input_blocks.0.0": "encoder.conv_in",
        "out.0": "norm_out",
        "out.2": "conv_out",
    },
    guidance="time_embed.cond_proj",
    block={
        "in_layers.0": "norm1",
        "in_layers.2": "conv1",
        "emb_layers.1": "embed",
        "out_layers.0": "norm2",
        "out_layers.3": "conv2",
    },
    skip="skip_connection",
    extra=_extra,
)


def _settings(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of UNetModel; what the tensors do not tell can be given: heads, prediction."""
    if foreign := sorted(given.keys() - set(ASKED)):
        raise ValueError(f"setting {foreign[0]!r} is not asked of {REFERENCE}; allowed: {', '.join(ASKED)}")
    predicts = given.get("parameterization")
    if predicts not in (None, *PREDICTIONS):
        raise ValueError(f"parameterization is {predicts!r}; allowed: {', '.join(PREDICTIONS)}")
    stack = stack_of(shapes, DIALECT)
    attention = attentions(shapes, stack, _heads(shapes, stack, given), [False] * len(stack.places))
    bare = config_of(shapes, DIALECT, attention, ())
    extras = _extras(shapes, bare.token_dim)
    config = replace(bare, embedding=replace(bare.embedding, extras=extras))
    told = {"parameterization": predicts, "zero_snr": bool(given.get("zero_snr"))}
    return {**_published(config, {}), **told, OURS: config}


def _heads(shapes: Shapes, stack: Stack, given: Settings) -> list[int]:
    """Heads of each level and of the middle. Raises: ValueError if they must be given."""
    number, width = given.get("num_heads"), given.get("num_head_channels")
    if number is None and width is None:
        linear = len(shapes.get(f"{stack.places[-1]}.proj_in.weight", ())) == 2
        if "label_emb.weight" in shapes or (not linear and stack.widths[0] == 320):
            number = 8  # the x4 upscaler; Stable Diffusion 1 and the text-to-image net before it
        elif linear:
            width = 64  # Stable Diffusion 2, SDXL
        else:
            one = attentions(shapes, stack, [1] * len(stack.places), [False] * len(stack.places))
            found = published_heads(config_of(shapes, DIALECT, one, ()))
            number, width = found.get("num_heads"), found.get("num_head_channels")
    assert isinstance(number, int | None)
    assert isinstance(width, int | None)
    return [number or w // (width or w) for w in (*stack.widths, stack.widths[-1])]


def published_heads(config: UNetConfig) -> Settings:
    """num_heads or num_head_channels of the published net of latent diffusion that is like one of one head.

    Raises: ValueError if there is none.
    """
    for name in UNETS:
        published = UNETS[name]()
        if name.startswith("ldm-") and _of_one_head(published) == config:
            assert published.middle is not None
            heads, each = published.middle.heads, published.middle.head_dim
            return {"num_heads": heads} if heads else {"num_head_channels": each}
    raise ValueError("tensors do not tell the heads of this U-Net; give num_heads or num_head_channels")


def _of_one_head(config: UNetConfig) -> UNetConfig:
    def of_one(attention: AttentionConfig | None) -> AttentionConfig | None:
        return None if attention is None else replace(attention, heads=1, head_dim=0)

    levels = tuple(replace(level, attention=of_one(level.attention)) for level in config.levels)
    return replace(config, levels=levels, middle=of_one(config.middle))


def _extras(shapes: Shapes, context: int) -> tuple[EmbedderConfig, ...]:
    """What is added to the embedding of time.

    Tokens of width 1024 are those of Stable Diffusion 2; SDXL's vectors hold a pooled text beside its sizes.
    """
    if (rows := shapes.get("label_emb.weight")) is not None:
        return (EmbedderConfig(kind="table", features=(Feature(field="aug", dim=rows[0]),)),)
    if (vector := shapes.get("label_emb.0.0.weight")) is None:
        return ()
    if context != 1024 and (vector[1] > 6 * SIZES or vector[1] == 5 * SIZES + context):
        return (sized(vector[1], context, SIZES),)
    half = vector[1] // 2
    features = (Feature(field="image_embed", dim=half), Feature(field="aug", dim=1, sinusoid=half))
    return (EmbedderConfig(kind="mlp", features=features),)


def _published(c: UNetConfig, extra: Settings) -> dict[str, object]:
    """Arguments of UNetModel."""
    supported(c, REFERENCE)
    assert c.middle is not None
    if c.block.norm_groups != 32 or c.block.norm_eps != 1e-5:
        raise ValueError(
            f"{REFERENCE} has 32 norm groups and epsilon 1e-5, this U-Net {c.block.norm_groups} and "
            f"{c.block.norm_eps:g}; save it as a sfumato system"
        )
    base, levels = c.levels[0].channels, c.levels
    return {
        "in_channels": c.in_channels,
        "out_channels": c.out_channels,
        "model_channels": base,
        "channel_mult": [level.channels // base for level in levels],
        "num_res_blocks": [level.blocks for level in levels],
        "attention_resolutions": [2**i for i, level in enumerate(levels) if level.attention is not None],
        "num_heads": c.middle.heads or -1,
        "num_head_channels": c.middle.head_dim or -1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": not c.middle.conv_proj,
        "transformer_depth": [level.attention.depth if level.attention else 0 for level in levels],
        "transformer_depth_middle": c.middle.depth,
        "disable_self_attentions": [bool(v.attention and not v.attention.to_pixels) for v in levels],
        "context_dim": c.token_dim,
        "adm_in_channels": sum(f.width for e in c.embedding.extras for f in e.features) or None,
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
    names=lambda config: names_of(config, DIALECT),
    published=_published,
    prefix="model.diffusion_model.",
)
