"""How well the two towers of CLIP find each other: recall of captions and pictures, zero-shot classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfumato.core.image import to_float
from sfumato.nets.clip import CLIP
from sfumato.text.tokenizers import Tokenizer

__all__ = ["embedded", "likeness", "recalls", "zero_shot"]

CHUNK = 64  # pictures that go through a tower at a time


@torch.no_grad()
def embedded(clip: CLIP, tokenizer: Tokenizer, pixels: Tensor, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Embeddings of pictures (N, 3, H, W) uint8 and of texts, on the CPU: (N, D) and (M, D)."""
    device = clip.logit_scale.device
    pictures = torch.cat([clip.see(to_float(part).to(device)).cpu() for part in pixels.split(CHUNK)])
    ids = tokenizer(texts)[0].to(device).split(CHUNK)
    return pictures, torch.cat([clip.text(part).embedding.cpu() for part in ids])


def likeness(a: Tensor, b: Tensor) -> Tensor:
    """Cosines (N, M) of rows (N, D) and (M, D). Raises: ValueError if the widths differ."""
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"embeddings of widths {a.shape[1]} and {b.shape[1]}: they are of different CLIPs")
    return torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).mT


def recalls(
    pictures: Tensor, texts: Tensor, captions: Sequence[str], ks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Share of pictures whose caption is among the k likeliest, "text@k", and the reverse, "picture@k".

    A different picture with the same caption counts as found.

    Args:
        pictures, texts: (N, D), row i of both belongs together.
        captions: N.
    """
    number = {caption: i for i, caption in enumerate(captions)}
    group = torch.tensor([number[caption] for caption in captions])
    scores, found = likeness(pictures.double(), texts.double()), dict[str, float]()
    for name, table in (("text", scores), ("picture", scores.mT)):
        ranked = group[table.argsort(dim=1, descending=True, stable=True)]
        for k in ks:
            found[f"{name}@{k}"] = float((ranked[:, :k] == group[:, None]).any(1).double().mean())
    return found


def zero_shot(pictures: Tensor, classes: Tensor, labels: Tensor) -> float:
    """Share of pictures whose likeliest class is theirs.

    Radford et al. 2021 (arXiv:2103.00020), section 3.1.

    Args:
        pictures: (N, D).
        classes: (K, D), of texts such as "a photo of a cat".
        labels: (N,) in 0..K - 1.
    """
    return float((likeness(pictures, classes).argmax(1) == labels).double().mean())
