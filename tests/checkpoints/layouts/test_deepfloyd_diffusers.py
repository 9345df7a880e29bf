"""DeepFloyd IF in diffusers' folders: published shapes both ways, outputs, wrong settings."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import sfumato
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.core.types import Conditioning
from sfumato.nets.presets import UNETS
from sfumato.nets.unet import UNet

diffusers = pytest.importorskip("diffusers")

CLOSE = {"rtol": 0, "atol": 1e-5}  # outputs of order 1; diffusers computes sines in float32
(PART,) = LAYOUTS["deepfloyd-diffusers"].parts
COMMON = {
    "out_channels": 6,
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "addition_embed_type": "text",
    "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
    "act_fn": "gelu",
}
SECOND = {
    "in_channels": 6,
    "class_embed_type": "timestep",
    "time_embedding_act_fn": "gelu",
    "resnet_skip_time_act": True,
    "resnet_out_scale_factor": 1 / 0.7071,
    "mid_block_scale_factor": 1 / 0.7071,
}


def stage(widths: list[int], plain: int, **more: Any) -> dict[str, Any]:
    """Settings with so many levels without attention."""
    kinds = ["Resnet{}sampleBlock2D"] * plain + ["SimpleCrossAttn{}Block2D"] * (len(widths) - plain)
    return {
        **COMMON,
        "in_channels": 3,
        "block_out_channels": widths,
        "down_block_types": [kind.format("Down") for kind in kinds],
        "up_block_types": [kind.format("Up") for kind in reversed(kinds)],
        **more,
    }


BIG = {"layers_per_block": 3, "attention_head_dim": 64, "encoder_hid_dim": 4096}
II = stage([160, 320, 640, 960, 1280], 3, **SECOND, **BIG, time_embedding_dim=1280, cross_attention_dim=1280)
II["layers_per_block"] = [2, 2, 3, 5, 5]
PUBLISHED = {
    "if-i-m": stage([192, 384, 576, 768], 1, **BIG, cross_attention_dim=768),
    "if-i-l": stage([320, 640, 960, 1280], 1, **BIG, cross_attention_dim=1280),
    "if-i-xl": stage([704, 1408, 2112, 2816], 1, **BIG, cross_attention_dim=2816),
    "if-ii-l": II,
    "if-ii-l tokens alone": II | {"only_cross_attention": True},
}
SMALL = {"layers_per_block": 1, "attention_head_dim": 16, "cross_attention_dim": 64, "norm_num_groups": 32}
TINY = {
    "first": stage([32, 64], 1, **SMALL, encoder_hid_dim=24, addition_embed_type_num_heads=4),
    "no projection": stage(
        [32, 64], 1, **SMALL | {"cross_attention_dim": 32}, addition_embed_type_num_heads=4
    ),
    "no norm of tokens, additive": stage([32, 64, 64], 2, **SMALL, encoder_hid_dim=24)
    | {"addition_embed_type_num_heads": 2, "cross_attention_norm": None}
    | {"resnet_time_scale_shift": "default", "act_fn": "silu"},
    "second": stage(
        [32, 64, 96], 1, **SMALL | {"layers_per_block": [1, 2, 1], "cross_attention_dim": 64}, **SECOND
    )
    | {"encoder_hid_dim": 24, "addition_embed_type_num_heads": 4, "time_embedding_dim": 96},
}
TINY["second, tokens alone"] = TINY["second"] | {"only_cross_attention": True}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_both_ways(name: str) -> None:
    """Every tensor of diffusers' own class has one place in ours, and back."""
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**PUBLISHED[name])
    state = model.state_dict()
    shapes = {n: tuple(v.shape) for n, v in state.items()}
    settings = PART.settings(shapes, {n: v for n, v in model.config.items() if n in PART.known})
    config = PART.config(settings)
    with torch.device("meta"):
        net = UNet(config)
    ours = PART.rows(config, settings).load(state, where=name)
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in net.state_dict().items()}
    back = PART.rows(config, settings).save(ours, where=name)
    assert {n: tuple(v.shape) for n, v in back.items()} == shapes
    if name in UNETS:
        assert config.levels == UNETS[name]().levels
        assert config.embedding == UNETS[name]().embedding
    told = PART.published(config, settings)
    with torch.device("meta"):
        again = diffusers.UNet2DConditionModel(**told)
    assert {n: tuple(v.shape) for n, v in again.state_dict().items()} == shapes


@pytest.mark.parametrize("name", TINY)
def test_tiny_twins_compute_the_same_and_are_written_back(name: str, tmp_path) -> None:
    model = diffusers.UNet2DConditionModel(**TINY[name]).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.05)
    model.save_pretrained(tmp_path / "unet")
    net = sfumato.load_nets(tmp_path / "unet", layout="diffusers")["net"].double()
    model.double()  # float32 sums in another order are amplified by the sharp attention of random nets
    side = 2 ** len(TINY[name]["block_out_channels"]) * 2
    x, t = torch.randn(3, model.config.in_channels, side, side).double(), torch.tensor([0, 17, 999])
    dim = TINY[name].get("encoder_hid_dim", TINY[name]["cross_attention_dim"])
    text, aug = torch.randn(3, 7, dim).double(), torch.tensor([0, 250, 999])
    labels = {"class_labels": aug} if "second" in name else {}
    with torch.no_grad():
        wanted = model(x, t, text, **labels).sample
        made = net(x, t, Conditioning(tokens=text, aug=aug.float()))
    assert wanted.std() > 0.1
    torch.testing.assert_close(made, wanted, **CLOSE)
    sfumato.save_nets({"net": net.float()}, tmp_path / "again", layout="deepfloyd-diffusers")
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "again").eval().double()
    with torch.no_grad():
        torch.testing.assert_close(again(x, t, text, **labels).sample, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"act_fn": "mish"}, "unknown act_fn 'mish'"),
        ({"norm_eps": 1e-6}, "norm_eps 1e-06 is not supported"),
        ({"mid_block_scale_factor": 2.0}, "mid_block_scale_factor and resnet_out_scale_factor differ"),
        ({"time_embedding_act_fn": "gelu"}, "time_embedding_act_fn must be act_fn beside"),
        ({"cross_attention_dim": 32}, "the config says cross_attention_dim 32, the tensors say 64"),
        ({"class_embed_type": "timestep"}, "the config says class_embed_type timestep"),
    ],
    ids=["activation", "epsilon", "factors", "twice", "width", "level"],
)
def test_settings_that_do_not_fit(change: dict[str, Any], said: str, tmp_path) -> None:
    diffusers.UNet2DConditionModel(**TINY["first"]).save_pretrained(tmp_path / "unet")
    file = tmp_path / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=said):
        sfumato.load_nets(tmp_path / "unet")
