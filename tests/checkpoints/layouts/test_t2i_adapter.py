"""T2I-Adapters: published names both ways, tiny twins of diffusers' class, files without a config."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sfumato
from sfumato.checkpoints.layouts import LAYOUTS
from sfumato.nets.presets import UNETS
from sfumato.nets.t2i_adapter import T2IAdapter, check_base

diffusers = pytest.importorskip("diffusers")

GOLDEN = Path(__file__).parents[2] / "golden/layouts"
FILES = {
    "t2i_adapter_full_sd15_diffusers": ("full_adapter", 8, "sd15", "sdxl-base"),
    "t2i_adapter_full_xl_diffusers": ("full_adapter_xl", 16, "sdxl-base", "sd15"),
    "t2i_adapter_light_diffusers": ("light_adapter", 8, "sd15", "sdxl-base"),
}
TINY: dict[str, dict[str, Any]] = {
    "full": {"channels": [8, 12, 12], "num_res_blocks": 2, "downscale_factor": 8},
    "gray": {"channels": [8, 12], "num_res_blocks": 1, "downscale_factor": 8, "in_channels": 1},
    "xl": {
        "channels": [8, 12, 16, 16],
        "num_res_blocks": 2,
        "downscale_factor": 16,
        "adapter_type": "full_adapter_xl",
    },
    "light": {
        "channels": [8, 12],
        "num_res_blocks": 3,
        "downscale_factor": 8,
        "adapter_type": "light_adapter",
    },
}


@pytest.mark.parametrize("file", sorted(FILES))
def test_published_files_both_ways(file: str) -> None:
    kind, factor, base, other = FILES[file]
    whole = json.loads(gzip.decompress((GOLDEN / f"{file}.json.gz").read_bytes()))
    shapes = {n: tuple(shape) for n, shape in whole.items()}
    assert next(n for n, layout in LAYOUTS.items() if layout.fits(shapes)) == "t2i-adapter-diffusers"
    (part,) = LAYOUTS["t2i-adapter-diffusers"].parts
    shapes = {n.removeprefix(part.prefix): v for n, v in shapes.items()}
    settings = part.settings(shapes, {})  # without its config.json
    assert (settings["adapter_type"], settings["downscale_factor"]) == (kind, factor)
    config = part.config(settings)
    with torch.device("meta"):
        net = T2IAdapter(config)
    rows = part.names(config)
    ours = rows.load({n: torch.empty(v, device="meta") for n, v in shapes.items()}, where=file)
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in net.state_dict().items()}
    assert {n: tuple(v.shape) for n, v in rows.save(ours, where=file).items()} == shapes
    check_base(UNETS[base](), config)
    with pytest.raises(ValueError, match="this T2I-Adapter is for another base, a U-Net that takes maps"):
        check_base(UNETS[other](), config)


def twin(kind: str, path: Path) -> Any:
    net = diffusers.T2IAdapter(**TINY[kind])
    net.save_pretrained(path)
    return net.eval()


@pytest.mark.parametrize("kind", sorted(TINY))
@torch.no_grad()
def test_twins_compute_the_same_and_are_written_back(kind: str, tmp_path: Path) -> None:
    reference = twin(kind, tmp_path / "theirs")
    net = sfumato.load_nets(tmp_path / "theirs")["adapter"]
    hint = torch.rand(2, reference.config.in_channels, 96, 80)  # odd numbers of squares on both sides
    ours, theirs = net(hint), reference(hint)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()  # float32 sums in another order
    sides = [96 // v.shape[-2] for v in net(torch.rand(1, reference.config.in_channels, 96, 96))]
    assert tuple(sides) == net.config.reductions
    sfumato.save_nets({"adapter": net}, tmp_path / "again", layout="t2i-adapter-diffusers")
    again = diffusers.T2IAdapter.from_pretrained(tmp_path / "again")
    told = [{k: v for k, v in one.config.items() if not k.startswith("_")} for one in (again, reference)]
    assert told[0] == told[1]
    for n, v in reference.state_dict().items():
        assert torch.equal(v, again.state_dict()[n])


@pytest.mark.parametrize("kind", sorted(TINY))
def test_files_without_a_config_are_the_same_net(kind: str, tmp_path: Path) -> None:
    twin(kind, tmp_path / "theirs")
    net = sfumato.load_nets(tmp_path / "theirs")["adapter"]
    original = "t2i-adapter-light" if kind == "light" else "t2i-adapter"
    sfumato.save_nets({"adapter": net}, tmp_path / "original.safetensors", layout=original)
    first = "body.0.body.0.block1.weight" if kind == "light" else "body.0.block1.weight"
    state = load_file(tmp_path / "original.safetensors")
    assert first in state
    if kind in ("full", "xl"):  # two blocks for each map, counted through
        assert "body.2.in_conv.weight" in state
        assert "body.3.block2.weight" in state
    state = load_file(tmp_path / "theirs/diffusion_pytorch_model.safetensors")
    save_file(state, tmp_path / "whole.safetensors")
    save_file({n.removeprefix("adapter."): v for n, v in state.items()}, tmp_path / "bare.safetensors")
    for name in ("original", "whole", "bare"):
        again = sfumato.load_nets(tmp_path / f"{name}.safetensors")["adapter"]
        assert again.config == net.config
        assert all(torch.equal(v, again.state_dict()[n]) for n, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("adapter_type", "half_adapter", "unknown adapter_type 'half_adapter'"),
        ("adapter_type", "light_adapter", "the config says adapter_type light_adapter, and the tensors are"),
        ("downscale_factor", 7, "downscale_factor 7 does not fit the 192 channels of the first tensor"),
        ("channels", [8, 8, 12], "the config says channels .* the tensors say"),
    ],
)
def test_settings_that_do_not_fit(name: str, value: object, said: str, tmp_path: Path) -> None:
    twin("full", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(ValueError, match=said):
        sfumato.load_nets(tmp_path)


def test_what_the_original_layout_cannot_tell(tmp_path: Path) -> None:
    diffusers.T2IAdapter(channels=[8], num_res_blocks=1, downscale_factor=4).save_pretrained(tmp_path / "a")
    net = sfumato.load_nets(tmp_path / "a")
    with pytest.raises(ValueError, match=r"no tensor of the original layout says .* by squares of 4"):
        sfumato.save_nets(net, tmp_path / "b.safetensors", layout="t2i-adapter")


def test_pictures_that_do_not_fit(tmp_path: Path) -> None:
    twin("gray", tmp_path)
    net = sfumato.load_nets(tmp_path)["adapter"]
    with pytest.raises(ValueError, match="the hint is 16x16 pixels of 3 channels; this T2I-Adapter reads 1"):
        net(torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"the hint is 20x16 .* sides that are multiples of 8"):
        net(torch.rand(1, 1, 16, 20))
