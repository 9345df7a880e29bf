"""The job of a recipe, by the kind of its task."""

from __future__ import annotations

from sfumato.training.jobs.denoiser import denoising
from sfumato.training.jobs.first_stage import autoencoding, caption_words, classifying, contrastive
from sfumato.training.jobs.job import Job, Place
from sfumato.training.jobs.token_prior import predicting
from sfumato.training.recipe import Recipe
from sfumato.training.tasks.autoencoding import AutoencodingConfig
from sfumato.training.tasks.classifying import ClassifyingConfig
from sfumato.training.tasks.contrastive import ContrastiveConfig
from sfumato.training.tasks.perceptual import CaptionWordsConfig
from sfumato.training.tasks.predicting import PredictingConfig

__all__ = ["build"]


def build(recipe: Recipe, place: Place) -> Job:
    """The job of a recipe; fresh weights come from torch's global generator.

    Raises: ValueError in one line if the task does not fit the data, or a net that it builds upon.
    """
    if recipe.trainer.batch > len(place.pictures):
        raise ValueError(
            f"trainer.batch {recipe.trainer.batch} is more than the {len(place.pictures)} pictures of "
            f"{place.pictures.path}; lower it"
        )
    if isinstance(recipe.task, AutoencodingConfig):
        return autoencoding(recipe, recipe.task, place)
    if isinstance(recipe.task, CaptionWordsConfig):
        return caption_words(recipe, recipe.task, place)
    if isinstance(recipe.task, ClassifyingConfig):
        return classifying(recipe, recipe.task, place)
    if isinstance(recipe.task, ContrastiveConfig):
        return contrastive(recipe, recipe.task, place)
    if isinstance(recipe.task, PredictingConfig):
        return predicting(recipe, recipe.task, place)
    return denoising(recipe, recipe.task, place)
