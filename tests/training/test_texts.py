"""Captions encoded once."""

from __future__ import annotations

import torch

from sfumato.training.cache import TensorCache
from sfumato.training.texts import CHUNK, CachedTexts


class Letters:
    """Counts letters, and what it was asked."""

    def __init__(self, identity="letters"):
        self.identity = identity
        self.asked = []

    def __call__(self, texts):
        self.asked += texts
        tokens = torch.tensor([[[float(text.count(c))] for c in "abc"] for text in texts])
        return {"tokens": tokens, "length": torch.tensor([len(text) for text in texts])}


def test_the_same_as_the_encoder_and_each_caption_once(tmp_path):
    plain, texts = Letters(), ["abba", "", "cab", "abba"]
    cached = CachedTexts(Letters(), TensorCache(tmp_path))
    for _ in range(2):
        for name, tensor in cached(texts).items():
            assert torch.equal(tensor, plain(texts)[name])
    assert cached.encoder.asked == ["abba", "", "cab"]
    again = CachedTexts(Letters(), TensorCache(tmp_path))
    assert torch.equal(again(["cab"])["length"], torch.tensor([3]))
    assert again.encoder.asked == []
    assert cached([]) == {}


def test_another_encoder_or_caption_is_encoded(tmp_path):
    CachedTexts(Letters(), TensorCache(tmp_path)).prepare(["a", "b"])
    other = CachedTexts(Letters("other weights"), TensorCache(tmp_path))
    other.prepare(["a", "b"])
    assert other.encoder.asked == ["a", "b"]
    edited = CachedTexts(Letters(), TensorCache(tmp_path))
    edited.prepare(["a", "b!"])
    assert edited.encoder.asked == ["b!"]


def test_a_whole_data_set_becomes_one_file(tmp_path):
    cached = CachedTexts(Letters(), TensorCache(tmp_path))
    cached.prepare([f"{i} a" for i in range(2 * CHUNK + 1)])
    assert len(list(tmp_path.iterdir())) == 1
    assert len(cached.cache) == 2 * CHUNK + 1
