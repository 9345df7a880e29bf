"""Karlo, an unCLIP: prior, decoder and super-resolution, as published and as diffusers keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sfumato.checkpoints.keymap import KeyMap, Leaf, LeafTable, regrouped, squeezed, stacked
from sfumato.checkpoints.layouts import unet_residual as residual
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
from sfumato.checkpoints.layouts.glide import BLOCK
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
from sfumato.nets.embedding import TokensConfig
from sfumato.nets.prior import EXTRA, Prior, PriorConfig
from sfumato.nets.unclip import NullImage, NullImageConfig, Projections, ProjectionsConfig, told_both
from sfumato.nets.unet import UNet, UNetConfig

__all__: list[str] = []  # everything is reached through LAYOUTS

STEPS = "ckpt-step=01000000-of-01000000"
COSINE: Settings = {"noise_schedule": "squaredcos_cap_v2"}

# The prior

PRIOR_TOP: LeafTable = {
    "positional_embedding": Leaf("positions", squeezed(0), ()),
    "prd_emb": Leaf("query", squeezed(0, 1), ()),
    **{"time_embed.0": "time.linear1", "time_embed.2": "time.linear2", "final_ln": "norm"},
    **{"text_enc_proj": "text", "text_emb_proj": "pooled", "clip_img_proj": "image", "out_proj": "out"},
}
HUB_TOP: LeafTable = {
    "positional_embedding": Leaf("positions", squeezed(0), ()),
    "prd_embedding": Leaf("query", squeezed(0, 1), ()),
    **{f"time_embedding.linear_{i}": f"time.linear{i}" for i in (1, 2)},
    **{"encoder_hidden_states_proj": "text", "embedding_proj": "pooled", "proj_in": "image"},
    **{"norm_out": "norm", "proj_to_clip_embeddings": "out"},
    **{f"clip_{n}": Leaf(n, squeezed(0), ()) for n in ("mean", "std")},
}
HUB_BLOCK: LeafTable = {
    tuple(f"attn1.to_{n}" for n in ("q", "k", "v")): Leaf("attention.qkv", stacked(3)),
    **{"attn1.to_out.0": "attention.out", "norm1": "norm1", "norm3": "norm2"},
    **{"ff.net.0.proj": "mlp.up", "ff.net.2": "mlp.down"},
}
# Our field -> the reference's setting, and the axis of a tensor that tells it.
OURS: Mapping[str, tuple[str, str, int]] = {
    "dim": ("clip_dim", "out_proj.weight", 0),
    "text_dim": ("clip_xf_width", "text_enc_proj.weight", 1),
    "width": ("xf_width", "out_proj.weight", 1),
}
HUB: Mapping[str, tuple[str, str, int]] = {
    "dim": ("embedding_dim", "proj_to_clip_embeddings.weight", 0),
    "text_dim": ("clip_embed_dim", "encoder_hidden_states_proj.weight", 1),
    "width": ("inner_dim", "proj_in.weight", 0),
}
COUNTS = {
    False: ("text_ctx", "xf_layers", "xf_heads"),
    True: ("num_embeddings", "num_layers", "num_attention_heads"),
}
PRIOR_FREE: Settings = {"xf_heads": None, "xf_final_ln": True}
HUB_FREE: Settings = {
    **{"num_attention_heads": 32, "attention_head_dim": 64, "dropout": 0.0, "added_emb_type": "prd"},
    **{"norm_in_type": None, "embedding_proj_norm_type": None, "encoder_hid_proj_type": "linear"},
    **{"time_embed_act_fn": "silu", "additional_embeddings": EXTRA},
}


def _prior(hub: bool) -> Part[PriorConfig]:
    """Karlo's PriorTransformer, or that of diffusers, which holds mean and std of the embeddings."""
    table, free = (HUB, HUB_FREE) if hub else (OURS, PRIOR_FREE)
    blocks = "transformer_blocks" if hub else "transformer.resblocks"
    context, layers, heads = COUNTS[hub]

    def settings(shapes: Shapes, given: Settings) -> Settings:
        read: dict[str, Any] = {name: shape_of(shapes, t, 2)[axis] for name, t, axis in table.values()}
        read[context] = shape_of(shapes, "positional_embedding", 3)[1] - EXTRA
        read[layers] = indices(shapes, blocks)
        s = settled({k: v for k, v in given.items() if v is not None}, read, free)
        if s[heads] is None:
            raise ValueError(f"no tensor tells the heads of the prior: give config={{{heads!r}: ...}}")
        if hub and s[heads] * s["attention_head_dim"] != read["inner_dim"]:  # type: ignore[operator]
            raise ValueError(
                f"{s[heads]} heads of {s['attention_head_dim']} are not the width {read['inner_dim']}: set "
                "num_attention_heads and attention_head_dim"
            )
        for name, value in free.items():
            if name not in (heads, "attention_head_dim", "dropout") and s[name] != value:
                raise ValueError(f"{name} {s[name]} is not supported for a prior; allowed: {value}")
        return s

    def config(s: Any) -> PriorConfig:
        sizes = {ours: s[name] for ours, (name, _, _) in table.items()}
        return PriorConfig(**sizes, context=s[context], depth=s[layers], heads=s[heads], moments=hub)

    def names(c: PriorConfig) -> KeyMap:
        qkv = Leaf("attention.qkv", regrouped(c.heads, 3))
        block: LeafTable = HUB_BLOCK if hub else {**BLOCK, "attn.c_qkv": qkv}
        rows = [(f"{blocks}.{i}", f"blocks.{i}", block) for i in range(c.depth)]
        return KeyMap.of([("", "", HUB_TOP if hub else PRIOR_TOP), *rows])

    def published(c: PriorConfig, extra: Settings) -> Settings:
        if c.moments != hub or (hub and c.text_dim != c.dim):
            raise ValueError(
                "diffusers' prior holds mean and std and reads text states as wide as the embeddings, "
                "Karlo's has no mean and std; write the other layout, or a sfumato system"
            )
        sizes = {name: getattr(c, ours) for ours, (name, _, _) in table.items()}
        head = {"attention_head_dim": c.width // c.heads} if hub else {}
        return {**free, **sizes, context: c.context, layers: c.depth, heads: c.heads, **head}

    known = (*free, context, layers, heads, *(name for name, _, _ in table.values()))
    prefix = "" if hub else "model."
    return Part("net", Prior, settings, config, names, published, prefix=prefix, known=known)


LAYOUTS("karlo-prior")(
    Layout(
        (_prior(False),),
        ("prd_emb", "text_enc_proj.weight"),
        files={f"prior-{STEPS}": {"xf_heads": 32}},
    )
)
LAYOUTS("karlo-prior-diffusers")(
    Layout((_prior(True),), ("prd_embedding", "proj_to_clip_embeddings.weight"), "PriorTransformer")
)

# The decoder

DECODER_FREE: Settings = {
    **FREE,
    **DIFFUSION,
    **{"xf_layers": 0, "xf_heads": 0, "xf_final_ln": False, "text_ctx": 77, "clip_emb_type": "image"},
    **{"text_drop": 0.0, "clip_emb_drop": 0.0},
}
DECODER_TOP: LeafTable = {
    "clip_emb": "encoder.embedding.extras.0.proj",
    "text_feat_proj": "encoder.embedding.extras.1.proj",
    "text_seq_proj.0": "encoder.tokens.proj",
    "text_seq_proj.1": "encoder.tokens.norm",
    "clip_tok_proj": "encoder.tokens.image",
}
OF_UNET = ("time_embed.", "input_blocks.", "middle_block.", "output_blocks.", "out.", *map(str, DECODER_TOP))


def _decoder_settings(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of Karlo's decoder."""
    rest = of_script(given)
    rest = normalized(rest, rest.get("image_size"))
    width, text = shape_of(shapes, "text_seq_proj.0.weight", 2)
    found = shape_of(shapes, "input_blocks.0.0.weight", 4)[1]
    read = {
        **structure(shapes),
        **same_channels(rest, found, ((1, 0),)),
        "out_channels": shape_of(shapes, "out.2.weight", 4)[0],
        "clip_dim": shape_of(shapes, "clip_emb.weight", 2)[1],
        "clip_emb_mult": shape_of(shapes, "clip_tok_proj.weight", 2)[0] // width,
        "xf_width": width,
        "clip_xf_width": text,
    }
    return settled(agreed(rest, read), read, DECODER_FREE)


def _decoder_config(settings: Settings) -> UNetConfig:
    s: Any = settings
    config = unet_config(settings, attention_of(settings, "appended"))
    return replace(
        config,
        embedding=told_both(config.embedding, s["clip_dim"], s["clip_dim"]),
        tokens=TokensConfig(
            dim=s["clip_xf_width"],
            width=s["xf_width"],
            norm=True,
            image_tokens=s["clip_emb_mult"],
            image_dim=s["clip_dim"],
            masked=True,
        ),
    )


def _decoder_names(config: UNetConfig) -> KeyMap:
    return replace(unet_map(config, DECODER_TOP), ignored=("cf_param",))


def _decoder_published(config: UNetConfig, extra: Settings) -> Settings:
    tokens = config.tokens
    if tokens is None or not tokens.image_tokens:
        raise ValueError("Karlo's decoder reads image tokens and this U-Net does not; save a sfumato system")
    settings: dict[str, object] = {
        **DECODER_FREE,
        **extra,
        **told(config),
        "clip_dim": tokens.image_dim,
        "clip_emb_mult": tokens.image_tokens,
        "xf_width": tokens.width,
        "clip_xf_width": tokens.dim,
    }
    del settings["disable_self_attentions"]
    same(config, _decoder_config(settings), "Karlo")
    return settings


def _null(shapes: Shapes, given: Settings) -> Settings:
    return {"clip_dim": shape_of(shapes, "cf_param", 1)[0]}


def _null_config(settings: Settings) -> NullImageConfig:
    s: Any = settings
    return NullImageConfig(dim=s["clip_dim"])


NULL = Part(
    name="null_image",
    build=NullImage,
    settings=_null,
    config=_null_config,
    names=lambda config: KeyMap.of([("", "", {"cf_param": Leaf("vector", tensors=())})], OF_UNET),
    published=lambda config, extra: {"clip_dim": config.dim},
    prefix="model.",
)
DECODER = Part(
    name="net",
    build=UNet,
    settings=_decoder_settings,
    config=_decoder_config,
    names=_decoder_names,
    published=_decoder_published,
    prefix="model.",
)
_FILE: Settings = {"image_size": 64, "num_head_channels": 64, "dropout": 0.1, **COSINE}
LAYOUTS("karlo-decoder")(
    Layout(
        (DECODER, NULL),
        ("cf_param", "clip_tok_proj.weight", "input_blocks.0.0.weight"),
        files={f"decoder-{STEPS}": _FILE},
    )
)

PROJECTION: LeafTable = {
    "clip_image_embeddings_project_to_time_embeddings": "extras.0.proj",
    "embedding_proj": "extras.1.proj",
    "encoder_hidden_states_proj": "tokens.proj",
    "text_encoder_hidden_states_norm": "tokens.norm",
    "clip_extra_context_tokens_proj": "tokens.image",
    "learned_classifier_free_guidance_embeddings": Leaf("null.vector", tensors=()),
}


def _projection_settings(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of UnCLIPTextProjModel."""
    width, dim = shape_of(shapes, "encoder_hidden_states_proj.weight", 2)
    read = {
        "clip_embeddings_dim": dim,
        "time_embed_dim": shape_of(shapes, "embedding_proj.weight", 2)[0],
        "cross_attention_dim": width,
        "clip_extra_context_tokens": shape_of(shapes, "clip_extra_context_tokens_proj.weight", 2)[0] // width,
    }
    return settled(given, read, {})


def _projection_config(settings: Settings) -> ProjectionsConfig:
    s: Any = settings
    return ProjectionsConfig(
        dim=s["clip_embeddings_dim"],
        embed=s["time_embed_dim"],
        width=s["cross_attention_dim"],
        image_tokens=s["clip_extra_context_tokens"],
    )


_SIZES = ("clip_embeddings_dim", "time_embed_dim", "cross_attention_dim", "clip_extra_context_tokens")
LAYOUTS("karlo-text-proj-diffusers")(
    Layout(
        (
            Part(
                name="text_proj",
                build=Projections,
                settings=_projection_settings,
                config=_projection_config,
                names=lambda config: KeyMap.of([("", "", PROJECTION)]),
                published=lambda c, extra: dict(
                    zip(_SIZES, (c.dim, c.embed, c.width, c.image_tokens), strict=True)
                ),
                known=_SIZES,
            ),
        ),
        ("clip_extra_context_tokens_proj.weight",),
        "UnCLIPTextProjModel",
    )
)

# Super-resolution: one net for all steps but the last, one for the last.

_ARGUMENTS = (
    "in_channels model_channels out_channels num_res_blocks channel_mult attention_resolutions "
    "use_scale_shift_norm resblock_updown"
)
SR_FREE: Settings = {**FREE, **DIFFUSION, "use_middle_attention": False}


def _sr_settings(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of Karlo's SuperResUNetModel."""
    rest = of_script(given)
    rest = normalized(rest, rest.get("image_size"))
    found = shape_of(shapes, "input_blocks.0.0.weight", 4)[1]
    read = {
        **structure(shapes),
        **same_channels(rest, found, ((1, 0), (2, 0))),
        "out_channels": shape_of(shapes, "out.2.weight", 4)[0],
    }
    settings = settled(agreed(rest, read), read, SR_FREE)
    if settings["use_middle_attention"] or settings["attention_resolutions"]:
        raise ValueError("Karlo's super-resolution with attention is not supported; allowed: without")
    return settings


def _sr_config(settings: Settings) -> UNetConfig:
    return replace(unet_config(settings, attention_of({**settings, "num_heads": 1})), middle=None)


def _sr_published(config: UNetConfig, extra: Settings) -> Settings:
    settings: dict[str, object] = {**SR_FREE, **extra, **told(config)}
    del settings["disable_self_attentions"]
    same(config, _sr_config(settings), "Karlo")
    return settings


LAYOUTS("karlo-sr")(
    Layout(
        tuple(
            Part(
                name=name,
                build=UNet,
                settings=_sr_settings,
                config=_sr_config,
                names=lambda config: unet_map(config, {}),
                published=_sr_published,
                prefix="model_first_steps." if name == "net" else "model_last_step.",
                known=(*SR_FREE, *_ARGUMENTS.split()),
            )
            for name in ("net", "last_step")
        ),
        ("model_first_steps.input_blocks.0.0.weight", "model_last_step.input_blocks.0.0.weight"),
        files={"improved-sr-ckpt-step=1.2M": {"image_size": 256, **COSINE}},
    )
)
_HUB_UNET = Part(
    name="net",
    build=UNet,
    settings=residual.settings_of,
    config=residual.config_of,
    names=residual.rows,
    published=residual.published,
    known=residual.KNOWN,
)
_RESIDUAL = ("down_blocks.0.downsamplers.0.conv1.weight", "mid_block.resnets.1.conv1.weight")
LAYOUTS("karlo-decoder-diffusers")(
    Layout(
        (_HUB_UNET,),
        (*_RESIDUAL, "mid_block.attentions.0.add_k_proj.weight"),
        "UNet2DConditionModel",
        absent=("encoder_hid_proj.", "add_embedding."),
    )
)
LAYOUTS("karlo-sr-diffusers")(
    Layout((_HUB_UNET,), _RESIDUAL, "UNet2DModel", absent=("mid_block.attentions.",))
)
