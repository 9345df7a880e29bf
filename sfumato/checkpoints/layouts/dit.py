"""DiT: files of facebookresearch/DiT and of SiT, and the DiTTransformer2DModel of diffusers."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from sfumato.checkpoints.keymap import SAME, KeyMap, Leaf, LeafTable, copied, flattened, regrouped, stacked
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
from sfumato.core.registry import unknown
from sfumato.nets.dit import DiT, DiTConfig
from sfumato.nets.patches import sincos_positions

__all__ = ["HEADS"]

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
"""Width -> heads of DiT-S, B, L and XL; no shape of a tensor tells the heads."""
SIZES = {"S": 384, "B": 768, "L": 1024, "XL": 1152}

BLOCK: LeafTable = {
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
    "adaLN_modulation.1": "modulation",
}
DIFFUSERS_BLOCK: LeafTable = {
    ("attn1.to_q", "attn1.to_k", "attn1.to_v"): Leaf("attention.qkv", stacked(3)),
    "attn1.to_out.0": "attention.out",
    "ff.net.0.proj": "mlp.up",
    "ff.net.2": "mlp.down",
    "norm1.linear": "modulation",
}


def _number(settings: Settings, name: str) -> int:
    value = settings[name]
    assert isinstance(value, int)
    return value


def _heads(given: Settings, width: int) -> int:
    """Heads of the published width. Raises: ValueError if there is none and the config does not say."""
    if "num_heads" not in given and width not in HEADS:
        raise ValueError(f"hidden_size {width} is not a published one: give config={{'num_heads': ...}}")
    return HEADS.get(width, 1)


# facebookresearch/DiT and SiT


def _settings(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of the reference's constructor DiT(...), or the name of a model for some of them."""
    width, channels, patch, _ = shape_of(shapes, "x_embedder.proj.weight", 4)
    rows = shape_of(shapes, "y_embedder.embedding_table.weight", 2)[0]
    outputs = shape_of(shapes, "final_layer.linear.weight", 2)[0] // patch**2
    hidden = shape_of(shapes, "blocks.0.mlp.fc1.weight", 2)[0]
    side = math.isqrt(shape_of(shapes, "pos_embed", 3)[1])
    given = _named(given)
    dropout = given.get("class_dropout_prob", 0.1 if given.get("num_classes") != rows else 0.0)
    read = {
        "input_size": side * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "depth": indices(shapes, "blocks"),
        "num_classes": rows - bool(dropout),
        "learn_sigma": outputs == 2 * channels,
    }
    ratio = given.pop("mlp_ratio", None)
    if ratio is not None and int(width * float(str(ratio))) != hidden:
        raise ValueError(f"the config says mlp_ratio {ratio}, the tensors say {hidden / width:g}")
    free = {"num_heads": _heads(given, width), "class_dropout_prob": dropout}
    return settled(given, read, free) | {"mlp_ratio": hidden / width}


def _named(given: Settings) -> dict[str, object]:
    """Settings with those that the name "DiT-XL/2" stands for in the place of `model`."""
    rest = dict(given)
    if (model := rest.pop("model", None)) is not None:
        size, _, patch = str(model).partition("-")[2].partition("/")
        if size not in SIZES or not patch.isdecimal():
            allowed = [f"DiT-{size}/{p}" for size in SIZES for p in (2, 4, 8)]
            raise ValueError(unknown("model", str(model), allowed))
        width = SIZES[size]
        rest = {"hidden_size": width, "num_heads": HEADS[width], "patch_size": int(patch)} | rest
    return rest


def _config(settings: Settings) -> DiTConfig:
    s, channels = settings, _number(settings, "in_channels")
    return DiTConfig(
        in_channels=channels,
        out_channels=channels * (2 if s["learn_sigma"] else 1),
        patch=_number(s, "patch_size"),
        width=_number(s, "hidden_size"),
        depth=_number(s, "depth"),
        heads=_number(s, "num_heads"),
        mlp_ratio=float(str(s["mlp_ratio"])),
        num_classes=_number(s, "num_classes"),
        null_label=bool(s["class_dropout_prob"]),
    )


