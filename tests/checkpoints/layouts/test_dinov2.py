"""DINOv2 of both layouts against transformers, and its published shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from sfumato.checkpoints.layouts.dinov2 import original_map, read_dinov2
from sfumato.nets.dinov2 import DINOv2, DINOv2Config

SIZES = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
PICTURE = {"image_size": 56, "patch_size": 14}


def oracle(*, gated: bool = False, registers: int = 0) -> torch.nn.Module:
    if registers:
        config = Dinov2WithRegistersConfig(
            **SIZES, **PICTURE, num_register_tokens=registers, use_swiglu_ffn=gated
        )
        model = Dinov2WithRegistersModel(config)
    else:
        model = Dinov2Model(Dinov2Config(**SIZES, **PICTURE, use_swiglu_ffn=gated))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.mark.parametrize(("gated", "registers"), [(False, 0), (True, 0), (False, 4)])
def test_both_layouts_give_the_features_of_transformers(gated: bool, registers: int, tmp_path: Path) -> None:
    model = oracle(gated=gated, registers=registers)
    model.save_pretrained(tmp_path)
    net = read_dinov2(tmp_path / "model.safetensors")
    image = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = model(image).last_hidden_state[:, 0]
        torch.testing.assert_close(net(image), expected, atol=1e-5, rtol=1e-5)
    torch.save(original_map(net.config).save(net.state_dict(), where="net"), tmp_path / "original.pth")
    again = read_dinov2(tmp_path / "original.pth")
    assert again.config == net.config
    with torch.no_grad():
        torch.testing.assert_close(again(image), expected, atol=1e-5, rtol=1e-5)


def test_positions_of_another_size(tmp_path: Path) -> None:
    """With registers as transformers; without, the published code scales by a tenth of a patch more."""
    model = oracle(registers=4)
    model.save_pretrained(tmp_path)
    net = read_dinov2(tmp_path / "model.safetensors")
    image = torch.randn(1, 3, 84, 112)
    with torch.no_grad():
        expected = model(image).last_hidden_state[:, 0]
        torch.testing.assert_close(net(image), expected, atol=1e-5, rtol=1e-5)
    plain = DINOv2(DINOv2Config(width=8, depth=1, heads=1, hidden=8, side=37))
    torch.nn.init.normal_(plain.positions)
    found = plain._positions(16, 16)[0, 1:].reshape(16, 16, 8)
    # The middle of our patch (5, 7) lies at these places of the grid of 37; a bicubic kernel by hand.
    rows, columns = ((i + 0.5) * 37 / 16.1 - 0.5 for i in (5, 7))
    grid = plain.positions[0, 1:].reshape(37, 37, 8)
    value = sum(
        kernel(rows - r) * kernel(columns - c) * grid[r, c]
        for r in range(int(rows) - 1, int(rows) + 3)
        for c in range(int(columns) - 1, int(columns) + 3)
    )
    torch.testing.assert_close(found[5, 7], value, atol=1e-5, rtol=1e-5)


def kernel(x: float, a: float = -0.75) -> float:
    """Keys' cubic convolution with torch's coefficient."""
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


@pytest.mark.parametrize(
    ("width", "depth", "heads", "gated", "registers", "count"),
    [
        (384, 12, 6, False, 0, 22_056_576),
        (768, 12, 12, False, 0, 86_580_480),
        (1024, 24, 16, False, 0, 304_368_640),
        (1536, 40, 24, True, 0, 1_136_480_768),
        (384, 12, 6, False, 4, 22_058_112),
    ],
)
def test_published_sizes(width: int, depth: int, heads: int, gated: bool, registers: int, count: int) -> None:
    hidden = 4096 if gated else 4 * width
    config = DINOv2Config(
        width=width, depth=depth, heads=heads, hidden=hidden, gated=gated, registers=registers
    )
    with torch.device("meta"):
        net = DINOv2(config)
    assert sum(p.numel() for p in net.parameters()) == count
    published = original_map(config).save(net.state_dict(), where="net")
    assert published["pos_embed"].shape == (1, 1370, width)
    assert published[f"blocks.{depth - 1}.attn.qkv.weight"].shape == (3 * width, width)
    assert (("blocks.0.mlp.w12.bias" in published), ("register_tokens" in published)) == (
        gated,
        registers > 0,
    )


def test_other_files(tmp_path: Path) -> None:
    file = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="is no DINOv2: it has no 'pos_embed'"):
        read_dinov2(file)
    torch.save(
        {"pos_embed": torch.zeros(1, 5, 128), "patch_embed.proj.weight": torch.zeros(128, 3, 2, 2)}, file
    )
    with pytest.raises(ValueError, match="is no DINOv2: its width is 128"):
        read_dinov2(file)


def test_sides_that_are_no_multiples_of_the_patch() -> None:
    net = DINOv2(DINOv2Config(width=8, depth=1, heads=1, hidden=8, side=4))
    with pytest.raises(ValueError, match="multiples of 14, not 20x28"):
        net(torch.zeros(1, 3, 28, 20))
