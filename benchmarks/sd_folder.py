"""Pipeline folders of Stable Diffusion with random weights at the published shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import pre_tokenizers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

__all__ = ["SIZES", "write"]

Options = dict[str, Any]
KINDS = ("DownBlock2D", "CrossAttnDownBlock2D")
SCHEDULER: Options = {
    **{"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    **{"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False},
}


def _blocks(*attention: bool) -> Options:
    down = [KINDS[a] for a in attention]
    return {
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
    }


def _tower(width: int, depth: int, act: str = "quick_gelu") -> Options:
    return {
        **{"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth},
        **{"num_attention_heads": max(width // 64, 1), "hidden_act": act, "projection_dim": width},
    }


SIZES: dict[str, Options] = {
    "sd15": {
        "side": 64,
        "unet": {"cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": (128, 256, 512, 512),
        "towers": [_tower(768, 12)],
    },
    "sdxl": {
        "side": 128,
        "unet": {
            **_blocks(False, True, True),
            "block_out_channels": (320, 640, 1280),
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "vae": (128, 256, 512, 512),
        "towers": [_tower(768, 12), _tower(1280, 32, "gelu")],
    },
    "tiny": {
        "side": 8,
        "unet": {
            **_blocks(True, False),
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "cross_attention_dim": 64,
            "attention_head_dim": 4,
        },
        "vae": (32, 64),
        "towers": [_tower(64, 2)],
    },
}


def write(size: str, path: Path) -> None:
    """Write the folder of a size, unless it is there; SDXL takes 14 GB, the others less."""
    if (path / "model_index.json").is_file():
        return
    torch.manual_seed(0)
    options = SIZES[size]
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=options["side"], **options["unet"])
        widths = options["vae"]
        vae = AutoencoderKL(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            layers_per_block=2,
            latent_channels=4,
            scaling_factor=0.13025 if len(options["towers"]) > 1 else 0.18215,
        )
    towers = [
        (CLIPTextModelWithProjection if i else CLIPTextModel)(CLIPTextConfig(**tower))
        for i, tower in enumerate(options["towers"])
    ]
    parts: Options = {"unet": _filled(unet), "vae": _filled(vae), "scheduler": DDIMScheduler(**SCHEDULER)}
    for i, tower in enumerate(towers):
        ending = f"_{i + 1}" if i else ""
        parts |= {f"text_encoder{ending}": _filled(tower), f"tokenizer{ending}": _words(path.parent)}
    if len(towers) > 1:
        StableDiffusionXLPipeline(**parts, add_watermarker=False).save_pretrained(path)
        return
    none = {"safety_checker": None, "feature_extractor": None}
    StableDiffusionPipeline(**parts, **none, requires_safety_checker=False).save_pretrained(path)


def _filled(net: nn.Module) -> nn.Module:
    """Random weights with which outputs are of order 1."""
    if any(p.is_meta for p in net.parameters()):
        net = net.to_empty(device="cpu")
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.7 * p[0].numel() ** -0.5)
        else:
            nn.init.normal_(p, mean=1.0, std=0.1)
    return net.eval()


def _words(folder: Path) -> CLIPTokenizer:
    """A vocabulary of bytes under CLIP's rules: the published one is not ours to ship."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    files = folder / "vocab.json", folder / "merges.txt"
    files[0].write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    files[1].write_text("#version: 0.2\n", "utf-8")
    return CLIPTokenizer(str(files[0]), str(files[1]), pad_token="<|endoftext|>", model_max_length=77)
