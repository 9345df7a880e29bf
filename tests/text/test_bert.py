"""Word pieces against transformers' BERT tokenizer, on a small vocabulary."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from sfumato.text.bert import bert_tokenizer

transformers = pytest.importorskip("transformers")

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,!?-'"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]
PIECES += ["red", "heart", "##s", "cafe", "blue", "##ish", "\u732b"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_text("\n".join(dict.fromkeys(PIECES)) + "\n", "utf-8")
    return tmp_path


def test_ids_are_those_of_transformers(folder: Path) -> None:
    """Accents, capitals, characters without a piece, tokens in brackets; cut and filled."""
    theirs = transformers.BertTokenizerFast.from_pretrained(folder)
    random_ = random.Random(0)
    words = [
        "Red",
        "HEARTS",
        "caf\u00e9",
        "bluish-red",
        "\u732b\u732b",
        "[SEP]",
        "[MASK]",
        "x" * 101,
        "\u20ac5",
        "don't",
        "\t",
    ]
    texts = ["", *(" ".join(random_.choices(words, k=random_.randint(1, 14))) for _ in range(200))]
    ours = bert_tokenizer([folder / "none", folder], 24)
    assert ours is not None
    told = theirs(texts, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
    ids, mask = ours(texts)
    assert ids.tolist() == told.input_ids.tolist()
    assert mask.long().tolist() == told.attention_mask.tolist()
    assert len({len(set(row)) for row in ids.tolist()}) > 3


def test_a_folder_without_the_list_and_another_list(folder: Path) -> None:
    assert bert_tokenizer([folder / "none"], 8) is None
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\nred\n")
    with pytest.raises(ValueError, match=r"vocab.txt is no vocabulary of BERT: it lacks \[CLS\]"):
        bert_tokenizer([folder], 8)
