"""Training of a denoiser, with its text tower, on pictures, latents or embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from sfumato.conditioners.base import Conditioner
from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, Inputs
from sfumato.data.degrade import DegradeConfig
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.objective import Objective
from sfumato.diffusion.schedules import Discrete, Flow, ScheduleConfig
from sfumato.diffusion.weights import Uncertainty
from sfumato.nets.autoencoder import DiagonalGaussian
from sfumato.nets.dit import DiTConfig
from sfumato.nets.lora import LoraConfig
from sfumato.nets.mlp import MLPConfig
from sfumato.nets.prior import PriorConfig
from sfumato.nets.t5 import T5Config
from sfumato.nets.text import TextTransformerConfig
from sfumato.nets.unet import UNetConfig
from sfumato.systems.codec import Codec
from sfumato.systems.conditioning import LowResConfig
from sfumato.systems.options import SampleOptions
from sfumato.systems.stage import Stage
from sfumato.training.batches import Batch
from sfumato.training.task import Loss, Memory, Moment, Phase

__all__ = ["Complete", "Denoising", "DenoisingConfig", "check_share", "told"]

Posterior = Literal["sample", "mean"]


@dataclass(frozen=True, kw_only=True)
class DenoisingConfig:
    """A denoiser on pictures, latents or embeddings, optionally told a text, a class, or both.

    It is told a class if its net has a table of classes: the labels of the data are read then.

    Attributes:
        net: its channels must be those of what it denoises: 3, those of the latents, or the width of the
            embeddings. None = the one of `init`.
        text: tower trained together with the net; `vocab_size` is an upper bound. None = none, or the one of
            `init`.
        low_res: the net enlarges pictures: it has 3 channels more, for the picture made small and enlarged
            again, with noise of a random level if there is a schedule; pixels only. None = it does not.
        autoencoder: folder of a trained first stage, or of a run that trained one; None = that of `init`, or
            pixels.
        embedder: folder of a trained perceptual net, or of a run that trained one: its pooled features are
            what is denoised.
        clip: folder of a trained CLIP, or of a run that trained one. Its text tower reads the captions; a
            prior denoises the embeddings of its pictures, and a net with image tokens is told them.
        degrade: how the small picture of an upsampler is made, which its net takes as 3 more channels.
        posterior: whether latents are samples of the autoencoder's posterior or its means.
        cache: encode every picture once, before training, if the data are not augmented; and every caption,
            if the text tower is not trained.
        latents: folder of that cache, for runs that share their pictures; None = within the run folder.
        schedule: noise over time.
        prediction: a parameterization: eps, x0, v, flow or edm.
        learned_var: the net has twice the channels and learns a variance; needs objective.vlb.
        objective: times, weights and the rest of the loss.
        uncertainty: number of features of a learned log-variance of the loss, see `weights.Uncertainty`;
            None = none.
        dropout: share of captions and labels that are replaced by null ones, for classifier-free guidance.
        holes: train the net to fill holes too, for which it reads a masked picture and its mask: 2 C + 1
            channels. Those that `init` lacks begin at zero. Pictures only.
        dropout_image: share of image embeddings that are, independently of the captions.
        sampling: how previews and the finished system sample unless told otherwise.
        prompts: of the preview; picture i has seed i. Empty = captions of the data.
        init: folder of a system, or of a run that made one, whose training is taken up: net, text tower,
            tokenizer and autoencoder are its own.
        partial: where `net` and `init` differ at the layers that touch the sample (another patch size), these
            are fresh; schedule and prediction may differ too.
        freeze_text: leave the text tower of `init` as it is.
        lora: train low-rank adapters of the net of `init` instead of the whole system.
        lora_text: the same for its text tower.
        control: train a ControlNet for the U-Net of `init`, and nothing else, on what is made of the
            pictures: "edges", see `core.image.edges`.
    """

    kind: Literal["denoising"] = "denoising"
    net: DiTConfig | UNetConfig | MLPConfig | PriorConfig | None = field(default_factory=DiTConfig)
    text: TextTransformerConfig | T5Config | None = None
    low_res: LowResConfig | None = None
    autoencoder: Path | None = None
    embedder: Path | None = None
    clip: Path | None = None
    degrade: DegradeConfig | None = None
    posterior: Posterior = "sample"
    cache: bool = True
    latents: Path | None = None
    schedule: ScheduleConfig = field(default_factory=Flow)
    prediction: str = "flow"
    learned_var: bool = False
    objective: Objective = field(default_factory=Objective)
    uncertainty: int | None = None
    dropout: float = 0.1
    holes: bool = False
    dropout_image: float = 0.1
    sampling: SampleOptions = field(default_factory=SampleOptions)
    prompts: tuple[str, ...] = ()
    init: Path | None = None
    partial: bool = False
    freeze_text: bool = False
    lora: LoraConfig | None = None
    lora_text: LoraConfig | None = None
    control: Literal["edges"] | None = None

    def __post_init__(self) -> None:
        for name, share in (("dropout", self.dropout), ("dropout_image", self.dropout_image)):
            check_share(name, share)
        if self.autoencoder is not None and self.embedder is not None:
            raise ValueError("autoencoder and embedder are both given; choose what is to be denoised")
        if self.uncertainty is not None and self.uncertainty < 1:
            raise ValueError(f"uncertainty is {self.uncertainty} features; allowed: at least 1, such as 128")
        self._check_clip()
        self._check_variance()
        self._check_init()

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained and nothing else."""
        return self.lora is not None or self.lora_text is not None

    def _check_clip(self) -> None:
        if self.clip is None and isinstance(self.net, PriorConfig):
            raise ValueError("a prior denoises the embeddings of a CLIP: set task.clip to its folder")
        if self.clip is not None and (self.text is not None or self.embedder is not None):
            raise ValueError(
                "task.clip reads the captions and embeds the pictures: leave out text and embedder"
            )
        if self.degrade is not None and self.autoencoder is not None:
            raise ValueError("task.degrade is for an upsampler of pictures: leave out autoencoder")

    def _check_variance(self) -> None:
        vlb = self.objective.vlb
        if vlb and not (self.learned_var and isinstance(self.schedule, Discrete)):
            raise ValueError(
                f"objective.vlb is {vlb}, which trains a variance: it needs learned_var and a schedule of "
                "kind discrete; 0 = off"
            )
        if self.learned_var and not vlb:
            raise ValueError("learned_var needs objective.vlb, which trains the variance; 0.001 is usual")

    def _check_init(self) -> None:
        if self.init is None:
            names = ("partial", "freeze_text", "lora", "lora_text", "control")
            wants = [n for n in names if getattr(self, n)]
            wants += ["no net"] if self.net is None else []
            if wants:
                raise ValueError(f"{wants[0]} needs init, the folder of a trained system or of its run")
        elif self.control is not None and (self.adapts or self.partial or self.net is not None):
            raise ValueError(
                "control leaves the net of init as it is: set net to None, and leave out lora and partial"
            )
        elif self.partial and self.adapts:
            raise ValueError("partial leaves fresh layers, and lora does not train them; choose one")
        elif self.freeze_text and self.lora_text is not None:
            raise ValueError(
                "freeze_text leaves the text tower as it is, and lora_text adapts it; choose one"
            )


