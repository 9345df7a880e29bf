"""What a file of weights looks like, by the names in it, and what would load it: for errors."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["looks_like"]

NOT_READ = "sfumato does not read these"
# Kind -> a name in it, what would load it; the first that fits is meant.
KINDS = {
    "a LoHa or LoKr adapter": (r"\.(hada_w1|lokr_w1)", NOT_READ),
    "a DoRA or other adapter of more than pairs": (r"dora_scale|lora_magnitude|lora_mid|\.diff", NOT_READ),
    "a LoRA": (
        r"\.lora_([AB]|down|up)\.|\.lora(_linear_layer)?\.(down|up)\.|_lora\.(down|up)\.",
        "give it as adapter (--adapter) with a system of its base",
    ),
    "an embedding of learned words": (
        r"^(string_to_param|emb_params|clip_[lg])$",
        "add it with systems.words.taught (--words) to a system of its base",
    ),
    "a ControlNet": (
        r"^controlnet_|^(control_model\.)?(zero_convs|input_hint_block)\.",
        "add it with systems.adapting.controlled (--control) to a system of its base",
    ),
    "a T2I-Adapter": (
        r"^(adapter\.)?body\.\d+\.(resnets|block1|in_conv)",
        "add it with systems.adapting.controlled (--control) to a system of its base",
    ),
    "Stable Diffusion 3": (r"joint_blocks\.|transformer_blocks\.\d+\.norm1_context", NOT_READ),
    "Flux": (r"double_blocks\.|single_transformer_blocks\.", NOT_READ),
    "an enlarger of pictures": (r"rdb1\.conv1|RRDB_trunk", NOT_READ),
    "a first stage": (
        r"(^|\.)(encoder\.down|decoder\.up)(_blocks)?\.\d",
        "give it as vae with a system's file, or to load_nets with its layout",
    ),
    "a text tower": (r"text_model\.|resblocks\.", "give the whole pipeline, or a layout to load_nets"),
}


def looks_like(names: Mapping[str, object]) -> str:
    """One sentence about a file with these names; "" if they say nothing.

    Args:
        names: name -> tensor, or what else is under that name.
    """
    for kind, (pattern, loader) in KINDS.items():
        if any(re.search(pattern, name) for name in names):
            return f"it looks like {kind}: {loader}"
    one = len(names) == 1 and getattr(next(iter(names.values())), "ndim", 3) <= 2
    return looks_like({"emb_params": None}) if one else ""  # a learned word's own name says nothing
