"""The project's own tokenizer: fixed length, round trip through JSON, unknown words spelled in pieces."""

from __future__ import annotations

import pytest
import torch

from sfumato.text.tokenizers import Tokenizer

CAPTIONS = ["red heart", "blue heart", "woman astronaut dark skin tone", "man astronaut", "OK button"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, vocab_size=300, context=8)


def test_every_word_of_the_captions_is_one_token(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer(CAPTIONS)
    assert ids.shape == mask.shape == (5, 8)
    assert ids.dtype == torch.int64
    assert mask.sum(1).tolist() == [len(c.split()) + 2 for c in CAPTIONS]  # start and end around the words


def test_case_and_outer_spaces_do_not_matter(tokenizer: Tokenizer) -> None:
    ids, _ = tokenizer(["Red Heart", "  red heart ", "red heart"])
    assert torch.equal(ids[0], ids[2])
    assert torch.equal(ids[1], ids[2])


def test_an_empty_text_is_start_and_end(tokenizer: Tokenizer) -> None:
    _, mask = tokenizer([""])
    assert mask.sum().item() == 2


def test_no_texts_give_an_empty_batch(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer([])
    assert ids.shape == mask.shape == (0, 8)


def test_an_unseen_word_is_spelled_and_reported(tokenizer: Tokenizer) -> None:
    assert tokenizer.unknown("red heat") == ["heat"]
    ids, mask = tokenizer(["heat"])
    assert mask.sum().item() > 3
    assert not torch.equal(ids, tokenizer(["heart"])[0])


def test_too_long_a_text_is_cut_but_keeps_its_end(tokenizer: Tokenizer) -> None:
    ids, mask = tokenizer(["red " * 20, "red"])
    assert mask[0].all()
    assert ids[0, -1] == ids[1, 2]  # the end token


def test_json_round_trip_gives_the_same_ids(tokenizer: Tokenizer) -> None:
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.context == 8
    assert again.vocab_size == tokenizer.vocab_size
    for a, b in zip(again(CAPTIONS), tokenizer(CAPTIONS), strict=True):
        assert torch.equal(a, b)


def test_a_text_that_is_no_tokenizer_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match=r"not a tokenizer\.json") as error:
        Tokenizer.from_json("{}")
    assert "\n" not in str(error.value)
