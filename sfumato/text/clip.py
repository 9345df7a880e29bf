"""CLIP's tokenizer from the vocabulary that lies beside its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Engine
from torch import Tensor

__all__ = ["CLIPTokenizer"]

START, END = "<|startoftext|>", "<|endoftext|>"
# Of the published code: specials, English endings, runs of letters, single digits, runs of anything else.
PIECES = rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[\p{{L}}]+|[\p{{N}}]|[^\s\p{{L}}\p{{N}}]+".replace(
    "<|", r"<\|"
).replace("|>", r"\|>")


class CLIPTokenizer:
    """Text -> ids of a fixed length, from start to end token, the end token repeated behind it.

    Args:
        folder: holds tokenizer.json, or vocab.json and merges.txt.
        context: ids per text; longer texts are cut, and end in the end token all the same.

    Raises: ValueError in one line if the folder has neither, or what it has is damaged.
    """

    def __init__(self, folder: Path, context: int = 77) -> None:
        engine = _engine(folder)
        ends = [(token, engine.token_to_id(token)) for token in (START, END)]
        if None in (id for _, id in ends):
            raise ValueError(f"the tokenizer in {folder} is not CLIP's: it lacks {START} or {END}")
        engine.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
        engine.enable_truncation(context)
        engine.enable_padding(length=context, pad_id=ends[1][1], pad_token=END)
        self._engine = engine

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Ids (B, context) int64."""
        return torch.tensor([row.ids for row in self._engine.encode_batch(list(texts))], dtype=torch.long)


def _engine(folder: Path) -> Engine:
    whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    try:
        if whole.is_file():
            return Engine.from_file(str(whole))
        if vocabulary.is_file() and merges.is_file():
            return _of_merges(*models.BPE.read_file(str(vocabulary), str(merges)))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(
            f"the tokenizer in {folder} cannot be read: {' '.join(str(error).split())}"
        ) from None
    raise ValueError(
        f"{folder} holds no CLIP vocabulary: no tokenizer.json, and not vocab.json with merges.txt"
    )


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
