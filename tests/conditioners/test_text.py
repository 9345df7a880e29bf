from __future__ import annotations

import pytest
import torch

from sfumato.conditioners.text import TokenText
from sfumato.core.types import Inputs
from sfumato.nets.text import TextTransformer, TextTransformerConfig
from sfumato.text.tokenizers import Tokenizer


@pytest.fixture(scope="module")
def conditioner():
    tokenizer = Tokenizer.train(["red heart", "blue star"], vocab_size=40, context=6)
    torch.manual_seed(0)
    config = TextTransformerConfig(vocab_size=tokenizer.vocab_size, context=6, width=8, depth=1, heads=2)
    return TokenText(tokenizer, TextTransformer(config))


def test_tokens_mask_and_pooled(conditioner):
    cond = conditioner(Inputs(n=2, text=["red heart", ""]))
    assert cond.tokens.shape == (2, 6, 8)
    assert cond.mask.shape == (2, 6)
    assert cond.pooled.shape == (2, 8)
    assert cond.mask.sum(1).tolist() == [4, 2]  # start, two words, end; start, end


def test_no_text_is_the_empty_text(conditioner):
    torch.testing.assert_close(
        conditioner(Inputs(n=2)).tokens, conditioner(Inputs(n=2, text=["", ""])).tokens, rtol=0, atol=0
    )


def test_null_is_the_empty_text_or_the_negative_one(conditioner):
    inputs = Inputs(n=2, text=["red heart", "blue star"])
    cond = conditioner(inputs)
    empty = conditioner.encode(["", ""])
    null = conditioner.null(inputs, cond)
    assert sorted(k for k, _ in null.items()) == ["mask", "pooled", "tokens"]
    # One row is encoded for both: batches of 1 and 2 may round differently in float32.
    torch.testing.assert_close(null.tokens, empty.tokens, rtol=0, atol=1e-6)
    negative = Inputs(n=2, text=inputs.text, negative=["star", ""])
    rows = conditioner.null(negative, cond)
    torch.testing.assert_close(rows.pooled, conditioner.encode(["star", ""]).pooled, rtol=0, atol=0)
    assert not torch.allclose(rows.pooled[0], empty.pooled[0])


def test_empty_negatives_are_no_negatives(conditioner):
    inputs = Inputs(n=1, text=["red heart"], negative=[""])
    cond = conditioner(inputs)
    torch.testing.assert_close(
        conditioner.null(inputs, cond).tokens, conditioner.encode([""]).tokens, rtol=0, atol=0
    )


def test_gradients_reach_the_tower_through_dropout(conditioner):
    inputs = Inputs(n=2, text=["red heart", "blue star"])
    cond = conditioner(inputs)
    kept = cond.select(torch.tensor([True, False]), conditioner.null(inputs, cond))
    kept.tokens.square().sum().backward()
    grad = conditioner.encoder.tokens.weight.grad
    assert grad is not None
    assert grad.abs().sum() > 0
    conditioner.encoder.zero_grad()


@pytest.mark.parametrize(("text", "said"), [("red heart", "one string"), (["a", "b"], "2 strings")])
def test_one_text_per_picture(conditioner, text, said):
    with pytest.raises(ValueError, match=f"text is {said} for 3 pictures; give a list of 3"):
        conditioner(Inputs(n=3, text=text))
