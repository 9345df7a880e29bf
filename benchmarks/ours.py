"""Our trainer as it is, on the nets that are compared."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from setting import LOG_EVERY, LR, Pace, Samples, Size
from torch import Tensor, nn

from sfumato.conditioners.base import Conditioner
from sfumato.conditioners.label import LabelCond
from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, Inputs
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.objective import Objective
from sfumato.diffusion.parameterization import PARAMETERIZATIONS
from sfumato.diffusion.schedules import Discrete
from sfumato.families import RECIPES
from sfumato.nets.dit import DiT
from sfumato.nets.unet import UNet
from sfumato.systems.config import About
from sfumato.systems.stage import Stage
from sfumato.training.batches import Batch, open_folder
from sfumato.training.jobs.build import build
from sfumato.training.jobs.job import Place, settle
from sfumato.training.log import RunLog
from sfumato.training.optim import OptimConfig
from sfumato.training.state import Checkpoints
from sfumato.training.task import Task
from sfumato.training.tasks.denoising import Denoising, DenoisingConfig
from sfumato.training.trainer import Trainer, TrainerConfig

__all__ = ["cached", "dit", "uncached", "unet"]

CPU = torch.device("cpu")
ENDLESS = 10**9  # images
BUNDLED = Path(__file__).resolve().parents[1] / "sfumato" / "assets" / "default"


@dataclass(frozen=True)
class Given:
    """Batches of the trainer; their captions are numbers of rows."""

    samples: Samples

    def __call__(self, images: int) -> Batch:
        """A batch of the trainer; its captions are numbers of rows."""
        rows = self.samples.rows(images)
        latents = self.samples.latents[rows]
        return Batch(
            text=tuple(map(str, rows.tolist())),
            index=rows,
            moments=torch.cat([latents, torch.zeros_like(latents)], dim=1),
            labels=self.samples.labels[rows],
        )


@dataclass(frozen=True)
class GivenTokens:
    """Stands for a frozen text encoder whose results are kept: a text is the number of its row."""

    table: Tensor

    def __call__(self, inputs: Inputs, noise: Noise | None = None) -> Conditioning:
        """Field tokens."""
        assert inputs.text is not None
        return Conditioning(tokens=self.table[[int(text) for text in inputs.text]])

    def null(self, inputs: Inputs, cond: Conditioning) -> Conditioning:
        """Zeros."""
        assert cond.tokens is not None
        return Conditioning(tokens=torch.zeros_like(cond.tokens))


def unet(size: Size, data: Path, pace: Pace) -> None:
    """Our trainer on the U-Net."""
    samples = Samples.of(size)
    _train(UNet(size.unet()), GivenTokens(samples.tokens), samples, pace, dropout=0.0, ema=0.9999)


def dit(size: Size, data: Path, pace: Pace) -> None:
    """Our trainer on the DiT."""
    assert size.dit.num_classes is not None
    samples = Samples.of(size)
    _train(DiT(size.dit), LabelCond(size.dit.num_classes), samples, pace, dropout=0.1, ema=0.9999)


def _train(
    net: nn.Module, conditioner: Conditioner, samples: Samples, pace: Pace, *, dropout: float, ema: float
) -> None:
    settle({"net": net}, CPU)
    net.train()
    denoiser = Denoiser(net, Discrete(), PARAMETERIZATIONS["eps"])
    stage = Stage(
        name="stage", denoiser=denoiser, shape=tuple(samples.latents.shape[1:]), conditioner=conditioner
    )
    task = Denoising(
        stage,
        Objective(),
        dropout=dropout,
        posterior="mean",
        modules={"denoiser": net},
        draw=lambda averaged: torch.zeros(1, 3, 8, 8),
    )
    optim = OptimConfig(lr=LR, betas=(0.9, 0.999), lr_schedule="constant", clip=1.0)
    _fit(task, Given(samples), optim, TrainerConfig(images=ENDLESS, batch=samples.batch, ema=ema), pace)


def _fit(
    task: Task, batches: Callable[[int], Batch], optim: OptimConfig, config: TrainerConfig, pace: Pace
) -> None:
    config = replace(
        config, images=ENDLESS, log_every=LOG_EVERY * config.batch, save_every=0, preview_every=0, quiet=True
    )

    def paced(images: int) -> Batch:
        pace()
        return batches(images)

    with tempfile.TemporaryDirectory() as folder:
        log = RunLog(Path(folder) / "log.jsonl", ENDLESS, config.log_every, quiet=True)
        checkpoints = Checkpoints(Path(folder) / "checkpoints")
        with log:
            Trainer(task, paced, config, optim=optim, log=log, checkpoints=checkpoints).fit()


def cached(size: Size, data: Path, pace: Pace) -> None:
    """Our trainer on latents that were encoded before."""
    _openmoji(size, data, pace, cache=True)


def uncached(size: Size, data: Path, pace: Pace) -> None:
    """Our trainer on pictures that the bundled system's autoencoder encodes in every step."""
    _openmoji(size, data, pace, cache=False)


def _openmoji(size: Size, data: Path, pace: Pace, *, cache: bool) -> None:
    recipe = RECIPES["openmoji-dit"]()
    assert isinstance(recipe.task, DenoisingConfig)
    task = replace(recipe.task, autoencoder=BUNDLED, cache=cache)
    settings = replace(recipe.data, path=data, split=None, even=None)
    trainer = replace(recipe.trainer, batch=size.batch)
    recipe = replace(recipe, task=task, data=settings, trainer=trainer)
    with tempfile.TemporaryDirectory() as folder:
        job = build(recipe, Place(Path(folder), CPU, open_folder(settings), About(), ""))
        _fit(job.task, job.batches, recipe.optim, trainer, pace)
