"""An Imagen-style cascade on OpenMoji: text to 32 pixels, and 32 to 64, with a tiny twin of each.

`sfumato.cascade("runs/openmoji-imagen-base/system", "runs/openmoji-imagen-upsampler/system")` joins them.
Saharia et al. 2022 (arXiv:2205.11487), with towers of T5's kind that are trained with the nets.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sfumato.diffusion.constraints import Dynamic
from sfumato.diffusion.guidance import CFG
from sfumato.diffusion.schedules import Cosine
from sfumato.evaluation.openmoji import PROMPTS
from sfumato.families.latent import ADAMW, OPENMOJI
from sfumato.families.registry import RECIPES
from sfumato.nets.attention import AttentionConfig
from sfumato.nets.blocks import BlockConfig
from sfumato.nets.embedding import EmbedderConfig, EmbeddingConfig, Feature, TokensConfig
from sfumato.nets.t5 import T5Config
from sfumato.nets.unet import LevelConfig, UNetConfig, levels
from sfumato.systems.conditioning import LowResConfig
from sfumato.systems.config import About
from sfumato.systems.options import SampleOptions
from sfumato.training.recipe import Recipe
from sfumato.training.tasks.denoising import DenoisingConfig
from sfumato.training.trainer import TrainerConfig

__all__: list[str] = []  # everything is reached through RECIPES

SCHEDULE = Cosine(offset=0.008, multiplier=1000.0)
AUG = 0.1  # the level that sampling tells the upsampler; training draws all from 0 to 1
TEXT = T5Config(vocab_size=4096, context=16, width=192, depth=2, heads=4, head_dim=48, hidden=512)
SAMPLING = SampleOptions(
    sampler="ddpm", steps=50, spacing="trailing", guidance=CFG(4.0), threshold=Dynamic(0.995)
)


@RECIPES("openmoji-imagen-base")
def openmoji_imagen_base() -> Recipe:
    """Text to 32x32; 10 % of the captions are dropped. Untried; about 1.3 GFLOP for a picture in training."""
    return _recipe("base", 32, _net(32, (1, 2, 4), (1, 1, 2), TEXT.width, at=(1, 2)), images=130_000)


@RECIPES("openmoji-imagen-upsampler")
def openmoji_imagen_upsampler() -> Recipe:
    """32x32 to 64x64 by an Efficient U-Net, told how noisy its picture is. Untried; about 1.4 GFLOP."""
    net = _net(32, (1, 2, 4), (1, 2, 3), TEXT.width, at=(2,), enlarges=True)
    recipe = _recipe("upsampler", 64, net, images=110_000)
    assert isinstance(recipe.task, DenoisingConfig)
    task = replace(recipe.task, low_res=LowResConfig(factor=2, schedule=SCHEDULE, aug=AUG), prompts=())
    return replace(recipe, task=replace(task, sampling=replace(SAMPLING, steps=25, guidance=CFG(2.0))))


def _net(
    width: int,
    mults: tuple[int, ...],
    blocks: tuple[int, ...],
    dim: int,
    at: tuple[int, ...],
    enlarges: bool = False,
) -> UNetConfig:
    """Attention to pixels and text in one; pooled text and level of noise are added to the time."""
    attention = AttentionConfig(kind="appended", heads=4, norm_tokens=True)
    pooled = EmbedderConfig(kind="mlp", features=(Feature(field="pooled", dim=dim),))
    aug = EmbedderConfig(kind="mlp", features=(Feature(field="aug", dim=1, sinusoid=width),))
    inner = levels(width, mults, blocks, attention=attention, at=at)
    return UNetConfig(
        in_channels=6 if enlarges else 3,
        out_channels=3,
        levels=(*([LevelConfig(channels=width, blocks=0)] if enlarges else []), *inner),
        middle=None if enlarges else attention,
        embedding=EmbeddingConfig(
            time_dim=width, dim=4 * width, extras=(pooled, aug) if enlarges else (pooled,)
        ),
        tokens=TokensConfig(dim=dim, norm=True, masked=True),
        block=BlockConfig(film=True, norm_groups=8, skip_scale=0.5**0.5 if enlarges else 1.0),
    )


def _recipe(name: str, size: int, net: UNetConfig, *, images: int) -> Recipe:
    task = DenoisingConfig(
        net=net,
        text=TEXT,
        schedule=SCHEDULE,
        prediction="v",
        dropout=0.1,
        sampling=SAMPLING,
        prompts=PROMPTS[:16],
    )
    return Recipe(
        name=f"openmoji-imagen-{name}",
        task=task,
        data=replace(OPENMOJI, size=size, even="concept"),
        optim=ADAMW,
        trainer=TrainerConfig(images=images, batch=32, ema=0.999, preview_every=32_000, save_every=16_000),
        about=About(
            name=f"OpenMoji Imagen {name}",
            summary=f"The {name} of an Imagen-style cascade on OpenMoji.",
            license="CC-BY-SA-4.0",
            data="OpenMoji",
        ),
    )


def _toy(full: Recipe, net: UNetConfig) -> Recipe:
    assert isinstance(full.task, DenoisingConfig)
    text = T5Config(vocab_size=300, context=8, width=16, depth=1, heads=2, head_dim=8, hidden=24)
    sampling = replace(full.task.sampling, steps=2)
    return replace(
        full,
        name=full.name.replace("openmoji", "toy"),
        task=replace(full.task, net=net, text=text, sampling=sampling, prompts=()),
        data=replace(full.data, path=Path("data"), size=full.data.size // 4, split=None, even=None),
        optim=replace(full.optim, warmup=8),
        trainer=TrainerConfig(images=64, batch=4, ema=0.9, log_every=16, preview_every=32, save_every=32),
        about=About(summary="A tiny twin for tests; its pictures mean nothing."),
    )


@RECIPES("toy-imagen-base")
def toy_imagen_base() -> Recipe:
    """Tiny twin of openmoji-imagen-base: 8x8."""
    return _toy(openmoji_imagen_base(), _net(8, (1, 2), (1, 1), 16, at=(1,)))


@RECIPES("toy-imagen-upsampler")
def toy_imagen_upsampler() -> Recipe:
    """Tiny twin of openmoji-imagen-upsampler: 8x8 to 16x16."""
    return _toy(openmoji_imagen_upsampler(), _net(8, (1, 2), (1, 2), 16, at=(1,), enlarges=True))
