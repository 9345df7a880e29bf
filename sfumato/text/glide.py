"""GLIDE's tokenizer: GPT-2's byte-pair encoding of the text in lower case, without start and end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Engine
from tokenizers import models, normalizers, pre_tokenizers

from sfumato.text.tokenizers import Tokenizer, packages, unpacked

__all__ = ["glide_tokenizer"]

PAD = "<|endoftext|>"
PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
"""The same two files as GLIDE and as others call them."""


def glide_tokenizer(place: Path | Sequence[Path], context: int) -> Tokenizer | None:
    """The tokenizer of GPT-2's vocabulary in a folder; None if it has none.

    Several folders stand for the first that has it, and after them for an installed package that carries it.

    A text becomes its ids alone, cut and filled to `context` with the end token; what is filled is no real
    token, and so the empty text has none.

    Raises: ValueError in one line if the files are damaged.
    """
    for folder in [place] if isinstance(place, Path) else [*place, *packages({"glide_text2im": "tokenizer"})]:
        for vocabulary, merges in PAIRS:
            ids, rules = unpacked(folder / vocabulary), unpacked(folder / merges)
            if ids is None or rules is None:
                continue
            pairs = [tuple(line.split()) for line in rules.splitlines()[1:] if line.strip()]
            try:
                engine = Engine(models.BPE(json.loads(ids), [(a, b) for a, b in pairs]))
            except Exception as error:  # the library raises bare Exception
                said = " ".join(str(error).split())
                raise ValueError(f"the tokenizer in {folder} cannot be read: {said}") from None
            if engine.token_to_id(PAD) is None or engine.token_to_id("<|startoftext|>") is not None:
                continue  # another program's: CLIP's has both
            engine.normalizer = normalizers.Lowercase()
            engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            engine.enable_padding(pad_id=engine.token_to_id(PAD), pad_token=PAD)
            return Tokenizer(engine, context)
    return None
