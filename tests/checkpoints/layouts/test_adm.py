"""Files of guided-diffusion: every published name, both orders of attention, classifiers, wrong settings."""

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
from sfumato.checkpoints.layouts.adm import FREE
from sfumato.core.types import Conditioning, Level
from sfumato.diffusion.score import class_log_prob, gradient
from sfumato.nets.presets import UNETS
from sfumato.nets.unet import UNet

GOLDEN = Path(__file__).parents[2] / "golden"
# Outputs are of order 1; float32 sums in another order.
CLOSE = {"rtol": 0, "atol": 1e-5}
FILES = {
    "adm_imagenet64_cond": ("64x64_diffusion", "adm-imagenet64"),
    "adm_imagenet128_cond": ("128x128_diffusion", "adm-imagenet128"),
    "adm_imagenet256_cond": ("256x256_diffusion", "adm-imagenet256"),
    "adm_imagenet256_uncond": ("256x256_diffusion_uncond", "adm-imagenet256-uncond"),
    "adm_imagenet512_cond": ("512x512_diffusion", "adm-imagenet512"),
    "adm_upsampler_64_256": ("64_256_upsampler", "adm-upsampler-64-256"),
    "adm_upsampler_128_512": ("128_512_upsampler", "adm-upsampler-128-512"),
    "adm_classifier64": ("64x64_classifier", None),
    "adm_classifier128": ("128x128_classifier", None),
    "adm_classifier256": ("256x256_classifier", None),
    "adm_classifier512": ("512x512_classifier", None),
}
SMALL = {
    "image_size": 16,
    "in_channels": 3,
    "model_channels": 32,
    "out_channels": 6,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "dropout": 0.1,
    "channel_mult": [1, 2],
    "num_classes": 5,
    "num_heads": 2,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
    "use_new_attention_order": False,
}
UNCONDITIONAL = {"num_classes": None}
CASES = {
    "legacy order, heads": {},
    "new order": {"use_new_attention_order": True},
    "head width": {"num_heads": 1, "num_head_channels": 8},
    "improved diffusion": {"resblock_updown": False, "use_scale_shift_norm": False, **UNCONDITIONAL},
    "strided and FiLM": {"resblock_updown": False, "num_res_blocks": 2},
    "half width first": {"model_channels": 64, "channel_mult": [0.5, 1, 1], "attention_resolutions": [1, 4]},
    "one level": {"channel_mult": [2], "attention_resolutions": []},
    "one block, three levels": {"channel_mult": [1, 1, 1], "out_channels": 3},
}
CLASSIFIER = {
    k: v
    for k, v in SMALL.items()
    if k not in ("num_classes", "num_heads_upsample", "dropout", "num_head_channels")
} | {"num_head_channels": 16, "out_channels": 7, "image_size": 16}


def shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    packed = (GOLDEN / "layouts" / f"{name}.json.gz").read_bytes()
    return {key: tuple(shape) for key, shape in json.loads(gzip.decompress(packed)).items()}


