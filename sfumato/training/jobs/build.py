"""The job of a recipe, by the kind of its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sfumato.training.jobs.denoiser import denoising
from sfumato.training.jobs.first_stage import (
    autoencoding,
    caption_words,
    classifying,
    contrastive,
    noised_contrastive,
)
from sfumato.training.jobs.job import Job, Place
from sfumato.training.jobs.token_prior import predicting
from sfumato.training.recipe import Recipe
from sfumato.training.tasks.autoencoding import AutoencodingConfig
from sfumato.training.tasks.classifying import ClassifyingConfig
from sfumato.training.tasks.contrastive import ContrastiveConfig
from sfumato.training.tasks.denoising import DenoisingConfig
from sfumato.training.tasks.noised_contrastive import NoisedContrastiveConfig
from sfumato.training.tasks.perceptual import CaptionWordsConfig
from sfumato.training.tasks.predicting import PredictingConfig

__all__ = ["build"]

JOBS: Mapping[type, Callable[[Recipe, Any, Place], Job]] = {
    AutoencodingConfig: autoencoding,
    CaptionWordsConfig: caption_words,
    ClassifyingConfig: classifying,
    ContrastiveConfig: contrastive,
    DenoisingConfig: denoising,
    NoisedContrastiveConfig: noised_contrastive,
    PredictingConfig: predicting,
}


def build(recipe: Recipe, place: Place) -> Job:
    """The job of a recipe; fresh weights come from torch's global generator.

    Raises: ValueError in one line if the task does not fit the data, or a net that it builds upon.
    """
    if recipe.trainer.batch > len(place.pictures):
        raise ValueError(
            f"trainer.batch {recipe.trainer.batch} is more than the {len(place.pictures)} pictures of "
            f"{place.pictures.path}; lower it"
        )
    return JOBS[type(recipe.task)](recipe, recipe.task, place)
