"""ControlNets: folders of diffusers' ControlNetModel, and the original files with `control_model.*`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sfumato.checkpoints.keymap import KeyMap, LeafTable
from sfumato.checkpoints.layouts import stable_file, unet_diffusers  # noqa: F401 (they come first in LAYOUTS)
from sfumato.checkpoints.layouts.layout import (
    LAYOUTS,
    OURS,
    Layout,
    Part,
    Settings,
    Shapes,
    settled,
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
        enter, leave: the first convolution of both, and the last one, which a ControlNet lacks.
        hint: prefix of the convolutions of the picture.
        hints: their names, by their number.
        zero, middle: the convolutions behind the encoder's blocks and its middle.
    """

    unet: Part[UNetConfig]
    enter: str
    leave: str
    hint: str
    hints: Callable[[int], list[str]]
    zero: str
    middle: str

    def names(self, c: ControlNetConfig) -> KeyMap:
        """The rows of a config."""
        encoder = tuple(r for r in self.unet.names(c.encoder).rows if r.ours[0].startswith("encoder."))
        zeros = [self.zero.format(i=i) for i in range(sum(level.blocks + 1 for level in c.encoder.levels))]
        hints = [f"{self.hint}.{n}" for n in self.hints(2 * len(c.hint_widths))]
        rows: list[tuple[str, str, LeafTable]] = []
        rows += [(n, f"zero.{i}", {"": ""}) for i, n in enumerate([*zeros, self.middle])]
        rows += [(n, f"hint.convs.{i}", {"": ""}) for i, n in enumerate(hints)]
        return KeyMap(encoder) + KeyMap.of(rows)

    def read(self, shapes: Shapes, given: Settings, *, pooled: bool = False) -> ControlNetConfig:
        """The config that the shapes and the settings of the encoder make."""
        count = sum(n.startswith(f"{self.hint}.") and n.endswith(".weight") for n in shapes)
        convs = [shape_of(shapes, f"{self.hint}.{n}.weight", 4) for n in self.hints(max(count, 2))]
        width, channels = shape_of(shapes, f"{self.enter}.weight", 4)[:2]
        told = self.unet.settings({**shapes, f"{self.leave}.weight": (channels, width, 3, 3)}, given)
        return ControlNetConfig(
            encoder=self.unet.config(told),
            hint_channels=convs[0][1],
            hint_widths=tuple(conv[0] for conv in convs[:-1:2]),
            pooled=pooled,
        )


DIFFUSERS = Dialect(
    unet=LAYOUTS["unet-diffusers"].parts[0],
    enter="conv_in",
    leave="conv_out",
    hint="controlnet_cond_embedding",
    hints=lambda count: ["conv_in", *(f"blocks.{i}" for i in range(count - 2)), "conv_out"],
    zero="controlnet_down_blocks.{i}",
    middle="controlnet_mid_block",
)
ORIGINAL = Dialect(
    unet=UNET,
    enter="input_blocks.0.0",
    leave="out.2",
    hint="input_hint_block",
    hints=lambda count: [str(2 * i) for i in range(count)],
    zero="zero_convs.{i}.0",
    middle="middle_block_out.0",
)


def _diffusers(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of ControlNetModel."""
    if given.get(ORDER, "rgb") != "rgb":
        raise ValueError(f"{ORDER} {given[ORDER]} is not supported for a ControlNetModel; allowed: rgb")
    rest = {name: value for name, value in given.items() if name not in EXTRA}
    config = DIFFUSERS.read(shapes, rest, pooled=bool(given.get("global_pool_conditions", False)))
    read = _published(config, given)
    own = {n: list(v) if isinstance(v, tuple) else v for n, v in given.items() if n in EXTRA}
    return {**read, **settled(own, {name: read[name] for name in EXTRA}, {}), OURS: config}


def _published(c: ControlNetConfig, extra: Settings) -> dict[str, object]:
    told = DIFFUSERS.unet.published(c.encoder, extra)
    return {
        **{name: told[name] for name in SHARED if name in told},
        "conditioning_channels": c.hint_channels,
        "conditioning_embedding_out_channels": list(c.hint_widths),
        "global_pool_conditions": c.pooled,
        ORDER: "rgb",
    }


def _original(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of the original class."""
    config = ORIGINAL.read(shapes, given)
    return {**_original_published(config, {}), OURS: config}


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


HEADS = ("num_heads", "num_head_channels")
BARE = _part(ORIGINAL, settings=_original, published=_original_published, known=HEADS)
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
ALONE = LAYOUTS["sd1-compvis"]
LAYOUTS("sd1-control-compvis")(
    replace(
        ALONE,
        parts=(*ALONE.parts, CONTROL),
        marks=(*ALONE.marks, CONTROL.prefix + MARK),
        absent=(),
    )
)
LAYOUTS("controlnet-compvis")(Layout((CONTROL,), (CONTROL.prefix + MARK,)))
LAYOUTS("controlnet-bare")(Layout((BARE,), (MARK, "zero_convs.0.0.weight")))
