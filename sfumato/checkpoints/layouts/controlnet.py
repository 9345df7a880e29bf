"""ControlNets: folders of diffusers' ControlNetModel, and the original files with `control_model.*`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sfumato.checkpoints.keymap import KeyMap
from sfumato.checkpoints.layouts import stable_file, unet_diffusers  # noqa: F401 (they come first in LAYOUTS)
from sfumato.checkpoints.layouts.layout import (
    LAYOUTS,
    OURS,
    Layout,
    Part,
    Settings,
    Shapes,
    indices,
    shape_of,
)
from sfumato.checkpoints.layouts.unet_compvis import UNET
from sfumato.nets.controlnet import ControlNet, ControlNetConfig
from sfumato.nets.unet import UNetConfig

__all__: list[str] = []  # everything is reached through LAYOUTS

ORDER = "controlnet_conditioning_channel_order"
# Arguments of diffusers' class besides those of its U-Net, and those of the U-Net that it lacks.
EXTRA = ("conditioning_channels", "conditioning_embedding_out_channels", "global_pool_conditions", ORDER)
SHARED = (
    *("in_channels", "flip_sin_to_cos", "freq_shift", "down_block_types", "mid_block_type"),
    *("only_cross_attention", "block_out_channels", "layers_per_block", "downsample_padding"),
    *("mid_block_scale_factor", "act_fn", "norm_num_groups", "norm_eps", "cross_attention_dim"),
    *("transformer_layers_per_block", "encoder_hid_dim", "encoder_hid_dim_type", "attention_head_dim"),
    *("num_attention_heads", "use_linear_projection", "class_embed_type", "addition_embed_type"),
    *("addition_time_embed_dim", "num_class_embeds", "upcast_attention", "resnet_time_scale_shift"),
    "projection_class_embeddings_input_dim",
)


@dataclass(frozen=True)
class Dialect:
    """How a layout names what a ControlNet has besides the encoder.

    Attributes:
        unet: the part whose names the encoder has.
        enter: the first convolution of both.
        out: the last one of the U-Net, which a ControlNet lacks.
        hint: prefix of the convolutions of the picture; `first`, `last` and {i} between them.
        zero, middle: the convolutions behind the encoder's blocks and its middle.
    """

    unet: Part[UNetConfig]
    enter: str
    out: str
    hint: str
    first: str
    between: str
    last: str
    zero: str
    middle: str

    def hints(self, count: int) -> list[str]:
        """Names of the `count` convolutions of the picture."""
        inner = [self.between.format(i=i, n=2 * (i + 1)) for i in range(count - 2)]
        return [f"{self.hint}.{n}" for n in (self.first, *inner, self.last.format(n=2 * (count - 1)))]

    def names(self, c: ControlNetConfig) -> KeyMap:
        """The rows of a config."""
        encoder = self.unet.names(c.encoder).rows
        skips = sum(level.blocks + 1 for level in c.encoder.levels)
        zeros = [self.zero.format(i=i) for i in range(skips)] + [self.middle]
        own = [(n, f"zero.{i}", {"": ""}) for i, n in enumerate(zeros)]
        hints = self.hints(2 * len(c.hint_widths))
        own += [(n, f"hint.convs.{i}", {"": ""}) for i, n in enumerate(hints)]
        return KeyMap(tuple(row for row in encoder if row.ours[0].startswith("encoder."))) + KeyMap.of(own)

    def read(self, shapes: Shapes, given: Settings, count: int, *, pooled: bool = False) -> Settings:
        """Settings of the encoder, and under OURS the config of the whole, of `count` convolutions."""
        convs = [shape_of(shapes, f"{n}.weight", 4) for n in self.hints(count)]
        width, channels = shape_of(shapes, f"{self.enter}.weight", 4)[:2]
        told = self.unet.settings({**shapes, f"{self.out}.weight": (channels, width, 3, 3)}, given)
        encoder = self.unet.config(told)
        widths = tuple(conv[0] for conv in convs[:-1:2])
        hint_channels = convs[0][1]
        config = ControlNetConfig(
            encoder=encoder, hint_channels=hint_channels, hint_widths=widths, pooled=pooled
        )
        return {**told, OURS: config}


DIFFUSERS = Dialect(
    unet=LAYOUTS["unet-diffusers"].parts[0],
    enter="conv_in",
    out="conv_out",
    hint="controlnet_cond_embedding",
    first="conv_in",
    between="blocks.{i}",
    last="conv_out",
    zero="controlnet_down_blocks.{i}",
    middle="controlnet_mid_block",
)
ORIGINAL = Dialect(
    unet=UNET,
    enter="input_blocks.0.0",
    out="out.2",
    hint="input_hint_block",
    first="0",
    between="{n}",
    last="{n}",
    zero="zero_convs.{i}.0",
    middle="middle_block_out.0",
)


def _diffusers(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of ControlNetModel."""
    if given.get(ORDER, "rgb") != "rgb":
        raise ValueError(f"{ORDER} {given[ORDER]} is not supported for a ControlNetModel; allowed: rgb")
    rest = {name: value for name, value in given.items() if name not in EXTRA}
    count = indices(shapes, f"{DIFFUSERS.hint}.blocks") + 2
    told = DIFFUSERS.read(shapes, rest, count, pooled=bool(given.get("global_pool_conditions", False)))
    config = _config(told)
    read = _published(config, given)
    for name in EXTRA[:2]:
        said = given.get(name, read[name])
        said = list(said) if isinstance(said, tuple) else said
        if said != read[name]:
            raise ValueError(f"the config says {name} {said}, the tensors say {read[name]}")
    return {**read, OURS: config}


