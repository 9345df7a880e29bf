"""DiT and SiT files: recorded outputs of the references, published names, writing, wrong files."""

from __future__ import annotations

import argparse
import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.checkpoints.foreign import read_foreign
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.core.types import Conditioning, Level
from sfumato.diffusion import PARAMETERIZATIONS, Denoiser, Discrete
from sfumato.diffusion.guidance import CFG
from sfumato.nets.dit import DiT, DiTConfig
from sfumato.nets.patches import sincos_positions

GOLDEN = Path(__file__).parents[2] / "golden"
CONFIG = {
    "input_size": 8,
    "patch_size": 2,
    "learn_sigma": True,
    "in_channels": 4,
    "hidden_size": 96,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 10,
}
# Outputs are of order 1; float32 sums in another order.
CLOSE = {"rtol": 0, "atol": 1e-5}


def recorded(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "dit" / f"{name}.safetensors")


def golden(layout: str) -> tuple[DiT, dict[str, torch.Tensor]]:
    path = GOLDEN / "dit" / f"{layout}_model.safetensors"
    return sfumato.load_nets(path, layout=layout, config=CONFIG)["net"], recorded(f"{layout}_io")


def random_net(config: DiTConfig) -> DiT:
    net = DiT(config)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.eval()


@pytest.mark.parametrize("layout", ["dit", "sit"])
@torch.no_grad()
def test_forward_is_the_reference(layout):
    net, io = golden(layout)
    out = net(io["in.x"], io["in.t"], Conditioning(label=io["in.y"]))
    torch.testing.assert_close(out, io["out.out"], **CLOSE)
    if "out.out_fractional_t" in io:
        out = net(io["in.x"], io["in.t"] + 0.5, Conditioning(label=io["in.y"]))
        torch.testing.assert_close(out, io["out.out_fractional_t"], **CLOSE)


@pytest.mark.parametrize("scale", [1.0, 1.5, 4.0])
@pytest.mark.parametrize("layout", ["dit", "sit"])
@torch.no_grad()
def test_guidance_on_three_of_four_channels(layout, scale):
    """The reference's forward_with_cfg: its first half is the guided prediction."""
    net, io = golden(layout)
    n = len(io["in.cfg_x"]) // 2
    x, y = io["in.cfg_x"][:n], io["in.cfg_y"]
    t = io["in.cfg_t"][:n].double()
    # A level at which x0 and eps differ, so that both are checked; the net sees only t.
    level = Level(t, torch.full((n,), 0.6, dtype=torch.float64), torch.full((n,), 0.8, dtype=torch.float64))
    denoiser = Denoiser(net, Discrete(), PARAMETERIZATIONS["eps"], learned_var=layout == "dit")
    guided = CFG(scale, channels=3).bind(denoiser, Conditioning(label=y[:n]), Conditioning(label=y[n:]))
    result, expected = guided(x, level), io[f"out.cfg_{scale}"][:n]
    # Guidance multiplies what two float32 sums differ by, and the outputs.
    near = 1e-5 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(result.eps, expected[:, :4], rtol=0, atol=near)
    torch.testing.assert_close(result.x0, (x - 0.8 * expected[:, :4]) / 0.6, rtol=0, atol=3 * near)
    if layout == "dit":
        torch.testing.assert_close(result.var, expected[:, 4:], **CLOSE)
    if scale > 1:
        plain = CFG(scale).bind(denoiser, Conditioning(label=y[:n]), Conditioning(label=y[n:]))(x, level)
        assert (plain.eps[:, 3] - result.eps[:, 3]).abs().max() > 0.1


