"""Feature nets from files, and how pictures are prepared for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import CLIPImageProcessor

from sfumato.checkpoints.files import sha256, write_safetensors
from sfumato.checkpoints.layouts.clip import open_map
from sfumato.checkpoints.layouts.dinov2 import original_map
from sfumato.core.image import to_pil
from sfumato.evaluation.evaluate import Instruments, evaluate, open_reference
from sfumato.evaluation.features import CLIPFeatures, open_net
from sfumato.evaluation.metrics.pairs import clip_score
from sfumato.evaluation.pictures import Folder
from sfumato.evaluation.preparation import for_clip, for_dinov2, for_inception
from sfumato.nets.clip import CLIP, CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from sfumato.nets.dinov2 import DINOv2, DINOv2Config


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A folder as open_clip keeps its models, of a tiny one."""
    folder = tmp_path / "clip"
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}), "utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    vision = CLIPVisionConfig(side=32, patch=8, width=16, depth=2, heads=2, hidden=32, embed=8)
    text = CLIPTextConfig(vocab=len(tokens), context=12, width=16, depth=2, heads=2, hidden=32, embed=8)
    net = CLIP(CLIPConfig(vision=vision, text=text))
    write_safetensors(
        folder / "open_clip_model.safetensors", open_map(net.config).save(net.state_dict(), where="net")
    )
    cfg = {"vision_cfg": {"width": 16, "head_width": 8}, "text_cfg": {"heads": 2}, "quick_gelu": True}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
    return folder


def test_clip_scores_of_a_folder(clip: Path, pictures: Path) -> None:
    net = open_net("clip", clip)
    assert isinstance(net, CLIPFeatures)
    assert net.protocol["sha256"] == sha256(clip / "open_clip_model.safetensors")
    tools = Instruments(("clip_score",), {"clip": net}, batch=8)
    folder = Folder(pictures)
    result = evaluate(folder, open_reference(None, folder.size, tools), tools)
    image, text = net(folder(range(30)))["clip"], net.texts(folder.texts)
    assert image.shape == text.shape == (30, 8)
    assert result.figures[0].value == pytest.approx(float(clip_score(image, text).mean()), rel=1e-5)
    assert float((text[0] - text[1]).abs().max()) > 0.01


def test_dinov2_of_a_file(tmp_path: Path) -> None:
    config = DINOv2Config(width=64, depth=1, heads=1, hidden=64, side=4)
    net = DINOv2(config)
    torch.save(
        original_map(config).save(net.state_dict(), where="net"), tmp_path / "dinov2_vits14_pretrain.pth"
    )
    found = open_net("dinov2", tmp_path / "dinov2_vits14_pretrain.pth")
    pixels = torch.randint(256, (2, 3, 40, 50), dtype=torch.uint8)
    with torch.no_grad():
        expected = net(for_dinov2(pixels))
    torch.testing.assert_close(found(pixels)["dinov2"], expected)
    assert found.protocol["file"] == "dinov2_vits14_pretrain.pth"


def test_pictures_for_clip_are_those_of_transformers() -> None:
    """At sizes whose middle is a whole pixel: else transformers rounds down, and CLIP's own code to even."""
    for height, width in ((40, 45), (300, 240), (224, 224)):
        pixels = torch.randint(256, (1, 3, height, width), dtype=torch.uint8)
        expected = CLIPImageProcessor()(to_pil(pixels[0]), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(for_clip(pixels), expected, atol=1e-5, rtol=0)


def test_pictures_for_dinov2_are_normalized_pillow_bicubics() -> None:
    pixels = torch.randint(256, (1, 3, 60, 91), dtype=torch.uint8)
    small = np.asarray(to_pil(pixels[0]).resize((224, 224), Image.Resampling.BICUBIC)) / 255
    expected = (small - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(for_dinov2(pixels)[0].permute(1, 2, 0), expected, atol=1e-5)


def test_pictures_for_inception_keep_their_corner() -> None:
    """TensorFlow 1 takes pixel 0 for place 0, where others take the half-way point."""
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    found = for_inception(pixels)
    assert found.shape == (1, 3, 299, 299)
    assert float(found[0, 0, 0, 0]) == -1
    assert float(found[0, 0, -1, -1]) == pytest.approx((255 - 128) / 128, abs=1e-6)


def test_nets_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name, what in (("inception", "FID's Inception"), ("dinov2", "DINOv2"), ("clip", "CLIP")):
        with pytest.raises(ValueError, match=rf"the weights of {what} are not on this machine .*downloads"):
            open_net(name)
