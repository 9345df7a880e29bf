"""Parameters and multiply-adds of the published sizes and block designs, on the meta device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sfumato.core.types import Conditioning
from sfumato.nets.dit import DiT, DiTConfig
from sfumato.nets.presets import DITS

# Table 1 and appendix of arXiv:2212.09748: giga multiply-adds at 32x32, millions of parameters.
GFLOPS = {
    "dit-s-8": 0.36,
    "dit-s-4": 1.41,
    "dit-s-2": 6.06,
    "dit-b-8": 1.42,
    "dit-b-4": 5.57,
    "dit-b-2": 23.01,
    "dit-l-8": 5.01,
    "dit-l-4": 19.70,
    "dit-l-2": 80.71,
    "dit-xl-8": 7.39,
    "dit-xl-4": 29.05,
    "dit-xl-2": 118.64,
}
MILLIONS = {"s": 33, "b": 130, "l": 458, "xl": 675}
# Table 4 and figure 5: DiT-XL/2 in the four designs.
DESIGNS = {
    "in_context": (119.37, 449),
    "cross": (137.62, 598),
    "adaln": (118.56, 600),
    "adaln_zero": (118.64, 675),
}


def built(config: DiTConfig) -> DiT:
    with torch.device("meta"):
        return DiT(config).eval()


def millions(net: nn.Module) -> float:
    return sum(p.numel() for p in net.parameters()) / 1e6


def giga(net: DiT, side: int) -> float:
    """Multiply-adds of one picture, a norm counted as one per element as the paper's counter does."""
    c = net.config
    x, t = torch.empty(1, c.in_channels, side, side, device="meta"), torch.empty(1, device="meta")
    norms: list[int] = []
    hooks = [
        m.register_forward_hook(lambda m, args, out: norms.append(out.numel()))
        for m in net.modules()
        if isinstance(m, nn.LayerNorm)
    ]
    with FlopCounterMode(display=False) as counter:
        net(x, t, Conditioning(label=torch.empty(1, dtype=torch.long, device="meta")))
    for hook in hooks:
        hook.remove()
    return (counter.get_total_flops() / 2 + sum(norms)) / 1e9


@pytest.mark.parametrize("name", DITS)
def test_published_sizes(name):
    net = built(DITS[name]())
    # The paper leaves off the last digit of some: 0.006 is half of one and a little.
    assert giga(net, 32) == pytest.approx(GFLOPS[name], abs=0.006)
    assert round(millions(net)) == pytest.approx(MILLIONS[name.split("-")[1]], abs=1)


def test_512_pixels():
    assert giga(built(DITS["dit-xl-2"]()), 64) == pytest.approx(524.6, abs=0.1)


@pytest.mark.parametrize("block", DESIGNS)
def test_published_designs(block):
    gigas, parameters = DESIGNS[block]
    net = built(replace(DITS["dit-xl-2"](), block=block))
    # The cross-attention design has a third norm per block, which the paper may have put elsewhere: 0.008.
    assert giga(net, 32) == pytest.approx(gigas, abs=0.01)
    assert millions(net) == pytest.approx(parameters, abs=0.6)


def test_exact_counts_of_released_files():
    """The published tensors less their fixed position tables."""
    assert millions(built(DITS["dit-xl-2"]())) * 1e6 == 675_129_632 - 294_912
    assert millions(built(DITS["dit-s-8"]())) * 1e6 == 33_148_160 - 6_144


def test_swiglu_and_sharing_keep_to_the_budget():
    plain = built(DITS["dit-s-2"]())
    gated = built(replace(plain.config, swiglu=True))
    assert millions(gated) == pytest.approx(millions(plain), rel=2e-3)
    assert giga(gated, 32) == pytest.approx(giga(plain, 32), rel=2e-3)
    shared = built(replace(plain.config, shared_modulation=True))
    assert millions(shared) == pytest.approx(millions(plain) * (1 - 0.32 * 11 / 12), rel=1e-2)
