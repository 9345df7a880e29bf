"""Prompts token for token as transformers reads them; weights of words, and long prompts in pieces."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import models, pre_tokenizers, trainers
from transformers import CLIPTokenizer as Oracle

from sfumato.core.types import Reading
from sfumato.text.clip import clip_tokenizer, clip_vocabulary
from sfumato.text.prompts import prompt_rows, weighted
from sfumato.text.tokenizers import Tokenizer

WORDS = (
    *("a", "photo", "of", "the", "red", "heart", "cat's", "don't", "I'll", "we've", "they're", "'s", "it's!"),
    *(
        "Na\u00efve",
        "CAF\u00c9",
        "e\u0301t\u00e9",
        "stra\u00dfe",
        "\u0130stanbul",
        "\u65e5\u672c\u8a9e",
        "\u0416\u0443\u043a",
    ),
    *(
        "\U0001f600",
        "\U0001f468\u200d\U0001f680",
        "\u2764\ufe0f",
        "\U0001f1e9\U0001f1ea",
        "\u00bd",
        "\u0663",
        "x\u00b2",
    ),
    *(
        "&amp;",
        "&lt;b&gt;",
        "&#39;",
        "<|endoftext|>",
        "<|startoftext|>",
        "(masterpiece:1.3)",
        "[dull]",
        "\\(",
    ),
    *(
        "4k",
        "1999",
        "f/1.8",
        "--ar",
        "#tag",
        "@me",
        "\t",
        "\n",
        "  ",
        "\u00a0",
        "\u200b",
        "\u3000",
        "...",
        "a" * 40,
    ),
)
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]


def prompts(count: int) -> list[str]:
    """Empty, short and over-long ones, the same ones on every machine."""
    draw = random.Random(7)
    made = ["", " ", "'", "\u0301", "x " * 200]
    while len(made) < count:
        made.append(draw.choice(["", " ", ", "]).join(draw.choices(WORDS, k=draw.randrange(1, 40))))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-pair encoding of the published kind, learned from the words, as files of both kinds."""
    path = tmp_path_factory.mktemp("words")
    engine = Engine(models.BPE(end_of_word_suffix="</w>"))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    engine.train_from_iterator([word.lower() for word in WORDS] * 4, trainer)
    merges = [" ".join(pair) for pair in json.loads(engine.to_str())["model"]["merges"]]
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    tokens = [*letters, *(f"{c}</w>" for c in letters), *(m.replace(" ", "") for m in merges), *SPECIAL]
    (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), "utf-8")
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    (path / "open_clip").mkdir()
    (path / "open_clip/__init__.py").write_text("raise RuntimeError('this is read, not imported')")
    file = path / "open_clip/bpe_simple_vocab_16e6.txt.gz"
    file.write_bytes(gzip.compress("\n".join(['"bpe_simple_vocab"', *merges, ""]).encode()))
    return path


def test_a_thousand_prompts_are_those_of_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = prompts(1000)
    oracle = Oracle(str(folder / "vocab.json"), str(folder / "merges.txt"))
    expected = oracle(texts, padding="max_length", truncation=True, max_length=77)["input_ids"]
    assert len({tuple(row) for row in expected}) > 900
    tokenizer = clip_tokenizer(folder)
    assert tokenizer(texts)[0].tolist() == expected
    rows = [prompt_rows(tokenizer, text, Reading()) for text in texts]
    assert [row.ids[0] for row in rows] == expected
    whole = oracle(texts)["input_ids"]
    assert [bool(row.rest) for row in rows] == [len(row) > 77 for row in whole]
    monkeypatch.syspath_prepend(str(folder))
    place = clip_vocabulary([folder / "none"])
    assert place == folder / "open_clip"
    assert clip_tokenizer(place)(texts)[0].tolist() == expected


@pytest.fixture
def tokenizer(folder: Path) -> Tokenizer:
    return clip_tokenizer(folder)


def test_long_prompts_are_read_in_pieces(tokenizer: Tokenizer) -> None:
    text = "a heart, " * 60
    whole = [number for number, _ in tokenizer.pieces(text)]
    assert len(whole) > 2 * 75
    start, end = tokenizer([""])[0][0, :2].tolist()
    two = prompt_rows(tokenizer, text, Reading(chunks=2))
    assert [row[1:-1] for row in two.ids] == [whole[:75], whole[75:150]]
    assert {(row[0], row[-1]) for row in two.ids} == {(start, end)}
    assert two.rest
    assert text.rstrip().endswith(two.rest)
    assert [number for number, _ in tokenizer.pieces(two.rest)] == whole[150:]
    many = prompt_rows(tokenizer, text, Reading(chunks=9))
    assert not many.rest
    assert many.ids[-1] == [start, *[end] * 76]


@pytest.mark.parametrize(
    ("prompt", "runs"),
    [
        ("a heart", [("a heart", 1.0)]),
        ("", [("", 1.0)]),
        ("a (red:1.5) heart", [("a ", 1.0), ("red", 1.5), (" heart", 1.0)]),
        ("(red) [blue]", [("red", 1.1), (" ", 1.0), ("blue", 1 / 1.1)]),
        ("((red) heart: 2)", [("red", 2.2), (" heart", 2.0)]),
        (r"\(red\) [:-)", [("(red) ", 1.0), (":-)", 1 / 1.1)]),
        ("a:1.3) b", [("a:1.3) b", 1.0)]),
        ("(never closed", [("never closed", 1.1)]),
        ("(a:.5)(b:0.5)", [("ab", 0.5)]),
    ],
    ids=str,
)
def test_weights_of_words(prompt: str, runs: list[tuple[str, float]]) -> None:
    found = weighted(prompt)
    assert [text for text, _ in found] == [text for text, _ in runs]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in runs])


def test_weights_stand_beside_their_tokens(tokenizer: Tokenizer) -> None:
    rows = prompt_rows(tokenizer, "a (heart:1.5) red", Reading(weights=True))
    plain = prompt_rows(tokenizer, "a heart red", Reading(weights=True))
    assert rows.ids == plain.ids
    assert set(plain.weights[0]) == {1.0}
    heart = len(tokenizer.pieces("heart"))
    assert rows.weights[0][:4] == [1.0, 1.0, 1.5, 1.5 if heart > 1 else 1.0]
    assert rows.weights[0].count(1.5) == heart
    assert prompt_rows(tokenizer, "a (heart:1.5) red", Reading()).ids != plain.ids


@pytest.mark.parametrize("reading", [{"chunks": 0}, {"skip": -1}, {"chunks": 1.5}], ids=str)
def test_readings_that_are_none(reading: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"of a prompt is .*; allowed: a whole number from"):
        Reading(**reading)
