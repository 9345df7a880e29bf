"""T2I-Adapters beside a U-Net: diffusers' places, once per walk, parts of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sfumato
from sfumato.core.types import Conditioning
from sfumato.nets.controlled import Controlled, ControlUse
from sfumato.nets.presets import UNETS
from sfumato.nets.t2i_adapter import T2IAdapter, T2IAdapterConfig, places
from sfumato.nets.unet import LevelConfig, UNet

diffusers = pytest.importorskip("diffusers")


@torch.no_grad()
def test_maps_are_added_where_diffusers_adds_them(tmp_path: Path) -> None:
    """The places of SDXL: behind a change of resolution, behind two levels, behind the middle."""
    reference = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=(1, 1, 1),
        use_linear_projection=True,
    )
    for p in reference.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1)
    reference.eval().save_pretrained(tmp_path)
    unet = sfumato.load_nets(tmp_path)["net"]
    config = T2IAdapterConfig(unshuffle=4, widths=(32, 64, 64, 64), blocks=1, kind="xl")
    adapter = T2IAdapter(config)
    x, t, tokens = torch.randn(2, 4, 16, 16), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 24)
    hint = torch.rand(2, 3, 32, 32)
    maps = [0.6 * v for v in adapter(hint)]
    # diffusers adds in place and takes out of the list what it has added.
    expected = reference(x, t, tokens, down_intrablock_additional_residuals=[v.clone() for v in maps])[0]
    net = Controlled(unet, [adapter], [ControlUse(scale=0.6)])
    cond = Conditioning(tokens=tokens, hint=hint)
    out = net(x, t, cond)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()  # float32 sums in another order
    assert [place.reduction for place in places(unet.config)] == [2, 2, 4, 4]
    for i in range(4):  # none of the four is idle
        silent = [v * (j != i) for j, v in enumerate(maps)]
        other = reference(x, t, tokens, down_intrablock_additional_residuals=silent)[0]
        assert (other - expected).abs().max() > 1e-3


@torch.no_grad()
def test_maps_are_made_once_and_act_for_a_share_of_the_steps() -> None:
    large = UNETS["sd15"]()
    first = replace(large.levels[0], channels=32)
    unet = UNet(replace(large, levels=(first, LevelConfig(channels=64)), middle=None))
    torch.nn.init.normal_(unet.conv_out.weight)
    adapter = T2IAdapter(T2IAdapterConfig(unshuffle=2, widths=(32, 64), blocks=1))
    calls = []
    adapter.register_forward_hook(lambda *_: calls.append(1))
    net = Controlled(unet, [adapter], [ControlUse(stop=0.5)])
    cond = Conditioning(tokens=torch.randn(1, 5, 768), hint=torch.rand(1, 3, 16, 16))
    times, x = torch.tensor([900.0, 600.0, 300.0, 100.0, float("nan")]), torch.randn(1, 4, 8, 8)
    walk, ready = net.plan(times), net.prepare(cond)
    differs = [
        not torch.equal(walk(x, t[None], ready), unet(x, t[None], replace(cond, hint=None)))
        for t in times[:-1]
    ]
    assert differs == [True, True, False, False]
    assert len(calls) == 1
