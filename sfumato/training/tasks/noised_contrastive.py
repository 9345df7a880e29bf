"""Training of GLIDE's noised CLIP: noisy pictures and captions find each other among the pairs of a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from sfumato.core.random import Noise
from sfumato.core.world import ALONE, World
from sfumato.diffusion.schedules import Discrete
from sfumato.diffusion.times import TimesConfig, Uniform
from sfumato.nets.noised_clip import NoisedText, NoisedTextConfig, NoisedVision, NoisedVisionConfig
from sfumato.text.tokenizers import Tokenizer
from sfumato.training.batches import Batch
from sfumato.training.task import Loss, Memory, Moment, Phase
from sfumato.training.tasks.classifying import noised
from sfumato.training.tasks.contrastive import LIMIT, info_nce

__all__ = ["NoisedContrastive", "NoisedContrastiveConfig"]

FIRST = math.log(1 / 0.07)  # the logarithmic scale of the cosines at first, as CLIP's


@dataclass(frozen=True, kw_only=True)
class NoisedContrastiveConfig:
    """Shape of both towers, and the noise that they see: that of the denoiser which they guide.

    Attributes:
        text: its vocabulary is an upper bound, the tokenizer is learned.
        schedule: of as many steps as the vision tower knows times.
        times: at which noise they are trained.
    """

    kind: Literal["noised_contrastive"] = "noised_contrastive"
    vision: NoisedVisionConfig = field(default_factory=NoisedVisionConfig)
    text: NoisedTextConfig = field(default_factory=NoisedTextConfig)
    schedule: Discrete = field(default_factory=Discrete)
    times: TimesConfig = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        if self.vision.embed != self.text.embed:
            raise ValueError(
                f"the towers embed in {self.vision.embed} and {self.text.embed} dimensions; set both embed "
                "to one width"
            )
        if self.vision.times != self.schedule.steps:
            raise ValueError(
                f"vision.times is {self.vision.times} and schedule.steps {self.schedule.steps}; set both to "
                "the same number"
            )


class Scale(nn.Module):
    """The learned factor of the cosines, as its logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(FIRST))


class NoisedContrastive:
    """One phase, "clip": InfoNCE at x_t (Nichol et al. 2021, arXiv:2112.10741, section 2.4).

    Args:
        config: the towers, with the vocabulary of the tokenizer, and their noise.
        tokenizer: of the text tower.
        examples: pictures (n, 3, H, W) that the preview shows.
        world: processes whose pairs are compared.
    """

    def __init__(
        self,
        config: NoisedContrastiveConfig,
        tokenizer: Tokenizer,
        examples: Tensor,
        world: World = ALONE,
    ) -> None:
        self.config, self.tokenizer, self.examples, self.world = config, tokenizer, examples, world
        self.vision, self.text, self.scale = NoisedVision(config.vision), NoisedText(config.text), Scale()
        self.modules: dict[str, nn.Module] = {
            "clip_image": self.vision,
            "clip_text": self.text,
            "scale": self.scale,
        }
        self.phases = {"clip": Phase(tuple(self.modules))}
        self.averaged = ("clip_image", "clip_text")
        self.memories: dict[str, Memory] = {}

    def losses(self, batch: Batch, noise: Noise, moment: Moment) -> Iterator[Loss]:
        """See Task; also the share of pictures that find their caption."""
        drawn = self.config.times.sample(self.config.schedule, noise)
        x_t, t = noised(self.config.schedule, batch.pictures, drawn.t, noise)
        pictures = self.vision(x_t, t)
        ids, mask = self.tokenizer(batch.text)
        texts = self.text(ids.to(pictures.device), mask.sum(1).to(pictures.device))
        with torch.no_grad():  # after the last step, in effect
            self.scale.logit_scale.clamp_(max=LIMIT)
        loss = info_nce(pictures, texts, self.scale.logit_scale.exp(), self.world)
        yield Loss("clip", loss, {"scale": self.scale.logit_scale.detach().exp()})

    def preview(self, averaged: Mapping[str, nn.Module]) -> Tensor:
        """The examples; the result of this task is no picture."""
        return self.examples
