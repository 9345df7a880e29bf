"""Published weights of CLIP: the names of OpenAI and OpenCLIP, and those of the model hub.

Shapes say all of a tower but its heads and its GELU. Those are read from a JSON file beside the weights,
`config.json` of the model hub or `open_clip_config.json`; OpenAI's own files have them by rule.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from sfumato.checkpoints.files import read_tensors, write_safetensors
from sfumato.checkpoints.keymap import SAME, TRANSPOSED, KeyMap, Leaf, LeafTable, Row, stacked
from sfumato.checkpoints.weights import assign, parameter_free
from sfumato.nets.clip import CLIP, Activation, CLIPConfig, CLIPTextConfig, CLIPVisionConfig

__all__ = [
    "hub_map",
    "hub_text_map",
    "hub_vision_map",
    "open_map",
    "open_text_map",
    "open_vision_map",
    "read_clip",
    "write_clip",
]

# Of the file but not of the net: row numbers, and what OpenAI's archives say of their shapes.
IGNORED = (
    *("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids"),
    *("input_resolution", "context_length", "vocab_size"),
)
HUB_BLOCK: LeafTable = {
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): Leaf("attention.qkv", stacked(3)),
    **{"self_attn.out_proj": "attention.out", "layer_norm1": "norm1", "layer_norm2": "norm2"},
    **{"mlp.fc1": "mlp.up", "mlp.fc2": "mlp.down"},
}
HUB_TEXT: LeafTable = {
    "embeddings.token_embedding.weight": Leaf("tokens.weight", tensors=()),
    "embeddings.position_embedding.weight": Leaf("positions", tensors=()),
    "final_layer_norm": "norm",
}
HUB_VISION: LeafTable = {
    "embeddings.class_embedding": Leaf("cls", tensors=()),
    "embeddings.patch_embedding.weight": Leaf("patches.weight", tensors=()),
    "embeddings.position_embedding.weight": Leaf("positions", tensors=()),
    "pre_layrnorm": "norm_in",  # spelled so
    "post_layernorm": "norm",
}
OPEN_BLOCK: LeafTable = {
    **{f"attn.in_proj_{name}": Leaf(f"attention.qkv.{name}", tensors=()) for name in ("weight", "bias")},
    **{"attn.out_proj": "attention.out", "ln_1": "norm1", "ln_2": "norm2"},
    **{"mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"},
}
OPEN_TEXT: LeafTable = {
    "token_embedding.weight": Leaf("tokens.weight", tensors=()),
    "positional_embedding": Leaf("positions", tensors=()),
    "ln_final": "norm",
}
OPEN_VISION: LeafTable = {
    "class_embedding": Leaf("cls", tensors=()),
    "conv1.weight": Leaf("patches.weight", tensors=()),
    "positional_embedding": Leaf("positions", tensors=()),
    "ln_pre": "norm_in",
    "ln_post": "norm",
}


def hub_text_map(config: CLIPTextConfig) -> KeyMap:
    """Names of a text tower on the model hub, to those of CLIPText."""
    blocks = [(f"encoder.layers.{i}", f"blocks.{i}", HUB_BLOCK) for i in range(config.depth)]
    tower = KeyMap.of([("", "", HUB_TEXT), *blocks]).under("text_model")
    return tower + _projection("text_projection.weight", config.embed)


def open_text_map(config: CLIPTextConfig) -> KeyMap:
    """Names of the text tower in files of OpenAI and OpenCLIP, to those of CLIPText."""
    blocks = [(f"transformer.resblocks.{i}", f"blocks.{i}", OPEN_BLOCK) for i in range(config.depth)]
    return KeyMap.of([("", "", OPEN_TEXT), *blocks]) + _projection("text_projection", config.embed)


def hub_vision_map(config: CLIPVisionConfig) -> KeyMap:
    """Names of a vision tower on the model hub, to those of CLIPVision."""
    blocks = [(f"encoder.layers.{i}", f"blocks.{i}", HUB_BLOCK) for i in range(config.depth)]
    tower = KeyMap.of([("", "", HUB_VISION), *blocks]).under("vision_model")
    return tower + _projection("visual_projection.weight", config.embed)


def hub_map(config: CLIPConfig) -> KeyMap:
    """Names of the model hub."""
    return _both(hub_text_map(config.text), hub_vision_map(config.vision))


def open_map(config: CLIPConfig) -> KeyMap:
    """Names of OpenAI and OpenCLIP."""
    return _both(open_text_map(config.text), open_vision_map(config.vision).under("visual"))


def open_vision_map(config: CLIPVisionConfig) -> KeyMap:
    """Names of the vision tower in files of OpenAI and OpenCLIP, without "visual", to those of CLIPVision."""
    blocks = [(f"transformer.resblocks.{i}", f"blocks.{i}", OPEN_BLOCK) for i in range(config.depth)]
    return KeyMap.of([("", "", OPEN_VISION), *blocks]) + _projection("proj", config.embed)


def read_clip(path: Path) -> CLIP:
    """The network of a weights file that has its JSON beside it.

    Raises: ValueError in one line with the file and what is wrong in it.
    """
    tensors = read_tensors(path)
    state = {name: v for name, v in tensors.items() if name not in IGNORED}
    hub = "text_model.embeddings.token_embedding.weight" in state
    if not hub and "token_embedding.weight" not in state:
        raise ValueError(f"{path} is no CLIP: it has no tensor 'token_embedding.weight'")
    said = _by_rule(state) if "input_resolution" in tensors else _said(path)
    try:
        config = CLIPConfig(vision=_vision(state, hub, said), text=_text(state, hub, said))
    except (KeyError, IndexError) as error:
        raise ValueError(f"{path} is no CLIP with a vision transformer: {error} is not as expected") from None
    net = parameter_free(CLIP, config)
    names = hub_map(config) if hub else open_map(config)
    assign(net, names.load(state, where=str(path)), where=str(path))
    return net.eval()


def write_clip(net: CLIP, folder: Path, layout: Literal["hub", "open"]) -> None:
    """Weights and their JSON as `read_clip` takes them: for transformers, or for OpenCLIP."""
    v, t = net.config.vision, net.config.text
    names = hub_map(net.config) if layout == "hub" else open_map(net.config)
    folder.mkdir(parents=True, exist_ok=True)
    stem, config = ("model", "config") if layout == "hub" else ("open_clip_model", "open_clip_config")
    write_safetensors(folder / f"{stem}.safetensors", names.save(net.state_dict(), where="CLIP"))
    if layout == "hub":
        gelu = {ours: theirs for theirs, ours in GELUS.items()}
        sizes: dict[str, dict[str, Any]] = {
            f"{name}_config": {
                "hidden_size": c.width,
                "num_hidden_layers": c.depth,
                "num_attention_heads": c.heads,
                "intermediate_size": c.hidden,
                "projection_dim": c.embed,
                "hidden_act": gelu[c.activation],
            }
            for name, c in (("text", t), ("vision", v))
        }
        # 2 means the highest id; another number is that of the end token.
        sizes["text_config"] |= {
            "vocab_size": t.vocab,
            "max_position_embeddings": t.context,
            "eos_token_id": 2,
        }
        sizes["vision_config"] |= {"image_size": v.side, "patch_size": v.patch}
        told = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": v.embed, **sizes}
    else:
        vision: dict[str, float] = {
            "image_size": v.side,
            "patch_size": v.patch,
            "width": v.width,
            "layers": v.depth,
        }
        text = {"context_length": t.context, "vocab_size": t.vocab, "width": t.width, "layers": t.depth}
        vision |= {"head_width": v.width // v.heads, "mlp_ratio": v.hidden / v.width}
        cfg = {"embed_dim": v.embed, "vision_cfg": vision, "text_cfg": {**text, "heads": t.heads}}
        told = {"model_cfg": {**cfg, "quick_gelu": v.activation == "quick"}}
    (folder / f"{config}.json").write_text(json.dumps(told, indent=2) + "\n", "utf-8")


class Said(NamedTuple):
    """What the JSON file says of both towers."""

    vision_heads: int
    text_heads: int
    activation: Activation


def _by_rule(state: Mapping[str, Tensor]) -> Said:
    """Of OpenAI's files, which have heads of 64 channels."""
    widths = (state[name].shape[1] for name in ("visual.positional_embedding", "positional_embedding"))
    vision, text = (max(width // 64, 1) for width in widths)
    return Said(vision, text, "quick")


def _said(path: Path) -> Said:
    """Of the JSON beside the weights. Raises: ValueError in one line if there is none, or it is no CLIP's."""
    for name in ("config.json", "open_clip_config.json"):
        file = path.parent / name
        if not file.is_file():
            continue
        try:
            data = json.loads(file.read_text("utf-8"))
            if "model_cfg" in data:
                model = data["model_cfg"]
                vision, text = model["vision_cfg"], model["text_cfg"]
                heads = int(vision["width"]) // int(vision.get("head_width", 64))
                return Said(heads, int(text["heads"]), "quick" if model.get("quick_gelu") else "none")
            vision, text = ({"num_attention_heads": n, **data.get(f"{t}_config", {})} for t, n in TOWERS)
            gelu = GELUS[vision.get("hidden_act", "quick_gelu")]
            return Said(int(vision["num_attention_heads"]), int(text["num_attention_heads"]), gelu)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not the configuration of a CLIP ({error!r})") from None
    raise ValueError(
        f"{path}: there is no config.json or open_clip_config.json beside it, and the weights alone do not "
        "tell heads and GELU; keep the file in its folder"
    )


TOWERS = (("vision", 12), ("text", 8))  # heads where config.json leaves them out
GELUS: dict[str, Activation] = {"quick_gelu": "quick", "gelu": "none"}


def _vision(state: Mapping[str, Tensor], hub: bool, said: Said) -> CLIPVisionConfig:
    first = "vision_model." if hub else "visual."
    patches = state[f"{first}{'embeddings.patch_embedding' if hub else 'conv1'}.weight"].shape
    places = state[
        f"{first}{'embeddings.position_embedding.weight' if hub else 'positional_embedding'}"
    ].shape
    projection = state.get("visual_projection.weight" if hub else "visual.proj")
    return CLIPVisionConfig(
        side=round((places[0] - 1) ** 0.5) * patches[-1],
        patch=patches[-1],
        width=patches[0],
        depth=_depth(state, first),
        heads=said.vision_heads,
        hidden=_hidden(state, first, hub),
        embed=_embed(projection, hub),
        activation=said.activation,
    )


def _text(state: Mapping[str, Tensor], hub: bool, said: Said) -> CLIPTextConfig:
    first = "text_model." if hub else ""
    tokens = state[f"{first}{'embeddings.' if hub else ''}token_embedding.weight"].shape
    places = state[
        f"{first}{'embeddings.position_embedding.weight' if hub else 'positional_embedding'}"
    ].shape
    return CLIPTextConfig(
        vocab=tokens[0],
        context=places[0],
        width=tokens[1],
        depth=_depth(state, first),
        heads=said.text_heads,
        hidden=_hidden(state, first, hub),
        embed=_embed(state.get("text_projection.weight" if hub else "text_projection"), hub),
        activation=said.activation,
    )


def _depth(state: Mapping[str, Tensor], first: str) -> int:
    """Blocks below a prefix; at least one."""
    within = f"{first}encoder.layers." if first.endswith("model.") else f"{first}transformer.resblocks."
    return 1 + max((int(n[len(within) :].split(".")[0]) for n in state if n.startswith(within)), default=0)


def _hidden(state: Mapping[str, Tensor], first: str, hub: bool) -> int:
    return state[
        f"{first}{'encoder.layers.0.mlp.fc1' if hub else 'transformer.resblocks.0.mlp.c_fc'}.bias"
    ].shape[0]


def _embed(projection: Tensor | None, hub: bool) -> int:
    return 0 if projection is None else projection.shape[0 if hub else 1]


def _projection(name: str, embed: int) -> KeyMap:
    """Into the shared space; the model hub has a layer's weight, the others a matrix (in, out)."""
    op = SAME if name.endswith(".weight") else TRANSPOSED
    return KeyMap((Row((name,), ("projection.weight",), op),) if embed else ())


def _both(text: KeyMap, vision: KeyMap) -> KeyMap:
    return (
        text.under("", "text")
        + vision.under("", "vision")
        + KeyMap((Row(("logit_scale",), ("logit_scale",)),))
    )
