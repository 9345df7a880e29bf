"""GLIDE's noised CLIP: a file for each of its towers, or one that holds both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from sfumato.checkpoints.keymap import KeyMap, Leaf, LeafTable
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
from sfumato.nets.noised_clip import NoisedText, NoisedTextConfig, NoisedVision, NoisedVisionConfig

__all__: list[str] = []  # everything is reached through LAYOUTS

Config = NoisedTextConfig | NoisedVisionConfig
HEADS: Settings = {"n_head": None, "n_head_state": None}
OURS = {
    "n_embd": "embed",
    "n_xf_blocks": "depth",
    "n_head": "heads",
    "n_bpe_vocab": "vocab",
    "max_text_len": "context",
    "image_size": "size",
    "patch_size": "patch",
    "n_timestep": "times",
}
"""Argument of the reference's constructor -> field of ours; the width is n_head * n_head_state."""


def _settings(own: str, shapes: Shapes, given: Settings) -> Settings:
    """Arguments of one tower; in a file of both, those of one alone are below `own`."""
    nested = given.get(own)
    said = {k: v for k, v in given.items() if k not in OWN}
    said |= nested if isinstance(nested, Mapping) else {}
    positions, width = shape_of(shapes, "blocks.input.w_pos", 2)
    numbered = {name.replace(".block_", "."): shape for name, shape in shapes.items()}
    embed = shape_of(shapes, "blocks.output.f.w", 2)[0]
    read: dict[str, object] = {"n_embd": embed, "n_xf_blocks": indices(numbered, "blocks")}
    if own == "text_kwargs":
        rows = shape_of(shapes, "blocks.input.w_voc", 2)[0]
        read |= {"max_text_len": positions, "n_bpe_vocab": rows}
    else:
        patch = shape_of(shapes, "blocks.input.patch_proj", 4)[2]
        rows = shape_of(shapes, "blocks.input.w_t", 2)[0]
        size = patch * math.isqrt(positions - 1)
        read |= {"n_timestep": rows, "patch_size": patch, "image_size": size}
    heads: Any = said.get("n_head")
    each: Any = said.get("n_head_state")
    if heads is None and each is None:
        raise ValueError("no tensor tells the heads: give config={'n_head_state': ...}, 64 as published")
    heads = heads or max(width // each, 1)
    read |= {"n_head": heads, "n_head_state": width // heads}
    return settled(said, read, HEADS)


def _published(config: Config, extra: Settings) -> Settings:
    told = {theirs: getattr(config, ours) for theirs, ours in OURS.items() if hasattr(config, ours)}
    return {**told, "n_head_state": config.width // config.heads}


def _names(config: Config) -> KeyMap:
    vision = isinstance(config, NoisedVisionConfig)
    table = {"w_t": "times.weight", "patch_proj": "patches.weight"} if vision else {"w_voc": "tokens.weight"}
    pairs = {f"blocks.input.{theirs}": ours for theirs, ours in {**table, "w_pos": "positions"}.items()}
    pairs["blocks.output.f.w"] = "projection.weight"
    norms = {"blocks.output.ln": "norm", **({"blocks.input.ln": "norm_in"} if vision else {})}
    linear: dict[str, str] = {}
    for i in range(config.depth):
        theirs, ours = f"blocks.block_{i}", f"blocks.{i}"
        norms |= {f"{theirs}.f_attn.ln": f"{ours}.norm1", f"{theirs}.f_mlp.ln": f"{ours}.norm2"}
        linear |= {f"{theirs}.f_attn.f_{a}": f"{ours}.{b}" for a, b in (("q", "q"), ("v", "v"), ("c", "out"))}
        linear |= {f"{theirs}.f_mlp.f_1": f"{ours}.mlp.up", f"{theirs}.f_mlp.f_2": f"{ours}.mlp.down"}
        pairs[f"{theirs}.f_attn.f_k.w"] = f"{ours}.k.weight"
    for layers, ends in ((norms, ("g", "b")), (linear, ("w", "b"))):
        for theirs, ours in layers.items():
            pairs |= {f"{theirs}.{ends[0]}": f"{ours}.weight", f"{theirs}.{ends[1]}": f"{ours}.bias"}
    leaves: LeafTable = {theirs: Leaf(ours, tensors=()) for theirs, ours in pairs.items()}
    return KeyMap.of([("", "", leaves)])


def _config(kind: type[Config], settings: Settings) -> Config:
    s: Any = settings
    fields = {ours: s[theirs] for theirs, ours in OURS.items() if theirs in s}
    return kind(width=s["n_head"] * s["n_head_state"], **fields)


OWN = ("text_kwargs", "image_kwargs")
TEXT, IMAGE = (
    Part(
        name=name,
        build=build,
        settings=partial(_settings, own),
        config=partial(_config, kind),
        names=_names,
        published=_published,
        known=("n_embd", "n_xf_blocks", *HEADS, *OWN, *own_names),
    )
    for name, build, own, kind, own_names in (
        ("clip_text", NoisedText, OWN[0], NoisedTextConfig, ("n_bpe_vocab", "max_text_len")),
        ("clip_image", NoisedVision, OWN[1], NoisedVisionConfig, ("image_size", "patch_size", "n_timestep")),
    )
)
MARKS = "blocks.input.w_voc", "blocks.input.w_t"
PUBLISHED: Settings = {"n_head_state": 64}
LAYOUTS("glide-clip")(
    Layout(
        (replace(TEXT, prefix="text_encoder."), replace(IMAGE, prefix="image_encoder.")),
        (f"text_encoder.{MARKS[0]}", f"image_encoder.{MARKS[1]}"),
        vocabulary="clip",
    )
)
LAYOUTS("glide-clip-text")(
    Layout((TEXT,), (MARKS[0],), files={"clip_text_enc": PUBLISHED}, vocabulary="clip")
)
LAYOUTS("glide-clip-image")(Layout((IMAGE,), (MARKS[1],), files={"clip_image_enc": PUBLISHED}))
