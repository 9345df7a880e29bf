"""DeepFloyd IF, stages I and II, as the original code names their tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sfumato.checkpoints.keymap import KeyMap, Leaf, LeafTable
from sfumato.checkpoints.layouts.adm import DIFFUSION, FREE
from sfumato.checkpoints.layouts.blocks import (
    agreed,
    attention_of,
    first_blocks,
    normalized,
    same,
    structure,
    told,
    unet_config,
    unet_map,
)
from sfumato.checkpoints.layouts.layout import LAYOUTS, Layout, Part, Settings, Shapes, settled, shape_of
from sfumato.core.registry import unknown
from sfumato.nets.blocks import ACTIVATIONS
from sfumato.nets.embedding import EmbedderConfig, Feature, TokensConfig
from sfumato.nets.unet import UNet, UNetConfig

__all__: list[str] = []  # everything is reached through LAYOUTS

SKIP = 0.7071
"""The reference's factor for 1 / sqrt(2)."""
ARGUMENTS: Settings = {
    **FREE,
    **DIFFUSION,
    "num_classes": None,
    "precision": "32",
    "activation": "gelu",
    "att_pool_heads": 64,
    "num_head_channels": 64,
    "noise_schedule": "cosine",
    "low_res_diffusion": None,
    "interpolate_mode": "bilinear",
}
"""What the tensors do not tell; the values are those of the published stages."""
TOP: LeafTable = {
    "encoder_pooling.0": "encoder.embedding.extras.0.pool.norm1",
    "encoder_pooling.1.positional_embedding": Leaf("encoder.embedding.extras.0.pool.position", tensors=()),
    **{f"encoder_pooling.1.{n}_proj": f"encoder.embedding.extras.0.pool.{n}" for n in ("q", "k", "v")},
    "encoder_pooling.2": "encoder.embedding.extras.0.pool.proj",
    "encoder_pooling.3": "encoder.embedding.extras.0.pool.norm2",
}
AUG: LeafTable = {
    "aug_proj.0": "encoder.embedding.extras.1.proj.linear1",
    "aug_proj.2": "encoder.embedding.extras.1.proj.linear2",
}


def _settings(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of UNetModel, or of SuperResUNetModel where there is an aug_proj."""
    rest = normalized(given, given.get("image_size"))
    read = structure(shapes)
    channels = shape_of(shapes, "input_blocks.0.0.weight", 4)[1]
    tokens = shape_of(shapes, "encoder_pooling.0.weight", 1)[0]
    stage2 = "aug_proj.0.weight" in shapes
    read |= {
        "in_channels": channels,
        "out_channels": shape_of(shapes, "out.2.weight", 4)[0],
        "encoder_dim": tokens,
        "encoder_channels": shapes.get("encoder_proj.weight", (tokens,))[0],
        "disable_self_attentions": _only_tokens(shapes, read),
        "effective_in_channels": channels,
        "aug_proj": stage2,
    }
    if rest.get("disable_self_attentions", None) in (None, False):
        rest["disable_self_attentions"] = []
    elif rest["disable_self_attentions"] is True:  # wherever there is attention
        rest["disable_self_attentions"] = read["attention_resolutions"]
    free = {**ARGUMENTS, "efficient_activation": stage2, "scale_skip_connection": stage2}
    return settled(agreed(rest, read), read, free)


def _only_tokens(shapes: Shapes, read: Settings) -> list[int]:
    """Downsamplings whose attention has queries alone: keys and values are those of the tokens."""
    counts: Any = read["num_res_blocks"]
    mults: Any = read["channel_mult"]
    names = first_blocks([counts] * len(mults) if isinstance(counts, int) else counts)
    attentions = {2**i: f"{name}.1.qkv.weight" for i, name in enumerate(names)}
    attentions[2 ** (len(mults) - 1)] = "middle_block.1.qkv.weight"
    return [d for d, name in attentions.items() if name in shapes and shapes[name][0] == shapes[name][1]]


def _config(settings: Settings) -> UNetConfig:
    s: Any = settings
    if s["activation"] not in ACTIVATIONS:
        raise ValueError(unknown("activation", str(s["activation"]), list(ACTIVATIONS)))
    width, dim = s["model_channels"], int(s["model_channels"] * max(s["channel_mult"]))
    config = unet_config(
        settings,
        attention_of(settings, "appended", norm_tokens=True),
        attention_of(settings, "appended", norm_tokens=True, to_pixels=False),
    )
    tokens, channels = s["encoder_dim"], s["encoder_channels"]
    pool = EmbedderConfig(
        kind="pool", features=(Feature(field="tokens", dim=tokens),), heads=s["att_pool_heads"]
    )
    aug = EmbedderConfig(kind="mlp", features=(Feature(field="aug", dim=1, sinusoid=width),))
    extras = (pool, aug) if s["aug_proj"] else (pool,)
    return replace(
        config,
        embedding=replace(config.embedding, dim=dim, extras=extras),
        tokens=TokensConfig(dim=tokens, width=0 if channels == tokens else channels),
        block=replace(
            config.block,
            activation=s["activation"],
            residual_scale=SKIP if s["scale_skip_connection"] else 1.0,
        ),
    )


def _names(config: UNetConfig) -> KeyMap:
    top = dict(TOP)
    if len(config.embedding.extras) == 2:
        top |= AUG
    if config.tokens and config.tokens.width:
        top["encoder_proj"] = "encoder.tokens.proj"
    return unet_map(config, top)


def _published(config: UNetConfig, extra: Settings) -> Settings:
    extras, tokens = config.embedding.extras, config.tokens
    if tokens is None or not extras:
        raise ValueError("DeepFloyd IF pools its tokens and this U-Net does not; save a sfumato system")
    scaled, stage2 = config.block.residual_scale != 1, len(extras) == 2
    settings: dict[str, object] = {
        **ARGUMENTS,
        "efficient_activation": scaled,
        **extra,
        **told(config),
        "encoder_dim": tokens.dim,
        "encoder_channels": tokens.out_dim,
        "att_pool_heads": extras[0].heads,
        "activation": config.block.activation,
        "scale_skip_connection": scaled,
        "aug_proj": stage2,
    }
    same(config, _config(settings), "DeepFloyd IF")
    return settings


UNET = Part(
    name="net",
    build=UNet,
    settings=_settings,
    config=_config,
    names=_names,
    published=_published,
    known=tuple(ARGUMENTS),
)
LAYOUTS("deepfloyd")(Layout((UNET,), ("encoder_pooling.1.positional_embedding", "input_blocks.0.0.weight")))
