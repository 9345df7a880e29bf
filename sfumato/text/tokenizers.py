"""Text -> token ids of a fixed length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

__all__ = ["Tokenizer"]

PAD, START, END, UNKNOWN, LAST = "[PAD]", "[START]", "[END]", "[UNK]", "[LAST]"


class Tokenizer:
    """A `tokenizers` engine that cuts and pads every text to `context` ids.

    Args:
        engine: its post-processor adds the start and end tokens; its padding token has an id, and is
            [PAD] if it says none.
        context: ids per text, L.
    """

    def __init__(self, engine: Engine, context: int) -> None:
        token = engine.padding["pad_token"] if engine.padding else PAD
        pad = engine.token_to_id(token)
        if pad is None:
            raise ValueError(f"the tokenizer has no {token} token")
        engine.enable_truncation(context)
        engine.enable_padding(length=context, pad_id=pad, pad_token=token)
        self.context = context
        self._engine = engine

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return int(self._engine.get_vocab_size())

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids (B, L) int64 and mask (B, L) bool, True = real token. An empty text is start and end alone."""
        rows = self._engine.encode_batch(list(texts))
        ids = torch.tensor([row.ids for row in rows], dtype=torch.long).reshape(len(rows), self.context)
        mask = torch.tensor([row.attention_mask for row in rows], dtype=torch.bool)
        return ids, mask.reshape(len(rows), self.context)

    def unknown(self, text: str) -> list[str]:
        """The words of `text` that training never saw whole, so that they are spelled in pieces."""
        words = [
            w
            for w, _ in self._engine.pre_tokenizer.pre_tokenize_str(
                self._engine.normalizer.normalize_str(text)
            )
        ]
        return [w.lstrip(SPACE) for w in words if self._engine.token_to_id(w) is None]

    def to_json(self) -> str:
        """The content of a `tokenizer.json`; truncation in it carries `context`."""
        return str(self._engine.to_str())

    @staticmethod
    def from_json(text: str) -> Tokenizer:
        """Inverse of `to_json`. Raises: ValueError if the text is not a tokenizer with a fixed length."""
        try:
            engine = Engine.from_str(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not a tokenizer.json: {error}") from None
        truncation = engine.truncation
        if not truncation:
            raise ValueError("the tokenizer.json has no truncation, so its fixed length is unknown")
        return Tokenizer(engine, int(truncation["max_length"]))

    @staticmethod
    def train(
        texts: Iterable[str], *, vocab_size: int = 4096, context: int = 16, end_highest: bool = False
    ) -> Tokenizer:
        """Byte-pair encoding learned from captions: lower case, words marked by a leading space.

        With a vocabulary large enough every word of the captions is one token, and a word that they do not
        hold is still spelled from its pieces.

        Args:
            end_highest: texts end in the highest id, by which CLIP finds the end.
        """
        engine = Engine(models.BPE(unk_token=UNKNOWN))
        engine.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()]
        )
        engine.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
        engine.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
        special = [PAD, START, END, UNKNOWN]
        engine.train_from_iterator(
            texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
        )
        end = LAST if end_highest else END
        if end_highest:
            engine.add_special_tokens([end])
        ends = [(token, engine.token_to_id(token)) for token in (START, end)]
        engine.post_processor = processors.TemplateProcessing(single=f"{START} $A {end}", special_tokens=ends)
        return Tokenizer(engine, context)


SPACE = "\u2581"  # the mark that Metaspace puts in front of a word
