"""What a net is told of the very pictures that it is trained on: embeddings, small copies, holes, edges."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sfumato.core.image import edges
from sfumato.core.random import Noise
from sfumato.core.types import Inputs
from sfumato.data.degrade import degraded
from sfumato.nets.clip import CLIP
from sfumato.training.jobs.sources import embedding_of
from sfumato.training.tasks.denoising import Complete, DenoisingConfig

__all__ = ["completion", "holes_in"]

EVERYTHING = 0.25  # share of the holes that are the whole picture


def completion(config: DenoisingConfig, clip: CLIP | None, *, embeds: bool) -> Complete | None:
    """What completes the inputs of a batch by its pictures; None if the net is told nothing of them.

    Args:
        clip: makes the embeddings.
        embeds: whether the net reads them.

    Raises: ValueError if it does, and there is no CLIP.
    """
    parts: list[Complete] = []
    if embeds:
        parts.append(_embedded(clip))
    if config.degrade is not None:
        damage = config.degrade
        parts.append(
            lambda inputs, x, noise: replace(
                inputs, low_res=degraded(x, damage, noise.integers(2**62).tolist())
            )
        )
    if config.low_res is not None:
        parts.append(_whole if config.low_res.schedule is None else _augmented)
    if config.holes:
        parts.append(lambda inputs, x, noise: replace(inputs, image=x, mask=holes_in(x, noise)))
    if config.control is not None:
        parts.append(lambda inputs, x, noise: replace(inputs, hint=edges(x)))
    if not parts:
        return None

    def complete(inputs: Inputs, pictures: Tensor, noise: Noise) -> Inputs:
        for part in parts:
            inputs = part(inputs, pictures, noise)
        return inputs

    return complete


def _embedded(clip: CLIP | None) -> Complete:
    if clip is None:
        raise ValueError("the net is told image embeddings: set task.clip to the CLIP that makes them")
    return lambda inputs, x, noise: replace(inputs, image_embed=embedding_of(clip, x).to(x))


def _whole(inputs: Inputs, pictures: Tensor, noise: Noise) -> Inputs:
    """The conditioner makes it small."""
    return replace(inputs, image=pictures)


def _augmented(inputs: Inputs, pictures: Tensor, noise: Noise) -> Inputs:
    return replace(inputs, image=pictures, aug=noise.uniform(torch.empty(inputs.n)))


def holes_in(x: Tensor, noise: Noise) -> Tensor:
    """A random box of each picture (B, C, H, W), or all of it, as a mask (B, 1, H, W), 1 = to be filled."""
    whole, *ends = noise.uniform(torch.empty(len(x), 5)).unbind(1)
    mask = torch.ones(len(x), 1, *x.shape[2:])
    for side, axis in ((x.shape[2], 2), (x.shape[3], 3)):
        low, high = (ends.pop(), ends.pop())
        at = torch.arange(side).view(-1, *[1] * (3 - axis)) + 0.5
        low, high = (v.view(-1, 1, 1, 1) * side for v in (torch.minimum(low, high), torch.maximum(low, high)))
        mask = mask * ((at >= low) & (at <= high))
    return torch.where((whole < EVERYTHING).view(-1, 1, 1, 1), torch.ones_like(mask), mask).to(x)
