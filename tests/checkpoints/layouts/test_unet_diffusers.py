"""UNet2DConditionModel: published settings both ways, tiny twins both ways, settings that do not fit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

import sfumato
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.checkpoints.weights import assign, parameter_free
from sfumato.core.types import Conditioning
from sfumato.nets.presets import UNETS
from sfumato.nets.unet import UNet

diffusers = pytest.importorskip("diffusers")

CLOSE = {"rtol": 0, "atol": 1e-5}  # outputs of order 1; float32 sums in another order
SD1 = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SIZES = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
DOWN, CROSS = "DownBlock2D", "CrossAttnDownBlock2D"


def blocks(*down: str) -> dict[str, list[str]]:
    up = [name.replace("Down", "Up") for name in reversed(down)]
    return {"down_block_types": list(down), "up_block_types": up}


PUBLISHED: dict[str, dict[str, Any]] = {
    "sd15": SD1,
    "sd15-inpaint": SD1 | {"in_channels": 9},
    "sd15-edit": SD1 | {"in_channels": 8},
    "sd2": SD2,
    "sd2-inpaint": SD2 | {"in_channels": 9},
    "sd2-depth": SD2 | {"in_channels": 5},
    "sd2-unclip-h": SD2 | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048},
    "sd-x4-upscaler": SD2
    | blocks(DOWN, CROSS, CROSS, CROSS)
    | {
        "attention_head_dim": 8,
        "in_channels": 7,
        "block_out_channels": [256, 512, 512, 1024],
        "only_cross_attention": [True, True, True, False],
        "num_class_embeds": 1000,
    },
    "sdxl-base": SIZES
    | blocks(DOWN, CROSS, CROSS)
    | {
        "block_out_channels": [320, 640, 1280],
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "cross_attention_dim": 2048,
        "projection_class_embeddings_input_dim": 2816,
    },
    "sdxl-refiner": SIZES
    | blocks(DOWN, CROSS, CROSS, DOWN)
    | {
        "block_out_channels": [384, 768, 1536, 1536],
        "attention_head_dim": [6, 12, 24, 24],
        "transformer_layers_per_block": 4,
        "use_linear_projection": True,
        "cross_attention_dim": 1280,
        "projection_class_embeddings_input_dim": 2560,
    },
}
(PART,) = LAYOUTS["unet-diffusers"].parts


def theirs(options: dict[str, Any]) -> nn.Module:
    return diffusers.UNet2DConditionModel(**options)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_settings_both_ways(name: str) -> None:
    """Every tensor of diffusers' own class has one place in ours, and back; the settings come back, too."""
    with torch.device("meta"):
        reference = theirs(PUBLISHED[name])
        net = UNet(UNETS[name]())
    state = reference.state_dict()
    given = {k: v for k, v in reference.config.items() if k in PART.known}
    settings = PART.settings({k: tuple(v.shape) for k, v in state.items()}, given)
    config = PART.config(settings)
    assert config == UNETS[name]()
    rows = PART.names(config)
    ours = rows.load(state, where=name)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in net.state_dict().items()}
    back = rows.save(ours, where=name)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}
    with torch.device("meta"):
        again = theirs(PART.published(config, {})).state_dict()
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}


TINY = {
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "cross_attention_dim": 24,
}
TWINS: dict[str, dict[str, Any]] = {
    "sd1": TINY | blocks(CROSS, DOWN) | {"attention_head_dim": 4},
    "sd2": TINY
    | blocks(CROSS, DOWN)
    | {"attention_head_dim": [2, 4], "use_linear_projection": True, "in_channels": 9},
    "uneven": TINY | blocks(CROSS, CROSS) | {"attention_head_dim": [8, 4], "layers_per_block": [1, 2]},
    "x4": TINY
    | blocks(DOWN, CROSS)
    | {"attention_head_dim": 8, "only_cross_attention": [True, False], "num_class_embeds": 50},
    "only": TINY | blocks(CROSS, CROSS) | {"attention_head_dim": 8, "only_cross_attention": True},
    "unclip": TINY
    | blocks(CROSS, DOWN)
    | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 24},
    "sdxl": TINY
    | SIZES
    | blocks(DOWN, CROSS)
    | {
        "attention_head_dim": [2, 4],
        "transformer_layers_per_block": [1, 2],
        "use_linear_projection": True,
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 6 * 16 + 8,
    },
    "refiner": TINY
    | SIZES
    | blocks(CROSS, DOWN)
    | {
        "attention_head_dim": [2, 4],
        "transformer_layers_per_block": 2,
        "use_linear_projection": True,
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 5 * 16 + 24,
    },
}


def randomized(net: nn.Module) -> nn.Module:
    for p in net.parameters():
        nn.init.normal_(p, mean=float(p.detach().mean()) if p.ndim == 1 else 0.0, std=0.1)
    return net.eval()


