"""Single files of latent diffusion's systems of 2021: U-Net, first stage, and what reads the condition."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from sfumato.checkpoints.keymap import KeyMap, Leaf, LeafTable, squeezed, stacked
from sfumato.checkpoints.layouts import adm
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
from sfumato.checkpoints.layouts.unet_compvis import UNET, published_heads
from sfumato.nets.text import TextTransformer, TextTransformerConfig
from sfumato.nets.told import ClassMap, ClassMapConfig, ClassToken, ClassTokenConfig

__all__ = ["FIRST_STAGE", "NET", "VAE"]

VAE = replace(LAYOUTS["vae-compvis"].parts[0], prefix="first_stage_model.")
NET = tuple(
    f"{UNET.prefix}{n}.weight" for n in ("input_blocks.0.0", "middle_block.1.proj_in", "time_embed.0")
)
FIRST_STAGE = f"{VAE.prefix}decoder.up.0.block.0.conv1.weight"


# The U-Net without a transformer, which has the names of guided-diffusion's


def _settings(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of UNetModel; without heads those of the published net of this shape."""
    if not given.keys() & {"num_heads", "num_head_channels"}:
        headless = adm.UNET.config(adm.UNET.settings(shapes, {**given, "num_heads": 1}))
        given = {**given, **published_heads(headless)}
    return adm.UNET.settings(shapes, given)


PLAIN = replace(adm.UNET, settings=_settings, prefix=UNET.prefix)


# What reads the condition


def _text_settings(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of BERTEmbedder or TransformerEmbedder."""
    vocab, width = shape_of(shapes, "token_emb.weight", 2)
    read = {
        "n_embed": width,
        "n_layer": indices(shapes, "attn_layers.layers") // 2,
        "vocab_size": vocab,
        "max_seq_len": shape_of(shapes, "pos_emb.emb.weight", 2)[0],
        "heads": shape_of(shapes, "attn_layers.layers.0.1.to_q.weight", 2)[0] // HEAD,
    }
    return settled(given, read, {})


HEAD = 64  # width of a head, in all of them
TOWER: LeafTable = {
    "token_emb": Leaf("tokens", tensors=("weight",)),
    "pos_emb.emb.weight": Leaf("positions", tensors=()),
    "norm": "norm",
}
READS: LeafTable = {
    "0": "norm1",
    ("1.to_q", "1.to_k", "1.to_v"): Leaf("attention.qkv", stacked(3), ("weight",)),
    "1.to_out": "attention.out",
}
FEEDS: LeafTable = {"0": "norm2", "1.net.0.0": "mlp.up", "1.net.2": "mlp.down"}


def _text_config(settings: Settings) -> TextTransformerConfig:
    s: Any = settings
    return TextTransformerConfig(
        vocab_size=s["vocab_size"],
        context=s["max_seq_len"],
        width=s["n_embed"],
        depth=s["n_layer"],
        heads=s["heads"],
        padding="read",
        head_dim=HEAD,
    )


def _text_names(config: TextTransformerConfig) -> KeyMap:
    rows: list[tuple[str, str, LeafTable]] = [("", "", TOWER)]
    for i in range(config.depth):
        for k, table in ((2 * i, READS), (2 * i + 1, FEEDS)):
            rows.append((f"attn_layers.layers.{k}", f"blocks.{i}", table))
    return KeyMap.of(rows, ("to_logits.",))


def _text_published(c: TextTransformerConfig, extra: Settings) -> Settings:
    told = {"n_embed": c.width, "n_layer": c.depth, "vocab_size": c.vocab_size, "max_seq_len": c.context}
    if _text_config({**told, "heads": c.heads}) != c:
        raise ValueError(
            "text towers of latent diffusion have heads of width 64 and read their padding; save this one as "
            "a sfumato system"
        )
    return {**told, "heads": c.heads}


TEXT = Part(
    name="text",
    build=TextTransformer,
    settings=_text_settings,
    config=_text_config,
    names=_text_names,
    published=_text_published,
    prefix="cond_stage_model.transformer.",
)
CLASS = Part(
    name="label",
    build=ClassToken,
    settings=lambda shapes, given: dict(
        zip(("n_classes", "embed_dim"), shape_of(shapes, "embedding.weight", 2), strict=True)
    ),
    config=lambda s: ClassTokenConfig(rows=int(str(s["n_classes"])), width=int(str(s["embed_dim"]))),
    names=lambda config: KeyMap.of([("", "", {"embedding": Leaf("embedding", tensors=("weight",))})]),
    published=lambda config, extra: {"n_classes": config.rows, "embed_dim": config.width},
    prefix="cond_stage_model.",
)
MIX: LeafTable = {"channel_mapper": Leaf("mix", squeezed(2, 3), ("weight",))}
MAP = Part(
    name="map",
    build=ClassMap,
    settings=lambda shapes, given: dict(
        zip(("out_channels", "in_channels"), shape_of(shapes, "channel_mapper.weight", 4)[:2], strict=True)
    ),
    config=lambda s: ClassMapConfig(classes=int(str(s["in_channels"])), channels=int(str(s["out_channels"]))),
    names=lambda config: KeyMap.of([("", "", MIX)]),
    published=lambda config, extra: {"out_channels": config.channels, "in_channels": config.classes},
    prefix="cond_stage_model.",
)


# Beside the networks


def _beside(state: Mapping[str, Tensor]) -> dict[str, dict[str, object]]:
    """The schedule and the scale of latents that a file keeps in buffers, as files of diffusers say them."""
    told: dict[str, dict[str, object]] = {}
    if "scale_factor" in state:
        told["vae"] = {"scaling_factor": float(state["scale_factor"])}
    if "betas" in state:
        betas = state["betas"].double()
        first, last = (float(f"{float(v):.3g}") for v in (betas[0], betas[-1]))  # as the configs say them
        formula = torch.linspace(first**0.5, last**0.5, len(betas), dtype=torch.float64) ** 2
        told["scheduler"] = {"num_train_timesteps": len(betas), "beta_start": first, "beta_end": last}
        if not torch.allclose(betas, formula, rtol=TOLERANCE, atol=0):
            told["scheduler"] = {"num_train_timesteps": len(betas), "trained_betas": betas.tolist()}
    return told


TOLERANCE = 2e-3  # relative, of a table in half precision


def _whole(*parts: Part[Any], mark: str, vocabulary: Literal["", "bert"] = "") -> Layout:
    marks = (*(NET if parts[0] is UNET else (PLAIN_NET,)), FIRST_STAGE, *([mark] if mark else []))
    return Layout(parts, marks, vocabulary=vocabulary, beside=_beside, averages=True)


PLAIN_NET = f"{PLAIN.prefix}middle_block.1.qkv.weight"
LAYOUTS("ldm-class-compvis")(_whole(UNET, VAE, CLASS, mark=f"{CLASS.prefix}embedding.weight"))
LAYOUTS("ldm-text-compvis")(_whole(UNET, VAE, TEXT, mark=f"{TEXT.prefix}token_emb.weight", vocabulary="bert"))
LAYOUTS("ldm-semantic-compvis")(_whole(PLAIN, VAE, MAP, mark=f"{MAP.prefix}channel_mapper.weight"))
LAYOUTS("ldm-compvis")(_whole(PLAIN, VAE, mark=""))
