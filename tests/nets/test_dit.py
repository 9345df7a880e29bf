"""DiT: zero at birth, any size, text by cross-attention prepared once."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sfumato.core.types import Conditioning
from sfumato.nets.dit import DiT, DiTConfig
from sfumato.nets.dit_block import Told
from sfumato.nets.patches import patchify, sincos_positions, unpatchify

TEXT = DiTConfig(width=32, depth=2, heads=2, text_dim=12, pooled_dim=10, num_classes=5, qk_norm=True)


def conditioning(batch: int = 2) -> Conditioning:
    g = torch.Generator().manual_seed(1)
    mask = torch.tensor([[True] * 4, [True] * 2 + [False] * 2])[:batch]
    return Conditioning(
        label=torch.arange(batch),
        tokens=torch.randn(batch, 4, 12, generator=g),
        pooled=torch.randn(batch, 10, generator=g),
        mask=mask,
    )


def awake(config: DiTConfig) -> DiT:
    """A net whose zero-initialized layers are random too, so that everything reaches the output."""
    torch.manual_seed(0)
    net = DiT(config)
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net.eval()


@pytest.mark.parametrize("shared", [False, True])
def test_a_fresh_net_is_zero_and_its_blocks_are_the_identity(shared: bool) -> None:
    net = DiT(replace(TEXT, shared_modulation=shared))
    x = torch.randn(2, 4, 8, 8)
    assert net(x, torch.rand(2), conditioning()).abs().max() == 0
    tokens, parts = torch.randn(2, 16, 32), net.modulations(torch.randn(2, 2, 32))
    kv = net.blocks[0].cross.project(torch.randn(2, 4, 12))
    assert torch.equal(net.blocks[0](tokens, parts[0], kv, Told(None, None, None)), tokens)


def test_published_parameter_counts() -> None:
    """DiT-S/2 and DiT-XL/2 with 1000 classes and learned variance, less their fixed position tables."""
    small = DiTConfig(width=384, depth=12, heads=6, num_classes=1000, out_channels=8)
    large = DiTConfig(width=1152, depth=28, heads=16, num_classes=1000, out_channels=8)
    with torch.device("meta"):
        counts = [sum(p.numel() for p in DiT(c).parameters()) for c in (small, large)]
    assert counts[1] == 675_129_632 - 294_912
    assert round(counts[0] / 1e6) == 33


def test_prepared_text_gives_the_same_output() -> None:
    net = awake(TEXT)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.rand(2), conditioning()
    assert torch.equal(net(x, t, cond), net(x, t, net.prepare(cond)))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("field", ["tokens", "pooled", "label", "mask"])
def test_every_kind_of_conditioning_reaches_the_output(field: str, shared: bool) -> None:
    net = awake(replace(TEXT, shared_modulation=shared))
    x, t, cond = torch.randn(2, 4, 8, 8), torch.rand(2), conditioning()
    changed = dict(cond.items())
    changed[field] = ~changed[field] if field == "mask" else changed[field] + 1
    assert (net(x, t, cond) - net(x, t, Conditioning(**changed))).abs().max() > 1e-4


def test_masked_tokens_are_not_read() -> None:
    net = awake(TEXT)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.rand(2), conditioning()
    changed = dict(cond.items())
    changed["tokens"] = torch.where(cond.mask[..., None], cond.tokens, torch.tensor(7.0))
    torch.testing.assert_close(net(x, t, cond), net(x, t, Conditioning(**changed)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_any_size_and_dtype(dtype: torch.dtype) -> None:
    net = awake(DiTConfig(width=32, depth=1, heads=2)).to(dtype)
    out = net(torch.randn(1, 4, 6, 10, dtype=dtype), torch.rand(1), Conditioning())
    assert out.shape == (1, 4, 6, 10)
    assert out.dtype == dtype


def test_wrong_size_and_missing_text_are_one_clear_line() -> None:
    net = DiT(TEXT)
    with pytest.raises(ValueError, match="5x8 is not a multiple of the patch size 2"):
        net(torch.randn(2, 4, 5, 8), torch.rand(2), conditioning())
    with pytest.raises(ValueError, match=r"needs cond\.label"):
        net(torch.randn(2, 4, 8, 8), torch.rand(2), Conditioning())


def test_patchify_round_trip() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert patchify(x, 2).shape == (2, 6, 12)
    assert torch.equal(unpatchify(patchify(x, 2), (2, 3), 2), x)


def test_positions_put_the_column_first() -> None:
    table = sincos_positions(2, 3, 8)[0]
    assert table.shape == (6, 8)
    assert table[1, 0].item() == pytest.approx(math.sin(1.0))  # row 0, column 1
    assert table[3, 4].item() == pytest.approx(math.sin(1.0))  # row 1, column 0
    assert table[3, 0] == 0
