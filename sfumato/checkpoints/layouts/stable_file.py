"""Single files of Stable Diffusion 1 and 2: U-Net, first stage and text tower in one."""

from __future__ import annotations

from dataclasses import replace

from sfumato.checkpoints.keymap import KeyMap
from sfumato.checkpoints.layouts import clip_text
from sfumato.checkpoints.layouts.clip import open_text_map
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
VAE = replace(LAYOUTS["vae-compvis"].parts[0], prefix="first_stage_model.")


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
        "embed_dim": shape_of(shapes, "text_projection", 2)[1],
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


FIRST = replace(clip_text.PART, prefix="cond_stage_model.transformer.", settings=_openai)
SECOND = Part(
    name="text_encoder",
    build=CLIPText,
    settings=_open,
    config=_open_config,
    names=lambda config: open_text_map(config) + KeyMap((), ("logit_scale", "attn_mask")),
    published=_open_published,
    prefix="cond_stage_model.model.",
)
NET = tuple(
    f"{UNET.prefix}{n}.weight" for n in ("input_blocks.0.0", "middle_block.1.proj_in", "time_embed.0")
)
FIRST_STAGE = f"{VAE.prefix}decoder.up.0.block.0.conv1.weight"
TOKENS = {
    "sd1-compvis": "transformer.text_model.embeddings.token_embedding",
    "sd2-compvis": "model.token_embedding",
}
# Of those that fit a file the first is meant: the whole before its U-Net alone.
for _name, _tower, _pad in (("sd1-compvis", FIRST, "<|endoftext|>"), ("sd2-compvis", SECOND, "!")):
    _marks = (*NET, FIRST_STAGE, f"cond_stage_model.{TOKENS[_name]}.weight")
    LAYOUTS(_name)(Layout((UNET, VAE, _tower), _marks, pad=_pad, absent=("control_model.",)))
LAYOUTS("unet-compvis")(Layout((UNET,), NET, absent=("control_model.",)))
