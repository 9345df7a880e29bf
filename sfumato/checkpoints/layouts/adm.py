"""guided-diffusion and improved-diffusion: their U-Nets, and the classifiers of noisy pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from sfumato.checkpoints.keymap import TRANSPOSED, KeyMap, Leaf, LeafTable, squeezed
from sfumato.checkpoints.layouts.blocks import (
    agreed,
    attention_of,
    encoder_rows,
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
from sfumato.nets.classifier import NoisyClassifier, NoisyClassifierConfig
from sfumato.nets.embedding import EmbedderConfig, Feature
from sfumato.nets.unet import UNet, UNetConfig

__all__ = ["ABSENT", "DIFFUSION", "FREE", "of_script", "same_channels"]

ABSENT = ("transformer.", "encoder_pooling.", "clip_emb.")
"""Prefixes of names in files of other families that have these blocks."""
FREE: Settings = {
    "image_size": None,
    "small_size": None,
    "dropout": 0.0,
    "num_heads": None,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_new_attention_order": False,
    "conv_resample": True,
    "dims": 2,
    "use_checkpoint": False,
    "use_fp16": False,
}
"""Of the reference's constructor, and not in the tensors; None = it must be given, if it is needed."""
DIFFUSION: Settings = {
    "diffusion_steps": 1000,
    "noise_schedule": None,
    "timestep_respacing": "",
    "use_kl": False,
    "predict_xstart": False,
    "rescale_timesteps": False,
    "rescale_learned_sigmas": False,
    "sigma_small": False,
    "clip_denoised": True,
    "use_ddim": False,
}
"""The reference's flags of its diffusion and sampling, that a system needs and a net does not."""

_ADM: Settings = {
    "num_head_channels": 64,
    "noise_schedule": "linear",
    "diffusion_steps": 1000,
    "timestep_respacing": "250",
}
_HEADS_4: Settings = {**_ADM, "num_heads": 4, "num_head_channels": -1}
_LSUN: Settings = {**_ADM, "image_size": 256, "dropout": 0.1}
_IDDPM: Settings = {
    "num_heads": 4,
    "diffusion_steps": 4000,
    "noise_schedule": "cosine",
    "rescale_timesteps": True,
}
FILES: Mapping[str, Settings] = {
    "64x64_diffusion": {
        **_ADM,
        "image_size": 64,
        "dropout": 0.1,
        "use_new_attention_order": True,
        "noise_schedule": "cosine",
    },
    "128x128_diffusion": {**_HEADS_4, "image_size": 128},
    "256x256_diffusion": {**_ADM, "image_size": 256},
    "256x256_diffusion_uncond": {**_ADM, "image_size": 256},
    "512x512_diffusion": {**_ADM, "image_size": 512},
    "64_256_upsampler": {**_HEADS_4, "image_size": 256, "small_size": 64},
    "128_512_upsampler": {**_ADM, "image_size": 512, "small_size": 128},
    "lsun_bedroom": _LSUN,
    "lsun_cat": _LSUN,
    "lsun_horse": _LSUN,
    "lsun_horse_nodropout": {**_LSUN, "dropout": 0.0},
    "cifar10_uncond_50M_500K": {**_IDDPM, "image_size": 32, "dropout": 0.3},
    "cifar10_uncond_vlb_50M_500K": {**_IDDPM, "image_size": 32, "dropout": 0.3},
    "imagenet64_uncond_100M_1500K": {**_IDDPM, "image_size": 64},
    "imagenet64_uncond_vlb_100M_1500K": {**_IDDPM, "image_size": 64},
    "imagenet64_cond_270M_250K": {**_IDDPM, "image_size": 64, "rescale_timesteps": False},
    "upsample_cond_500K": {
        **_IDDPM,
        "image_size": 256,
        "small_size": 64,
        "noise_schedule": "linear",
        "rescale_timesteps": False,
    },
    **{
        f"lsun_uncond_100M_{name}": {
            "num_heads": 1,
            "image_size": 256,
            "diffusion_steps": 1000,
            "noise_schedule": "linear",
            "rescale_timesteps": False,
        }
        for name in ("1200K_bs128", "2400K_bs64")
    },
}
"""Published file -> what its tensors do not tell, from the papers and the references' command lines."""


def of_script(given: Settings) -> dict[str, object]:
    """Settings of the constructor, some of which the reference's scripts call otherwise."""
    rest = dict(given)
    for theirs, ours in (("num_channels", "model_channels"), ("large_size", "image_size")):
        if theirs in rest:
            rest.setdefault(ours, rest.pop(theirs))
    return rest


