"""Files of DeepFloyd IF as the original code names tensors: every name, outputs, wrong settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.core.types import Conditioning
from sfumato.nets.presets import UNETS
from sfumato.nets.unet import UNet

# Outputs are of order 1; float32 sums in another order.
CLOSE = {"rtol": 0, "atol": 1e-5}
(PART,) = LAYOUTS["deepfloyd"].parts
SMALL = {
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": "4",
    "activation": "gelu",
    "encoder_dim": 24,
    "att_pool_heads": 4,
    "encoder_channels": 64,
    "image_size": 8,
    "channel_mult": "1,2",
    "num_head_channels": 16,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "dropout": 0,
}
STAGE_2 = {
    "in_channels": 6,
    "num_res_blocks": [1, 2],
    "efficient_activation": True,
    "scale_skip_connection": True,
    "low_res_diffusion": None,
}


def names_of(config: dict[str, object], *, aug: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a file of the reference with these settings."""
    told = {
        "num_heads": None,
        "num_heads_upsample": -1,
        "scale_skip_connection": False,
        **config,
        "attention_resolutions": [8 // int(one) for one in str(config["attention_resolutions"]).split(",")],
        "channel_mult": [int(one) for one in str(config["channel_mult"]).split(",")],
        "effective_in_channels": config["in_channels"],
        "aug_proj": aug,
    }
    if config.get("disable_self_attentions") is True:
        told["disable_self_attentions"] = told["attention_resolutions"]
    with torch.device("meta"):
        net = UNet(PART.config(told))
    written = PART.names(net.config).save(net.state_dict(), where="small")
    return {name: tuple(v.shape) for name, v in written.items()}


@pytest.mark.parametrize("preset", ["if-i-m", "if-i-l", "if-i-xl", "if-ii-l"])
def test_every_name_of_a_stage_both_ways(preset):
    config = UNETS[preset]()
    with torch.device("meta"):
        net = UNet(config)
    state = PART.names(config).save(net.state_dict(), where=preset)
    shapes = {name: tuple(v.shape) for name, v in state.items()}
    assert [layout for layout, kind in LAYOUTS.items() if kind.fits(shapes)] == ["deepfloyd"]
    assert PART.config(PART.settings(shapes, {})) == config
    ours = PART.names(config).load(state, where=preset)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert PART.config(PART.published(config, {})) == config
    named = {
        "input_blocks.0.0.weight": (config.levels[0].channels, config.in_channels, 3, 3),
        "middle_block.1.norm_encoder.weight": (config.token_dim,),
        "encoder_pooling.1.positional_embedding": (1, 4096),
        "encoder_pooling.2.weight": (config.embedding.dim, 4096),
        "encoder_proj.weight": (config.token_dim, 4096),
    }
    assert {name: shapes[name] for name in named} == named
    assert ("aug_proj.2.bias" in shapes) == (preset == "if-ii-l")


CASES = {
    "stage 1": ({}, False),
    "text of the attention's width": ({"encoder_channels": 32, "encoder_dim": 32}, False),
    "stage 2": (STAGE_2, True),
    "stage 2, tokens alone": ({**STAGE_2, "disable_self_attentions": True}, True),
    "tokens alone at one of two": (
        {"attention_resolutions": "8,4", "disable_self_attentions": [2], "num_head_channels": 8},
        False,
    ),
    "silu, more heads in the pool": ({"activation": "silu", "att_pool_heads": 8}, False),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_it_computes_what_the_file_means(case, reading, random_file, tmp_path):
    changes, aug = CASES[case]
    config = SMALL | changes
    state = random_file(names_of(config, aug=aug))
    save_file(state, tmp_path / "a.safetensors")
    net = sfumato.load_nets(tmp_path / "a.safetensors", layout="deepfloyd", config=config)["net"]
    x, t = torch.randn(2, config["in_channels"], 8, 16), torch.tensor([3.5, 999.0])
    text, level = torch.randn(2, 5, config["encoder_dim"]), torch.tensor([250, 0])
    file = reading(
        state,
        lambda c: c // config["num_head_channels"],
        activation=F.silu if config["activation"] == "silu" else F.gelu,
        scale=0.7071 if config.get("scale_skip_connection") else 1.0,
    )
    extra = pooled(file, text, config["att_pool_heads"])
    if aug:
        extra = extra + file.embedded(level, name="aug_proj")
    tokens = file.linear("encoder_proj", text) if "encoder_proj.weight" in state else text
    blocks = config["num_res_blocks"]
    down = {(blocks if isinstance(blocks, int) else blocks[0]) + 1}
    expected = file.unet(x, file.embedded(t, extra), down, tokens)
    assert expected.std() > 0.1
    cond = Conditioning(tokens=text, aug=level if aug else None)
    torch.testing.assert_close(net(x, t, cond), expected, **CLOSE)

    sfumato.save_nets({"net": net}, tmp_path / "b.safetensors", layout="deepfloyd")
    again = load_file(tmp_path / "b.safetensors")
    assert set(again) == set(state)
    assert all(torch.equal(again[key], v) for key, v in state.items())


def pooled(file, text: torch.Tensor, heads: int) -> torch.Tensor:
    """The mean of the tokens, with its position, attends to itself and to them."""
    state, name = file.state, "encoder_pooling"
    x = F.layer_norm(text, text.shape[-1:], state[f"{name}.0.weight"], state[f"{name}.0.bias"])
    first = x.mean(1, keepdim=True) + state[f"{name}.1.positional_embedding"]
    x = torch.cat([first, x], 1)
    q, k, v = (
        file.linear(f"{name}.1.{n}_proj", y).reshape(2, y.shape[1], heads, -1)
        for n, y in (("q", first), ("k", x), ("v", x))
    )
    weights = torch.einsum("bthc,bshc->bhts", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    out = torch.einsum("bhts,bshc->bthc", weights, v).flatten(1)
    out = file.linear(f"{name}.2", out)
    return F.layer_norm(out, out.shape[-1:], state[f"{name}.3.weight"], state[f"{name}.3.bias"])


@torch.no_grad()
def test_style_is_another_text_for_the_pool(random_file, tmp_path):
    """The reference's timestep_text_emb: attention reads one text, the embedding of time another."""
    save_file(random_file(names_of(SMALL, aug=False)), tmp_path / "a.safetensors")
    net = sfumato.load_nets(tmp_path / "a.safetensors", config=SMALL)["net"]
    x, t, one, two = torch.randn(1, 3, 8, 8), torch.ones(1), torch.randn(1, 5, 24), torch.randn(1, 5, 24)
    read = net.prepare(Conditioning(tokens=one))
    mixed = net(x, t, replace(read, tokens=two))
    for text in (one, two):
        assert (mixed - net(x, t, Conditioning(tokens=text))).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"att_pool_heads": 5}, r"attention pooling of width 24: heads 5 must divide it"),
        ({"encoder_dim": 48}, r"the config says encoder_dim 48, the tensors say 24$"),
        ({"disable_self_attentions": True}, r"disable_self_attentions \[2\], the tensors say \[\]$"),
        ({"num_res_blocks": [1, 2]}, r"says num_res_blocks \[1\.0, 2\.0\], the tensors say 1$"),
        ({"activation": "relu"}, r"unknown activation 'relu'"),
    ],
)
def test_a_config_that_is_not_the_file_s_is_one_line(changes, message, random_file, tmp_path):
    save_file(random_file(names_of(SMALL, aug=False)), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        sfumato.load_nets(Path(tmp_path / "a.safetensors"), config=SMALL | changes)
    assert "\n" not in str(error.value)
