from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sfumato.core.types import Conditioning
from sfumato.nets.attention import AttentionConfig
from sfumato.nets.blocks import BlockConfig
from sfumato.nets.dit import DiT, DiTConfig
from sfumato.nets.embedding import EmbeddingConfig, TokensConfig
from sfumato.nets.unet import UNet, UNetConfig, levels
from sfumato.training import compute
from sfumato.training.compute import autocast, compile_parts, recompute

CPU = torch.device("cpu")


def unet(kind: str) -> UNet:
    attention = AttentionConfig(kind=kind, heads=2)
    return UNet(
        UNetConfig(
            in_channels=3,
            out_channels=6,
            levels=levels(8, (1, 2), 1, attention=attention, at=(1,)),
            middle=attention,
            embedding=EmbeddingConfig(time_dim=8, dim=16),
            tokens=None if kind == "self" else TokensConfig(dim=7, masked=True),
            block=BlockConfig(norm_groups=4),
        )
    )


NETS = {
    **{f"unet-{kind}": lambda kind=kind: unet(kind) for kind in ("self", "appended", "transformer")},
    "dit": lambda: DiT(
        DiTConfig(in_channels=3, out_channels=6, width=16, depth=4, heads=2, text_dim=7, qk_norm=True)
    ),
}


def inputs() -> tuple[Tensor, Tensor, Conditioning]:
    tokens, mask = torch.randn(2, 4, 7), torch.arange(4) < torch.tensor([[2], [4]])
    return torch.randn(2, 3, 16, 16), torch.tensor([1.5, 900.0]), Conditioning(tokens=tokens, mask=mask)


def saved_bytes(net: nn.Module, x: Tensor, t: Tensor, cond: Conditioning) -> tuple[Tensor, int]:
    """Output, and the bytes that autograd keeps for the backward pass."""
    total = 0

    def pack(v: Tensor) -> Tensor:
        nonlocal total
        total += v.nbytes
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        return net(x, t, cond), total


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("frozen", [False, True])
def test_recomputing_keeps_gradients_and_saves_memory(name, frozen):
    net = NETS[name]().requires_grad_(not frozen)
    for p in net.parameters():  # none at zero, so that everything shows in the gradients
        nn.init.normal_(p, mean=float(p.detach().mean()), std=0.2)
    twin = copy.deepcopy(net)
    recompute({"net": twin})
    x, t, cond = inputs()
    gradients, sizes = [], []
    for one in (net, twin):
        leaf = x.clone().requires_grad_()
        y, size = saved_bytes(one, leaf, t, cond)
        y.square().sum().backward()
        sizes.append(size)
        gradients.append([leaf.grad, *(p.grad for p in one.parameters() if p.requires_grad)])
    assert gradients[0][0].any()
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)
    assert sizes[1] < 0.6 * sizes[0]
    assert twin.state_dict().keys() == net.state_dict().keys()


def test_bfloat16_is_refused_where_it_is_emulated_and_auto_is_float32_there(monkeypatch):
    monkeypatch.setattr(compute, "has_bfloat16", lambda device: False)
    with pytest.raises(ValueError, match=r"precision is bfloat16, which device 'cpu' only emulates"):
        autocast(CPU, "bfloat16")
    for precision in ("auto", "float32"):
        with autocast(CPU, precision)():
            assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32


def test_auto_is_bfloat16_where_the_device_has_it(monkeypatch):
    monkeypatch.setattr(compute, "has_bfloat16", lambda device: True)
    layer = nn.Linear(2, 2)
    for precision, dtype in (
        ("auto", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("float32", torch.float32),
    ):
        with autocast(CPU, precision)():
            assert layer(torch.ones(1, 2)).dtype == dtype
    assert layer.weight.dtype == torch.float32


@pytest.mark.slow  # a C++ compiler runs
def test_compiled_parts_compute_the_same_under_the_same_names():
    torch.manual_seed(0)
    net = NETS["dit"]()
    for p in net.parameters():
        nn.init.normal_(p, mean=float(p.detach().mean()), std=0.2)
    twin = copy.deepcopy(net)
    compile_parts({"net": twin})
    assert twin.state_dict().keys() == net.state_dict().keys()
    x, t, cond = inputs()
    torch.testing.assert_close(twin(x, t, cond), net(x, t, cond), rtol=1e-4, atol=1e-4)
