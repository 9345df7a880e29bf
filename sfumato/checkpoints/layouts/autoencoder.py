"""First stages: diffusers' AutoencoderKL and VQModel, and the names of CompVis' latent diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from sfumato.checkpoints.keymap import SAME, KeyMap, Leaf, LeafTable, squeezed
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
from sfumato.nets.autoencoder import Autoencoder, AutoencoderConfig

__all__: list[str] = []  # everything is reached through LAYOUTS


@dataclass(frozen=True)
class Dialect:
    """How a layout names the parts of encoder and decoder; {} = number of the level or of the block.

    Attributes:
        levels: of encoder and decoder.
        block, attention, resample: below a level.
        middle: block, attention, block.
        norm_out: of encoder and decoder.
        skip: the 1x1 convolution around a block that changes the width.
        attends: layers of an attention.
        finest_first: the decoder's levels are counted from the finest.
    """

    levels: tuple[str, str]
    block: str
    attention: str
    resample: tuple[str, str]
    middle: tuple[str, str, str]
    norm_out: str
    skip: str
    attends: LeafTable
    finest_first: bool


DIFFUSERS = Dialect(
    levels=("down_blocks.{}", "up_blocks.{}"),
    block="resnets.{}",
    attention="attentions.{}",
    resample=("downsamplers.0.conv", "upsamplers.0.conv"),
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    norm_out="conv_norm_out",
    skip="conv_shortcut",
    attends={"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "out"},
    finest_first=False,
)
COMPVIS = Dialect(
    levels=("down.{}", "up.{}"),
    block="block.{}",
    attention="attn.{}",
    resample=("downsample.conv", "upsample.conv"),
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    norm_out="norm_out",
    skip="nin_shortcut",
    attends={
        "norm": "norm",
        **{name: Leaf(name, squeezed(2, 3)) for name in "qkv"},
        "proj_out": Leaf("out", squeezed(2, 3)),
    },
    finest_first=True,
)


def _names(c: AutoencoderConfig, d: Dialect) -> KeyMap:
    blocks: list[tuple[str, str, LeafTable]] = []
    for side, name in enumerate(("encoder", "decoder")):
        blocks += _levels(c, d, side, name)
        top: LeafTable = {"conv_in": "conv_in", "conv_out": "conv_out", d.norm_out: "norm_out"}
        blocks.append((name, name, top))
        tables: list[LeafTable] = [_block(d, False), d.attends, _block(d, False)]
        for i in (0, 1, 2) if c.mid_attention else (0, 2):
            blocks.append((f"{name}.{d.middle[i]}", f"{name}.middle.{i}", tables[i]))
    if c.quant_conv:
        blocks.append(("", "", {n: n for n in ("quant_conv", "post_quant_conv")}))
    if c.kind == "vq":
        blocks.append(("quantize", "quantizer", {"embedding": Leaf("embedding", SAME, ("weight",))}))
    return KeyMap.of(blocks, ("loss.", "model_ema."))  # what latent diffusion trains beside it


def _levels(c: AutoencoderConfig, d: Dialect, side: int, name: str) -> list[tuple[str, str, LeafTable]]:
    """The levels of the encoder (side 0) or decoder (1)."""
    rows: list[tuple[str, str, LeafTable]] = []
    last = len(c.mults) - 1
    width = c.mults[last] if side else 1
    for place in range(last + 1):
        level = last - place if side else place  # 0 = full resolution
        theirs = f"{name}.{d.levels[side].format(level if d.finest_first else place)}"
        ours, at, attend = f"{name}.levels.{place}", 0, level in c.attention_levels
        for i in range(c.blocks + side):
            rows.append((f"{theirs}.{d.block.format(i)}", f"{ours}.{at}", _block(d, width != c.mults[level])))
            width, at = c.mults[level], at + 1
            if attend:
                rows.append((f"{theirs}.{d.attention.format(i)}", f"{ours}.{at}", d.attends))
                at += 1
        if place < last:
            rows.append((theirs, ours, {d.resample[side]: f"{at}.conv"}))
    return rows


def _block(d: Dialect, skip: bool) -> LeafTable:
    plain: LeafTable = {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
    return {**plain, d.skip: "skip"} if skip else {**plain}


def _read(shapes: Shapes, d: Dialect) -> AutoencoderConfig:
    """What shapes tell."""

    def level(i: int | str) -> str:
        return f"encoder.{d.levels[0].format(i)}".rstrip(".")

    levels = indices(shapes, level(""))
    base, images = shape_of(shapes, "encoder.conv_in.weight", 4)[:2]
    first = [f"{level(i)}.{d.block.format(0)}.conv1.weight" for i in range(levels)]
    widths = [shape_of(shapes, name, 4)[0] for name in first]
    if any(w % base for w in widths) or not widths:
        raise ValueError(f"widths {widths} of the levels are not multiples of the first width {base}")
    z = shape_of(shapes, "decoder.conv_in.weight", 4)[1]
    quant = "post_quant_conv.weight" in shapes
    codes = shapes.get("quantize.embedding.weight", (0,))[0]
    attention = f"{d.attention.format(0)}.{_norm(d)}"
    return AutoencoderConfig(
        kind="vq" if codes else "kl",
        image_channels=images,
        channels=base,
        mults=tuple(w // base for w in widths),
        blocks=indices(shapes, f"{level(0)}.{d.block.format('')}".rstrip(".")),
        attention_levels=tuple(i for i in range(levels) if f"{level(i)}.{attention}" in shapes),
        mid_attention=f"encoder.{d.middle[1]}.{_norm(d)}" in shapes,
        z_channels=z,
        embed_dim=shape_of(shapes, "post_quant_conv.weight", 4)[1] if quant else z,
        codebook_size=codes,
        quant_conv=quant,
        legacy_commitment=codes > 0,
    )


def _norm(d: Dialect) -> str:
    return f"{next(str(name) for name, ours in d.attends.items() if ours == 'norm')}.weight"


def _config(settings: Settings) -> AutoencoderConfig:
    config = settings[OURS]
    assert isinstance(config, AutoencoderConfig)
    return config


# diffusers

CLASSES: Mapping[str, str] = {"kl": "AutoencoderKL", "vq": "VQModel"}
FREE: dict[str, object] = {"act_fn": "silu", "sample_size": 32, "scaling_factor": 0.18215}
"""Arguments of both classes that tensors do not tell."""
FREE_OF: Mapping[str, dict[str, object]] = {
    "kl": {**FREE, "shift_factor": None, "latents_mean": None, "latents_std": None, "force_upcast": True},
    "vq": {**FREE, "force_upcast": False},
}
"""The same, and those of one class."""
ARGUMENTS = (
    "in_channels out_channels down_block_types up_block_types block_out_channels layers_per_block "
    "latent_channels mid_block_add_attention norm_num_groups"
)
ARGUMENTS_OF: Mapping[str, str] = {
    "kl": f"{ARGUMENTS} use_quant_conv use_post_quant_conv",
    "vq": f"{ARGUMENTS} num_vq_embeddings vq_embed_dim norm_type lookup_from_codebook",
}


def _diffusers_settings(shapes: Shapes, given: Settings, kind: str) -> Settings:
    """Arguments of the class of a kind."""
    config = _read(shapes, DIFFUSERS)
    groups = given.get("norm_num_groups", config.norm_groups)
    assert isinstance(groups, int)
    config = replace(config, norm_groups=groups)
    read = _diffusers_published(config, {}, kind)
    free = {name: read.pop(name) for name in FREE_OF[kind]}
    said = {name: value for name, value in given.items() if value is not None}
    return settled(said, read, free) | {OURS: config}


def _diffusers_published(c: AutoencoderConfig, extra: Settings, kind: str) -> dict[str, object]:
    """Arguments of the class of a kind; `extra` has what the net does not know."""
    fits = c.embed_dim == c.z_channels if kind == "kl" else c.quant_conv
    if c.kind != kind or c.patch != 1 or not fits:
        raise ValueError(
            f"diffusers' {CLASSES[kind]} computes no {c.kind} model with patch {c.patch}, quant_conv "
            f"{c.quant_conv} and embed_dim {c.embed_dim} for {c.z_channels} z_channels; save it as a sfumato "
            "system"
        )
    levels = range(len(c.mults))
    attends = ["Attn" * (i in c.attention_levels) for i in levels]
    own: dict[str, object] = {"use_quant_conv": c.quant_conv, "use_post_quant_conv": c.quant_conv}
    if kind == "vq":
        own = {"num_vq_embeddings": c.codebook_size, "vq_embed_dim": c.embed_dim}
        own |= {"norm_type": "group", "lookup_from_codebook": False}
    return {
        "in_channels": c.image_channels,
        "out_channels": c.image_channels,
        "down_block_types": [f"{a}DownEncoderBlock2D" for a in attends],
        "up_block_types": [f"{a}UpDecoderBlock2D" for a in reversed(attends)],
        "block_out_channels": [c.channels * m for m in c.mults],
        "layers_per_block": c.blocks,
        "latent_channels": c.z_channels,
        "mid_block_add_attention": c.mid_attention,
        "norm_num_groups": c.norm_groups,
        **own,
        **FREE_OF[kind],
        **{name: extra[name] for name in FREE_OF[kind] if name in extra},
    }


OLD_ATTENTION = (
    (".query.", ".to_q."),
    (".key.", ".to_k."),
    (".value.", ".to_v."),
    (".proj_attn.", ".to_out.0."),
)
MARKS = ("encoder.down_blocks.0.resnets.0.conv1.weight", "decoder.up_blocks.0.resnets.0.conv1.weight")


def _part(kind: str) -> Part[AutoencoderConfig]:
    return Part(
        name="vae",
        build=Autoencoder,
        settings=partial(_diffusers_settings, kind=kind),
        config=_config,
        names=lambda config: _names(config, DIFFUSERS),
        published=partial(_diffusers_published, kind=kind),
        aliases=OLD_ATTENTION,
        known=(*FREE_OF[kind], *ARGUMENTS_OF[kind].split()),
    )


LAYOUTS("vae-diffusers")(Layout((_part("kl"),), MARKS, CLASSES["kl"], absent=("quantize.",)))
LAYOUTS("vq-diffusers")(Layout((_part("vq"),), (*MARKS, "quantize.embedding.weight"), CLASSES["vq"]))


# CompVis


def _compvis_settings(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of latent diffusion's AutoencoderKL or VQModel and of the `ddconfig` inside them."""
    inner = given.get("ddconfig", {})
    assert isinstance(inner, Mapping)
    given = {k: v for k, v in given.items() if k != "ddconfig"} | dict(inner)
    config = _read(shapes, COMPVIS)
    resolution = given.get("resolution", 256)
    assert isinstance(resolution, int)
    read = _compvis_published(config, {"resolution": resolution})
    return settled(given, read, {"dropout": 0.0}) | {OURS: config}


