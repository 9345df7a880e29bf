"""What training by a recipe costs: counted operations, and the time of one measured step."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sfumato.core.device import device_of
from sfumato.core.world import ALONE
from sfumato.data.datasets import ImageFolder
from sfumato.training.distributed import engine_for
from sfumato.training.jobs.build import build
from sfumato.training.jobs.job import Place
from sfumato.training.optim import PhaseOptimizer
from sfumato.training.recipe import Recipe
from sfumato.training.signals import Stop
from sfumato.training.step import Step
from sfumato.training.tasks.denoising import DenoisingConfig

__all__ = ["Cost", "cost_of"]


@dataclass(frozen=True)
class Cost:
    """What a recipe takes.

    Attributes:
        parameters: of the denoising net.
        gflop: of one picture in training, text tower included: products of matrices and convolutions of the
            forward and the backward pass, a multiplication and an addition counted as two.
        seconds: of the same, in one measured step of the recipe's batch, on this machine.
    """

    parameters: int
    gflop: float
    seconds: float


def cost_of(recipe: Recipe, pictures: ImageFolder) -> Cost:
    """Two steps of the trainer by the recipe: one is counted, the next one is timed.

    Args:
        pictures: one batch of the recipe's data; nothing is left of what is computed for them.

    Raises: ValueError in one line, as training by the recipe would.
    """
    assert isinstance(recipe.task, DenoisingConfig)
    recipe, device = (
        replace(recipe, task=replace(recipe.task, latents=None)),
        device_of(recipe.trainer.device),
    )
    devices = [device] if device.type == "cuda" else []
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=devices):
        torch.manual_seed(recipe.trainer.seed)
        job = build(recipe, Place(Path(folder), device, pictures, recipe.about, ""))
        optimizers = {
            name: PhaseOptimizer([job.task.modules[m] for m in phase.modules], phase.optim or recipe.optim)
            for name, phase in job.task.phases.items()
        }
        step = Step(
            job.task,
            optimizers,
            seed=recipe.trainer.seed,
            total=recipe.trainer.images,
            precision=recipe.trainer.precision,
            stop=Stop(),
            engine=engine_for(job.task, "replicate", ALONE),
        )
        counter = FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):  # it does not know the fused attention of CPUs
            step(job.batches(0), 0)
        start = time.perf_counter()
        step(job.batches(0), 0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        weights = sum(p.numel() for p in job.task.modules["denoiser"].parameters())
    batch = recipe.trainer.batch
    return Cost(weights, counter.get_total_flops() / batch / 1e9, seconds / batch)
