"""Training of a CLIP: pictures and captions find each other among the pairs of a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.random import Noise
from sfumato.core.world import ALONE, World
from sfumato.nets.clip import CLIP, CLIPConfig
from sfumato.text.tokenizers import Tokenizer
from sfumato.training.batches import Batch
from sfumato.training.task import Loss, Memory, Moment, Phase

__all__ = ["LIMIT", "Contrastive", "ContrastiveConfig", "info_nce"]

LIMIT = math.log(100)  # of the learned logarithmic scale


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """Shape of both towers; the vocabulary of the text tower is an upper bound, its tokenizer is learned."""

    kind: Literal["contrastive"] = "contrastive"
    net: CLIPConfig = field(default_factory=CLIPConfig)

    def __post_init__(self) -> None:
        image, text = self.net.vision.embed, self.net.text.embed
        if image != text or not image:
            raise ValueError(
                f"the towers embed in {image} and {text} dimensions; set both embed to one width"
            )


def info_nce(pictures: Tensor, texts: Tensor, scale: Tensor, world: World = ALONE) -> Tensor:
    """Symmetric cross-entropy over the cosines of all pairs of all processes, ().

    Mean of picture -> text and text -> picture (Radford et al. 2021, arXiv:2103.00020, figure 3). Each
    process has the rows of its own pairs; the mean over processes is the loss of the whole batch.

    Args:
        pictures, texts: (B, D) embeddings, row i of both belongs together.
        scale: factor of the cosines, ().
    """
    pictures, texts = F.normalize(pictures, dim=1), F.normalize(texts, dim=1)
    wanted = torch.arange(len(pictures), device=pictures.device) + world.rank * len(pictures)
    to_text = F.cross_entropy(scale * pictures @ world.joined(texts).mT, wanted)
    return (to_text + F.cross_entropy(scale * texts @ world.joined(pictures).mT, wanted)) / 2


class Contrastive:
    """One phase, "clip"; with trainer.accumulate the other pairs are those of a micro-batch.

    Args:
        net: whose towers are trained, on the run's device.
        tokenizer: its text tower's.
        examples: pictures (n, 3, H, W) that the preview shows.
        world: processes whose pairs are compared.
    """

    def __init__(self, net: CLIP, tokenizer: Tokenizer, examples: Tensor, world: World = ALONE) -> None:
        self.net, self.tokenizer, self.examples, self.world = net, tokenizer, examples, world
        self.modules: dict[str, nn.Module] = {"clip": net}
        self.phases = {"clip": Phase(("clip",))}
        self.averaged = ("clip",)
        self.memories: dict[str, Memory] = {}

    def losses(self, batch: Batch, noise: Noise, moment: Moment) -> Iterator[Loss]:
        """See Task."""
        pictures = self.net.see(batch.pictures)
        texts = self.net.text(self.tokenizer(batch.text)[0].to(pictures.device)).embedding
        with torch.no_grad():  # after the last step, in effect
            self.net.logit_scale.clamp_(max=LIMIT)
        scale = self.net.logit_scale.exp()
        loss = info_nce(pictures, texts, scale, self.world)
        yield Loss("clip", loss, {"scale": scale.detach()})

    def preview(self, averaged: Mapping[str, nn.Module]) -> Tensor:
        """The examples as the vision tower sees them; its result is no picture."""
        return self.examples
