"""Attention over pixels, tokens or both against the definition, and its masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sfumato.nets.attention import (
    Attention,
    AttentionConfig,
    AttentionPool,
    SpatialAttention,
    SpatialTransformer,
    spatial_attention,
    token_readers,
)
from sfumato.nets.blocks import Context

# Softmax attention written out in float64 against one fused kernel in float64.
EXACT = {"rtol": 0.0, "atol": 1e-12}


def defined(
    layer: Attention, x: Tensor, read: list[tuple[Tensor, nn.Linear, nn.Linear]], keep: Tensor
) -> Tensor:
    """softmax(q k / sqrt(d)) v, head by head; `read` is what is attended to and by which layers, in order."""
    d = x.shape[2] // layer.heads
    q = layer.q(x)
    k = torch.cat([key(source) for source, key, _ in read], dim=1)
    v = torch.cat([value(source) for source, _, value in read], dim=1)
    heads = []
    for i in range(layer.heads):
        part = slice(i * d, (i + 1) * d)
        logits = q[..., part] @ k[..., part].transpose(1, 2) / d**0.5
        heads.append(logits.masked_fill(~keep[:, None, :], -torch.inf).softmax(-1) @ v[..., part])
    return layer.out(torch.cat(heads, dim=2))


def told(layer: Attention, tokens: Tensor, mask: Tensor | None = None) -> Context:
    return Context(
        torch.empty(0), (layer.keys_values(tokens),), None if mask is None else mask[:, None, None, :]
    )


def test_self_attention() -> None:
    layer = Attention(12, 3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    want = defined(layer, x, [(x, layer.k, layer.v)], torch.ones(2, 5, dtype=torch.bool))
    torch.testing.assert_close(layer(x, Context(torch.empty(0), (), None)), want, **EXACT)


@pytest.mark.parametrize("to_self", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_to_tokens(to_self: bool, masked: bool) -> None:
    layer = Attention(12, 3, to_self=to_self, token_dim=7).double()
    x, tokens = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 4, 7, dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    read = [(tokens, layer.token_k, layer.token_v)]
    keep = mask if masked else torch.ones(2, 4, dtype=torch.bool)
    if to_self:
        read.append((x, layer.k, layer.v))
        keep = torch.cat([keep, torch.ones(2, 5, dtype=torch.bool)], dim=1)
    got = layer(x, told(layer, tokens, mask if masked else None))
    torch.testing.assert_close(got, defined(layer, x, read, keep), **EXACT)


def test_masked_tokens_do_not_matter() -> None:
    layer = Attention(12, 3, token_dim=7)
    x, tokens = torch.randn(1, 5, 12), torch.randn(1, 4, 7)
    mask = torch.tensor([[True, True, False, False]])
    other = torch.where(mask[..., None], tokens, 100.0)
    assert torch.equal(layer(x, told(layer, tokens, mask)), layer(x, told(layer, other, mask)))


def test_nothing_to_read_gives_no_nan() -> None:
    """An empty caption masks every token; attention to the tokens alone then reads nothing."""
    layer = Attention(12, 3, to_self=False, token_dim=7)
    x, tokens = torch.randn(1, 5, 12, requires_grad=True), torch.randn(1, 4, 7)
    y = layer(x, told(layer, tokens, torch.zeros(1, 4, dtype=torch.bool)))
    y.square().sum().backward()
    assert torch.equal(y, layer.out.bias.expand_as(y))
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(layer.q.weight.grad).all()


def test_normalized_tokens_ignore_their_scale() -> None:
    layer = Attention(12, 3, token_dim=8, token_groups=4)
    tokens = torch.randn(2, 4, 8)
    for ours, scaled in zip(layer.keys_values(tokens), layer.keys_values(tokens * 50), strict=True):
        torch.testing.assert_close(ours, scaled, rtol=0, atol=1e-4)  # epsilon 1e-5 beside a variance of 1


@pytest.mark.parametrize("kind", ["self", "appended", "transformer"])
def test_fresh_attention_is_the_identity(kind: str) -> None:
    layer = spatial_attention(16, AttentionConfig(kind=kind, heads=2), 7, groups=4, eps=1e-5)
    tokens = torch.randn(2, 4, 7)
    kv = tuple(reader.keys_values(tokens) for reader in token_readers(layer))
    for slot, reader in enumerate(token_readers(layer)):
        reader.slot = slot
    x = torch.randn(2, 16, 3, 5)
    assert torch.equal(layer(x, Context(torch.empty(0), kv, None)), x)


@pytest.mark.parametrize("kind", ["self", "appended", "transformer"])
def test_pixels_keep_their_place_and_layout(kind: str) -> None:
    """Attention knows no positions: permuting the pixels permutes the result. Channels-last stays so."""
    layer = spatial_attention(16, AttentionConfig(kind=kind, heads=2), 7, groups=4, eps=1e-5)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    tokens = torch.randn(2, 4, 7)
    for slot, reader in enumerate(token_readers(layer)):
        reader.slot = slot
    context = Context(torch.empty(0), tuple(r.keys_values(tokens) for r in token_readers(layer)), None)
    x = torch.randn(2, 16, 3, 5).contiguous(memory_format=torch.channels_last)
    y = layer(x, context)
    assert y.is_contiguous(memory_format=torch.channels_last)
    order = torch.randperm(15)
    shuffled = layer(x.flatten(2)[:, :, order].unflatten(2, (3, 5)), context)
    torch.testing.assert_close(shuffled.flatten(2), y.flatten(2)[:, :, order], rtol=0, atol=1e-5)


def test_transformer_reads_tokens_in_every_block() -> None:
    two = AttentionConfig(kind="transformer", heads=2, depth=2)
    assert len(token_readers(SpatialTransformer(16, two, 7, 4))) == 2
    tokens_only = AttentionConfig(kind="transformer", heads=2, depth=2, to_pixels=False)
    assert len(token_readers(SpatialTransformer(16, tokens_only, 7, 4))) == 4


def test_kinds() -> None:
    plain = spatial_attention(16, AttentionConfig(heads=2), 7, groups=4, eps=1e-5)
    assert isinstance(plain, SpatialAttention)
    assert not token_readers(plain)
    tokens_only = AttentionConfig(kind="appended", heads=2, to_pixels=False)
    cross = spatial_attention(16, tokens_only, 7, groups=4, eps=1e-5)
    assert not hasattr(cross.attention, "k")


def test_attention_pool_of_equal_tokens_is_that_token() -> None:
    """A softmax over equal tokens and their mean returns the value of that token, whatever the query."""
    pool = AttentionPool(8, 6, 2)
    nn.init.zeros_(pool.position)
    one = torch.randn(3, 1, 8)
    want = pool.norm2(pool.proj(pool.v(pool.norm1(one))))[:, 0]
    torch.testing.assert_close(pool(one.expand(3, 5, 8)), want, rtol=0, atol=1e-5)


def test_configuration_errors() -> None:
    with pytest.raises(ValueError, match="give exactly one"):
        AttentionConfig()
    with pytest.raises(ValueError, match="give exactly one"):
        AttentionConfig(heads=4, head_dim=32)
    with pytest.raises(ValueError, match="nothing to read"):
        AttentionConfig(heads=4, to_pixels=False)
    with pytest.raises(ValueError, match="head_dim 24 must divide"):
        AttentionConfig(head_dim=24).heads_of(32)
    with pytest.raises(ValueError, match="heads 3 must divide"):
        AttentionConfig(heads=3).heads_of(32)
    with pytest.raises(ValueError, match="reads tokens"):
        spatial_attention(16, AttentionConfig(kind="transformer", heads=2), 0, groups=4, eps=1e-5)
    with pytest.raises(ValueError, match="heads 3 must divide"):
        AttentionPool(8, 6, 3)
    assert AttentionConfig(head_dim=64).heads_of(640) == 10