def names_of(layout: str, settings: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a file of the reference with these settings."""
    (part,) = LAYOUTS[layout].parts
    settings = {**FREE, "effective_in_channels": settings["in_channels"], **settings}
    config = part.config(settings)
    with torch.device("meta"):
        net = part.build(config)
    return {
        k: tuple(v.shape) for k, v in part.rows(config, settings).save(net.state_dict(), where="").items()
    }


@pytest.mark.parametrize("name", FILES)
def test_every_name_of_a_published_file_both_ways(name):
    shapes, (stem, preset) = shapes_of(name), FILES[name]
    layout = next(layout for layout, kind in LAYOUTS.items() if kind.fits(shapes))
    assert layout == ("adm" if preset else "adm-classifier")
    (part,) = LAYOUTS[layout].parts
    settings = part.settings(shapes, LAYOUTS[layout].files[stem])
    config = part.config(settings)
    assert preset is None or config == UNETS[preset]()
    assert settings["use_new_attention_order"] == (stem == "64x64_diffusion")
    assert settings["noise_schedule"] == ("cosine" if stem.startswith("64x64") else "linear")
    with torch.device("meta"):
        net = part.build(config)
    rows = part.rows(config, settings)
    ours = rows.load({key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, where=name)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in net.state_dict().items()}
    assert {k: tuple(v.shape) for k, v in rows.save(ours, where=name).items()} == shapes
    published = part.published(config, {"noise_schedule": settings["noise_schedule"]})
    assert part.config(published) == config


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_u_net_computes_what_the_file_means(case, reading, random_file, tmp_path):
    config = {**SMALL, **CASES[case]}
    shapes = names_of("adm", config)
    state = random_file(shapes)
    save_file(state, tmp_path / "a.safetensors")
    net = sfumato.load_nets(tmp_path / "a.safetensors", layout="adm", config=config)["net"]
    n, levels, width = config["num_res_blocks"], len(config["channel_mult"]), config["num_head_channels"]
    file = reading(
        state,
        lambda c: c // width if width > 0 else config["num_heads"],
        new_order=config["use_new_attention_order"],
    )
    x, t, y = torch.randn(3, 3, 16, 24), torch.tensor([0.0, 250.5, 999.0]), torch.tensor([0, 4, 2])
    labels = state["label_emb.weight"][y] if config["num_classes"] else 0.0
    down = {(i + 1) * (n + 1) for i in range(levels - 1)} if config["resblock_updown"] else set()
    expected = file.unet(x, file.embedded(t, labels), down)
    assert expected.std() > 0.1
    cond = Conditioning(label=y if config["num_classes"] else None)
    torch.testing.assert_close(net(x, t, cond), expected, **CLOSE)
    if config["attention_resolutions"]:
        swapped = replace(file, new_order=not file.new_order)
        assert (swapped.unet(x, file.embedded(t, labels), down) - expected).abs().max() > 1e-2

    sfumato.save_nets({"net": net}, tmp_path / "b.safetensors", layout="adm", config=given(config))
    written = load_file(tmp_path / "b.safetensors")
    assert set(written) == set(state)
    assert all(torch.equal(written[key], v) for key, v in state.items())


def given(config: dict[str, object]) -> dict[str, object]:
    return {"use_new_attention_order": config["use_new_attention_order"]}


@pytest.mark.parametrize("pool", ["adaptive", "attention", "spatial", "spatial_v2"])
@pytest.mark.parametrize("film", [True, False])
@torch.no_grad()
def test_a_classifier_computes_what_the_file_means(pool, film, reading, random_file, tmp_path):
    config = CLASSIFIER | {"pool": pool, "use_scale_shift_norm": film, "resblock_updown": film}
    state = random_file(names_of("adm-classifier", config))
    save_file(state, tmp_path / "a.safetensors")
    net = sfumato.load_nets(tmp_path / "a.safetensors", layout="adm", config=config)["classifier"]
    file = reading(state, lambda c: c // 16)
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([0, 250, 999])
    emb = torch.nn.functional.silu(file.embedded(t))
    h, skips = file.encode(x, emb, None, {2} if film else set())
    if pool.startswith("spatial"):
        means = torch.cat([one.mean((2, 3)) for one in [*skips, h]], 1)
        hidden = file.linear("out.0", means)
        middle = hidden.relu() if pool == "spatial" else torch.nn.functional.silu(file.norm("out.1", hidden))
        expected = file.linear("out.2" if pool == "spatial" else "out.3", middle)
    else:
        h = torch.nn.functional.silu(file.norm("out.0", h))
        expected = file.linear("out.3", h.mean((2, 3))) if pool == "adaptive" else pooled(file, h)
    assert expected.std() > 0.1
    torch.testing.assert_close(net(x, t), expected, **CLOSE)

    sfumato.save_nets({"classifier": net}, tmp_path / "b.pt", layout="adm-classifier")
    written = torch.load(tmp_path / "b.pt", weights_only=True)
    assert set(written) == set(state)
    assert all(torch.equal(written[key], v) for key, v in state.items())


def pooled(file, h: torch.Tensor) -> torch.Tensor:
    """Attention of the mean to all pixels; rows of q, k, v are not by head here."""
    b, c = h.shape[:2]
    tokens = torch.cat([h.flatten(2).mean(2, keepdim=True), h.flatten(2)], 2)
    tokens = tokens + file.state["out.2.positional_embedding"]
    qkv = file.linear("out.2.qkv_proj", tokens.mT).mT.reshape(b, 3, c // 16, 16, -1)
    weights = torch.einsum("bhct,bhcs->bhts", qkv[:, 0], qkv[:, 1]).div(4).softmax(-1)
    read = torch.einsum("bhts,bhcs->bhct", weights, qkv[:, 2]).reshape(b, c, -1)
    return file.linear("out.2.c_proj", read[..., 0])


def test_the_recorded_classifier_and_its_gradient():
    config = CLASSIFIER | {"image_size": 32, "out_channels": 10, "channel_mult": [1, 2, 3]}
    config |= {"attention_resolutions": [2, 4], "num_heads": 1, "pool": "attention"}
    folder = GOLDEN / "adm_classifier"
    net = sfumato.load_nets(folder / "model.safetensors", config=config)["classifier"]
    inputs, outputs = (load_file(folder / f"{name}.safetensors") for name in ("inputs", "outputs"))
    x, t, y = inputs["x"], inputs["timesteps"], inputs["y"]
    with torch.no_grad():
        torch.testing.assert_close(net(x, t), outputs["logits"], **CLOSE)
    level = Level(t.double(), torch.ones(4).double(), torch.ones(4).double())
    log_prob = class_log_prob(net, y)
    torch.testing.assert_close(log_prob(x, level).detach(), outputs["log_prob_selected"], **CLOSE)
    grad = gradient(log_prob, x, level)
    torch.testing.assert_close(grad, outputs["cond_fn_grad_scale1"], rtol=0, atol=1e-7)  # at most 0.004
    torch.testing.assert_close(2.5 * grad, outputs["cond_fn_grad_scale2.5"], rtol=0, atol=2.5e-7)


def small(tmp_path: Path, random_file, **changes: object) -> Path:
    save_file(random_file(names_of("adm", {**SMALL, **changes})), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize(
    "config",
    [
        {"attention_resolutions": "8", "image_size": 16, "channel_mult": "1,2", "num_channels": 32},
        {"attention_resolutions": (2, 4, 8), "channel_mult": (1, 2), "class_cond": True},
        {"num_res_blocks": [1, 1], "channel_mult": "", "learn_sigma": True, "noise_schedule": "cosine"},
    ],
)
def test_settings_as_the_scripts_write_them(config, random_file, tmp_path):
    net = sfumato.load_nets(small(tmp_path, random_file), config={"num_heads": 2, **config})["net"]
    assert isinstance(net, UNet)
    assert net.config.levels[1].attention.heads == 2


def test_an_upsampler_counts_the_channels_of_one_picture(random_file, tmp_path):
    path = small(tmp_path, random_file, in_channels=6)
    for channels in (3, 6):
        net = sfumato.load_nets(path, config={"num_heads": 2, "in_channels": channels})["net"]
        assert net.config.in_channels == 6


def test_a_published_name_says_what_tensors_do_not(random_file, tmp_path):
    small(tmp_path, random_file).rename(tmp_path / "64_256_upsampler.safetensors")
    net = sfumato.load_nets(tmp_path / "64_256_upsampler.safetensors")["net"]
    assert net.config.middle.heads == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"a\.safetensors: no tensor tells the attention heads: give config="),
        ({"num_heads": 3}, r"attention at width 64: heads 3 must divide it"),
        ({"num_heads": 2, "num_classes": 6}, r"the config says num_classes 6, the tensors say 5$"),
        ({"num_heads": 2, "class_cond": False}, r"the config says class_cond False, the tensors say True$"),
        (
            {"num_heads": 2, "channel_mult": "1,3"},
            r"says channel_mult \[1\.0, 3\.0\], the tensors",
        ),
        ({"num_heads": 2, "num_heads_upsample": 4}, r"num_heads_upsample 4 is not supported"),
        ({"num_heads": 2, "in_channels": 4}, r"the config says in_channels 4, the tensors say 3$"),
        ({"num_heads": 2, "attention_resolutions": "8"}, r"'8' is in pixels: give image_size as well"),
        ({"num_heads": 2, "resblock_updown": False}, r"resblock_updown False, the tensors say True$"),
        ({"num_heads": 2, "head": 2}, r"unknown setting 'head'"),
        ({"num_heads": 2, "dims": 3}, r"dims 3 is not supported; allowed: 2$"),
        ({"num_heads": 2, "conv_resample": False}, r"conv_resample False is not supported; allowed: True$"),
    ],
)
def test_a_config_that_is_not_the_file_s_is_one_line(config, message, random_file, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        sfumato.load_nets(small(tmp_path, random_file), config=config)
    assert "\n" not in str(error.value)


def test_levels_of_a_classifier_that_could_be_several(random_file, tmp_path):
    """Six blocks of one width without attention are 2 levels of 2, or 3 of 1."""
    config = CLASSIFIER | {"channel_mult": [1, 1, 1], "attention_resolutions": [], "pool": "adaptive"}
    save_file(random_file(names_of("adm-classifier", config)), tmp_path / "a.safetensors")
    heads = {"num_head_channels": 16}
    for depth, levels in ((1, 3), (2, 2)):
        net = sfumato.load_nets(tmp_path / "a.safetensors", config={**heads, "classifier_depth": depth})
        assert len(net["classifier"].config.encoder.levels) == levels
    with pytest.raises(ValueError, match=r"num_res_blocks \(classifier_depth\) 1, 2, 5, not None: give"):
        sfumato.load_nets(tmp_path / "a.safetensors", config=heads)


def test_a_classifier_is_bound_to_its_size():
    config = CLASSIFIER | {"image_size": 32, "out_channels": 10, "channel_mult": [1, 2, 3]}
    config |= {"attention_resolutions": [2, 4], "num_heads": 1}
    net = sfumato.load_nets(GOLDEN / "adm_classifier/model.safetensors", config=config)["classifier"]
    with pytest.raises(ValueError, match="x is 16x16; this classifier needs 32x32"):
        net(torch.zeros(1, 3, 16, 16), torch.zeros(1))


def test_a_net_that_the_reference_cannot_compute_is_not_written(tmp_path):
    """One with other norms."""
    config = LAYOUTS["adm"].parts[0].config({**SMALL, "effective_in_channels": 3})
    net = UNet(replace(config, block=replace(config.block, norm_groups=16)))
    with pytest.raises(ValueError, match="guided-diffusion has no U-Net with this block"):
        sfumato.save_nets({"net": net}, tmp_path / "a.pt", layout="adm")
    assert not (tmp_path / "a.pt").exists()
