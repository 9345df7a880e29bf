"""Training of an autoregressive prior: the next token of a quantized image embedding, given a caption."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.conditioners.base import Conditioner
from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, Inputs
from sfumato.diffusion.guidance import LogitCFG
from sfumato.nets.token_prior import TokenPrior, TokenPriorConfig
from sfumato.systems.options import SampleOptions
from sfumato.training.batches import Batch
from sfumato.training.task import Loss, Memory, Moment, Phase
from sfumato.training.tasks.denoising import check_share, told

__all__ = ["Predicting", "PredictingConfig", "token_losses"]


@dataclass(frozen=True, kw_only=True)
class PredictingConfig:
    """An autoregressive prior of the image embeddings of a CLIP.

    Attributes:
        net: its dim, text_dim and context are those of the CLIP.
        clip: folder of a trained CLIP, or of a run that trained one.
        dropout: share of captions that are replaced by the empty one, for guidance.
        sampling: how previews and the finished system sample unless told otherwise.
        prompts: of the preview; picture i has seed i. Empty = captions of the data.
    """

    kind: Literal["predicting"] = "predicting"
    net: TokenPriorConfig = field(default_factory=TokenPriorConfig)
    clip: Path
    dropout: float = 0.1
    sampling: SampleOptions = field(default_factory=lambda: SampleOptions(steps=1, guidance=LogitCFG(2.0)))
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_share("dropout", self.dropout)
        if not isinstance(self.sampling.guidance, LogitCFG):
            found = getattr(self.sampling.guidance, "kind", "unknown")
            raise ValueError(
                f"task.sampling.guidance is of kind {found}; this prior draws tokens: choose logits"
            )


def token_losses(net: TokenPrior, vectors: Tensor, cond: Conditioning, text: Tensor) -> Tensor:
    """Cross-entropy of each coordinate of embeddings (B, D), given the true ones before it, in nats: (B,).

    Args:
        cond: what the net is told, dropout included.
        text: (B, D) embeddings of the true texts, to which the cosines are.
    """
    tokens = net.quantizer.encode(vectors, text)
    logits = net.logits(tokens, cond)
    return F.cross_entropy(logits.mT.float(), tokens[:, 1:], reduction="none").mean(1)


class Predicting:
    """One phase, "prior"; a dropped caption leaves the token of its cosine.

    Args:
        net: whose quantizer is fitted.
        conditioner: reads captions; it is not trained.
        dropout: see PredictingConfig.
        embed: pictures (B, 3, H, W) in [-1, 1] -> embeddings (B, D), for the validation of the run.
        draw: the preview's pictures from averaged modules.
    """

    def __init__(
        self,
        net: TokenPrior,
        conditioner: Conditioner,
        *,
        dropout: float,
        embed: Callable[[Tensor], Tensor],
        draw: Callable[[Mapping[str, nn.Module]], Tensor],
    ) -> None:
        self.net, self.conditioner, self.dropout, self.embed = net, conditioner, dropout, embed
        self.modules: dict[str, nn.Module] = {"denoiser": net}
        self.phases = {"prior": Phase(("denoiser",))}
        self.averaged = ("denoiser",)
        self.memories: dict[str, Memory] = {}
        self._draw = draw

    def losses(self, batch: Batch, noise: Noise, moment: Moment) -> Iterator[Loss]:
        """See Task."""
        assert batch.vectors is not None
        inputs = Inputs(n=len(batch), text=batch.text)
        full, _, cond = told(self.conditioner, inputs, self.dropout, noise, batch.vectors.device)
        assert full.pooled is not None
        loss = token_losses(self.net, batch.vectors, cond, full.pooled).mean()
        yield Loss("prior", loss, {"bits": loss.detach() / math.log(2)})

    def preview(self, averaged: Mapping[str, nn.Module]) -> Tensor:
        """The pictures of the data that are nearest to what the averaged net draws for the prompts."""
        return self._draw(averaged)
