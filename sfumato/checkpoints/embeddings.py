"""Files of textual inversion: learned rows of the embedding table of CLIP's text towers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sfumato.checkpoints.files import read_weights
from sfumato.checkpoints.kinds import looks_like

__all__ = ["LearnedWord", "read_word"]

TOWERS = ("clip_l", "clip_g")  # of SDXL, in the order of its towers


@dataclass(frozen=True)
class LearnedWord:
    """A word and its vectors.

    Attributes:
        vectors: (n, width) for every tower, in their order.
    """

    word: str
    vectors: tuple[Tensor, ...]


def read_word(path: Path) -> LearnedWord:
    """The word of a file of A1111, of the original scripts, or of diffusers.

    Gal et al. 2022 (arXiv:2208.01618). Only diffusers' files name it; else it is the name of the file.

    Raises: ValueError in one line if the file is something else.
    """
    content = read_weights(path)
    inside, word = content.get("string_to_param", content), path.stem
    items = inside.items() if isinstance(inside, Mapping) else ()
    tensors = {name: v for name, v in items if isinstance(v, Tensor)}
    if set(tensors) == set(TOWERS):
        found = [tensors[name] for name in TOWERS]
    elif len(tensors) == 1:
        ((name, vector),) = tensors.items()
        found, word = [vector], path.stem if name in ("*", "emb_params", *TOWERS) else name
    else:
        found = []
    found = [(v[None] if v.ndim == 1 else v).detach().float() for v in found]
    if not found or any(v.ndim != 2 or len(v) != len(found[0]) for v in found):
        hint = looks_like(content) or f"it holds {', '.join(map(repr, list(content)[:3]))}"
        raise ValueError(f"{path} is no embedding of textual inversion: {hint}")
    return LearnedWord(word, tuple(found))
