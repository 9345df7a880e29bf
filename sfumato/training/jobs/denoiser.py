"""Job of a denoiser: codec, text tower, net, and the system that they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sfumato.checkpoints.native import Folder, Parts
from sfumato.core.config import to_json
from sfumato.core.png import write_whole
from sfumato.core.types import Inputs
from sfumato.nets import NETS
from sfumato.nets.autoencoder import Autoencoder
from sfumato.nets.text import TextTransformer
from sfumato.systems.config import (
    CodecConfig,
    LatentsConfig,
    PixelsConfig,
    StageConfig,
    SystemConfig,
    TokenTextConfig,
)
from sfumato.systems.stage import Stage
from sfumato.systems.system import assemble
from sfumato.text.tokenizers import Tokenizer
from sfumato.training.batches import Batch, check_captions, open_folder
from sfumato.training.jobs.job import Job, Place, picture_batches, settle, spread, trained
from sfumato.training.latents import LatentBatches, encode_folder, statistics
from sfumato.training.recipe import Recipe
from sfumato.training.tasks.denoising import Denoising, DenoisingConfig

__all__ = ["denoising"]

PROMPTS = 16  # captions that the previews draw if the recipe names none
SURVEYED = 4096  # pictures from which the scale of latents is measured if they are not all encoded anyway


@dataclass(frozen=True)
class Source:
    """What a denoiser learns from.

    Attributes:
        shape: of one sample, (C, h, w).
        frozen: nets that the codec uses.
    """

    codec: CodecConfig
    shape: tuple[int, int, int]
    batches: Callable[[int], Batch]
    frozen: Mapping[str, nn.Module]


def denoising(recipe: Recipe, config: DenoisingConfig, place: Place) -> Job:
    """Publishes the whole system: autoencoder, net, text tower and tokenizer.

    Raises: ValueError in one line if net, autoencoder and data do not fit each other.
    """
    source = _source(recipe, config, place)
    modules: dict[str, nn.Module] = {"denoiser": NETS[_tag(config)].net(config.net)}
    tokenizers: dict[str, Tokenizer] = {}
    if config.text is not None:
        tokenizers["text"] = _tokenizer(place, config.text.vocab_size, config.text.context)
        modules["text"] = TextTransformer(replace(config.text, vocab_size=tokenizers["text"].vocab_size))
    settle(modules, place.device)
    settings = _stage(config, source)

    def parts(averaged: Mapping[str, nn.Module]) -> Parts:
        return Parts({**source.frozen, **averaged}, tokenizers)

    def result(averaged: Mapping[str, nn.Module]) -> Folder:
        system = SystemConfig(stages=(settings,))
        return Folder(parts(averaged), to_json(system), to_json(place.about), place.card)

    prompts = config.prompts or spread(place.pictures.texts, PROMPTS)

    def draw(averaged: Mapping[str, nn.Module]) -> Tensor:
        inputs = Inputs(n=len(prompts), text=prompts if config.text is not None else None)
        pictures = assemble(SystemConfig(stages=(settings,)), parts(averaged)).run(inputs).low_res
        assert pictures is not None
        return pictures

    stage = settings.build(parts(modules))
    _check_fit(stage)
    task = Denoising(
        stage,
        config.objective,
        dropout=config.dropout,
        posterior=config.posterior,
        modules=modules,
        draw=draw,
    )
    return Job(task, source.batches, result)


def _stage(config: DenoisingConfig, source: Source) -> StageConfig:
    return StageConfig(
        schedule=config.schedule,
        parameterization=config.prediction,
        learned_var=config.learned_var,
        conditioners=() if config.text is None else (TokenTextConfig(),),
        codec=source.codec,
        shape=source.shape,
        defaults=config.sampling,
    )


def _source(recipe: Recipe, config: DenoisingConfig, place: Place) -> Source:
    """Pictures, cached latents, or pictures that become latents as they are drawn.

    Raises: ValueError in one line if captions are wanted and there are none, or sizes do not fit.
    """
    if config.text is not None:
        check_captions(place.pictures)
    size, pictures = recipe.data.size, picture_batches(recipe, place)
    if config.autoencoder is None:
        return Source(PixelsConfig(), (3, size, size), pictures, {})
    net = trained(config.autoencoder, Autoencoder, "openmoji-autoencoder", place.device)
    factor = net.config.factor
    if size % factor:
        raise ValueError(f"data.size {size} is not a multiple of {factor}, the factor of the autoencoder")
    if recipe.data.buckets is not None and recipe.data.buckets % factor:
        raise ValueError(
            f"data.buckets {recipe.data.buckets} is not a multiple of {factor}, the factor of the autoencoder"
        )
    shape = net.config.embed_dim, size // factor, size // factor
    cached = config.cache and not recipe.data.augments
    folder, sizes = place.pictures, pictures.order.sizes
    if not cached:
        folder = open_folder(replace(recipe.data, flip=False, shift=0, crop=None))
        folder.entries = spread(folder.entries, SURVEYED)
        sizes = None if sizes is None else spread(sizes, SURVEYED)
    moments = encode_folder(net, folder, place.out / "latents" if cached else None, sizes=sizes)
    scale = statistics(moments, sampled=config.posterior == "sample")
    codec = LatentsConfig(mean=scale[0], std=scale[1])
    if not cached:
        return Source(codec, shape, pictures, {"autoencoder": net})
    batches = LatentBatches(moments, scale, pictures.order, recipe.trainer.batch, place.device)
    return Source(codec, shape, batches, {"autoencoder": net})


def _check_fit(stage: Stage) -> None:
    """Raise ValueError in one line if the net cannot take the codec's latents or the tower's tokens."""
    channels = stage.shape[0]
    wanted = channels * (2 if stage.denoiser.learned_var else 1)
    config = getattr(stage.denoiser.net, "config", None)
    found = getattr(config, "in_channels", channels), getattr(config, "out_channels", wanted)
    if found != (channels, wanted):
        raise ValueError(
            f"the net has in_channels {found[0]} and out_channels {found[1]}, but what it denoises has "
            f"{channels} channels; set task.net.in_channels {channels} and task.net.out_channels {wanted}"
        )
    level = stage.denoiser.schedule(torch.tensor([sum(stage.denoiser.schedule.span) / 2]))
    with torch.no_grad():
        cond = stage.conditioner(Inputs(n=1, text=("",)))
        try:
            stage.denoiser.raw(torch.zeros(1, *stage.shape, device=stage.device), level, cond)
        except RuntimeError as error:
            raise ValueError(f"the net does not fit its inputs: {str(error).splitlines()[0]}") from None


def _tokenizer(place: Place, vocab_size: int, context: int) -> Tokenizer:
    """Learned from the captions once per run: training it again need not give the same ids."""
    path = place.out / "tokenizer.json"
    if path.is_file():
        return Tokenizer.from_json(path.read_text("utf-8"))
    texts = [text for text in place.pictures.texts if text]
    tokenizer = Tokenizer.train(texts, vocab_size=vocab_size, context=context)
    write_whole(path, tokenizer.to_json().encode())
    return tokenizer


def _tag(config: DenoisingConfig) -> str:
    """Tag in NETS of the net's config."""
    return next(tag for tag, kind in NETS.items() if kind.config is type(config.net))
