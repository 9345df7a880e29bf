"""Single files of CompVis and Stability: published names both ways, the kind from names and shapes."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.core.types import Conditioning
from sfumato.nets.attention import AttentionConfig
from sfumato.nets.clip import CLIPVision, CLIPVisionConfig
from sfumato.nets.presets import UNETS
from sfumato.nets.unet import UNet, UNetConfig

GOLDEN = Path(__file__).parents[2] / "golden/layouts"
(PART,) = LAYOUTS["unet-compvis"].parts
FILES = {
    "sd15_single_file": ("sd15", "sd1-compvis"),
    "sd21_single_file": ("sd2", "sd2-compvis"),
    "sdxl_base_single_file": ("sdxl-base", "sdxl-compvis"),
    "sdxl_refiner_single_file": ("sdxl-refiner", "sdxl-refiner-compvis"),
}
UNUSED = ("position_ids", "logit_scale")  # of the towers in these files


@pytest.mark.parametrize("file", sorted(FILES))
def test_published_files_both_ways(file: str) -> None:
    """Every tensor of a net in the file has one place in ours, and back."""
    whole = json.loads(gzip.decompress((GOLDEN / f"{file}.json.gz").read_bytes()))
    shapes = {n: tuple(shape) for n, shape in whole.items()}
    preset, layout = FILES[file]
    assert next(name for name, kind in LAYOUTS.items() if kind.fits(shapes)) == layout
    for part in LAYOUTS[layout].parts:
        own = {n.removeprefix(part.prefix): v for n, v in shapes.items() if n.startswith(part.prefix)}
        config = part.config(part.settings(own, {}))
        assert part.name != "net" or config == UNETS[preset]()
        with torch.device("meta"):
            net = part.build(config)
        rows = part.names(config)
        ours = rows.load({n: torch.empty(v, device="meta") for n, v in own.items()}, where=file)
        assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in net.state_dict().items()}
        kept = {n: v for n, v in own.items() if not n.endswith(UNUSED)}
        assert {n: tuple(v.shape) for n, v in rows.save(ours, where=file).items()} == kept


ROUND = ["sd15-inpaint", "sd15-edit", "sd2-depth", "sd2-inpaint", "sd2-unclip-h", "sd-x4-upscaler"]


@pytest.mark.parametrize("name", [*ROUND, "ldm-text2img"])
def test_the_kind_is_inferred_from_names_and_shapes(name: str) -> None:
    config = UNETS[name]()
    with torch.device("meta"):
        state = PART.names(config).save(UNet(config).state_dict(), where=name)
    assert PART.config(PART.settings({n: tuple(v.shape) for n, v in state.items()}, {})) == config


@pytest.mark.parametrize(
    "config",
    [
        CLIPVisionConfig(
            width=1280, depth=32, hidden=5120, embed=1024, activation="none"
        ),  # OpenCLIP's ViT-H
        CLIPVisionConfig(),  # OpenAI's ViT-L
    ],
)
def test_heads_and_gelu_of_unclips_vision_tower_follow_from_its_width(config: CLIPVisionConfig) -> None:
    part = LAYOUTS["sd2-unclip-compvis"].parts[-1]
    with torch.device("meta"):
        state = part.names(config).save(CLIPVision(config).state_dict(), where="vision")
    assert part.config(part.settings({n: tuple(v.shape) for n, v in state.items()}, {})) == config


def tiny() -> UNetConfig:
    base = UNETS["sd15"]()
    attention = AttentionConfig(kind="transformer", heads=4, conv_proj=True)
    levels = (replace(base.levels[0], channels=32), replace(base.levels[3], channels=64))
    levels = (replace(levels[0], attention=attention, blocks=1), replace(levels[1], blocks=1))
    return replace(
        base,
        levels=levels,
        middle=attention,
        embedding=replace(base.embedding, time_dim=32, dim=128),
        tokens=replace(base.tokens, dim=24),
    )


@torch.no_grad()
def test_the_names_of_both_layouts_are_the_same_net(tmp_path: Path) -> None:
    """Through our net to a folder that diffusers reads, and the same outputs from both."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = UNet(tiny()).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.15)
    sfumato.save_nets({"net": net}, tmp_path / "a.safetensors", layout="unet-compvis")
    state = load_file(tmp_path / "a.safetensors")
    name = "model.diffusion_model.output_blocks.1.1.conv.weight"  # level without attention
    assert state[name].shape == (64, 64, 3, 3)
    save_file(state | {"betas": torch.zeros(1000)}, tmp_path / "b.safetensors")
    again = sfumato.load_nets(tmp_path / "b.safetensors", config={"num_heads": 4})["net"]
    assert again.config == net.config
    sfumato.save_nets({"net": again}, tmp_path / "c", layout="unet-diffusers")
    theirs = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "c").eval()
    x, t, tokens = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 741.0]), torch.randn(2, 5, 24)
    expected = theirs(x, t, encoder_hidden_states=tokens).sample
    assert expected.std() > 0.05
    torch.testing.assert_close(again(x, t, Conditioning(tokens=tokens)), expected, rtol=0, atol=1e-5)


def test_heads_that_tensors_do_not_tell_must_be_given(tmp_path: Path) -> None:
    sfumato.save_nets({"net": UNet(tiny())}, tmp_path / "a.safetensors", layout="unet-compvis")
    with pytest.raises(ValueError, match="give num_heads or num_head_channels"):
        sfumato.load_nets(tmp_path / "a.safetensors")
    with pytest.raises(
        ValueError, match=r"'width' is not asked .*; allowed: num_heads, num_head_channels, par"
    ):
        sfumato.load_nets(tmp_path / "a.safetensors", config={"width": 4})