def test_positions_are_the_file_s():
    model = recorded("dit_model")
    torch.testing.assert_close(sincos_positions(4, 4, 96), model["pos_embed"], rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "layout", "config"),
    [
        ("dit_s_8_original", "dit", DiTConfig(patch=8, out_channels=8, num_classes=1000)),
        (
            "dit_xl_2_256_original",
            "dit",
            DiTConfig(width=1152, depth=28, heads=16, out_channels=8, num_classes=1000),
        ),
        (
            "dit_xl_2_256_original",
            "sit",
            DiTConfig(width=1152, depth=28, heads=16, spare_channels=4, num_classes=1000),
        ),
        (
            "dit_xl_2_256_diffusers",
            "dit-diffusers",
            DiTConfig(
                width=1152,
                depth=28,
                heads=16,
                out_channels=8,
                num_classes=1000,
                time_shift=1.0,
                norm2_eps=1e-5,
                position_base=16,
            ),
        ),
    ],
)
def test_every_name_of_a_published_file_both_ways(name, layout, config):
    shapes = json.loads(gzip.decompress((GOLDEN / "layouts" / f"{name}.json.gz").read_bytes()))
    shapes = {key: tuple(shape) for key, shape in shapes.items()}
    kind = LAYOUTS[layout]
    assert kind.fits(shapes)
    (part,) = kind.parts
    settings = part.settings(shapes, {})
    assert part.config(settings) == config
    constants = part.constants(settings)
    theirs = {key: torch.empty(shape, device="meta") for key, shape in shapes.items() if key not in constants}
    with torch.device("meta"):
        net = part.build(config)
    ours = part.names(config).load(theirs, where=name)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in net.state_dict().items()}
    back = part.names(config).save(ours, where=name) | constants
    assert {k: tuple(v.shape) for k, v in back.items()} == shapes
    published = part.published(config, {"input_size": 32})
    assert {k: published[k] for k in published if k in settings} == {
        k: settings[k] for k in published if k in settings
    }


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
@pytest.mark.parametrize("layout", ["dit", "sit"])
def test_a_written_file_is_the_read_one(layout, ending, tmp_path):
    net, _ = golden(layout)
    sfumato.save_nets({"net": net}, tmp_path / f"a{ending}", layout=layout, config={"input_size": 8})
    written = load_file(tmp_path / "a.safetensors") if ending != ".pt" else torch.load(tmp_path / "a.pt")
    original = recorded(f"{layout}_model")
    assert set(written) == set(original)
    for key, value in original.items():
        if key == "pos_embed":
            torch.testing.assert_close(written[key], value, rtol=0, atol=1e-7)
        else:
            assert torch.equal(written[key], value), key


def test_training_checkpoints_give_their_average(tmp_path):
    """The reference keeps the model, its average and an argparse.Namespace, which says the heads."""
    shapes = json.loads(gzip.decompress((GOLDEN / "layouts/dit_s_8_original.json.gz").read_bytes()))
    one = {key: torch.full(shape, 0.5).half() for key, shape in shapes.items()}
    one["pos_embed"] = sincos_positions(4, 4, 384)
    two = {key: torch.zeros_like(value) for key, value in one.items()}
    args = argparse.Namespace(model="DiT-S/8", image_size=256, num_classes=1000)
    torch.save({"model": two, "ema": one, "opt": {}, "args": args}, tmp_path / "0050000.pt")
    net = sfumato.load_nets(tmp_path / "0050000.pt")["net"]
    assert net.config.heads == 6
    assert net.out.weight[0, 0].item() == 0.5
    torch.save({"model": one, "opt": {}, "args": args}, tmp_path / "a.pt")
    assert sfumato.load_nets(tmp_path / "a.pt")["net"].out.weight[0, 0].item() == 0.5


def test_without_a_null_class_or_a_learned_sigma(tmp_path):
    config = DiTConfig(
        width=32, depth=1, heads=2, num_classes=5, null_label=False, in_channels=3, out_channels=3
    )
    net = random_net(config)
    sfumato.save_nets({"net": net}, tmp_path / "a.pt", layout="dit", config={"input_size": 4})
    given = {"num_heads": 2, "class_dropout_prob": 0.0}
    again = sfumato.load_nets(tmp_path / "a.pt", config=given)["net"]
    assert again.config == config
    # The number of classes tells as well that there is no null class.
    assert (
        sfumato.load_nets(tmp_path / "a.pt", config={"num_heads": 2, "num_classes": 5})["net"].config
        == config
    )
    x, t, cond = torch.randn(2, 3, 4, 4), torch.tensor([3.0, 900.0]), Conditioning(label=torch.tensor([0, 4]))
    assert torch.equal(net(x, t, cond), again(x, t, cond))