def same_channels(given: Settings, found: int, allowed: tuple[tuple[int, int], ...]) -> dict[str, int]:
    """in_channels as it is given: classes that concatenate pictures take their number before that.

    Args:
        found: channels in the file.
        allowed: (factor, addend) from those that are given to those in the file.
    """
    told = given.get("in_channels", found)
    fits = isinstance(told, int) and any(told * factor + more == found for factor, more in allowed)
    return {"in_channels": told if fits and isinstance(told, int) else found, "effective_in_channels": found}


def _settings(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of UNetModel or SuperResModel, with those of the scripts for its diffusion."""
    rest = of_script(given)
    rest = normalized(rest, rest.get("image_size"))
    channels = shape_of(shapes, "input_blocks.0.0.weight", 4)[1]
    outputs = shape_of(shapes, "out.2.weight", 4)[0]
    rows = shape_of(shapes, "label_emb.weight", 2)[0] if "label_emb.weight" in shapes else None
    read = {
        **structure(shapes),
        **same_channels(rest, channels, ((1, 0), (2, 0))),
        "out_channels": outputs,
        "num_classes": rows,
    }
    for name, value in (("class_cond", rows is not None), ("learn_sigma", outputs == 6)):
        if name in rest:
            read[name] = value
    return settled(agreed(rest, read), read, {**FREE, **DIFFUSION})


def _config(settings: Settings) -> UNetConfig:
    config = unet_config(settings, attention_of(settings))
    rows: Any = settings["num_classes"]
    if rows is None:
        return config
    labels = EmbedderConfig(kind="table", features=(Feature(field="label", dim=rows),))
    return replace(config, embedding=replace(config.embedding, extras=(labels,)))


def _names(config: UNetConfig, *, new_order: bool = False) -> KeyMap:
    label: LeafTable = {"label_emb": Leaf("encoder.embedding.extras.0.table", tensors=("weight",))}
    return unet_map(config, label if config.embedding.extras else {}, new_order=new_order)


def _published(config: UNetConfig, extra: Settings) -> Settings:
    labels = config.embedding.extras
    rows = labels[0].features[0].dim if labels else None
    settings: dict[str, object] = {**FREE, **DIFFUSION, **extra, **told(config), "num_classes": rows}
    del settings["disable_self_attentions"]
    same(config, _config(settings), "guided-diffusion")
    return settings


_ARGUMENTS = (
    "in_channels model_channels out_channels num_res_blocks channel_mult attention_resolutions num_classes "
    "use_scale_shift_norm resblock_updown"
)
UNET = Part(
    name="net",
    build=UNet,
    settings=_settings,
    config=_config,
    names=_names,
    published=_published,
    known=(*_ARGUMENTS.split(), *FREE, *DIFFUSION),
    renumbered=lambda config, s: _names(config, new_order=bool(s["use_new_attention_order"])),
)
_MARKS = ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.1.qkv.weight")
LAYOUTS("adm")(Layout((UNET,), (*_MARKS, "output_blocks.0.0.in_layers.2.weight"), absent=ABSENT, files=FILES))


# Classifiers

CLASSIFIERS: Mapping[str, Settings] = {
    f"{size}x{size}_classifier": {
        "image_size": size,
        "num_head_channels": 64,
        "num_res_blocks": 4 if size == 64 else 2,
        "noise_schedule": "cosine" if size == 64 else "linear",
    }
    for size in (64, 128, 256, 512)
}
"""Published file -> what its tensors do not tell."""
_SCRIPT = {
    "classifier_width": "model_channels",
    "classifier_depth": "num_res_blocks",
    "classifier_attention_resolutions": "attention_resolutions",
    "classifier_use_scale_shift_norm": "use_scale_shift_norm",
    "classifier_resblock_updown": "resblock_updown",
    "classifier_pool": "pool",
    "classifier_use_fp16": "use_fp16",
}


def _classifier_settings(shapes: Shapes, given: Settings) -> Settings:
    """Arguments of EncoderUNetModel, or of the scripts' create_classifier."""
    rest = of_script({_SCRIPT.get(name, name): value for name, value in given.items()})
    pool = _pool(shapes)
    positions = shapes.get("out.2.positional_embedding")
    blocks = _blocks(shapes, rest.get("num_res_blocks"))
    read = {**structure(shapes, blocks), "pool": pool}
    mults: Any = read["channel_mult"]
    if positions is not None:
        read["image_size"] = math.isqrt(positions[1] - 1) << (len(mults) - 1)
    channels = shape_of(shapes, "input_blocks.0.0.weight", 4)[1]
    last = {"adaptive": "out.3", "attention": "out.2.c_proj", "spatial": "out.2", "spatial_v2": "out.3"}
    read |= {"effective_in_channels": channels, "in_channels": channels}
    read |= {"out_channels": shapes[f"{last[pool]}.weight"][0]}
    rest = normalized(rest, read.get("image_size", rest.get("image_size")))
    return settled(agreed(rest, read), read, {**FREE, **DIFFUSION})


def _pool(shapes: Shapes) -> str:
    if "out.2.positional_embedding" in shapes:
        return "attention"
    if len(shapes.get("out.0.weight", ())) == 2:
        return "spatial" if "out.2.weight" in shapes else "spatial_v2"
    return "adaptive"


def _blocks(shapes: Shapes, given: object) -> list[int]:
    """Residual blocks of every level, as given or as the only number that fits the widths.

    Raises: ValueError if several fit, or none.
    """
    total = indices(shapes, "input_blocks")
    fitting = [n for n in range(1, total) if total % (n + 1) == 0 and _fits(shapes, n, total // (n + 1))]
    if isinstance(given, int) and given in fitting:
        fitting = [given]
    if len(fitting) != 1:
        allowed = ", ".join(map(str, fitting)) or "none"
        raise ValueError(
            f"its {total} input_blocks fit num_res_blocks (classifier_depth) {allowed}, not {given}: give "
            "one of them in the config"
        )
    return fitting * (total // (fitting[0] + 1))


def _fits(shapes: Shapes, n: int, levels: int) -> bool:
    """Whether widths and attention change at the borders of levels of n blocks alone."""
    for i in range(1, levels * (n + 1)):
        place, start = i % (n + 1), f"input_blocks.{i}"
        attended = f"{start}.1.qkv.weight" in shapes
        first = f"input_blocks.{i - place + 1}.1.qkv.weight" in shapes
        wider, strided = f"{start}.0.skip_connection.weight" in shapes, f"{start}.0.op.weight" in shapes
        if (place == 0 and (wider or attended)) or (place != 0 and (strided or attended != first)):
            return False
        if place > 1 and wider:
            return False
    return True


def _classifier_config(settings: Settings) -> NoisyClassifierConfig:
    s: Any = settings
    return NoisyClassifierConfig(
        encoder=unet_config(settings, attention_of(settings)),
        num_classes=s["out_channels"],
        pool=s["pool"],
        size=s["image_size"] or NoisyClassifierConfig.size,
        head_dim=s["num_head_channels"] if s["pool"] == "attention" else NoisyClassifierConfig.head_dim,
    )


def _classifier_names(config: NoisyClassifierConfig, *, new_order: bool = False) -> KeyMap:
    with torch.device("meta"):
        net = NoisyClassifier(config)
    flat = squeezed(2)
    heads: dict[str, LeafTable] = {
        "adaptive": {"out.0": "norm", "out.3": Leaf("head", squeezed(2, 3))},
        "attention": {
            "out.0": "norm",
            "out.2.positional_embedding": Leaf("head.positions", TRANSPOSED, ()),
            "out.2.qkv_proj": Leaf("head.qkv", flat),
            "out.2.c_proj": Leaf("head.out", flat),
        },
        "spatial": {"out.0": "up", "out.2": "head"},
        "spatial_v2": {"out.0": "up", "out.1": "norm", "out.3": "head"},
    }
    rows = encoder_rows(net.encoder, "encoder", new_order=new_order)
    return KeyMap.of([("", "", heads[config.pool]), *rows])


def _classifier_published(config: NoisyClassifierConfig, extra: Settings) -> Settings:
    settings: dict[str, object] = {
        **FREE,
        **DIFFUSION,
        **extra,
        **told(config.encoder),
        "out_channels": config.num_classes,
        "pool": config.pool,
        "image_size": config.size,
    }
    del settings["disable_self_attentions"]
    again = replace(_classifier_config(settings).encoder, out_channels=config.encoder.out_channels)
    same(config.encoder, again, "guided-diffusion")
    return settings


CLASSIFIER = Part(
    name="classifier",
    build=NoisyClassifier,
    settings=_classifier_settings,
    config=_classifier_config,
    names=_classifier_names,
    published=_classifier_published,
    known=(*UNET.known, "pool"),
    renumbered=lambda config, s: _classifier_names(config, new_order=bool(s["use_new_attention_order"])),
)
LAYOUTS("adm-classifier")(
    Layout((CLASSIFIER,), _MARKS, absent=(*ABSENT, "output_blocks."), files=CLASSIFIERS)
)
