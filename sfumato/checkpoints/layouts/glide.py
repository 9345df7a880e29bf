"""GLIDE: base and upsampler, for inpainting or not, each with its own text transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sfumato.checkpoints.keymap import KeyMap, Leaf, LeafTable, regrouped
from sfumato.checkpoints.layouts.adm import DIFFUSION, FREE, of_script, same_channels
from sfumato.checkpoints.layouts.blocks import (
    agreed,
    attention_of,
    normalized,
    same,
    structure,
    told,
    unet_config,
    unet_map,
)
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
from sfumato.nets.embedding import EmbedderConfig, Feature, TokensConfig
from sfumato.nets.text import TextTransformer, TextTransformerConfig
from sfumato.nets.unet import UNet, UNetConfig

__all__: list[str] = []  # everything is reached through LAYOUTS

TEXT_FREE: Settings = {
    "xf_heads": None,
    "xf_final_ln": True,
    "xf_ar": 0.0,
    "share_unemb": False,
    "tokenizer": None,
}
BLOCK: LeafTable = {
    "attn.c_proj": "attention.out",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
OF_TEXT = ("transformer.", "final_ln.", "token_embedding.", "positional_embedding", "padding_embedding")
OF_UNET = ("time_embed.", "input_blocks.", "middle_block.", "output_blocks.", "out.", "transformer_proj.")
CHANNELS = ((1, 0), (2, 0), (2, 1), (3, 1))
"""Plain; with a low-resolution picture; with a masked picture and its mask; with all three."""
_BASE: Settings = {
    "image_size": 64,
    "num_head_channels": 64,
    "dropout": 0.1,
    "xf_heads": 8,
    "noise_schedule": "squaredcos_cap_v2",
    "timestep_respacing": "100",
}
_UP: Settings = {
    **_BASE,
    "image_size": 256,
    "small_size": 64,
    "noise_schedule": "linear",
    "timestep_respacing": "fast27",
}
FILES: Mapping[str, Settings] = {
    "base": _BASE,
    "base_inpaint": _BASE,
    "upsample": _UP,
    "upsample_inpaint": _UP,
}
"""Published file -> what its tensors do not tell."""


def _text_settings(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of Text2ImUNet that concern its transformer."""
    tokens, width = shape_of(shapes, "token_embedding.weight", 2)
    read = {
        "text_ctx": shape_of(shapes, "positional_embedding", 2)[0],
        "xf_width": width,
        "xf_layers": indices(shapes, "transformer.resblocks"),
        "xf_padding": "padding_embedding" in shapes,
        "tokenizer_n_vocab": tokens,
    }
    settings = settled(given, read, TEXT_FREE)
    for name in ("xf_final_ln", "xf_ar", "share_unemb"):
        if settings[name] != TEXT_FREE[name]:
            raise ValueError(f"{name} {settings[name]} is not supported; allowed: {TEXT_FREE[name]}")
    if settings["xf_heads"] is None:
        raise ValueError(
            "no tensor tells the heads of the text transformer: give config={'xf_heads': ...}, or the file "
            "the name under which it was published"
        )
    return settings


TEXT_KNOWN = ("text_ctx", "xf_width", "xf_layers", "xf_padding", "tokenizer_n_vocab", *TEXT_FREE)


def _text_config(settings: Settings) -> TextTransformerConfig:
    s: Any = settings
    return TextTransformerConfig(
        vocab_size=s["tokenizer_n_vocab"],
        context=s["text_ctx"],
        width=s["xf_width"],
        depth=s["xf_layers"],
        heads=s["xf_heads"],
        padding="learned" if s["xf_padding"] else "read",
    )


def _text_names(config: TextTransformerConfig) -> KeyMap:
    top: LeafTable = {
        "final_ln": "norm",
        "token_embedding": Leaf("tokens", tensors=("weight",)),
        "positional_embedding": Leaf("positions", tensors=()),
        **({"padding_embedding": Leaf("padding", tensors=())} if config.padding == "learned" else {}),
    }
    block: LeafTable = {**BLOCK, "attn.c_qkv": Leaf("attention.qkv", regrouped(config.heads, 3))}
    blocks = [(f"transformer.resblocks.{i}", f"blocks.{i}", block) for i in range(config.depth)]
    return KeyMap.of([("", "", top), *blocks], OF_UNET)


def _text_published(config: TextTransformerConfig, extra: Settings) -> Settings:
    if config.padding == "masked":
        raise ValueError(
            "GLIDE's text transformer reads its padding and this one does not; save a sfumato system"
        )
    return {
        **TEXT_FREE,
        "text_ctx": config.context,
        "xf_width": config.width,
        "xf_layers": config.depth,
        "xf_heads": config.heads,
        "xf_padding": config.padding == "learned",
        "tokenizer_n_vocab": config.vocab_size,
    }


TEXT = Part(
    name="text",
    build=TextTransformer,
    settings=_text_settings,
    config=_text_config,
    names=_text_names,
    published=_text_published,
    known=TEXT_KNOWN,
)


def _settings(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of Text2ImUNet and its subclasses, or of the scripts that make them."""
    rest = of_script({k: v for k, v in given.items() if k not in TEXT_KNOWN})
    rest = normalized(rest, rest.get("image_size"))
    found = shape_of(shapes, "input_blocks.0.0.weight", 4)[1]
    read = {
        **structure(shapes),
        **same_channels(rest, found, CHANNELS),
        "out_channels": shape_of(shapes, "out.2.weight", 4)[0],
        "xf_width": shape_of(shapes, "transformer_proj.weight", 2)[1],
    }
    free = {**FREE, **DIFFUSION, "cache_text_emb": False, "inpaint": None, "super_res": None}
    return settled(agreed(rest, read), read, free)


def _config(settings: Settings) -> UNetConfig:
    width: Any = settings["xf_width"]
    config = unet_config(settings, attention_of(settings, "appended"))
    pooled = EmbedderConfig(kind="linear", features=(Feature(field="pooled", dim=width),))
    embedding = replace(config.embedding, extras=(pooled,))
    return replace(config, embedding=embedding, tokens=TokensConfig(dim=width))


def _names(config: UNetConfig) -> KeyMap:
    rows = unet_map(config, {"transformer_proj": "encoder.embedding.extras.0.proj"})
    return replace(rows, ignored=OF_TEXT)


def _published(config: UNetConfig, extra: Settings) -> Settings:
    width = config.tokens.dim if config.tokens else 0
    settings: dict[str, object] = {**FREE, **DIFFUSION, **extra, **told(config), "xf_width": width}
    del settings["disable_self_attentions"]
    same(config, _config(settings), "GLIDE")
    return settings


UNET = Part(
    name="net",
    build=UNet,
    settings=_settings,
    config=_config,
    names=_names,
    published=_published,
    known=(*FREE, *DIFFUSION),
)
_MARKS = ("transformer_proj.weight", "transformer.resblocks.0.attn.c_qkv.weight", "input_blocks.0.0.weight")
LAYOUTS("glide")(Layout((UNET, TEXT), _MARKS, files=FILES, vocabulary="gpt2"))
