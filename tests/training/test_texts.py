"""Captions encoded once."""

from __future__ import annotations

import pytest
import torch

from sfumato.conditioners.base import Merged
from sfumato.conditioners.label import LabelCond
from sfumato.conditioners.text import TokenText
from sfumato.core.types import Inputs
from sfumato.nets.text import TextTransformer, TextTransformerConfig
from sfumato.text.tokenizers import Tokenizer
from sfumato.training.cache import TensorCache
from sfumato.training.texts import CHUNK, CachedText, remembering

CAPTIONS = ["red heart", "blue heart", "a green square"]


@pytest.fixture
def plain():
    tokenizer = Tokenizer.train(CAPTIONS, vocab_size=80, context=8)
    config = TextTransformerConfig(vocab_size=tokenizer.vocab_size, context=8, width=16, depth=1, heads=2)
    return TokenText(tokenizer, TextTransformer(config))


@pytest.fixture
def encoded(monkeypatch):
    """The number of texts of each call of a tower."""
    calls = []
    forward = TextTransformer.forward
    monkeypatch.setattr(
        TextTransformer, "forward", lambda self, ids, mask: calls.append(len(ids)) or forward(self, ids, mask)
    )
    return calls


def cached(plain, folder):
    return CachedText(plain.tokenizer, plain.encoder, TensorCache(folder))


def test_the_same_as_the_tower_and_each_caption_once(plain, tmp_path, encoded):
    wanted = dict(plain.encode(CAPTIONS).items())
    texts = cached(plain, tmp_path)
    texts.prepare(CAPTIONS)
    for conditioner in (texts, texts, cached(plain, tmp_path)):
        found = dict(conditioner(Inputs(n=3, text=CAPTIONS)).items())
        assert found.keys() == wanted.keys() == {"tokens", "mask", "pooled"}
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert encoded == [3, 3]
    assert not found["tokens"].requires_grad


def test_null_is_the_empty_text_and_is_kept_too(plain, tmp_path, encoded):
    inputs = Inputs(n=3, text=CAPTIONS)
    wanted = plain.null(inputs, plain(inputs))
    encoded.clear()
    texts = cached(plain, tmp_path)
    found = [texts.null(inputs, texts(inputs)) for _ in range(2)][1]
    assert all(torch.equal(v, dict(wanted.items())[name]) for name, v in found.items())
    assert encoded == [3, 1]


def test_another_caption_tower_or_tokenizer_is_encoded(plain, tmp_path, encoded):
    cached(plain, tmp_path).prepare(CAPTIONS)
    cached(plain, tmp_path).prepare([*CAPTIONS[:2], "a green square!"])
    assert encoded == [3, 1]
    other = TokenText(Tokenizer.train(["other words"], vocab_size=50, context=8), plain.encoder)
    cached(other, tmp_path).prepare(CAPTIONS)
    assert encoded == [3, 1, 3]
    with torch.no_grad():
        plain.encoder.norm.bias[0] += 1
    texts = cached(plain, tmp_path)
    texts.prepare(CAPTIONS)
    assert encoded == [3, 1, 3, 3]
    assert torch.equal(texts.encode(CAPTIONS).tokens, plain.encode(CAPTIONS).tokens)


def test_a_whole_data_set_becomes_one_file(plain, tmp_path):
    texts = cached(plain, tmp_path)
    texts.prepare([f"{i} a" for i in range(2 * CHUNK + 1)])
    assert len(list(tmp_path.iterdir())) == 1
    assert len(texts.cache) == 2 * CHUNK + 1


def test_remembering_reaches_text_among_others_and_leaves_no_old_files(plain, tmp_path, encoded):
    merged = Merged((plain, LabelCond(3)))
    inputs = Inputs(n=3, text=CAPTIONS, label=torch.tensor([0, 1, 2]))
    wanted = dict(merged(inputs).items())
    remembering(plain, ["an old caption"], tmp_path)
    (old,) = tmp_path.iterdir()
    encoded.clear()
    found = dict(remembering(merged, CAPTIONS, tmp_path)(inputs).items())
    assert encoded == [3]  # "" was known
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(found, wanted)
    assert old.exists()  # it holds ""
    with torch.no_grad():
        plain.encoder.norm.bias[0] += 1
    remembering(merged, CAPTIONS, tmp_path)
    assert not old.exists()
    label = LabelCond(3)
    assert remembering(label, CAPTIONS, tmp_path) is label
