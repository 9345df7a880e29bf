"""Text -> tokens, and pooled embedding, by CLIP's text towers: Stable Diffusion 1 and 2, SDXL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sfumato.conditioners.text import checked
from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, Inputs
from sfumato.nets.clip import CLIPText, TextStates
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
        depth = self.encoder.config.depth
        if not 0 <= self.skip < depth:
            raise ValueError(
                f"skip is {self.skip} for a text tower of {depth} blocks; allowed: 0 to {depth - 1}"
            )

    def read(self, texts: Sequence[str]) -> tuple[Tensor, TextStates, Tensor]:
        """Tokens (B, L, width), everything that the tower computed, and (B, L) bool where there is text."""
        ids, mask = (v.to(self.encoder.positions.device) for v in self.tokenizer(texts))
        found = self.encoder(ids)
        state = found.states[-1 - self.skip]
        return (self.encoder.norm(state) if self.norm else state), found, mask


@dataclass(frozen=True)
class ClipText:
    """Tokens of all towers side by side; the padding is read, too, as most of these systems were trained.

    Attributes:
        pooled: whether the projected end token of the last tower is a field, too.
        zero_null: without negative texts, what guidance leaves behind is zeros and not the empty text (SDXL).
        mask: whether the padding is told from the text, as unCLIP's nets are trained.
    """

    towers: tuple[Tower, ...]
    pooled: bool = False
    zero_null: bool = False
    mask: bool = False

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """Fields tokens and pooled of `inputs.text`; without text all pictures are unconditional.

        Raises: ValueError if there is not one text per picture.
        """
        texts = [""] * inputs.n if inputs.text is None else inputs.text
        return self.encode(checked(texts, inputs.n, "text"))

    def null(self, inputs: Inputs, cond: Conditioning) -> Conditioning:
        """The negative texts, the empty one, or zeros in place of the text."""
        if inputs.negative is not None:
            empty = self.encode(checked(inputs.negative, inputs.n, "negative"))
        else:
            one = self.encode([""])  # one row serves all
            empty = (one.map(torch.zeros_like) if self.zero_null else one).map(
                lambda v: v.expand(inputs.n, *v.shape[1:])
            )
        return replace(cond, tokens=empty.tokens, pooled=empty.pooled, mask=empty.mask)

    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Tokens, pooled and mask of any texts, on the device of the towers."""
        read = [tower.read(texts) for tower in self.towers]
        _, last, mask = read[-1]
        return Conditioning(
            tokens=torch.cat([tokens for tokens, _, _ in read], dim=2),
            pooled=last.embedding if self.pooled else None,
            mask=mask if self.mask else None,
        )
