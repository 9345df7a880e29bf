"""Single files of Stable Diffusion 1 and 2 and of SDXL: U-Net, first stage and text towers in one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sfumato.checkpoints.keymap import KeyMap
from sfumato.checkpoints.layouts import clip_text
from sfumato.checkpoints.layouts.clip import GELUS, open_text_map, open_vision_map
from sfumato.checkpoints.layouts.latent_file import FIRST_STAGE, NET, VAE
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
from sfumato.checkpoints.layouts.unet_compvis import UNET
from sfumato.nets.clip import CLIPText, CLIPTextConfig, CLIPVision, CLIPVisionConfig

__all__: list[str] = []  # everything is reached through LAYOUTS

HEAD = 64  # width of a head in all published towers of CLIP but one
HUGE = 1280  # width of that one, the vision tower of OpenCLIP's ViT-H, whose heads have 80


def _openai(shapes: Shapes, given: Settings) -> Settings:
    """Of the tower of Stable Diffusion 1, in the names of transformers."""
    width = shape_of(shapes, "text_model.embeddings.token_embedding.weight", 2)[1]
    told = {"num_attention_heads": max(width // HEAD, 1), "hidden_act": "quick_gelu"}
    return clip_text.PART.settings(shapes, {**told, **given})


def _open(shapes: Shapes, given: Settings) -> Settings:
    """Of the tower of Stable Diffusion 2, in the names of OpenCLIP."""
    vocab, width = shape_of(shapes, "token_embedding.weight", 2)
    read: dict[str, object] = {
        "vocab_size": vocab,
        "context_length": shape_of(shapes, "positional_embedding", 2)[0],
        "width": width,
        "layers": indices(shapes, "transformer.resblocks"),
        "hidden": shape_of(shapes, "transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        # Files that were made of diffusers' folders have neither it nor the last block.
        "embed_dim": shape_of(shapes, "text_projection", 2)[1] if "text_projection" in shapes else 0,
    }
    return settled(given, read, {"heads": max(width // HEAD, 1)})


def _open_config(settings: Settings) -> CLIPTextConfig:
    names = ("vocab_size", "context_length", "width", "layers", "heads", "hidden", "embed_dim")
    numbers = [n for n in (settings[name] for name in names) if isinstance(n, int)]
    vocab, context, width, depth, heads, hidden, embed = numbers
    return CLIPTextConfig(
        vocab=vocab,
        context=context,
        width=width,
        depth=depth,
        heads=heads,
        hidden=hidden,
        embed=embed,
        activation="none",
    )


def _open_published(c: CLIPTextConfig, extra: Settings) -> dict[str, object]:
    return {"width": c.width, "layers": c.depth, "heads": c.heads, "embed_dim": c.embed}


def _vision(shapes: Shapes, given: Settings) -> Settings:
    """Of the vision tower of Stable unCLIP: OpenCLIP's ViT-H, or OpenAI's ViT-L."""
    width, _, patch, _ = shape_of(shapes, "conv1.weight", 4)
    read: dict[str, object] = {
        "side": round((shape_of(shapes, "positional_embedding", 2)[0] - 1) ** 0.5) * patch,
        "patch": patch,
        "width": width,
        "depth": indices(shapes, "transformer.resblocks"),
        "heads": width // (80 if width == HUGE else HEAD),
        "hidden": shape_of(shapes, "transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
        "embed": shape_of(shapes, "proj", 2)[1],
        "activation": GELUS["gelu" if width == HUGE else "quick_gelu"],
    }
    return settled(given, read, {})


def _vision_config(settings: Settings) -> CLIPVisionConfig:
    told: Any = settings
    return CLIPVisionConfig(**told)


FIRST = replace(clip_text.PART, settings=_openai)
SECOND = Part(
    name="text_encoder",
    build=CLIPText,
    settings=_open,
    config=_open_config,
    names=lambda config: open_text_map(config) + KeyMap((), ("logit_scale", "attn_mask")),
    published=_open_published,
)
VISION = Part(
    name="image_encoder",
    build=CLIPVision,
    settings=_vision,
    config=_vision_config,
    names=open_vision_map,
    published=lambda config, extra: vars(config),
)
CONTROLLED = ("control_model.",)  # with these a file is one of the layouts in `controlnet`
OPENAI, OPEN = "<|endoftext|>", "!"  # what short texts are filled with
MARKERS: dict[str, Settings] = {"v_pred": {"parameterization": "v"}, "ztsnr": {"zero_snr": True}}
Tower = tuple[Part[Any], str, str]
"""A tower, its name, and its prefix in the file."""
TOWERS: dict[str, tuple[Tower, ...]] = {
    "sd1-compvis": ((FIRST, "text_encoder", "cond_stage_model.transformer."),),
    "sd2-unclip-compvis": (
        (SECOND, "text_encoder", "cond_stage_model.model."),
        (VISION, "image_encoder", "embedder.model.visual."),
    ),
    "sd2-compvis": ((SECOND, "text_encoder", "cond_stage_model.model."),),
    "sdxl-compvis": (
        (FIRST, "text_encoder", "conditioner.embedders.0.transformer."),
        (SECOND, "text_encoder_2", "conditioner.embedders.1.model."),
    ),
    "sdxl-refiner-compvis": ((SECOND, "text_encoder_2", "conditioner.embedders.0.model."),),
}


def _whole(towers: tuple[Tower, ...]) -> Layout:
    parts = tuple(replace(part, name=name, prefix=prefix) for part, name, prefix in towers)
    table = {id(FIRST): "text_model.embeddings.token_embedding", id(SECOND): "token_embedding"}
    table[id(VISION)] = "conv1"
    marks = tuple(f"{prefix}{table[id(part)]}.weight" for part, _, prefix in towers)
    pads = {
        name.replace("text_encoder", "tokenizer"): OPENAI if part is FIRST else OPEN
        for part, name, _ in towers
        if part is not VISION
    }
    return Layout(
        (UNET, VAE, *parts), (*NET, FIRST_STAGE, *marks), pads=pads, markers=MARKERS, absent=CONTROLLED
    )


# Of those that fit a file the first is meant: the whole before its U-Net alone.
for _name, _towers in TOWERS.items():
    LAYOUTS(_name)(_whole(_towers))
LAYOUTS("unet-compvis")(Layout((UNET,), NET, markers=MARKERS, absent=CONTROLLED))
