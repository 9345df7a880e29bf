"""Text towers of transformers' folders: published shapes both ways, and settings that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sfumato
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.nets.clip import CLIPText

transformers = pytest.importorskip("transformers")

L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
TOWERS = {
    "L": ("clip-text", "CLIPTextModel", {**L, "hidden_act": "quick_gelu"}, 123_060_480),
    "H": ("clip-text", "CLIPTextModel", {**H, "hidden_act": "gelu"}, 340_387_840),
    "bigG": (
        "clip-text-projected",
        "CLIPTextModelWithProjection",
        {**G, "hidden_act": "gelu", "projection_dim": 1280},
        694_659_840,
    ),
}


@pytest.mark.parametrize("name", sorted(TOWERS))
def test_published_towers_both_ways(name: str) -> None:
    layout, kind, options, count = TOWERS[name]
    (part,) = LAYOUTS[layout].parts
    with torch.device("meta"):
        theirs = getattr(transformers, kind)(transformers.CLIPTextConfig(**options)).state_dict()
    shapes = {part.renamed(n): tuple(v.shape) for n, v in theirs.items()}
    config = part.config(part.settings(shapes, {k: v for k, v in options.items() if k in part.known}))
    with torch.device("meta"):
        net = CLIPText(config)
    assert sum(p.numel() for p in net.parameters()) == count
    rows = part.names(config)
    ours = rows.load({n: torch.empty(v, device="meta") for n, v in shapes.items()}, where=name)
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in net.state_dict().items()}
    assert {n: tuple(v.shape) for n, v in rows.save(ours, where=name).items()} == shapes
    published = part.published(config, {})
    assert {k: published[k] for k in options} == options


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TOWERS))
@torch.no_grad()
def test_same_numbers_at_published_size(name: str, scaled, tmp_path: Path) -> None:
    _, kind, options, _ = TOWERS[name]
    config = transformers.CLIPTextConfig(**options, eos_token_id=49407)
    with torch.device("meta"):
        meta = getattr(transformers, kind)(config)
    scaled(meta).save_pretrained(tmp_path)
    theirs = getattr(transformers, kind).from_pretrained(tmp_path).eval()
    net = next(iter(sfumato.load_nets(tmp_path).values()))
    ids = torch.randint(0, 49406, (2, 77))
    ids[:, 0], ids[0, 9:], ids[1, 76:] = 49406, 49407, 49407
    expected = theirs(ids, output_hidden_states=True)
    found = net(ids)
    pooled = expected.text_embeds if kind == "CLIPTextModelWithProjection" else expected.pooler_output
    for ours, wanted in ((found.last, expected.last_hidden_state), (found.embedding, pooled)):
        error = (ours - wanted).norm() / wanted.norm()
        assert error < 1e-4, f"{error:.2e}"
        print(f"{name}: {error:.2e}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "relu"}, "hidden_act relu is unknown; allowed: quick_gelu, gelu"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-06 is not supported"),
        ({"num_hidden_layers": 3}, "the config says num_hidden_layers 3, the tensors say 1"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_settings_that_do_not_fit(change: dict[str, object], said: str, tmp_path: Path) -> None:
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(**small, vocab_size=20)
    transformers.CLIPTextModel(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=said):
        sfumato.load_nets(tmp_path)
