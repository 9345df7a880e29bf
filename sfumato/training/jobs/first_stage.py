"""Jobs of the nets beside a denoiser: the perceptual net, the autoencoder, a classifier that guides."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from sfumato.checkpoints.layouts.lpips import read_lpips
from sfumato.checkpoints.native import Folder, Parts
from sfumato.core.config import to_json
from sfumato.nets.autoencoder import Autoencoder
from sfumato.nets.clip import CLIP
from sfumato.nets.perceptual import FeatureDistance, PerceptualNet
from sfumato.training.batches import check_captions, check_labels
from sfumato.training.jobs.job import (
    Job,
    Place,
    examples,
    picture_batches,
    settle,
    trained,
    vocabulary_of,
)
from sfumato.training.recipe import Recipe
from sfumato.training.tasks.autoencoding import Autoencoding, AutoencodingConfig
from sfumato.training.tasks.classifying import Classifying, ClassifyingConfig
from sfumato.training.tasks.contrastive import Contrastive, ContrastiveConfig
from sfumato.training.tasks.noised_contrastive import NoisedContrastive, NoisedContrastiveConfig
from sfumato.training.tasks.perceptual import CaptionWords, CaptionWordsConfig, vocabulary

__all__ = ["autoencoding", "caption_words", "classifying", "contrastive", "noised_contrastive"]

LOGGER = logging.getLogger(__name__)


def autoencoding(recipe: Recipe, config: AutoencodingConfig, place: Place) -> Job:
    """Publishes the autoencoder. Raises: ValueError if the perceptual net or a file of LPIPS is not there."""
    task = Autoencoding(config, _perceptual(config, place), examples(place))
    if config.init is not None:
        _take_up(task, config.init, place)
    settle(task.modules, place.device)

    def result(averaged: Mapping[str, nn.Module]) -> Folder:
        return Folder(Parts({"autoencoder": averaged["autoencoder"]}), {}, to_json(place.about), place.card)

    return Job(task, picture_batches(recipe, place), result)


def _take_up(task: Autoencoding, path: Path, place: Place) -> None:
    """Begin with the weights of a trained autoencoder."""
    trained_net = trained(path, Autoencoder, "openmoji-autoencoder", place.device)
    asked, found = to_json(task.config.net), to_json(trained_net.config)
    if differ := [f"{name} {found[name]}" for name in asked if asked[name] != found[name]]:
        raise ValueError(f"the autoencoder of {path} has {', '.join(differ)}; set task.net like it")
    task.net.load_state_dict(trained_net.state_dict())


def _perceptual(config: AutoencodingConfig, place: Place) -> FeatureDistance | None:
    """LPIPS from its files, or what stands in for it."""
    if config.lpips_trunk is not None and config.lpips_heads is not None:
        lpips = read_lpips(config.lpips_trunk, config.lpips_heads)
        settle({"lpips": lpips}, place.device)
        return lpips
    if config.perceptual_net is None:
        return None
    LOGGER.warning(
        "the perceptual net of %s stands in for LPIPS; for the published one give task.lpips_trunk and "
        "task.lpips_heads",
        config.perceptual_net,
    )
    return trained(config.perceptual_net, PerceptualNet, "openmoji-perceptual", place.device)


def caption_words(recipe: Recipe, config: CaptionWordsConfig, place: Place) -> Job:
    """Publishes the perceptual net. Raises: ValueError if the captions have no words."""
    task = CaptionWords(config, vocabulary(tuple(place.pictures.texts)), examples(place))
    settle(task.modules, place.device)

    def result(averaged: Mapping[str, nn.Module]) -> Folder:
        net = copy.deepcopy(task.net)
        net.trunk.load_state_dict(averaged["trunk"].state_dict())
        return Folder(Parts({"perceptual": net}), {}, to_json(place.about), place.card)

    return Job(task, picture_batches(recipe, place), result)


def classifying(recipe: Recipe, config: ClassifyingConfig, place: Place) -> Job:
    """Publishes the classifier. Raises: ValueError if the data have other classes or sizes."""
    check_labels(place.pictures, config.net.num_classes)
    if config.net.pool == "attention" and config.net.size != recipe.data.size:
        raise ValueError(
            f"task.net.size is {config.net.size} and data.size {recipe.data.size}; attention pooling is "
            "bound to the size, set them equal"
        )
    task = Classifying(config, examples(place))
    settle(task.modules, place.device)

    def result(averaged: Mapping[str, nn.Module]) -> Folder:
        return Folder(Parts({"classifier": averaged["classifier"]}), {}, to_json(place.about), place.card)

    return Job(task, picture_batches(recipe, place), result)


def contrastive(recipe: Recipe, config: ContrastiveConfig, place: Place) -> Job:
    """Publishes the CLIP and its tokenizer. Raises: ValueError if there are no captions."""
    check_captions(place.pictures)
    text = config.net.text
    tokenizer = vocabulary_of(place, text.vocab, text.context, end_highest=True)
    net = CLIP(replace(config.net, text=replace(text, vocab=tokenizer.vocab_size)))
    task = Contrastive(net, tokenizer, examples(place), place.world)
    settle(task.modules, place.device)

    def result(averaged: Mapping[str, nn.Module]) -> Folder:
        parts = Parts({"clip": averaged["clip"]}, {"tokenizer": tokenizer})
        return Folder(parts, {}, to_json(place.about), place.card)

    return Job(task, picture_batches(recipe, place), result)


def noised_contrastive(recipe: Recipe, config: NoisedContrastiveConfig, place: Place) -> Job:
    """Publishes the towers of a noised CLIP, and its tokenizer.

    Raises: ValueError if there are no captions, or the pictures are of another size.
    """
    check_captions(place.pictures)
    if config.vision.size != recipe.data.size:
        raise ValueError(
            f"task.vision.size is {config.vision.size} and data.size {recipe.data.size}; set them equal"
        )
    text = config.text
    tokenizer = vocabulary_of(place, text.vocab, text.context)
    config = replace(config, text=replace(text, vocab=tokenizer.vocab_size))
    task = NoisedContrastive(config, tokenizer, examples(place), place.world)
    settle(task.modules, place.device)

    def result(averaged: Mapping[str, nn.Module]) -> Folder:
        return Folder(Parts(dict(averaged), {"clip": tokenizer}), {}, to_json(place.about), place.card)

    return Job(task, picture_batches(recipe, place), result)
