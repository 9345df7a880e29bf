"""T5's encoder in folders of transformers: T5EncoderModel, and what it needs of a whole T5."""

from __future__ import annotations

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
from sfumato.core.registry import unknown
from sfumato.nets.t5 import T5Config, T5Encoder

__all__: list[str] = []  # everything is reached through LAYOUTS

FREE: dict[str, object] = {
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "dropout_rate": 0.1,
    "feed_forward_proj": None,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
"""Settings that the tensors do not tell."""
READ = (
    *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"),
    "relative_attention_num_buckets",
)
FORWARDS = {
    "relu": (False, "relu"),
    "gated-gelu": (True, "gelu_tanh"),  # the library's word for v1.1, whose GELU is the approximate one
    "gated-silu": (True, "silu"),
    "gated-gelu_new": (True, "gelu_tanh"),
    "gelu": (False, "gelu"),
    "gelu_new": (False, "gelu_tanh"),
    "silu": (False, "silu"),
}
FIRST = "encoder.block.0.layer.0.SelfAttention"
BIAS = f"{FIRST}.relative_attention_bias"
WEIGHT = ("weight",)


def _settings(shapes: Shapes, given: Settings) -> Settings:
    vocab, width = shape_of(shapes, "shared.weight", 2)
    buckets, heads = shape_of(shapes, f"{BIAS}.weight", 2)
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in shapes
    read: dict[str, object] = {
        "vocab_size": vocab,
        "d_model": width,
        "d_kv": shape_of(shapes, f"{FIRST}.q.weight", 2)[0] // heads,
        "d_ff": shape_of(shapes, "encoder.block.0.layer.1.DenseReluDense.wo.weight", 2)[1],
        "num_layers": indices(shapes, "encoder.block"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }
    found = settled(given, read, {**FREE, "feed_forward_proj": "gated-gelu" if gated else "relu"})
    forward = str(found["feed_forward_proj"])
    if forward not in FORWARDS:
        raise ValueError(unknown("feed_forward_proj", forward, list(FORWARDS)))
    if FORWARDS[forward][0] != gated:
        raise ValueError(f"the config says feed_forward_proj {forward}, the tensors are gated: {gated}")
    return found


def _config(settings: Settings) -> T5Config:
    s: Any = settings
    gated, activation = FORWARDS[s["feed_forward_proj"]]
    return T5Config(
        vocab_size=s["vocab_size"],
        width=s["d_model"],
        depth=s["num_layers"],
        heads=s["num_heads"],
        head_dim=s["d_kv"],
        hidden=s["d_ff"],
        gated=gated,
        activation=activation,  # type: ignore[arg-type]
        buckets=s["relative_attention_num_buckets"],
        max_distance=s["relative_attention_max_distance"],
        eps=s["layer_norm_epsilon"],
    )


def _names(c: T5Config) -> KeyMap:
    ups = {"wi_0": "up", "wi_1": "gate"} if c.gated else {"wi": "up"}
    block: LeafTable = {
        **{
            f"layer.0.SelfAttention.{n}": Leaf(ours, tensors=WEIGHT)
            for n, ours in zip("qkvo", ("q", "k", "v", "out"), strict=True)
        },
        **{f"layer.{i}.layer_norm": Leaf(f"norm{i + 1}", tensors=WEIGHT) for i in (0, 1)},
        **{
            f"layer.1.DenseReluDense.{n}": Leaf(ours, tensors=WEIGHT)
            for n, ours in {**ups, "wo": "down"}.items()
        },
    }
    top: LeafTable = {
        "shared": Leaf("tokens", tensors=WEIGHT),
        BIAS: Leaf("distances", tensors=WEIGHT),
        "encoder.final_layer_norm": Leaf("norm", tensors=WEIGHT),
    }
    rows = [("", "", top), *((f"encoder.block.{i}", f"blocks.{i}", block) for i in range(c.depth))]
    return KeyMap.of(rows, ignored=("decoder.", "lm_head."))


def _published(c: T5Config, extra: Settings) -> dict[str, object]:
    forwards = {kind: name for name, kind in reversed(FORWARDS.items())}
    return {
        "model_type": "t5",
        **FREE,
        **{name: extra[name] for name in FREE if name in extra},
        "vocab_size": c.vocab_size,
        "d_model": c.width,
        "d_kv": c.head_dim,
        "d_ff": c.hidden,
        "num_layers": c.depth,
        "num_heads": c.heads,
        "relative_attention_num_buckets": c.buckets,
        "relative_attention_max_distance": c.max_distance,
        "layer_norm_epsilon": c.eps,
        "feed_forward_proj": forwards[c.gated, c.activation],
    }


LAYOUTS("t5")(
    Layout(
        (
            Part(
                name="text_encoder",
                build=T5Encoder,
                settings=_settings,
                config=_config,
                names=_names,
                published=_published,
                aliases=(("encoder.embed_tokens.", "shared."),),
                known=(*FREE, *READ),
            ),
        ),
        ("shared.weight", f"{BIAS}.weight"),
        "T5EncoderModel",
        "transformers",
    )
)
