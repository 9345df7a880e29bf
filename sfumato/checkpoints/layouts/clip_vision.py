"""Vision towers in folders of transformers, and the moments of embeddings beside one in Stable unCLIP."""

from __future__ import annotations

from sfumato.checkpoints.keymap import KeyMap, Row
from sfumato.checkpoints.layouts.clip import GELUS, IGNORED, hub_vision_map
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
from sfumato.nets.clip import CLIPVision, CLIPVisionConfig, EmbeddingMoments, EmbeddingMomentsConfig

__all__: list[str] = []  # everything is reached through LAYOUTS

CLASS, MOMENTS = "CLIPVisionModelWithProjection", "StableUnCLIPImageNormalizer"
FREE: dict[str, object] = {"num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
"""Settings of a tower that its tensors do not tell."""
TOWER, PROJECTION = "vision_model", "visual_projection.weight"
PATCHES, PLACES = (f"{TOWER}.embeddings.{n}_embedding.weight" for n in ("patch", "position"))
# Ours -> theirs.
NUMBERS = {
    "side": "image_size",
    "patch": "patch_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "embed": "projection_dim",
}


def _settings(shapes: Shapes, given: Settings) -> Settings:
    width, _, patch, _ = shape_of(shapes, PATCHES, 4)
    read: dict[str, object] = {
        "image_size": round((shape_of(shapes, PLACES, 2)[0] - 1) ** 0.5) * patch,
        "patch_size": patch,
        "hidden_size": width,
        "num_hidden_layers": indices(shapes, f"{TOWER}.encoder.layers"),
        "intermediate_size": shape_of(shapes, f"{TOWER}.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "projection_dim": shape_of(shapes, PROJECTION, 2)[0],
    }
    found = settled(given, read, FREE)
    if found["hidden_act"] not in GELUS or found["layer_norm_eps"] != FREE["layer_norm_eps"]:
        raise ValueError(
            f"hidden_act {found['hidden_act']} with layer_norm_eps {found['layer_norm_eps']} is not "
            f"supported; allowed: {', '.join(GELUS)} with 1e-5"
        )
    return found


def _config(settings: Settings) -> CLIPVisionConfig:
    numbers = {ours: v for ours, theirs in NUMBERS.items() if isinstance(v := settings[theirs], int)}
    return CLIPVisionConfig(**numbers, activation=GELUS[str(settings["hidden_act"])])


def _published(c: CLIPVisionConfig, extra: Settings) -> dict[str, object]:
    acts = {ours: theirs for theirs, ours in GELUS.items()}
    numbers = {theirs: getattr(c, ours) for ours, theirs in NUMBERS.items()}
    return {"model_type": "clip_vision_model", **FREE, **numbers, "hidden_act": acts[c.activation]}


LAYOUTS("clip-vision")(
    Layout(
        (
            Part(
                name="image_encoder",
                build=CLIPVision,
                settings=_settings,
                config=_config,
                names=lambda config: hub_vision_map(config) + KeyMap((), IGNORED),
                published=_published,
                known=(*FREE, *NUMBERS.values()),
            ),
        ),
        (PATCHES, PROJECTION),
        CLASS,
        "transformers",
    )
)
LAYOUTS("clip-moments")(
    Layout(
        (
            Part(
                name="image_normalizer",
                build=EmbeddingMoments,
                settings=lambda shapes, given: {"embedding_dim": shape_of(shapes, "mean", 2)[1]},
                config=lambda settings: EmbeddingMomentsConfig(dim=int(str(settings["embedding_dim"]))),
                names=lambda config: KeyMap((Row(("mean",), ("mean",)), Row(("std",), ("std",)))),
                published=lambda config, extra: {"embedding_dim": config.dim},
                known=("embedding_dim",),
            ),
        ),
        ("mean", "std"),
        MOMENTS,
        "stable_diffusion",
    )
)
