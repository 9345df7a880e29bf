"""BERT's word pieces, which the text towers of latent diffusion read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Engine
from tokenizers import models, normalizers, pre_tokenizers, processors

from sfumato.text.tokenizers import PAD, UNKNOWN, Tokenizer

__all__ = ["bert_tokenizer"]

START, END, MASK = "[CLS]", "[SEP]", "[MASK]"


def bert_tokenizer(places: Sequence[Path], context: int) -> Tokenizer | None:
    """The tokenizer of the first folder with vocab.txt, BERT's list of word pieces; None if there is none.

    A text in lower case and without accents becomes pieces between [CLS] and [SEP], cut and filled to
    `context` ids (Devlin et al. 2019, arXiv:1810.04805).

    Raises: ValueError in one line if the list lacks one of the tokens that BERT has for itself.
    """
    for file in (place / "vocab.txt" for place in places):
        if file.is_file():
            break
    else:
        return None
    lines = file.read_text("utf-8").split("\n")
    vocabulary = {piece.rstrip("\r"): i for i, piece in enumerate(lines) if piece}
    special = [PAD, UNKNOWN, START, END]
    if missing := [token for token in special if token not in vocabulary]:
        raise ValueError(f"{file} is no vocabulary of BERT: it lacks {missing[0]}")
    engine = Engine(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    engine.add_special_tokens([token for token in (*special, MASK) if token in vocabulary])
    engine.normalizer = normalizers.BertNormalizer(lowercase=True)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(token, vocabulary[token]) for token in (START, END)]
    engine.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
    return Tokenizer(engine, context)