def _sit_config(settings: Settings) -> DiTConfig:
    """SiT computes a variance half where learn_sigma is set, and drops it."""
    config = _config(settings)
    spare = config.out_channels - config.in_channels
    return replace(config, out_channels=config.in_channels, spare_channels=spare)


def _names(config: DiTConfig) -> KeyMap:
    patch, outputs = config.patch, config.out_channels + config.spare_channels
    top: LeafTable = {
        "x_embedder.proj": Leaf("patches", flattened(config.in_channels, patch, patch)),
        "t_embedder.mlp.0": "time.0",
        "t_embedder.mlp.2": "time.2",
        "y_embedder.embedding_table": Leaf("label", SAME, ("weight",)),
        "final_layer.adaLN_modulation.1": "modulation",
        # The reference has the channels of a pixel side by side, we the pixels of a channel.
        "final_layer.linear": Leaf("out", regrouped(patch**2, outputs)),
    }
    blocks = [(f"blocks.{i}", f"blocks.{i}", BLOCK) for i in range(config.depth)]
    return KeyMap.of([("", "", top), *blocks])


def _positions(settings: Settings) -> dict[str, Tensor]:
    side = _number(settings, "input_size") // _number(settings, "patch_size")
    return {"pos_embed": sincos_positions(side, side, _number(settings, "hidden_size"))}


def _published(config: DiTConfig, extra: Settings, outputs: int) -> dict[str, object]:
    """The reference's arguments, if its class can compute this net."""
    plain = DiTConfig(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        spare_channels=config.spare_channels,
        patch=config.patch,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        num_classes=config.num_classes,
        null_label=config.null_label,
    )
    _same(config, plain, "the original's class")
    if outputs not in (config.in_channels, 2 * config.in_channels) or config.num_classes is None:
        raise ValueError(
            f"a DiT of {config.in_channels} to {config.out_channels} channels, {config.num_classes} classes "
            "cannot be written so: the original has classes, and as many channels out as in or twice as many"
        )
    return {
        "input_size": extra.get("input_size", 32),
        "patch_size": config.patch,
        "in_channels": config.in_channels,
        "hidden_size": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
        "class_dropout_prob": 0.1 if config.null_label else 0.0,
        "num_classes": config.num_classes,
        "learn_sigma": outputs == 2 * config.in_channels,
    }


def _same(config: DiTConfig, plain: DiTConfig, whose: str) -> None:
    """Raises: ValueError for the first setting that a class does not have."""
    for name, value in vars(config).items():
        if value != getattr(plain, name):
            raise ValueError(
                f"{whose} computes {name} {getattr(plain, name)}, this DiT {value}: written so it would "
                "draw other pictures; save it as a sfumato system"
            )


_ARGUMENTS = (
    "input_size patch_size in_channels hidden_size depth num_heads mlp_ratio class_dropout_prob num_classes "
    "learn_sigma model"
)
ORIGINAL = Part(
    name="net",
    build=DiT,
    settings=_settings,
    config=_config,
    names=_names,
    published=lambda config, extra: _published(config, extra, config.out_channels),
    constants=_positions,
    known=tuple(_ARGUMENTS.split()),
)
SIT = replace(
    ORIGINAL,
    config=_sit_config,
    published=lambda config, extra: _published(config, extra, config.out_channels + config.spare_channels),
)
_MARKS = (
    "x_embedder.proj.weight",
    "t_embedder.mlp.0.weight",
    "blocks.0.adaLN_modulation.1.weight",
    "pos_embed",
)
LAYOUTS("dit")(Layout((ORIGINAL,), _MARKS))
LAYOUTS("sit")(Layout((SIT,), _MARKS))


# diffusers

_FIXED = {
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "attention_bias": True,
}
_TIME, _LABEL = "norm1.emb.timestep_embedder", "norm1.emb.class_embedder.embedding_table"


