"""Loss on pictures that a run is not trained on, at fixed times and noise, and the best system by it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from sfumato.checkpoints.native import Folder, write_folder
from sfumato.core.config import from_json
from sfumato.core.random import Noise
from sfumato.core.types import Conditioning, expand
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.guidance import noise_fraction
from sfumato.diffusion.objective import Objective
from sfumato.diffusion.times import Uniform
from sfumato.nets.autoencoder import Autoencoder
from sfumato.nets.clip import CLIP
from sfumato.nets.perceptual import FeatureDistance
from sfumato.nets.token_prior import TokenPrior
from sfumato.systems.config import SystemConfig
from sfumato.systems.system import assemble
from sfumato.training.held_out import HeldOut
from sfumato.training.history import LOSS, read_log
from sfumato.training.tasks.autoencoding import AutoencodingConfig
from sfumato.training.tasks.contrastive import info_nce
from sfumato.training.tasks.denoising import Complete
from sfumato.training.tasks.predicting import token_losses

__all__ = [
    "LOSS",
    "VELOCITY",
    "DenoisingLoss",
    "ReconstructionLoss",
    "RetrievalLoss",
    "TokenLoss",
    "Validation",
]

VELOCITY = "validation/velocity"
"""Name in the log of the error that compares denoisers of different objectives, see `DenoisingLoss`."""
SPAN = (0.05, 0.95)  # noise fractions of it: at 1, a net that predicts eps says nothing of x0

EDGES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the noise-level bins, as fractions sigma / (alpha + sigma)
Measure = Callable[[Folder, HeldOut], dict[str, float]]


class DenoisingLoss:
    """The training objective, without dropout, of the system that a run would publish.

    Each picture has `draws` times and noises of its own, which never change; times are distributed as in
    training, so that the number can be compared with the training loss. A sampler that learns from the losses
    is replaced by the uniform one, whose loss is the same on average.

    Args:
        objective: of the run.
        sampled: whether latents are samples of the posterior, or its means.
        embed, complete: of the task, see `Denoising`.
        velocity: measure besides the squared error of the velocity eps - x0 of the straight path (Liu et al.
            2022, arXiv:2209.03003) at uniform noise fractions, whatever schedule, parameterization, times and
            weights the run has: |x0 error|^2 / fraction^2 at the level of its schedule with that fraction.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        sampled: bool,
        embed: Callable[[Tensor], Tensor] | None = None,
        complete: Complete | None = None,
        velocity: bool = False,
    ) -> None:
        learns = hasattr(objective.times, "state_dict")
        self.objective = replace(objective, times=Uniform()) if learns else objective
        self.sampled = sampled
        self.embed = embed
        self.complete = complete
        self.velocity = velocity
        self._clean: dict[int, Tensor] = {}

    def __call__(self, folder: Folder, held: HeldOut) -> dict[str, float]:
        """The mean loss, and that of each quarter of the noise levels that occurs."""
        system = assemble(from_json(SystemConfig, dict(folder.system)), folder.parts)
        (stage,) = system.stages
        schedule, losses, fractions = stage.denoiser.schedule, [], []
        errors, places = list[Tensor](), list[Tensor]()
        for rows in held.rows():
            if rows.start not in self._clean:  # the codec is not trained
                images = held.images(rows, stage.device)
                images = images if self.embed is None else self.embed(images).to(images)
                noise = held.noise(rows, "posterior")
                self._clean[rows.start] = stage.codec.encode(images, noise if self.sampled else None)
            noise = held.noise(rows, "conditioning")
            inputs = held.inputs(rows)
            if self.complete is not None:
                inputs = self.complete(inputs, held.images(rows, stage.device), held.noise(rows, "told"))
            cond = stage.conditioner(inputs, noise).to(stage.device)
            for draw in range(held.draws):
                name = f"draw {draw}"
                t = self.objective.times.sample(schedule, held.noise(rows, name)).t
                clean = self._clean[rows.start]
                loss = self.objective(stage.denoiser, clean, cond, held.noise(rows, name)).loss
                losses.append(loss)
                fractions.append(noise_fraction(schedule(t)))
                if self.velocity:
                    error, fraction = _velocity(stage.denoiser, clean, cond, held.noise(rows, f"flow {draw}"))
                    errors.append(error)
                    places.append(fraction)
        numbers = _by_level(LOSS, held.pooled(losses), held.pooled(fractions))
        return numbers | (_by_level(VELOCITY, held.pooled(errors), held.pooled(places)) if errors else {})