def test_the_reference_rounds_the_width_of_the_feed_forward_down(tmp_path):
    net = random_net(DiTConfig(width=32, depth=1, heads=2, num_classes=3, mlp_ratio=107 / 32, out_channels=8))
    sfumato.save_nets({"net": net}, tmp_path / "a.pt", layout="dit", config={"input_size": 4})
    again = sfumato.load_nets(tmp_path / "a.pt", config={"num_heads": 2, "mlp_ratio": 3.36})["net"]
    assert again.blocks[0].mlp.up.weight.shape == (107, 32)


def saved(tmp_path: Path, **changes: torch.Tensor | None) -> Path:
    state = {k: v for k, v in (recorded("dit_model") | changes).items() if v is not None}
    save_file(state, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIG | {"depth": 4}, r"a\.safetensors: the config says depth 4, the tensors say 3$"),
        (CONFIG | {"patch_size": 4}, r"the config says patch_size 4, the tensors say 2$"),
        (CONFIG | {"num_classes": 1000}, r"the config says num_classes 1000, the tensors say 10$"),
        (CONFIG | {"mlp_ratio": 2.0}, r"the config says mlp_ratio 2.0, the tensors say 4$"),
        (CONFIG | {"learn_sigma": False}, r"the config says learn_sigma False, the tensors say True$"),
        (CONFIG | {"input_size": 16}, r"the config says input_size 16, the tensors say 8$"),
        (CONFIG | {"num_heads": 5}, r"width 96 must be a multiple of heads \(5\)"),
        (CONFIG | {"head": 5}, r"unknown setting 'head'"),
        ({}, r"hidden_size 96 is not a published one: give config=\{'num_heads'"),
        ({"model": "DiT-Q/2"}, r"unknown model 'DiT-Q/2'.*allowed: DiT-B/2"),
        ({"model": "DiT-S/2"}, r"the config says hidden_size 384, the tensors say 96$"),
    ],
)
def test_a_config_that_is_not_the_file_s_names_both_values(config, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        sfumato.load_nets(saved(tmp_path), config=config)
    assert "\n" not in str(error.value)


def test_damaged_files_are_one_clear_line(tmp_path):
    def refused(message: str, **changes: torch.Tensor | None) -> None:
        with pytest.raises(ValueError, match=message) as error:
            sfumato.load_nets(saved(tmp_path, **changes), config=CONFIG)
        assert "\n" not in str(error.value)

    refused(r"1 missing: 'blocks\.1\.mlp\.fc2\.bias'", **{"blocks.1.mlp.fc2.bias": None})
    refused(r"1 unexpected: 'blocks\.1\.more'", **{"blocks.1.more": torch.ones(1)})
    refused(
        r"'blocks.1.attn.qkv.weight' has shape|'blocks.1.attention.qkv.weight' has shape \(3, 3\), expected",
        **{"blocks.1.attn.qkv.weight": torch.ones(3, 3)},
    )
    refused(r"'pos_embed' is not the fixed table", pos_embed=torch.zeros(1, 16, 96))
    refused(
        r"has 1 values that are NaN",
        **{"blocks.1.mlp.fc2.bias": torch.full((96,), 0.0).index_fill_(0, torch.tensor(3), torch.nan)},
    )
    with pytest.raises(ValueError, match=r"unknown layout 'dti'; did you mean 'dit'\?"):
        sfumato.load_nets(saved(tmp_path), layout="dti")
    save_file({"a": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(
        ValueError, match=r"b\.safetensors: its tensors \('a', \.\.\.\) are of no known layout"
    ):
        sfumato.load_nets(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("name", "value"), [("qk_norm", True), ("time_shift", 1.0), ("block", "adaln"), ("num_classes", None)]
)
def test_a_net_that_the_original_cannot_compute_is_not_written(name, value, tmp_path):
    net = random_net(replace(DiTConfig(width=32, depth=1, heads=2, num_classes=5), **{name: value}))
    message = "None classes cannot be written" if value is None else f"computes {name} .*, this DiT {value}: "
    with pytest.raises(ValueError, match=message):
        sfumato.save_nets({"net": net}, tmp_path / "a.pt", layout="dit")
    assert not (tmp_path / "a.pt").exists()


def test_the_settings_that_were_read_are_told():
    found = read_foreign(GOLDEN / "dit/dit_model.safetensors", config=CONFIG)
    assert found.settings["net"] == CONFIG
    assert found.layouts == {"net": "dit"}
