"""Norms, residual block, resampling and sinusoids against their formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.nets.blocks import (
    BlockConfig,
    Context,
    Downsample,
    GroupNorm,
    LayerNorm,
    ResBlock,
    Upsample,
    sinusoid,
    zeroed,
)

SMALL = BlockConfig(norm_groups=4)


def context(batch: int = 2, dim: int = 6) -> Context:
    return Context(torch.randn(batch, dim), (), None)


def awake(block: ResBlock) -> ResBlock:
    """With a second convolution that is not zero."""
    nn.init.normal_(block.conv2.weight, std=0.1)
    return block


@pytest.mark.parametrize(("dim", "shift"), [(8, 0.0), (8, 1.0), (7, 0.0), (256, 0.0)])
def test_sinusoid_is_its_formula(dim: int, shift: float) -> None:
    t = torch.tensor([0.0, 0.5, 999.0], dtype=torch.float64)
    half = dim // 2
    rows = [[float(v) * 10_000 ** (-j / (half - shift)) for j in range(half)] for v in t]
    want = [[*map(math.cos, row), *map(math.sin, row)] + [0.0] * (dim % 2) for row in rows]
    got = sinusoid(t, dim, shift=shift)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-12)


def test_sinusoid_orders_and_shapes() -> None:
    t = torch.rand(2, 3) * 1000
    cos_first, sin_first = sinusoid(t, 8), sinusoid(t, 8, cos_first=False)
    assert cos_first.shape == (2, 3, 8)
    assert torch.equal(cos_first, sin_first.roll(4, dims=-1))
    assert not torch.equal(cos_first, sin_first)


def test_sinusoid_of_half_precision_time_is_computed_in_float32() -> None:
    t = torch.tensor([500.0], dtype=torch.bfloat16)  # 500 is exact in bfloat16, 500 * frequency is not
    assert torch.equal(sinusoid(t, 16), sinusoid(t.float(), 16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_compute_in_float32(dtype: torch.dtype) -> None:
    """The rounding of the result is the only one: statistics and affine map are float32's."""
    x = (torch.randn(2, 8, 5) * 3 + 40).to(dtype)
    group, layer = GroupNorm(4, 8).to(dtype), LayerNorm(5).to(dtype)
    for p in (*group.parameters(), *layer.parameters()):
        nn.init.normal_(p)
    want_group = F.group_norm(x.float(), 4, group.weight.float(), group.bias.float()).to(dtype)
    want_layer = F.layer_norm(x.float(), (5,), layer.weight.float(), layer.bias.float()).to(dtype)
    assert torch.equal(group(x), want_group)
    assert torch.equal(layer(x), want_layer)


def test_norms_keep_float64() -> None:
    x = torch.randn(2, 8, 5, dtype=torch.float64)
    got = GroupNorm(4, 8).double()(x)
    grouped = x.view(2, 4, 10)
    want = (grouped - grouped.mean(2, keepdim=True)) / (
        grouped.var(2, correction=0, keepdim=True) + 1e-5
    ).sqrt()
    torch.testing.assert_close(got, want.view_as(x), rtol=0, atol=1e-12)


def test_fresh_residual_block_is_its_skip_path() -> None:
    x = torch.randn(2, 8, 4, 4)
    assert torch.equal(ResBlock((8, 8), 6, SMALL)(x, context()), x)
    widening = ResBlock((8, 12), 6, SMALL)
    assert torch.equal(widening(x, context()), widening.skip(x))


@pytest.mark.parametrize("film", [False, True])
def test_residual_block_is_its_formula(film: bool) -> None:
    block = awake(ResBlock((8, 12), 6, replace(SMALL, film=film, residual_scale=0.5, activation="gelu")))
    x, c = torch.randn(2, 8, 4, 4), context()
    h = block.conv1(F.gelu(F.group_norm(x, 4)))
    e = block.embed(c.embedding)[..., None, None]
    if film:  # the scale comes first
        scale, shift = e[:, :12], e[:, 12:]
        h = F.group_norm(h, 4) * (1 + scale) + shift
    else:
        h = F.group_norm(h + e, 4)
    want = 0.5 * (block.skip(x) + block.conv2(F.gelu(h)))
    torch.testing.assert_close(block(x, c), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "size"), [("down", 2), ("up", 8)])
def test_residual_resampling_acts_on_branch_and_skip(kind: str, size: int) -> None:
    block = ResBlock((8, 8), 6, SMALL, kind)
    x = torch.randn(2, 8, 4, 4)
    scaled = F.avg_pool2d(x, 2) if kind == "down" else x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(block(x, context()), scaled)  # a fresh block is its skip path
    assert awake(block)(x, context()).shape == (2, 8, size, size)
    assert sum(p.numel() for p in block.parameters()) == sum(
        p.numel() for p in ResBlock((8, 8), 6, SMALL).parameters()
    )


def test_dropout_acts_in_training_only() -> None:
    block = awake(ResBlock((8, 8), 6, replace(SMALL, dropout=0.5)))
    x, c = torch.randn(2, 8, 4, 4), context()
    assert not torch.equal(block(x, c), block(x, c))
    block.eval()
    assert torch.equal(block(x, c), block(x, c))


@pytest.mark.parametrize("asymmetric", [False, True])
def test_downsample_padding(asymmetric: bool) -> None:
    """With all weights one, each output is the sum of the pixels that it sees."""
    down = Downsample(1, asymmetric=asymmetric)
    nn.init.ones_(down.conv.weight)
    nn.init.zeros_(down.conv.bias)
    seen = down(torch.ones(1, 1, 4, 4), context())[0, 0]
    want = [[9.0, 6.0], [6.0, 4.0]] if asymmetric else [[4.0, 6.0], [6.0, 9.0]]
    assert torch.equal(seen, torch.tensor(want))


def test_upsample_doubles() -> None:
    assert Upsample(3)(torch.randn(2, 3, 4, 5), context()).shape == (2, 3, 8, 10)


def test_zeroed_zeroes_everything() -> None:
    layer: nn.Conv2d = zeroed(nn.Conv2d(2, 3, 1))
    parameters: list[Tensor] = list(layer.parameters())
    assert [p.count_nonzero().item() for p in parameters] == [0, 0]
