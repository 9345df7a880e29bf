"""CLIP of both layouts against transformers, and its published shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig as OracleConfig
from transformers import CLIPModel

from sfumato.checkpoints.files import write_safetensors
from sfumato.checkpoints.layouts.clip import hub_map, open_map, read_clip, write_clip
from sfumato.nets.clip import CLIP, CLIPConfig, CLIPText, CLIPTextConfig, CLIPVisionConfig

HEADS = {"vision": 4, "text": 2}


def oracle(gelu: str) -> CLIPModel:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "hidden_act": gelu}
    text = {**sizes, "hidden_size": 24, "vocab_size": 60, "max_position_embeddings": 10, "eos_token_id": 2}
    vision = {**sizes, "num_attention_heads": HEADS["vision"], "image_size": 20, "patch_size": 5}
    config = OracleConfig(
        text_config={**text, "num_attention_heads": HEADS["text"]}, vision_config=vision, projection_dim=16
    )
    model = CLIPModel(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def described(folder: Path, model: CLIPModel) -> None:
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))


@pytest.mark.parametrize("gelu", ["quick_gelu", "gelu"])
def test_both_layouts_give_the_embeddings_of_transformers(gelu: str, tmp_path: Path) -> None:
    model = oracle(gelu)
    write_safetensors(tmp_path / "model.safetensors", model.state_dict())
    described(tmp_path, model)
    net = read_clip(tmp_path / "model.safetensors")
    image = torch.randn(2, 3, 20, 20)
    ids = torch.tensor([[58, 4, 7, 59, 59], [58, 9, 59, 3, 0]])
    with torch.no_grad():
        seen = model.vision_model(image, output_hidden_states=True)
        read = model.text_model(ids, output_hidden_states=True)
        pictures, texts = (
            model.visual_projection(seen.pooler_output),
            model.text_projection(read.pooler_output),
        )
        close(net.vision(image), pictures)
        found = net.text(ids)
        close(found.embedding, texts)
        close(found.pooled, read.pooler_output)
        close(found.last, read.last_hidden_state)
        for ours, theirs in zip(found.states, read.hidden_states, strict=True):
            close(ours, theirs)
        for ours, theirs in zip(net.vision.states(image), seen.hidden_states, strict=True):
            close(ours, theirs)
    assert float(pictures.std()) > 0.1
    (tmp_path / "open").mkdir()
    published = open_map(net.config).save(net.state_dict(), where="net")
    torch.save(
        published | {"context_length": torch.tensor(10)}, tmp_path / "open/open_clip_pytorch_model.bin"
    )
    cfg = {"vision_cfg": {"width": 32, "head_width": 8}, "text_cfg": {"heads": 2}}
    model_cfg = {"model_cfg": {**cfg, **({"quick_gelu": True} if gelu == "quick_gelu" else {})}}
    (tmp_path / "open/open_clip_config.json").write_text(json.dumps(model_cfg))
    again = read_clip(tmp_path / "open/open_clip_pytorch_model.bin")
    assert again.config == net.config
    with torch.no_grad():
        close(again.text(ids).embedding, texts)
        close(again.vision(image), pictures)
    for layout, name in (("hub", "model"), ("open", "open_clip_model")):
        write_clip(net, tmp_path / layout, layout)
        again = read_clip(tmp_path / layout / f"{name}.safetensors")
        assert again.config == net.config
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())
    theirs = CLIPModel.from_pretrained(tmp_path / "hub").eval()
    with torch.no_grad():
        close(theirs.visual_projection(theirs.vision_model(image).pooler_output), pictures)
        close(theirs.text_projection(theirs.text_model(ids).pooler_output), texts)


def test_openai_s_files_need_no_json(tmp_path: Path) -> None:
    towers = {"width": 128, "depth": 1, "heads": 2, "hidden": 64, "embed": 16}
    text = CLIPTextConfig(vocab=30, context=6, **towers)
    net = CLIP(CLIPConfig(vision=CLIPVisionConfig(side=8, patch=4, **towers), text=text))
    state = open_map(net.config).save(net.state_dict(), where="net")
    told = {"input_resolution": 8, "context_length": 6, "vocab_size": 30}
    torch.save(state | {k: torch.tensor(v) for k, v in told.items()}, tmp_path / "a.pt")
    assert read_clip(tmp_path / "a.pt").config == net.config


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_what_follows_the_end_token_changes_nothing() -> None:
    net = CLIPText(CLIPTextConfig(vocab=9, context=6, width=8, depth=2, heads=2, hidden=8, embed=4))
    with torch.no_grad():
        one, other = (net(torch.tensor([[1, 2, 8, *rest]])).embedding for rest in ([8, 8, 8], [0, 3, 0]))
    torch.testing.assert_close(one, other)


PUBLISHED = {
    "ViT-B/32": (CLIPVisionConfig(patch=32, width=768, depth=12, heads=12, hidden=3072, embed=512),
                 CLIPTextConfig(width=512, heads=8, hidden=2048, embed=512), 151_277_313),
    "ViT-L/14": (CLIPVisionConfig(), CLIPTextConfig(), 427_616_513),
    "OpenCLIP ViT-H/14": (
        CLIPVisionConfig(width=1280, depth=32, heads=16, hidden=5120, embed=1024, activation="none"),
        CLIPTextConfig(width=1024, depth=24, heads=16, hidden=4096, embed=1024, activation="none"),
        986_109_441,
    ),
    "OpenCLIP ViT-bigG/14": (
        CLIPVisionConfig(width=1664, depth=48, heads=16, hidden=8192, embed=1280, activation="none"),
        CLIPTextConfig(width=1280, depth=32, heads=20, hidden=5120, embed=1280, activation="none"),
        2_539_567_105,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_sizes(name: str) -> None:
    vision, text, count = PUBLISHED[name]
    config = CLIPConfig(vision=vision, text=text)
    with torch.device("meta"):
        net = CLIP(config)
    assert sum(p.numel() for p in net.parameters()) == count
    state = net.state_dict()
    ours = open_map(config).save(state, where="net")
    assert ours["visual.proj"].shape == (vision.width, vision.embed)
    assert ours["text_projection"].shape == (text.width, text.embed)
    theirs = hub_map(config).save(state, where="net")
    assert theirs["visual_projection.weight"].shape == (vision.embed, vision.width)
    assert len(theirs) == len(ours) + 4 * (vision.depth + text.depth)  # q, k and v apart


def test_wrong_files(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_safetensors(file, {"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"is no CLIP: it has no tensor 'token_embedding.weight'"):
        read_clip(file)
    model = oracle("gelu")
    write_safetensors(file, model.state_dict())
    with pytest.raises(ValueError, match=r"no config.json or open_clip_config.json beside it"):
        read_clip(file)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"is not the configuration of a CLIP"):
        read_clip(file)
    described(tmp_path, model)
    state = dict(model.state_dict())
    del state["vision_model.embeddings.patch_embedding.weight"]
    write_safetensors(file, state)
    with pytest.raises(ValueError, match=r"is no CLIP with a vision transformer"):
        read_clip(file)


def test_too_many_tokens() -> None:
    net = CLIPText(CLIPTextConfig(vocab=9, context=4, width=8, depth=1, heads=2, hidden=8))
    with pytest.raises(ValueError, match="5 tokens for a text tower with a context of 4"):
        net(torch.zeros(1, 5, dtype=torch.long))
