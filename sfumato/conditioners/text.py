"""Text -> tokens, mask and pooled embedding by a tower that belongs to the system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, Inputs
from sfumato.text.tokenizers import Tokenizer

__all__ = ["TokenText", "checked"]


@dataclass(frozen=True)
class TokenText:
    """A tokenizer and a tower `(ids (B, L), mask (B, L)) -> tokens (B, L, D), pooled (B, D)`."""

    tokenizer: Tokenizer
    encoder: nn.Module

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """Fields tokens, mask and pooled of `inputs.text`; without text all pictures are unconditional.

        Raises: ValueError if there is not one text per picture.
        """
        texts = [""] * inputs.n if inputs.text is None else inputs.text
        return self.encode(checked(texts, inputs.n, "text"))

    def null(self, inputs: Inputs, cond: Conditioning) -> Conditioning:
        """The negative texts, or the empty one, in place of the text."""
        if inputs.negative is None or not any(inputs.negative):
            # One row serves all: the empty text is what most requests and every caption dropout use.
            empty = self.encode([""]).map(lambda v: v.expand(inputs.n, *v.shape[1:]))
        else:
            empty = self.encode(checked(inputs.negative, inputs.n, "negative"))
        return replace(cond, tokens=empty.tokens, mask=empty.mask, pooled=empty.pooled)

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Tokens, mask and pooled of any texts, on the device of the tower."""
        device = next(self.encoder.parameters()).device
        ids, mask = (v.to(device) for v in self.tokenizer(texts))
        tokens: Tensor
        pooled: Tensor
        tokens, pooled = self.encoder(ids, mask)
        return Conditioning(tokens=tokens, mask=mask, pooled=pooled)


def checked(texts: Sequence[str], n: int, name: str) -> Sequence[str]:
    """The texts themselves. Raises: ValueError if there is not one per picture."""
    if isinstance(texts, str) or len(texts) != n:
        count = "one string" if isinstance(texts, str) else f"{len(texts)} strings"
        raise ValueError(f"{name} is {count} for {n} pictures; give a list of {n}")
    return texts