def _published(c: ControlNetConfig, extra: Settings) -> dict[str, object]:
    told: Mapping[str, object] = DIFFUSERS.unet.published(c.encoder, extra)
    return {
        **{name: told[name] for name in SHARED if name in told},
        "conditioning_channels": c.hint_channels,
        "conditioning_embedding_out_channels": list(c.hint_widths),
        "global_pool_conditions": c.pooled,
        ORDER: "rgb",
    }


def _original(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of the original class."""
    count = (indices(shapes, ORIGINAL.hint) + 1) // 2
    return ORIGINAL.read(shapes, given, count)


def _original_published(c: ControlNetConfig, extra: Settings) -> dict[str, object]:
    if c.pooled:
        raise ValueError(
            "no tensor of the original layout says that residuals are pooled: write 'controlnet-diffusers'"
        )
    told = {n: v for n, v in UNET.published(c.encoder, extra).items() if n != "out_channels"}
    return {**told, "hint_channels": c.hint_channels}


def _config(settings: Settings) -> ControlNetConfig:
    config = settings[OURS]
    assert isinstance(config, ControlNetConfig)
    return config


def _part(dialect: Dialect, **rest: Any) -> Part[ControlNetConfig]:
    return Part(name="control", build=ControlNet, config=_config, names=dialect.names, **rest)


BARE = _part(ORIGINAL, settings=_original, published=_original_published)
CONTROL = replace(BARE, prefix="control_model.")
LAYOUTS("controlnet-diffusers")(
    Layout(
        (_part(DIFFUSERS, settings=_diffusers, published=_published, known=(*SHARED, *EXTRA)),),
        ("controlnet_cond_embedding.conv_in.weight", "controlnet_mid_block.weight"),
        "ControlNetModel",
    )
)
MARK = "input_hint_block.0.weight"
# A whole system of Stable Diffusion 1 with its ControlNet, the ControlNet alone, and without its prefix.
WHOLE = (*LAYOUTS["sd1-compvis"].parts, CONTROL)
LAYOUTS("sd1-control-compvis")(
    Layout(WHOLE, (*LAYOUTS["sd1-compvis"].marks, CONTROL.prefix + MARK), pad=LAYOUTS["sd1-compvis"].pad)
)
LAYOUTS("controlnet-compvis")(Layout((CONTROL,), (CONTROL.prefix + MARK,)))
LAYOUTS("controlnet-bare")(Layout((BARE,), (MARK, "zero_convs.0.0.weight")))
