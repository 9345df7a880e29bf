"""Single files of Stable Diffusion 1 and 2 and of SDXL: U-Net, first stage and text towers in one."""

from __future__ import annotations

from dataclasses import replace

from sfumato.checkpoints.keymap import KeyMap
from sfumato.checkpoints.layouts import clip_text
from sfumato.checkpoints.layouts.clip import open_text_map
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
from sfumato.nets.clip import CLIPText, CLIPTextConfig

__all__: list[str] = []  # everything is reached through LAYOUTS

HEAD = 64  # width of a head in all published text towers of CLIP


def _openai(shapes: Shapes, given: Settings) -> Settings:
    """Of the tower of Stable Diffusion 1, in the names of transformers."""
    width = shape_of(shapes, "text_model.embeddings.token_embedding.weight", 2)[1]
    told = {"num_attention_heads": width // HEAD, "hidden_act": "quick_gelu"}
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


FIRST = replace(clip_text.PART, settings=_openai)
SECOND = Part(
    name="text_encoder",
    build=CLIPText,
    settings=_open,
    config=_open_config,
    names=lambda config: open_text_map(config) + KeyMap((), ("logit_scale", "attn_mask")),
    published=_open_published,
)
CONTROLLED = ("control_model.",)  # with these a file is one of the layouts in `controlnet`
OPENAI, OPEN = "<|endoftext|>", "!"  # what short texts are filled with
MARKERS: dict[str, Settings] = {"v_pred": {"parameterization": "v"}, "ztsnr": {"zero_snr": True}}
Tower = tuple[Part[CLIPTextConfig], str, str]
"""A tower, its name, and its prefix in the file."""
TOWERS: dict[str, tuple[Tower, ...]] = {
    "sd1-compvis": ((FIRST, "text_encoder", "cond_stage_model.transformer."),),
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
    marks = tuple(f"{prefix}{table[id(part)]}.weight" for part, _, prefix in towers)
    pads = {
        name.replace("text_encoder", "tokenizer"): OPENAI if part is FIRST else OPEN
        for part, name, _ in towers
    }
    return Layout(
        (UNET, VAE, *parts), (*NET, FIRST_STAGE, *marks), pads=pads, markers=MARKERS, absent=CONTROLLED
    )


# Of those that fit a file the first is meant: the whole before its U-Net alone.
for _name, _towers in TOWERS.items():
    LAYOUTS(_name)(_whole(_towers))
LAYOUTS("unet-compvis")(Layout((UNET,), NET, markers=MARKERS, absent=CONTROLLED))
