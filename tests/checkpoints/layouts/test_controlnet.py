"""ControlNets: published names both ways, tiny twins of diffusers' class, several at once, other bases."""

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
from sfumato.core.types import Conditioning
from sfumato.nets.controlnet import ControlNet
from sfumato.nets.presets import UNETS

diffusers = pytest.importorskip("diffusers")

GOLDEN = Path(__file__).parents[2] / "golden/layouts"
FILES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "controlnet_sd15_diffusers": ("controlnet-diffusers", "sd15", {}),
    "controlnet_sd15_original": ("controlnet-compvis", "sd15", {}),
    "controlnet_sdxl_diffusers": (
        "controlnet-diffusers",
        "sdxl-base",
        {"attention_head_dim": [5, 10, 20], "addition_time_embed_dim": 256},
    ),
}
TINY: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
    "conditioning_embedding_out_channels": (8, 12, 16),
}
XL = TINY | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 24,
}


@pytest.mark.parametrize("file", sorted(FILES))
def test_published_files_both_ways(file: str) -> None:
    layout, base, given = FILES[file]
    whole = json.loads(gzip.decompress((GOLDEN / f"{file}.json.gz").read_bytes()))
    shapes = {n: tuple(shape) for n, shape in whole.items()}
    assert next(name for name, kind in LAYOUTS.items() if kind.fits(shapes)) == layout
    (part,) = LAYOUTS[layout].parts
    shapes = {n.removeprefix(part.prefix): v for n, v in shapes.items()}
    config = part.config(part.settings(shapes, given))
    with torch.device("meta"):
        net = ControlNet(config)
    unet = UNETS[base]()
    assert (config.encoder.levels, config.encoder.embedding) == (unet.levels, unet.embedding)
    rows = part.names(config)
    ours = rows.load({n: torch.empty(v, device="meta") for n, v in shapes.items()}, where=file)
    assert {n: v.shape for n, v in ours.items()} == {n: v.shape for n, v in net.state_dict().items()}
    assert {n: tuple(v.shape) for n, v in rows.save(ours, where=file).items()} == shapes


def twin(options: dict[str, Any], path: Path) -> Any:
    torch.manual_seed(0)
    net = diffusers.ControlNetModel(**options)
    for p in net.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1)
    net.save_pretrained(path)
    return net.eval()


@pytest.mark.parametrize(
    "options", [TINY, XL, TINY | {"global_pool_conditions": True}], ids=["1", "xl", "pooled"]
)
@torch.no_grad()
def test_twins_compute_the_same_and_are_written_back(options: dict[str, Any], tmp_path: Path) -> None:
    reference = twin(options, tmp_path / "theirs")
    net = sfumato.load_nets(tmp_path / "theirs")["control"]
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    tokens, hint = torch.randn(2, 5, 24), torch.rand(2, 3, 32, 32)
    cond = Conditioning(tokens=tokens, hint=hint, pooled=torch.randn(2, 24), micro=100 * torch.rand(2, 6))
    added = {"text_embeds": cond.pooled, "time_ids": cond.micro}
    skips, middle = reference(x, t, tokens, hint, 1.0, added_cond_kwargs=added, return_dict=False)
    ours = net(x, t, cond)
    assert len(ours.skips) == len(skips)
    for a, b in zip((*ours.skips, ours.middle), (*skips, middle), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()  # float32 sums in another order
    sfumato.save_nets({"control": net}, tmp_path / "again", layout="controlnet-diffusers")
    again = diffusers.ControlNetModel.from_pretrained(tmp_path / "again")
    assert {k: v for k, v in again.config.items() if not k.startswith("_")} == {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in reference.config.items()
        if not k.startswith("_")
    }
    for n, v in reference.state_dict().items():
        assert torch.equal(v, again.state_dict()[n])


def test_original_files_are_the_same_net(tmp_path: Path) -> None:
    twin(TINY, tmp_path / "theirs")
    net = sfumato.load_nets(tmp_path / "theirs")["control"]
    sfumato.save_nets({"control": net}, tmp_path / "a.safetensors", layout="controlnet-compvis")
    state = load_file(tmp_path / "a.safetensors")
    assert all(name.startswith("control_model.") for name in state)
    save_file({n.removeprefix("control_model."): v for n, v in state.items()}, tmp_path / "b.safetensors")
    for name in ("a", "b"):
        again = sfumato.load_nets(tmp_path / f"{name}.safetensors", config={"num_heads": 4})["control"]
        assert again.config == net.config
        assert all(torch.equal(v, again.state_dict()[n]) for n, v in net.state_dict().items())


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("controlnet_conditioning_channel_order", "bgr", "bgr is not supported .* allowed: rgb"),
        ("conditioning_channels", 1, "the config says conditioning_channels 1, the tensors say 3"),
        ("block_out_channels", [32, 32], "the config says block_out_channels .* the tensors say"),
    ],
)
def test_settings_that_do_not_fit(name: str, value: object, said: str, tmp_path: Path) -> None:
    twin(TINY, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(ValueError, match=said):
        sfumato.load_nets(tmp_path)
