"""The text tower: padding must not leak into the meaning of a text."""

from __future__ import annotations

import pytest
import torch

from sfumato.nets.text import TextTransformer, TextTransformerConfig


@pytest.fixture
def tower() -> TextTransformer:
    torch.manual_seed(0)
    return TextTransformer(
        TextTransformerConfig(vocab_size=20, context=8, width=16, depth=2, heads=2)
    ).double()


def test_padding_changes_nothing(tower: TextTransformer) -> None:
    ids = torch.tensor([[1, 5, 6, 2, 0, 0, 0, 0]])
    mask = ids != 0
    tokens, pooled = tower(ids, mask)
    garbage = torch.where(mask, ids, torch.tensor(9))
    tokens2, pooled2 = tower(garbage, mask)
    short_tokens, short_pooled = tower(ids[:, :4], mask[:, :4])
    assert torch.equal(tokens, tokens2)
    assert torch.equal(pooled, pooled2)
    torch.testing.assert_close(tokens[:, :4], short_tokens)
    torch.testing.assert_close(pooled, short_pooled)
    assert tokens[:, 4:].abs().max() == 0


def test_order_of_the_words_matters(tower: TextTransformer) -> None:
    ids = torch.tensor([[1, 5, 6, 2], [1, 6, 5, 2]])
    _, pooled = tower(ids, torch.ones_like(ids, dtype=torch.bool))
    assert (pooled[0] - pooled[1]).abs().max() > 1e-4


def test_too_many_tokens_are_refused(tower: TextTransformer) -> None:
    ids = torch.ones(1, 9, dtype=torch.long)
    with pytest.raises(ValueError, match="9 tokens for a text tower with a context of 8"):
        tower(ids, ids.bool())


def test_every_parameter_gets_a_gradient(tower: TextTransformer) -> None:
    ids = torch.tensor([[1, 5, 6, 2, 0, 0, 0, 0]])
    tokens, pooled = tower(ids, ids != 0)
    (tokens.square().sum() + pooled[:, 0].sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.parameters())