class ReconstructionLoss:
    """What a first stage loses: its L1, L2 and perceptual losses from posterior means, and the PSNR.

    Args:
        config: weights of the losses.
        perceptual: frozen net, or None.
    """

    def __init__(self, config: AutoencodingConfig, perceptual: FeatureDistance | None) -> None:
        self.config = config
        self.perceptual = perceptual

    def __call__(self, folder: Folder, held: HeldOut) -> dict[str, float]:
        """The weighted sum without the GAN's part, and the mean PSNR in dB."""
        net = folder.parts.nets["autoencoder"]
        assert isinstance(net, Autoencoder)
        device = next(net.parameters()).device
        losses, ratios = [], []
        for rows in held.rows():
            image = held.images(rows, device)
            decoded = net.decode(net.encode(image).mean)
            error = (decoded - image).double().flatten(1)
            loss = self.config.l1 * error.abs().mean(1) + self.config.l2 * error.square().mean(1)
            if self.perceptual is not None:
                loss = loss + self.config.perceptual * self.perceptual(image, decoded).double().flatten()
            losses.append(loss)
            inside = ((decoded.clamp(-1, 1) - image) / 2).double().flatten(1)
            ratios.append(-10 * inside.square().mean(1).clamp_min(1e-10).log10())
        return {
            LOSS: float(held.pooled(losses).mean()),
            "validation/psnr": float(held.pooled(ratios).mean()),
        }


class RetrievalLoss:
    """What a CLIP loses: InfoNCE over all pairs of the held-out pictures and captions at its scale."""

    def __call__(self, folder: Folder, held: HeldOut) -> dict[str, float]:
        """The loss, with the number of pairs that were compared."""
        clip = folder.parts.nets["clip"]
        assert isinstance(clip, CLIP)
        device, tokenizer = clip.logit_scale.device, folder.parts.tokenizers["tokenizer"]
        rows = [slice(i, i + held.batch) for i in range(0, len(held.text), held.batch)]
        pictures = torch.cat([clip.see(held.images(part, device)) for part in rows])
        texts = torch.cat([clip.text(tokenizer(held.text[part])[0].to(device)).embedding for part in rows])
        loss = info_nce(pictures, texts, clip.logit_scale.exp())
        return {LOSS: float(loss), "validation/pairs": float(len(pictures))}


class TokenLoss:
    """What an autoregressive prior loses: the cross-entropy of a coordinate in nats, without dropout.

    Args:
        embed: of the task, see `Predicting`.
    """

    def __init__(self, embed: Callable[[Tensor], Tensor]) -> None:
        self.embed = embed

    def __call__(self, folder: Folder, held: HeldOut) -> dict[str, float]:
        """The mean loss."""
        (stage,) = assemble(from_json(SystemConfig, dict(folder.system)), folder.parts).stages
        net, losses = stage.denoiser.net, []
        assert isinstance(net, TokenPrior)
        for rows in held.rows():
            cond = stage.conditioner(held.inputs(rows)).to(stage.device)
            assert cond.pooled is not None
            vectors = self.embed(held.images(rows, stage.device)).to(stage.device)
            losses.append(token_losses(net, vectors, cond, cond.pooled))
        return {LOSS: float(held.pooled(losses).mean())}


class Validation:
    """Measures what a run would publish, and keeps the best of it in the folder best/.

    A resumed run knows the best loss so far from its log, so that it keeps what an uninterrupted one keeps.
    No state of the training is touched: averages are measured, and all noise is from streams of its own.

    Args:
        measure: gives LOSS, lower is better, and further numbers.
        result: what would be published now.
        held: the pictures.
        out: folder of the run.
    """

    def __init__(self, measure: Measure, result: Callable[[], Folder], held: HeldOut, out: Path) -> None:
        self.measure = measure
        self.result = result
        self.held = held
        self.out = out
        self._best: float | None = None

    @torch.no_grad()
    def __call__(self, images: int) -> Mapping[str, float]:
        """Numbers to log, at `images` seen."""
        folder = self.result()
        numbers = self.measure(folder, self.held)
        if not self.held.world.leads:
            return numbers
        if self._best is None:
            self._best = self._logged(images)
        if numbers[LOSS] < self._best:
            write_folder(self.out / "best", folder)
            self._best = numbers[LOSS]
        return numbers

    def _logged(self, images: int) -> float:
        log = self.out / "log.jsonl"
        if not log.is_file() or not (self.out / "best").is_dir():
            return math.inf
        rows = [row for row in read_log(log) if row["images"] < images]
        return min((row[LOSS] for row in rows if LOSS in row), default=math.inf)


def _velocity(denoiser: Denoiser, clean: Tensor, cond: Conditioning, noise: Noise) -> tuple[Tensor, Tensor]:
    """Squared errors of the velocity, and the noise fractions at which they were measured; (B,) each."""
    low, high = SPAN
    at = low + (high - low) * noise.uniform(torch.empty(len(clean), dtype=torch.float64))
    level = denoiser.schedule(denoiser.schedule.time_of(at / (1 - at)))
    x_t = expand(level.alpha, clean) * clean + expand(level.sigma, clean) * noise(clean)
    fraction = noise_fraction(level)
    error = (denoiser(x_t, level, cond).x0 - clean).double().square().flatten(1).mean(1).cpu()
    return error / fraction.square(), fraction


def _by_level(name: str, losses: Tensor, fractions: Tensor) -> dict[str, float]:
    """The mean of a loss, and its means over bins of the noise fraction."""
    numbers = {name: float(losses.mean())}
    bins = torch.bucketize(fractions, torch.tensor(EDGES[1:-1], dtype=fractions.dtype))
    for i, (low, high) in enumerate(pairwise(EDGES)):
        inside = losses[bins == i]
        if len(inside):
            numbers[f"{name}/{low:.2f}-{high:.2f}"] = float(inside.mean())
    return numbers