def told(net: UNet) -> tuple[Conditioning, dict[str, Any]]:
    """Random conditioning in our words and in theirs."""
    features = [f for e in net.config.embedding.extras for f in e.features]
    rows: dict[str, Any] = {f.field: torch.rand(2, f.dim) * 40 for f in features if f.field != "aug"}
    rows |= {f.field: torch.tensor([2, 41]) for f in features if f.field == "aug"}
    rows["tokens"] = torch.randn(2, 5, net.config.token_dim)
    arguments: dict[str, Any] = {"encoder_hidden_states": rows["tokens"]}
    if "pooled" in rows:
        arguments["added_cond_kwargs"] = {"text_embeds": rows["pooled"], "time_ids": rows["micro"]}
    elif "image_embed" in rows:
        embed = diffusers.models.embeddings.get_timestep_embedding
        level = embed(rows["aug"], features[1].sinusoid, flip_sin_to_cos=True, downscale_freq_shift=0)
        arguments["class_labels"] = torch.cat([rows["image_embed"], level], 1)
    elif "aug" in rows:
        arguments["class_labels"] = rows["aug"]
    return Conditioning(**rows), arguments


@pytest.mark.parametrize("name", sorted(TWINS))
@torch.no_grad()
def test_same_numbers_both_ways(name: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    reference = randomized(theirs(TWINS[name]))
    reference.save_pretrained(tmp_path / "theirs")
    net = sfumato.load_nets(tmp_path / "theirs")["net"]
    x, t = torch.randn(2, net.config.in_channels, 8, 8), torch.tensor([3.0, 741.0])
    cond, arguments = told(net)
    expected = reference(x, t, **arguments).sample
    assert expected.std() > 0.05
    torch.testing.assert_close(net(x, t, cond), expected, **CLOSE)
    sfumato.save_nets({"net": net}, tmp_path / "ours", layout="unet-diffusers")
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours").eval()
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in reference.state_dict().items())
    assert torch.equal(again(x, t, **arguments).sample, expected)
    sfumato.save_nets({"net": net}, tmp_path / "twice", layout="unet-diffusers")
    files = [tmp_path / one / "config.json" for one in ("ours", "twice")]
    assert files[0].read_text() == files[1].read_text()


@pytest.mark.slow  # up to 11 GB
@pytest.mark.parametrize("name", ["sd15", "sd2", "sd-x4-upscaler", "sdxl-base", "sdxl-refiner"])
@torch.no_grad()
def test_same_numbers_at_published_size(name: str, scaled: Any) -> None:
    with torch.device("meta"):
        reference = theirs(PUBLISHED[name])
    reference, net = scaled(reference), parameter_free(UNet, UNETS[name]())
    # The tensors are shared wherever a row only renames them: two copies would not fit.
    assign(net, PART.names(net.config).load(reference.state_dict(), where=name), where=name)
    x, t = torch.randn(2, net.config.in_channels, 32, 32), torch.tensor([3.0, 741.0])
    cond, arguments = told(net)
    expected = reference(x, t, **arguments).sample
    assert 0.1 < expected.std() < 10
    error = (net(x, t, cond) - expected).norm() / expected.norm()
    assert error < 1e-4, f"{error:.2e}"
    print(f"{name}: {error:.2e}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"time_cond_proj_dim": 256}, r"the config says time_cond_proj_dim 256, the tensors say None"),
        ({"act_fn": "gelu"}, r"act_fn gelu is not supported"),
        ({"cross_attention_dim": 32}, r"the config says cross_attention_dim 32, the tensors say 24"),
        ({"block_out_channels": [32, 32]}, r"the config says block_out_channels \[32, 32\], .*\[32, 64\]"),
        ({"attention_head_dim": 5}, r"5 heads do not divide the width 32"),
        ({"attention_head_dim": [1, 2, 4]}, r"3 values \[1, 2, 4\] for 2 levels"),
        ({"down_block_types": [DOWN, DOWN]}, r"the config says down_block_types .*the tensors say"),
        (
            {"use_linear_projection": True},
            r"the config says use_linear_projection True, the tensors say False",
        ),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_settings_that_do_not_fit(change: dict[str, Any], said: str, tmp_path: Any) -> None:
    theirs(TWINS["sd1"]).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=said):
        sfumato.load_nets(tmp_path)


def test_another_kind_of_unet_is_not_written(tmp_path: Any) -> None:
    with torch.device("meta"):
        net = UNet(UNETS["ldm-churches"]())
    with pytest.raises(ValueError, match=r"computes no U-Net of this kind; save it as a sfumato system"):
        sfumato.save_nets({"net": net}, tmp_path / "a", layout="unet-diffusers")
    assert not (tmp_path / "a").exists()