def _compvis_published(c: AutoencoderConfig, extra: Settings) -> dict[str, object]:
    resolution = extra.get("resolution", 256)
    assert isinstance(resolution, int)
    if c.patch != 1 or not c.quant_conv or c.norm_groups != 32:
        raise ValueError(
            f"latent diffusion has no first stage with patch {c.patch}, quant_conv {c.quant_conv} "
            f"and {c.norm_groups} norm groups; save it as a sfumato system"
        )
    return {
        "in_channels": c.image_channels,
        "out_ch": c.image_channels,
        "ch": c.channels,
        "ch_mult": list(c.mults),
        "num_res_blocks": c.blocks,
        "attn_resolutions": [resolution >> i for i in c.attention_levels],
        "attn_type": "vanilla" if c.mid_attention else "none",
        "z_channels": c.z_channels,
        "double_z": c.kind == "kl",
        "embed_dim": c.embed_dim,
        "resolution": resolution,
        **({"n_embed": c.codebook_size} if c.kind == "vq" else {}),
    }


LAYOUTS("vae-compvis")(
    Layout(
        (
            Part(
                name="vae",
                build=Autoencoder,
                settings=_compvis_settings,
                config=_config,
                names=lambda config: _names(config, COMPVIS),
                published=_compvis_published,
                aliases=(("first_stage_model.", ""), ("vae.", "")),  # cut out of a whole file
            ),
        ),
        ("encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight"),
        absent=("model.diffusion_model.",),
    )
)
