"""GLIDE's tokenizer: GPT-2's byte-pair encoding of the text in lower case, without start and end."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer as Engine
from tokenizers import models, normalizers, pre_tokenizers

from sfumato.text.tokenizers import Tokenizer

__all__ = ["glide_tokenizer", "installed", "packed"]

PAD = "<|endoftext|>"
PAIRS = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
"""The same two files as GLIDE and as others call them."""
PACKAGES = {"glide_text2im": "tokenizer", "clip": "", "open_clip": ""}


def glide_tokenizer(folders: Sequence[Path], context: int) -> Tokenizer | None:
    """The tokenizer of the first folder that holds GPT-2's vocabulary; None if there is none.

    A text becomes its ids alone, cut and filled to `context` with the end token; what is filled is no real
    token, and so the empty text has none.

    Raises: ValueError in one line if the files are damaged.
    """
    for folder in folders:
        for vocabulary, merges in PAIRS:
            ids, rules = packed(folder / vocabulary), packed(folder / merges)
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


def installed() -> Iterator[Path]:
    """Folders of vocabularies in installed packages of other programs, which are read and not imported."""
    for name, folder in PACKAGES.items():
        spec = find_spec(name)
        for place in (spec.submodule_search_locations if spec else None) or ():
            yield Path(place) / folder


def packed(path: Path) -> str | None:
    """The text of a file, or of the same file with .gz behind its name; None if there is neither."""
    zipped = path.with_name(f"{path.name}.gz")
    if path.is_file():
        return path.read_text("utf-8")
    return gzip.decompress(zipped.read_bytes()).decode() if zipped.is_file() else None
