"""CLIP's tokenizer from the vocabulary that lies beside its weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Engine

from sfumato.text.tokenizers import Tokenizer, packages, unpacked

__all__ = ["END", "clip_files", "clip_tokenizer", "clip_vocabulary"]

LONGEST = 2**16  # ids per text that a file may mean
PUBLISHED, MERGES = "bpe_simple_vocab_16e6.txt", 48_894  # of OpenAI's release, and how many it uses
START, END = "<|startoftext|>", "<|endoftext|>"
# Of the published code: specials, English endings, runs of letters, single digits, runs of anything else.
PIECES = rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+".replace(
    "<|", r"<\|"
).replace("|>", r"\|>")


def clip_tokenizer(folder: Path, pad: str = "", context: int | None = None) -> Tokenizer:
    """CLIP's tokenizer: from start to end token, filled up; longer texts are cut before the end token.

    Args:
        folder: holds tokenizer.json, or vocab.json and merges.txt, or OpenAI's file of merges.
        pad, context: what fills short texts, and ids per text; by default as the files say, or else the end
            token and 77.

    Raises: ValueError in one line if the folder has none, or what it has is damaged.
    """
    told: dict[str, object] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        try:
            told |= json.loads(file.read_text("utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{file} is not JSON ({error}); copy or download it again") from None
    token, length = told.get("pad_token") or END, told.get("model_max_length")
    if isinstance(token, dict):
        token = token.get("content", END)
    length = context or (length if isinstance(length, int) and length < LONGEST else 77)  # 1e30 = not known
    return Tokenizer(_padded(folder, length, pad or str(token)), length)


def clip_files(tokenizer: Tokenizer) -> dict[str, str]:
    """The files of a pipeline's tokenizer folder: name -> content.

    Raises: ValueError if it is no byte-pair encoding with CLIP's start and end.
    """
    told = json.loads(tokenizer.to_json())
    vocabulary, merges = told["model"].get("vocab", {}), told["model"].get("merges", [])
    if START not in vocabulary or END not in vocabulary:
        raise ValueError(f"the tokenizer is not CLIP's: it lacks {START} or {END}")
    special = {
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": told["padding"]["pad_token"],
    }
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "add_prefix_space": False,
        "do_lower_case": True,
        "model_max_length": tokenizer.context,
        **special,
    }
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    return {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *pairs, ""]),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "special_tokens_map.json": json.dumps(special, indent=2),
    }


def _padded(folder: Path, context: int, pad: str) -> Engine:
    """An engine that cuts and fills to `context` ids between start and end."""
    engine = _engine(folder)
    ends = [(token, engine.token_to_id(token)) for token in (START, END)]
    if None in (id for _, id in ends):
        raise ValueError(f"the tokenizer in {folder} is not CLIP's: it lacks {START} or {END}")
    engine.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
    number = engine.token_to_id(pad)
    if number is None:
        raise ValueError(f"the tokenizer in {folder} pads with {pad!r}, which it has no id for")
    engine.enable_truncation(context)
    engine.enable_padding(length=context, pad_id=number, pad_token=pad)
    return engine


def _engine(folder: Path) -> Engine:
    whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if whole.is_file():
            return Engine.from_file(str(whole))
        if vocabulary.is_file() and merges.is_file():
            return _of_merges(*models.BPE.read_file(str(vocabulary), str(merges)))
        if (published := unpacked(folder / PUBLISHED)) is not None:
            return _of_merges(*_published(published))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"the tokenizer in {folder} cannot be read: {' '.join(str(error).split())}"
        ) from None
    raise ValueError(
        f"{folder} holds no CLIP vocabulary: no tokenizer.json, no {PUBLISHED}.gz, and not vocab.json with "
        "merges.txt"
    )


def clip_vocabulary(places: Sequence[Path]) -> Path | None:
    """The first of the folders that has CLIP's vocabulary, or the folder of an installed package."""
    for place in (*places, *packages({"open_clip": "", "clip": ""})):
        if (place / "merges.txt").is_file() or unpacked(place / PUBLISHED) is not None:
            return place
    return None


def _published(text: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Tokens and merges of OpenAI's file: a line that is none, then a merge a line, more than are used."""
    lines = text.split("\n")[1 : 1 + MERGES]
    merges = [(first, second) for first, _, second in (line.partition(" ") for line in lines) if second]
    # Printable bytes stand for themselves; the others for letters from 256 on, in order.
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    tokens = [*letters, *(f"{c}</w>" for c in letters), *(a + b for a, b in merges), START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def _of_merges(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Engine:
    engine = Engine(models.BPE(vocabulary, merges, unk_token=END, end_of_word_suffix="</w>"))
    engine.add_special_tokens([token for token in (START, END) if token in vocabulary])
    engine.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return engine
