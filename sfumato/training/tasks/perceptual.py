"""Training of a stand-in for LPIPS: features that tell which words describe a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.random import Noise
from sfumato.nets.perceptual import PerceptualConfig, PerceptualNet
from sfumato.training.batches import Batch
from sfumato.training.task import Loss, Memory, Moment, Phase

__all__ = ["CaptionWords", "CaptionWordsConfig"]


@dataclass(frozen=True, kw_only=True)
class CaptionWordsConfig:
    """Shape of the net whose features are to be compared."""

    kind: Literal["caption_words"] = "caption_words"
    net: PerceptualConfig = field(
        default_factory=lambda: PerceptualConfig(widths=(32, 64, 128), convs=(2, 2, 2))
    )


class CaptionWords:
    """Multi-label classification of a picture's caption words from the spatial means of all taps of a trunk.

    A stand-in: published LPIPS compares features of a net trained on a million photographs and weighs them
    by human judgements; these features come from the training pictures alone and all weigh the same.

    Args:
        config: the net.
        words: the vocabulary, one output each; words outside it are ignored.
        examples: pictures (n, 3, H, W) that the preview repeats.
    """

    def __init__(self, config: CaptionWordsConfig, words: tuple[str, ...], examples: Tensor) -> None:
        if not words:
            raise ValueError("the captions hold no words; the perceptual net learns from captions")
        self.net = PerceptualNet(config.net)
        self.head = nn.Linear(sum(config.net.widths), len(words))
        self.examples = examples
        self._column = {word: i for i, word in enumerate(words)}
        self.modules: dict[str, nn.Module] = {"trunk": self.net.trunk, "head": self.head}
        self.phases = {"classifier": Phase(("trunk", "head"))}
        self.averaged = ("trunk",)
        self.memories: dict[str, Memory] = {}

    def losses(self, batch: Batch, noise: Noise, moment: Moment) -> Iterator[Loss]:
        """Binary cross-entropy summed over words, averaged over the batch."""
        features = torch.cat([tap.mean((2, 3)) for tap in self.net.trunk(batch.pictures)], dim=1)
        logits = self.head(features)
        wanted = self.targets(batch.text).to(logits)
        loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(1).mean()
        hit = wanted.gather(1, logits.argmax(1, keepdim=True)).mean()
        yield Loss("classifier", loss, {"top_word_right": hit})

    def targets(self, text: tuple[str, ...]) -> Tensor:
        """1 where a word of the vocabulary occurs in a caption: (B, words)."""
        table = torch.zeros(len(text), len(self._column))
        for i, caption in enumerate(text):
            for word in caption_words(caption):
                if word in self._column:
                    table[i, self._column[word]] = 1.0
        return table

    def preview(self, averaged: Mapping[str, nn.Module]) -> Tensor:
        """Each example and the mean activation of every tap for it, in grey."""
        trunk = averaged["trunk"]
        image = self.examples.to(next(trunk.parameters()).device)
        rows = [image]
        for tap in trunk(image):
            grey = tap.mean(1, keepdim=True)
            grey = F.interpolate(grey / grey.amax((2, 3), keepdim=True).clamp_min(1e-8), image.shape[-2:])
            rows.append((2 * grey - 1).expand_as(image))
        return torch.cat(rows)


def caption_words(caption: str) -> list[str]:
    """Lower-case words of a caption, split at spaces."""
    return caption.lower().split()


def vocabulary(captions: tuple[str, ...]) -> tuple[str, ...]:
    """Every word of the captions, sorted."""
    return tuple(sorted({word for caption in captions for word in caption_words(caption)}))
