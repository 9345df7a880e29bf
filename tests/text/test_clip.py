"""CLIP's tokenization against transformers, over a small vocabulary of the published kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer as Oracle

from sfumato.text.clip import clip_tokenizer

MERGES = ["r e", "re d</w>", "h e", "a r", "he ar", "hear t</w>", "i t", "' s</w>", "c a", "ca t</w>", "1 2"]
TEXTS = (
    *(
        "red heart",
        "  Red   HEART ",
        "",
        "cat's re-dheart",
        "12 345, it's!",
        "na\u00efve caf\u00e9",
        "e\u0301",
    ),
    *(
        "\U0001f600 heart \U0001f468\u200d\U0001f680",
        "\u65e5\u672c \u0416",
        "tab\tand\nline",
        "a" * 40,
        "$%&/ (x)",
    ),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *(m.replace(" ", "") for m in MERGES)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary), "utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n", "utf-8")
    return tmp_path


def test_ids_are_those_of_transformers(folder: Path) -> None:
    theirs = Oracle(str(folder / "vocab.json"), str(folder / "merges.txt"))
    expected = theirs(list(TEXTS), padding="max_length", truncation=True, max_length=20)["input_ids"]
    assert clip_tokenizer(folder, context=20)(TEXTS)[0].tolist() == expected
    theirs.save_pretrained(folder / "whole")
    assert (folder / "whole/tokenizer.json").is_file()
    assert clip_tokenizer(folder / "whole", context=20)(TEXTS)[0].tolist() == expected


def test_texts_are_cut_and_padded(folder: Path) -> None:
    found, _ = clip_tokenizer(folder)(["red heart", "x " * 100])
    assert found.shape == (2, 77)
    end = int(found[0, -1])
    assert found[0].tolist()[3:] == [end] * 74
    assert int(found[1, -1]) == end
    assert end not in found[1, :-1]


def test_folders_without_a_vocabulary(folder: Path, tmp_path: Path) -> None:
    (folder / "merges.txt").unlink()
    with pytest.raises(ValueError, match="holds no CLIP vocabulary"):
        clip_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        clip_tokenizer(folder)
