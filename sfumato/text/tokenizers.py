"""Text -> token ids of a fixed length."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Engine
from torch import Tensor

__all__ = ["Tokenizer", "packages", "unpacked"]

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

    def pieces(self, text: str) -> list[tuple[int, int]]:
        """All ids of a text, neither cut nor filled nor between start and end; with each where it ends."""
        first = self._engine.encode(text, add_special_tokens=False)
        return [
            (number, end)
            for part in (first, *first.overflowing)
            for number, (_, end), real in zip(part.ids, part.offsets, part.attention_mask, strict=True)
            if real
        ]

    def unknown(self, text: str) -> list[str]:
        """The words of `text` that training never saw whole, so that they are spelled in pieces.

        Of a vocabulary that was learned elsewhere, which spells many words, this says nothing.
        """
        if not isinstance(self._engine.pre_tokenizer, pre_tokenizers.Metaspace):
            return []
        words = [
            w
            for w, _ in self._engine.pre_tokenizer.pre_tokenize_str(
                self._engine.normalizer.normalize_str(text)
            )
        ]
        return [w.lstrip(SPACE) for w in words if self._engine.token_to_id(w) is None]

    def taught(self, word: str, count: int) -> tuple[Tokenizer, list[int]]:
        """The same with one word more, which becomes `count` new ids, and these.

        Texts have the word replaced by characters for private use, one for each id, so that it works in the
        engine's own file.

        Raises: ValueError for a word that was taught before, or none.
        """
        engine = Engine.from_str(self.to_json())
        old = engine.normalizer
        plain = old.normalize_str(word).strip() if old is not None else word
        if not plain or any(ord(c) >= PRIVATE for c in plain):
            raise ValueError(f"the word {word!r} was taught before, or is none; choose another")
        signs = [chr(PRIVATE + self.vocab_size + i) for i in range(count)]
        before = r"(?<!\w)" if re.match(r"\w", plain) else ""
        after = r"(?!\w)" if re.match(r"\w", plain[-1]) else ""
        swap = normalizers.Replace(Regex(before + re.escape(plain) + after), "".join(signs))
        engine.normalizer = swap if old is None else normalizers.Sequence([old, swap])
        engine.add_tokens([AddedToken(sign, normalized=True) for sign in signs])
        first = self.vocab_size
        return Tokenizer(engine, self.context), list(range(first, first + count))

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


PRIVATE = 0xF0000  # the first of 65,534 characters that stand for nothing
SPACE = "\u2581"  # the mark that Metaspace puts in front of a word


def packages(folders: Mapping[str, str]) -> Iterator[Path]:
    """Folders within those packages that are installed; their vocabularies are read, nothing is imported."""
    for name, folder in folders.items():
        spec = find_spec(name)
        for place in (spec.submodule_search_locations if spec else None) or ():
            yield Path(place) / folder


def unpacked(path: Path) -> str | None:
    """The text of a file, or of the same file with .gz behind its name; None if there is neither."""
    zipped = path.with_name(f"{path.name}.gz")
    if path.is_file():
        return path.read_text("utf-8")
    return gzip.decompress(zipped.read_bytes()).decode("utf-8") if zipped.is_file() else None
