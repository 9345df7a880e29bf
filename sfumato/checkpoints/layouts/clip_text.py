"""Text towers in folders of transformers: CLIPTextModel, and with a projection."""

from __future__ import annotations

from sfumato.checkpoints.keymap import KeyMap
from sfumato.checkpoints.layouts.clip import GELUS, IGNORED, hub_text_map
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
from sfumato.nets.clip import CLIPText, CLIPTextConfig

__all__: list[str] = []  # everything is reached through LAYOUTS

PLAIN, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
FREE: dict[str, object] = {
    "num_attention_heads": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 512,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}
"""Settings of a tower that its tensors do not tell."""
READ = ("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size", "num_hidden_layers")
# Old files have the prefix, those of newer releases lack it: off and on again.
PREFIX = (
    ("text_model.", ""),
    *((n, f"text_model.{n}") for n in ("embeddings.", "encoder.", "final_layer_norm.")),
)


def _settings(shapes: Shapes, given: Settings) -> Settings:
    tower = "text_model."
    vocab, width = shape_of(shapes, f"{tower}embeddings.token_embedding.weight", 2)
    read: dict[str, object] = {
        "vocab_size": vocab,
        "max_position_embeddings": shape_of(shapes, f"{tower}embeddings.position_embedding.weight", 2)[0],
        "hidden_size": width,
        "intermediate_size": shape_of(shapes, f"{tower}encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": indices(shapes, f"{tower}encoder.layers"),
    }
    projection = shapes.get("text_projection.weight")
    if projection is not None:
        read["projection_dim"] = projection[0]
    free = {name: value for name, value in FREE.items() if name not in read}
    found = settled(given, read, free)
    if found["hidden_act"] not in GELUS:
        raise ValueError(f"hidden_act {found['hidden_act']} is unknown; allowed: {', '.join(GELUS)}")
    if found["layer_norm_eps"] != FREE["layer_norm_eps"]:
        raise ValueError(f"layer_norm_eps {found['layer_norm_eps']} is not supported; allowed: 1e-5")
    return {**found, "projection": projection is not None}


def _config(settings: Settings) -> CLIPTextConfig:
    def number(name: str) -> int:
        value = settings[name]
        assert isinstance(value, int)
        return value

    return CLIPTextConfig(
        vocab=number("vocab_size"),
        context=number("max_position_embeddings"),
        width=number("hidden_size"),
        depth=number("num_hidden_layers"),
        heads=number("num_attention_heads"),
        hidden=number("intermediate_size"),
        embed=number("projection_dim") if settings["projection"] else 0,
        activation=GELUS[str(settings["hidden_act"])],
    )


def _published(c: CLIPTextConfig, extra: Settings) -> dict[str, object]:
    if c.end is not None:
        raise ValueError("this text tower was taught words, which a CLIPTextModel has not: save its base")
    acts = {ours: theirs for theirs, ours in GELUS.items()}
    return {
        "model_type": "clip_text_model",
        **FREE,
        **{name: extra[name] for name in FREE if name in extra},
        "vocab_size": c.vocab,
        "max_position_embeddings": c.context,
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "intermediate_size": c.hidden,
        "projection_dim": c.embed or c.width,
        "hidden_act": acts[c.activation],
        # The highest ids of the vocabulary, in this order, whatever its size.
        "bos_token_id": c.vocab - 2,
        "eos_token_id": c.vocab - 1,
    }


def _names(config: CLIPTextConfig) -> KeyMap:
    return hub_text_map(config) + KeyMap((), IGNORED)


PART = Part(
    name="text_encoder",
    build=CLIPText,
    settings=_settings,
    config=_config,
    names=_names,
    published=_published,
    aliases=PREFIX,
    known=(*FREE, *READ),
)
MARKS = ("text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight")
LAYOUTS("clip-text-projected")(Layout((PART,), (*MARKS, "text_projection.weight"), PROJECTED, "transformers"))
LAYOUTS("clip-text")(Layout((PART,), MARKS, PLAIN, "transformers"))
