"""What a frozen text encoder says of captions, computed once for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sfumato.training.cache import TensorCache, key_of

__all__ = ["CachedTexts", "TextEncoder"]

CHUNK = 64  # captions encoded at a time


class TextEncoder(Protocol):
    """A text tower with its tokenizer, whose weights do not change."""

    @property
    def identity(self) -> str:
        """Changes when weights or tokenizer do; see `cache.fingerprint`."""
        ...

    def __call__(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        """Tensors by name, such as tokens and pooled, whose first axis is one row per text."""
        ...


class CachedTexts:
    """A frozen text encoder that reads each caption once; called like the encoder itself.

    Args:
        encoder: whose rows do not depend on the other texts of a call, padding included.
        cache: where the rows are kept, by the hash of the caption and of the encoder.
    """

    def __init__(self, encoder: TextEncoder, cache: TensorCache) -> None:
        self.encoder = encoder
        self.cache = cache

    @property
    def identity(self) -> str:
        """That of the encoder."""
        return self.encoder.identity

    def prepare(self, texts: Sequence[str]) -> None:
        """Encode what is not known yet; with all captions of a data set at once, it makes few large files."""
        self.cache.add(self._fresh(texts))

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The encoder's tensors on the CPU, encoding what `prepare` was not given."""
        self.prepare(texts)
        rows = [self.cache[self._key(text)] for text in texts]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} if rows else {}

    def _key(self, text: str) -> str:
        return key_of("text", self.encoder.identity, text)

    def _fresh(self, texts: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        unknown = [text for text in dict.fromkeys(texts) if self._key(text) not in self.cache]
        for start in range(0, len(unknown), CHUNK):
            part = unknown[start : start + CHUNK]
            with torch.no_grad():
                told = self.encoder(part)
            for i, text in enumerate(part):
                yield self._key(text), {name: tensor[i] for name, tensor in told.items()}
