"""Text -> tokens, and pooled embedding, by CLIP's text towers: Stable Diffusion 1 and 2, SDXL."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sfumato.conditioners.text import checked
from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, Inputs, Reading
from sfumato.nets.clip import CLIPText
from sfumato.text.prompts import prompt_rows
from sfumato.text.tokenizers import Tokenizer

__all__ = ["ClipText", "Tower"]


@dataclass(frozen=True)
class Tower:
    """One text tower and what is taken of it.

    Attributes:
        skip: blocks that are left out at the end: 0 = all are used, 1 = the penultimate state. diffusers
            counts `clip_skip` so; others say one more.
        norm: whether the final norm follows: yes in Stable Diffusion 1 and 2, no in SDXL.

    Raises: ValueError if the tower has not more blocks than that.
    """

    tokenizer: Tokenizer
    encoder: CLIPText
    skip: int = 0
    norm: bool = True

    def __post_init__(self) -> None:
        self._check(self.skip)

    def read(self, texts: Sequence[str], reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, L, width), the embedding (B, embed) of the first chunk, and (B, L) bool where text is.

        L is chunks * context.
        A weight multiplies a token's state, and the mean of the text is kept. Warns of what was cut.

        Raises: ValueError if blocks are to be left out that the tower does not have.
        """
        self._check(self.skip + reading.skip)
        rows = [prompt_rows(self.tokenizer, text, reading) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if row.rest:
                room = reading.chunks * (self.tokenizer.context - 2)
                said = f"{text[:24]!r}... has more than {room} tokens; {row.rest!r} is not read"
                warnings.warn(f"the prompt {said}: say less, or read more chunks", stacklevel=2)
        ids, weights = (torch.tensor([row[i] for row in rows]) for i in (0, 1))
        device, n = self.encoder.positions.device, len(texts)
        found = self.encoder(ids.flatten(0, 1).to(device))
        state = found.states[-1 - self.skip - reading.skip]
        state = (self.encoder.norm(state) if self.norm else state).reshape(n, -1, state.shape[-1])
        if reading.weights:
            scaled = state * weights.reshape(n, -1, 1).to(state)
            state = scaled * (state.mean((1, 2), keepdim=True) / scaled.mean((1, 2), keepdim=True))
        lengths = torch.tensor([row.lengths for row in rows])[..., None]
        real = (torch.arange(ids.shape[-1]) < lengths).flatten(1).to(device)
        return state, found.embedding[:: reading.chunks], real

    def _check(self, skip: int) -> None:
        depth = self.encoder.config.depth
        if not 0 <= skip < depth:
            raise ValueError(f"skip is {skip} for a text tower of {depth} blocks; allowed: 0 to {depth - 1}")


@dataclass(frozen=True)
class ClipText:
    """Tokens of all towers side by side; the padding is read, too, as most of these systems were trained.

    Attributes:
        pooled: whether the projected end token of the last tower is a field, too.
        zero_null: without negative texts, what guidance leaves behind is zeros and not the empty text (SDXL).
        reading: how prompts are read where the inputs do not say.
        mask: whether the padding is told from the text, as unCLIP's nets are trained.
    """

    towers: tuple[Tower, ...]
    pooled: bool = False
    zero_null: bool = False
    reading: Reading = field(default_factory=Reading)
    mask: bool = False

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """Fields tokens and pooled of `inputs.text`; without text all pictures are unconditional.

        Raises: ValueError if there is not one text per picture.
        """
        texts = [""] * inputs.n if inputs.text is None else inputs.text
        return self.encode(checked(texts, inputs.n, "text"), inputs.reading)

    def null(self, inputs: Inputs, cond: Conditioning) -> Conditioning:
        """The negative texts, the empty one, or zeros in place of the text."""
        if inputs.negative is not None:
            empty = self.encode(checked(inputs.negative, inputs.n, "negative"), inputs.reading)
        else:
            one = self.encode([""], inputs.reading)  # one row serves all
            empty = (one.map(torch.zeros_like) if self.zero_null else one).map(
                lambda v: v.expand(inputs.n, *v.shape[1:])
            )
        return replace(cond, tokens=empty.tokens, pooled=empty.pooled, mask=empty.mask)

    def encode(self, texts: Sequence[str], reading: Reading | None = None) -> Conditioning:
        """Tokens, pooled and mask of any texts, on the device of the towers."""
        read = [tower.read(texts, reading or self.reading) for tower in self.towers]
        _, pooled, mask = read[-1]
        return Conditioning(
            tokens=torch.cat([tokens for tokens, _, _ in read], dim=2),
            pooled=pooled if self.pooled else None,
            mask=mask if self.mask else None,
        )