def _diffusers_settings(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of DiTTransformer2DModel, and downscale_freq_shift of the Timesteps that it makes."""
    width, channels, patch, _ = shape_of(shapes, "pos_embed.proj.weight", 4)
    rows = shape_of(shapes, f"transformer_blocks.0.{_LABEL}.weight", 2)[0]
    heads = given.get("num_attention_heads", HEADS.get(width))
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"num_attention_heads {heads} of width {width}: give a divisor of it in the config")
    read = {
        "in_channels": channels,
        "out_channels": shape_of(shapes, "proj_out_2.weight", 2)[0] // patch**2,
        "patch_size": patch,
        "num_layers": indices(shapes, "transformer_blocks"),
        "num_embeds_ada_norm": rows - 1,
        "attention_head_dim": width // heads,
    }
    free = {
        "num_attention_heads": heads,
        "sample_size": 32,
        "norm_eps": 1e-5,
        "downscale_freq_shift": 1,
        "dropout": 0.0,
        "norm_num_groups": 32,
        "upcast_attention": False,
    }
    given = {k: v for k, v in given.items() if k != "out_channels" or v is not None}
    for name, value in _FIXED.items():
        if given.get(name, value) != value:
            raise ValueError(f"{name} {given[name]!r} is not supported for a DiT; allowed: {value!r}")
    return settled(given, read, free | _FIXED)


def _diffusers_config(settings: Settings) -> DiTConfig:
    s, heads = settings, _number(settings, "num_attention_heads")
    shift = float(str(s["downscale_freq_shift"]))
    return DiTConfig(
        in_channels=_number(s, "in_channels"),
        out_channels=_number(s, "out_channels"),
        patch=_number(s, "patch_size"),
        width=heads * _number(s, "attention_head_dim"),
        depth=_number(s, "num_layers"),
        heads=heads,
        num_classes=_number(s, "num_embeds_ada_norm"),
        time_shift=shift,
        norm2_eps=float(str(s["norm_eps"])),
        position_base=_number(s, "sample_size") // _number(s, "patch_size") if shift == 1 else None,
    )


def _diffusers_names(config: DiTConfig) -> KeyMap:
    patch, depth = config.patch, config.depth

    def of_every_block(name: str) -> tuple[str, ...]:
        return tuple(f"transformer_blocks.{i}.{name}" for i in range(depth))

    top: LeafTable = {
        "pos_embed.proj": Leaf("patches", flattened(config.in_channels, patch, patch)),
        of_every_block(f"{_TIME}.linear_1"): Leaf("time.0", copied(depth)),
        of_every_block(f"{_TIME}.linear_2"): Leaf("time.2", copied(depth)),
        of_every_block(_LABEL): Leaf("label", copied(depth), ("weight",)),
        "proj_out_1": "modulation",
        "proj_out_2": Leaf("out", regrouped(patch**2, config.out_channels)),
    }
    blocks = [(f"transformer_blocks.{i}", f"blocks.{i}", DIFFUSERS_BLOCK) for i in range(depth)]
    return KeyMap.of([("", "", top), *blocks])


def _diffusers_published(config: DiTConfig, extra: Settings) -> Settings:
    size = config.position_base * config.patch if config.position_base else extra.get("sample_size", 32)
    assert isinstance(size, int)
    plain = DiTConfig(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        patch=config.patch,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        num_classes=config.num_classes,
        time_shift=1.0,
        norm2_eps=config.norm2_eps,
        position_base=size // config.patch,
    )
    _same(config, plain, "diffusers' class")
    if config.num_classes is None:
        raise ValueError("diffusers' class has classes, and this DiT none; save it as a sfumato system")
    return {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": size,
        "patch_size": config.patch,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": config.norm2_eps,
        **_FIXED,
    }


_DIFFUSERS_ARGUMENTS = (
    "num_attention_heads attention_head_dim in_channels out_channels num_layers sample_size patch_size "
    "num_embeds_ada_norm norm_eps downscale_freq_shift dropout norm_num_groups upcast_attention"
)
DIFFUSERS = Part(
    name="net",
    build=DiT,
    settings=_diffusers_settings,
    config=_diffusers_config,
    names=_diffusers_names,
    published=_diffusers_published,
    known=(*_DIFFUSERS_ARGUMENTS.split(), *_FIXED),
)
LAYOUTS("dit-diffusers")(
    Layout(
        (DIFFUSERS,),
        ("pos_embed.proj.weight", f"transformer_blocks.0.{_LABEL}.weight"),
        "DiTTransformer2DModel",
    )
)
