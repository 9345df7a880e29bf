"""Where things are in a picture, as latent diffusion is told it: a class for every pixel, or boxes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sfumato.conditioners.image import Kept
from sfumato.conditioners.text import checked
from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, Inputs
from sfumato.nets.text import TextTransformer
from sfumato.nets.told import ClassMap

__all__ = ["Boxes", "Semantic"]


@dataclass(frozen=True)
class Semantic(Kept):
    """A class for every pixel, made small and mixed into a few channels.

    Attributes:
        factor: pixels per cell of the latents along one side.
    """

    encoder: ClassMap
    factor: int

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """Field concat (n, C, H / factor, W / factor) of `inputs.hint`, a gray picture of class numbers.

        Raises: ValueError without a hint, or for a class that the encoder does not have.
        """
        if inputs.hint is None:
            raise ValueError(
                "this system is told a class for every pixel: give a gray picture of them as hint"
            )
        classes, known = ((inputs.hint[:, 0] + 1) * 127.5).round().long(), self.encoder.config.classes
        if int(classes.max()) >= known:
            raise ValueError(
                f"the hint has class {int(classes.max())}; allowed: gray values 0 to {known - 1}"
            )
        return Conditioning(concat=self.encoder(classes, self.factor))


@dataclass(frozen=True)
class Boxes(Kept):
    """Boxes with classes, three tokens each: class, top left and bottom right corner on a grid.

    After the boxes, filled up with the last id, stand the corners of the part of the picture that is shown:
    all of it. Taming Transformers' builder of conditions (Esser et al. 2021, arXiv:2012.09841) has the
    rounding.
    """

    encoder: TextTransformer

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """Field tokens (n, L, D) of texts such as "12 0.1 0.2 0.5 0.9; 7 0 0 1 1".

        A box is its class, left, top, right and bottom, from 0 to 1; there may be none.

        Raises: ValueError for a text that is no such list, or if there is not one per picture.
        """
        texts = checked([""] * inputs.n if inputs.text is None else inputs.text, inputs.n, "text")
        device = self.encoder.positions.device
        ids = torch.tensor([self._ids(text) for text in texts], device=device)
        return Conditioning(tokens=self.encoder(ids, torch.ones_like(ids, dtype=torch.bool))[0])

    def _ids(self, text: str) -> list[int]:
        vocab, room = self.encoder.config.vocab_size, self.encoder.config.context - 2
        ids = [i for box in text.split(";") if box.strip() for i in self._box(box, vocab)]
        if len(ids) > room:
            raise ValueError(f"{len(ids) // 3} boxes; allowed: at most {room // 3}")
        return [*ids, *[vocab - 1] * (room - len(ids)), *self._corners(vocab, 0, 0, 1, 1)]

    def _box(self, box: str, vocab: int) -> tuple[int, int, int]:
        try:
            number, *sides = box.split()
            kind, (left, top, right, bottom) = int(number), (float(side) for side in sides)
        except ValueError:
            kind, left, top, right, bottom = -1, 0.0, 0.0, 0.0, 0.0
        if not (0 <= kind < vocab - 1 and 0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError(
                f"box {box.strip()!r} is not understood; give class (0 to {vocab - 2}), left, top, right and "
                "bottom, the sides from 0 to 1, and ';' between boxes: '12 0.1 0.2 0.5 0.9; 7 0 0 1 1'"
            )
        return kind, *self._corners(vocab, left, top, right, bottom)

    @staticmethod
    def _corners(vocab: int, left: float, top: float, right: float, bottom: float) -> tuple[int, int]:
        side = math.isqrt(vocab)
        first, second = (
            round(y * (side - 1)) * side + round(x * (side - 1)) for x, y in ((left, top), (right, bottom))
        )
        return first, second
