"""Every named shape has exactly the parameters of the published network, on the meta device."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sfumato.core.config import from_json, to_json
from sfumato.nets.autoencoder import Autoencoder, AutoencoderConfig
from sfumato.nets.presets import AUTOENCODERS, UNETS
from sfumato.nets.unet import UNet, UNetConfig

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/parameter_counts.json").read_text("utf-8"))


def counted(net: nn.Module) -> tuple[int, str]:
    """Number of parameters, and a digest of how often each shape occurs; ones are dropped from shapes."""
    shapes = ["x".join(str(n) for n in p.shape if n != 1) for p in net.parameters()]
    table = "\n".join(f"{shape} {n}" for shape, n in sorted(Counter(shapes).items()))
    return sum(p.numel() for p in net.parameters()), hashlib.sha256(table.encode()).hexdigest()[:16]


def unet(config: UNetConfig) -> UNet:
    with torch.device("meta"):
        return UNet(config)


def test_every_preset_has_a_golden_count() -> None:
    assert set(UNETS) == set(GOLDEN["unets"]) | set(IMAGEN)
    assert set(AUTOENCODERS) == set(GOLDEN["autoencoders"])


# Never published: what the paper's numbers come to here, and the rounded count that it states.
IMAGEN = {
    "imagen-64": (2_258_474_499, 2.0e9),
    "imagen-256": (652_043_011, 0.6e9),
    "imagen-1024": (647_844_611, None),  # 400M in the paper, whose shapes must differ from those it lists
}


@pytest.mark.parametrize("name", IMAGEN)
def test_imagen_has_about_the_parameters_of_the_paper(name: str) -> None:
    count, stated = IMAGEN[name]
    net = unet(UNETS[name]())
    assert counted(net)[0] == count
    assert stated is None or abs(count - stated) < 0.15 * stated
    efficient = name != "imagen-64"
    assert (net.encoder.blocks[0].res is None) == efficient  # the resolution falls before the first block


@pytest.mark.parametrize("name", sorted(GOLDEN["unets"]))
def test_unet_has_the_published_parameters(name: str) -> None:
    golden = GOLDEN["unets"][name]
    assert counted(unet(UNETS[name]())) == (golden["parameters"], golden["shapes"])


@pytest.mark.parametrize("name", sorted(AUTOENCODERS))
def test_autoencoder_has_the_published_parameters(name: str) -> None:
    golden = GOLDEN["autoencoders"][name]
    with torch.device("meta"):
        net = Autoencoder(AUTOENCODERS[name]())
    assert counted(net) == (golden["parameters"], golden["shapes"])


def test_headline_counts() -> None:
    """The figures that the papers and model cards state, independent of the golden file."""
    headline = {
        "sd15": 859_520_964,
        "sd2": 865_910_724,
        "sdxl-base": 2_567_463_684,
        "sdxl-refiner": 2_259_526_660,
        "adm-imagenet256": 553_838_086,
        "ddpm-cifar10": 35_746_307,
    }
    assert {name: GOLDEN["unets"][name]["parameters"] for name in headline} == headline
    # Published files hold more than the U-Net: GLIDE's text tower (16 layers of width 512, tables, last
    # norm) and Karlo's null image embedding.
    tower = 16 * (12 * 512**2 + 13 * 512) + (50_257 + 2 * 128) * 512 + 2 * 512
    files = {
        "glide-base": (385_030_726, tower),
        "glide-base-inpaint": (385_037_638, tower),
        "glide-upsampler": (398_361_286, tower),
        "glide-upsampler-inpaint": (398_368_198, tower),
        "karlo-decoder": (893_318_086, 768),
    }
    for name, (total, rest) in files.items():
        golden = GOLDEN["unets"][name]
        assert golden["parameters"] + rest == golden["file_total"] == total


@pytest.mark.parametrize("name", sorted(UNETS))
def test_unet_presets_survive_json(name: str) -> None:
    config = UNETS[name]()
    assert from_json(UNetConfig, json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize("name", sorted(AUTOENCODERS))
def test_autoencoder_presets_survive_json(name: str) -> None:
    config = AUTOENCODERS[name]()
    assert from_json(AutoencoderConfig, json.loads(json.dumps(to_json(config)))) == config


def test_counting_sees_a_changed_width() -> None:
    """The check itself: one more input channel changes both numbers."""
    config = UNETS["ddpm-cifar10"]()
    total, digest = counted(unet(config))
    wider, other = counted(unet(replace(config, in_channels=4)))
    assert wider == total + 9 * 128
    assert other != digest