@runtime_checkable
class Remembering(Protocol):
    """A time sampler that learns from the losses."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


Complete = Callable[[Inputs, Tensor, Noise], Inputs]


class Denoising:
    """One phase, "denoiser": the objective at random levels, with captions and labels dropped at random.

    Args:
        stage: its net and its conditioner's tower are trained, or adapted; its codec encodes what comes
            without moments.
        objective: times, weights and the rest of the loss.
        dropout: share of captions and labels replaced by null ones (Ho & Salimans 2022, arXiv:2207.12598).
        posterior: see DenoisingConfig.
        modules: what is trained and averaged.
        draw: the preview's pictures from averaged modules.
        uncertainty: trained beside them, not averaged; None = none.
        memories: further state of the run.

    Attributes:
        embed: pictures (B, 3, H, W) in [-1, 1] -> embeddings (B, D), if those are what is denoised; set by
            the job, for the validation of the run.
        complete: inputs, pictures and their noise -> inputs with what is told of the pictures themselves.
        crop: side of the part of each picture that is trained on, a multiple of `cell`; None = all.
    """

    embed: Callable[[Tensor], Tensor] | None = None
    complete: Complete | None = None
    dropout_image = 0.0
    crop: int | None = None
    cell = 1

    def __init__(
        self,
        stage: Stage,
        objective: Objective,
        *,
        dropout: float,
        posterior: Posterior,
        modules: Mapping[str, nn.Module],
        draw: Callable[[Mapping[str, nn.Module]], Tensor],
        uncertainty: Uncertainty | None = None,
        memories: Mapping[str, Memory] | None = None,
    ) -> None:
        self.denoiser: Denoiser = stage.denoiser
        self.conditioner: Conditioner = stage.conditioner
        self.codec: Codec = stage.codec
        self.objective = objective
        self.dropout = dropout
        self.posterior = posterior
        self.uncertainty = uncertainty
        self.modules = {**modules, **({"uncertainty": uncertainty} if uncertainty is not None else {})}
        self.phases = {"denoiser": Phase(tuple(self.modules))}
        self.averaged = tuple(modules)
        self.memories: dict[str, Memory] = dict(memories or {})
        if isinstance(objective.times, Remembering):
            self.memories["times"] = objective.times
        self._draw = draw

    def losses(self, batch: Batch, noise: Noise, moment: Moment) -> Iterator[Loss]:
        """See Task."""
        if self.crop is not None:
            batch = replace(batch, images=_cropped(batch.pictures, self.crop, self.cell, noise))
        x0 = self.clean(batch, noise)
        inputs = Inputs(n=len(batch), text=batch.text, label=batch.labels)
        if self.complete is not None:
            inputs = self.complete(inputs, batch.pictures, noise.fork("told"))
        cond = self._told(inputs, noise, x0.device)
        losses = self.objective(self.denoiser, x0, cond, noise, uncertainty=self.uncertainty)
        yield Loss("denoiser", losses.loss.mean(), {name: v.mean() for name, v in losses.metrics.items()})

    def _told(self, inputs: Inputs, noise: Noise, device: torch.device) -> Conditioning:
        """What the net is told, with captions and labels dropped, and image embeddings independently."""
        full, null, cond = told(self.conditioner, inputs, self.dropout, noise, device)
        if full.image_embed is None or null.image_embed is None:
            return cond
        keep = (noise.uniform(torch.empty(inputs.n, 1)) >= self.dropout_image).to(device)
        return replace(cond, image_embed=torch.where(keep, full.image_embed, null.image_embed))

    def clean(self, batch: Batch, noise: Noise) -> Tensor:
        """What is to be denoised: pictures or latents (B, C, h, w), or embeddings (B, D).

        Latents come from moments if the batch has them, else from the codec.
        """
        sampled = self.posterior == "sample"
        if batch.moments is not None:
            posterior = DiagonalGaussian(*batch.moments.chunk(2, dim=1))
            return posterior.sample(noise(posterior.mean)) if sampled else posterior.mean
        x = batch.pictures if batch.vectors is None else batch.vectors
        with torch.no_grad():
            return self.codec.encode(x, noise if sampled else None)

    def preview(self, averaged: Mapping[str, nn.Module]) -> Tensor:
        """Pictures for the prompts by the averaged net and tower."""
        return self._draw(averaged)


def told(
    conditioner: Conditioner, inputs: Inputs, dropout: float, noise: Noise, device: torch.device
) -> tuple[Conditioning, Conditioning, Conditioning]:
    """What a net may be told, the same without what guidance amplifies, and rows of either, by chance.

    Args:
        dropout: share of the second.
    """
    full = conditioner(inputs, noise).to(device)
    keep = noise.uniform(torch.empty(inputs.n)) >= dropout
    null = conditioner.null(inputs, full).to(device)
    return full, null, full.select(keep.to(device), null)


def check_share(name: str, share: float) -> None:
    """Raises: ValueError in one line outside [0, 1)."""
    if not 0 <= share < 1:
        raise ValueError(f"{name} is {share}; allowed: a share in [0, 1), such as 0.1")


def _cropped(pictures: Tensor, side: int, cell: int, noise: Noise) -> Tensor:
    """A random square of each picture whose corner is a multiple of `cell`."""
    free = [(n - side) // cell + 1 for n in pictures.shape[-2:]]
    if min(free) < 1:
        raise ValueError(f"crops of {side} pixels from pictures of {tuple(pictures.shape[-2:])}; lower crop")
    top, left = (noise.integers(n) * cell for n in free)
    rows = zip(pictures, top.tolist(), left.tolist(), strict=True)
    return torch.stack([p[:, t : t + side, x : x + side] for p, t, x in rows])
