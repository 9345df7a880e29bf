"""Job of an autoregressive prior: axes and ranges of the data, the net, and the system that it makes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sfumato.checkpoints.native import Folder, Parts
from sfumato.conditioners.base import Conditioner
from sfumato.core.config import to_json
from sfumato.core.random import Noise
from sfumato.core.types import Inputs
from sfumato.diffusion.schedules import Flow
from sfumato.nets.token_prior import TokenPrior
from sfumato.systems.conditioning import ClipTextConfig
from sfumato.systems.config import EmbeddingsConfig, StageConfig, SystemConfig
from sfumato.systems.system import assemble
from sfumato.training.batches import check_captions
from sfumato.training.jobs.denoiser import PROMPTS, drawn, nearest
from sfumato.training.jobs.job import Job, Place, settle, spread
from sfumato.training.jobs.sources import CHUNK, of_clip
from sfumato.training.recipe import Recipe
from sfumato.training.tasks.predicting import Predicting, PredictingConfig

__all__ = ["predicting"]


def predicting(recipe: Recipe, config: PredictingConfig, place: Place) -> Job:
    """Publishes a system of one stage, which draws an embedding in one step, with CLIP's towers.

    Raises: ValueError in one line if there are no captions, or the net does not fit its CLIP.
    """
    check_captions(place.pictures)
    source = of_clip(recipe, config.clip, place, embedded=True)
    assert source.vectors is not None
    assert source.clip is not None
    tokenizers, vectors = {"tokenizer": source.clip[1]}, source.vectors
    net = TokenPrior(config.net)
    settings = StageConfig(
        name="prior",
        schedule=Flow(),
        parameterization="x0",
        conditioners=(ClipTextConfig(pooled=True, mask=True),),
        codec=EmbeddingsConfig(),
        shape=(config.net.dim,),
        emits="image_embed",
        defaults=config.sampling,
    )
    system = SystemConfig(stages=(settings,))
    settle({"net": net}, place.device)
    conditioner = settings.build(Parts({**source.frozen, "denoiser": net}, tokenizers)).conditioner
    net.quantizer.fit(vectors.table, _embedded(conditioner, vectors.text))
    net.prepare(conditioner(Inputs(n=1, text=[""]), Noise([0])))  # or its text does not fit

    def parts(averaged: Mapping[str, nn.Module]) -> Parts:
        return Parts({**source.frozen, **averaged}, tokenizers)

    def result(averaged: Mapping[str, nn.Module]) -> Folder:
        return Folder(parts(averaged), to_json(system), to_json(place.about), place.card)

    prompts = config.prompts or spread(place.pictures.texts, PROMPTS)

    def draw(averaged: Mapping[str, nn.Module]) -> Tensor:
        made = assemble(system, parts(averaged))
        return nearest(drawn(made, Inputs(n=len(prompts), text=prompts), place.world), vectors, place)

    task = Predicting(net, conditioner, dropout=config.dropout, embed=vectors.embed, draw=draw)
    return Job(task, source.batches, result)


@torch.no_grad()
def _embedded(conditioner: Conditioner, texts: tuple[str, ...]) -> Tensor:
    """CLIP's embeddings (N, D) of captions, on the CPU."""
    rows = []
    for start in range(0, len(texts), CHUNK):
        part = texts[start : start + CHUNK]
        pooled = conditioner(Inputs(n=len(part), text=part)).pooled
        assert pooled is not None
        rows.append(pooled.float().cpu())
    return torch.cat(rows)
