"""What a frozen text tower says of captions, computed once for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from sfumato.conditioners.base import Conditioner, Merged
from sfumato.conditioners.text import TokenText
from sfumato.core.types import Conditioning
from sfumato.training.cache import Fields, TensorCache, fingerprint, key_of

__all__ = ["CachedText", "remembering"]

CHUNK = 64  # captions encoded at a time
FIELDS = "tokens", "mask", "pooled"  # of Conditioning, that a text fills


@dataclass(frozen=True)
class CachedText(TokenText):
    """Text by a tower that does not change: each caption is read once.

    A row does not depend on the other texts of a call, for all are padded to one length.

    Attributes:
        cache: where the rows are kept, by the hash of the caption, of the tokenizer and of the tower.
    """

    cache: TensorCache

    def prepare(self, texts: Sequence[str]) -> None:
        """Encode what is not known yet; with all captions of a data set at once, it makes few large files."""
        self.cache.add(self._fresh(texts))

    def prune(self, texts: Sequence[str]) -> None:
        """Remove the files of the cache that hold none of these texts."""
        self.cache.prune([self._key(text) for text in texts])

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """See TokenText; without gradients, encoding only what the cache lacks."""
        self.prepare(texts)
        rows = [self.cache[self._key(text)] for text in texts]
        device = next(self.encoder.parameters()).device
        tokens, mask, pooled = (torch.stack([row[name] for row in rows]).to(device) for name in FIELDS)
        return Conditioning(tokens=tokens, mask=mask, pooled=pooled)

    @cached_property
    def _about(self) -> str:
        config = getattr(self.encoder, "config", None)
        return key_of(fingerprint(self.encoder, config), self.tokenizer.to_json())

    def _key(self, text: str) -> str:
        return key_of("text", self._about, text)

    def _fresh(self, texts: Sequence[str]) -> Iterator[tuple[str, Fields]]:
        unknown = [text for text in dict.fromkeys(texts) if self._key(text) not in self.cache]
        for start in range(0, len(unknown), CHUNK):
            part = unknown[start : start + CHUNK]
            with torch.no_grad():
                told = dict(super().encode(part).items())
            for i, text in enumerate(part):
                yield self._key(text), {name: tensor[i] for name, tensor in told.items()}


def remembering(conditioner: Conditioner, texts: Sequence[str], folder: Path) -> Conditioner:
    """The same with towers that read each text once: those of a data set, and "", now.

    Args:
        conditioner: whose towers are not trained.
        texts: of the data set.
        folder: of the cache; files of it that serve no text are removed.
    """
    if isinstance(conditioner, Merged):
        return Merged(tuple(remembering(part, texts, folder) for part in conditioner.parts))
    if not isinstance(conditioner, TokenText):
        return conditioner
    cached = CachedText(conditioner.tokenizer, conditioner.encoder, TensorCache(folder))
    known = ["", *texts]
    cached.prepare(known)
    cached.prune(known)
    return cached
