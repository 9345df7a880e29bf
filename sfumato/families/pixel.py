"""Recipes of pixel diffusion on OpenMoji: DDPM, ADM and what guides it, GLIDE's base, tiny twins.

Counts are in images. What the recipes reach is for the runs to say.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sfumato.data.openmoji_groups import GROUPS
from sfumato.diffusion.constraints import Static
from sfumato.diffusion.guidance import CFG
from sfumato.diffusion.objective import Objective
from sfumato.diffusion.schedules import Discrete
from sfumato.families.latent import ADAMW, AUGMENTED, OPENMOJI, about, toy
from sfumato.families.registry import RECIPES
from sfumato.nets.attention import AttentionConfig
from sfumato.nets.blocks import BlockConfig
from sfumato.nets.classifier import NoisyClassifierConfig
from sfumato.nets.embedding import EmbedderConfig, EmbeddingConfig, Feature, TokensConfig
from sfumato.nets.noised_clip import NoisedTextConfig, NoisedVisionConfig
from sfumato.nets.text import TextTransformerConfig
from sfumato.nets.unet import UNetConfig, levels
from sfumato.systems.options import SampleOptions
from sfumato.systems.start import Fill
from sfumato.training.optim import OptimConfig
from sfumato.training.recipe import Recipe
from sfumato.training.tasks.classifying import ClassifyingConfig
from sfumato.training.tasks.denoising import DenoisingConfig
from sfumato.training.tasks.noised_contrastive import NoisedContrastiveConfig
from sfumato.training.trainer import TrainerConfig

__all__: list[str] = []  # everything is reached through RECIPES

COSINE = Discrete(formula="cosine")
SAMPLING = SampleOptions(sampler="ddim", steps=25, spacing="respaced", guidance=CFG(3.0), threshold=Static())


def _encoder(width: int, at: tuple[int, ...], mults: tuple[int, ...], groups: int = 8) -> UNetConfig:
    """ADM's blocks, small."""
    attention = AttentionConfig(head_dim=width // 2)
    return UNetConfig(
        in_channels=3,
        out_channels=6,
        levels=levels(width, mults, 1, attention=attention, at=at),
        middle=attention,
        embedding=EmbeddingConfig(time_dim=width, dim=4 * width),
        block=BlockConfig(film=True, resample="residual", norm_groups=groups),
    )


@RECIPES("openmoji-ddpm")
def openmoji_ddpm() -> Recipe:
    """DDPM's blocks on OpenMoji at 32x32, told nothing: L_simple, a variance of no parameters; untried."""
    task = DenoisingConfig(
        net=_ddpm(48, (1, 2, 2)),
        schedule=Discrete(),
        prediction="eps",
        dropout=0.0,
        sampling=SampleOptions(sampler="ddpm", steps=100, spacing="respaced", threshold=Static()),
    )
    return Recipe(
        name="openmoji-ddpm",
        task=task,
        data=replace(AUGMENTED, size=32, shift=2),
        optim=ADAMW,
        trainer=TrainerConfig(images=300_000, batch=32, ema=0.999),
        about=about("DDPM on OpenMoji, 32x32."),
    )


@RECIPES("openmoji-adm")
def openmoji_adm() -> Recipe:
    """ADM told one of OpenMoji's groups, at 32x32, for openmoji-classifier to guide; untried.

    A tenth of the groups is left out in training, so that guidance without a classifier works too.
    """
    task = DenoisingConfig(
        net=_classed(_encoder(48, (1, 2), (1, 2, 3)), len(GROUPS)),
        schedule=COSINE,
        prediction="eps",
        learned_var=True,
        objective=Objective(vlb=0.001),
        sampling=replace(SAMPLING, guidance=CFG(1.0)),
    )
    return Recipe(
        name="openmoji-adm",
        task=task,
        data=replace(AUGMENTED, size=32, shift=2, label="group"),
        optim=ADAMW,
        trainer=TrainerConfig(images=300_000, batch=32, ema=0.999),
        about=about("Class-conditional ADM on OpenMoji, 32x32."),
    )


def _ddpm(width: int, mults: tuple[int, ...], groups: int = 8) -> UNetConfig:
    """DDPM's blocks, small: attention of one head at half the resolution, the time added before the norm."""
    attention = AttentionConfig(heads=1)
    return UNetConfig(
        in_channels=3,
        out_channels=3,
        levels=levels(width, mults, 1, attention=attention, at=(1,)),
        middle=attention,
        embedding=EmbeddingConfig(time_dim=width, dim=4 * width, cos_first=False, shift=1.0),
        block=BlockConfig(resample="conv_asymmetric", norm_eps=1e-6, norm_groups=groups),
    )


def _classed(net: UNetConfig, classes: int) -> UNetConfig:
    """The same, told one of some classes or none."""
    label = EmbedderConfig(kind="table", features=(Feature(field="label", dim=classes + 1),))
    return replace(net, embedding=replace(net.embedding, extras=(label,)))


@RECIPES("openmoji-classifier")
def openmoji_classifier() -> Recipe:
    """Which of OpenMoji's groups a noisy picture of 32x32 shows, with ADM's attention pooling; untried.

    The metadata must have the column "group": `sfumato data openmoji` adds it to an earlier rendering.
    """
    net = NoisyClassifierConfig(
        encoder=_encoder(48, (1, 2), (1, 2, 2)), num_classes=len(GROUPS), size=32, head_dim=48
    )
    return Recipe(
        name="openmoji-classifier",
        task=ClassifyingConfig(net=net, schedule=COSINE),
        data=replace(AUGMENTED, size=32, shift=2, label="group"),
        optim=OptimConfig(lr=6e-4, weight_decay=0.2, lr_schedule="cosine", warmup=1600),
        trainer=TrainerConfig(images=160_000, batch=32, ema=0.999),
        about=about("A classifier of noisy 32x32 OpenMoji pictures by group, for guidance."),
    )


@RECIPES("openmoji-noised-clip")
def openmoji_noised_clip() -> Recipe:
    """A CLIP of noisy 32x32 pictures, which guides the result of openmoji-glide; untried."""
    text = NoisedTextConfig(width=192, depth=4, heads=4, vocab=4096, context=18, embed=192)
    vision = NoisedVisionConfig(width=192, depth=5, heads=4, size=32, patch=4, embed=192)
    return Recipe(
        name="openmoji-noised-clip",
        task=NoisedContrastiveConfig(vision=vision, text=text, schedule=COSINE),
        data=replace(OPENMOJI, size=32, even="concept", shift=2),
        optim=OptimConfig(
            lr=1e-3, betas=(0.9, 0.98), weight_decay=0.2, lr_schedule="cosine", warmup=6400, final=0.01
        ),
        trainer=TrainerConfig(images=120_000, batch=128, ema=0.99, save_every=20_000),
        about=about("A CLIP of noisy 32x32 OpenMoji pictures, for guidance."),
    )


@RECIPES("openmoji-glide")
def openmoji_glide() -> Recipe:
    """GLIDE's base on OpenMoji at 32x32: a text transformer trained jointly, no empty captions yet."""
    text = TextTransformerConfig(vocab_size=4096, context=16, width=192, depth=3, heads=4, padding="learned")
    task = DenoisingConfig(
        net=_told(_encoder(48, (1, 2), (1, 2, 3)), 192),
        text=text,
        schedule=COSINE,
        prediction="eps",
        learned_var=True,
        objective=Objective(vlb=0.001),
        dropout=0.0,
        sampling=SAMPLING,
    )
    return Recipe(
        name="openmoji-glide",
        task=task,
        data=replace(OPENMOJI, size=32, even="concept"),
        optim=ADAMW,
        trainer=TrainerConfig(images=400_000, batch=32, ema=0.999),
        about=about("GLIDE's base on OpenMoji, 32x32."),
    )


@RECIPES("openmoji-glide-fill")
def openmoji_glide_fill() -> Recipe:
    """The fine-tune of openmoji-glide to 20 % empty captions and to holes (or one: --task.holes False)."""
    full = openmoji_glide()
    assert isinstance(full.task, DenoisingConfig)
    assert isinstance(full.task.net, UNetConfig)
    return replace(
        full,
        name="openmoji-glide-fill",
        task=_filling(full.task, Path("runs/openmoji-glide")),
        trainer=replace(full.trainer, images=100_000),
    )


def _told(net: UNetConfig, width: int) -> UNetConfig:
    """The same, which reads a text in front of the pixels, and its vector beside the time."""
    attention = AttentionConfig(kind="appended", head_dim=net.levels[0].channels // 2)
    pooled = EmbedderConfig(kind="linear", features=(Feature(field="pooled", dim=width),))
    return replace(
        net,
        levels=tuple(replace(v, attention=attention if v.attention else None) for v in net.levels),
        middle=attention,
        tokens=TokensConfig(dim=width),
        embedding=replace(net.embedding, extras=(pooled,)),
    )


def _filling(task: DenoisingConfig, base: Path) -> DenoisingConfig:
    assert isinstance(task.net, UNetConfig)
    sampling = replace(task.sampling, start=Fill())
    net = replace(task.net, in_channels=2 * 3 + 1)
    return replace(task, net=net, init=base, dropout=0.2, holes=True, sampling=sampling)


# Twins for smoke tests: any folder of captioned and labelled pictures, seconds on one core.


@RECIPES("toy-ddpm")
def toy_ddpm() -> Recipe:
    """Tiny twin of openmoji-ddpm."""
    full = openmoji_ddpm()
    assert isinstance(full.task, DenoisingConfig)
    sampling = replace(full.task.sampling, steps=2)
    return toy(full, replace(full.task, net=_ddpm(8, (1, 2), 4), sampling=sampling))


@RECIPES("toy-adm")
def toy_adm() -> Recipe:
    """Tiny twin of openmoji-adm, for three classes; toy-classifier guides it."""
    full = openmoji_adm()
    assert isinstance(full.task, DenoisingConfig)
    net = _classed(_encoder(8, (1,), (1, 2), 4), 3)
    return toy(full, replace(full.task, net=net, sampling=replace(full.task.sampling, steps=2)))


@RECIPES("toy-classifier")
def toy_classifier() -> Recipe:
    """Tiny twin of openmoji-classifier, for three classes."""
    net = NoisyClassifierConfig(encoder=_encoder(8, (1,), (1, 2), 4), num_classes=3, size=16, head_dim=8)
    full = openmoji_classifier()
    return toy(full, ClassifyingConfig(net=net, schedule=COSINE))


@RECIPES("toy-noised-clip")
def toy_noised_clip() -> Recipe:
    """Tiny twin of openmoji-noised-clip."""
    text = NoisedTextConfig(width=16, depth=1, heads=2, vocab=300, context=10, embed=16)
    vision = NoisedVisionConfig(width=16, depth=1, heads=2, size=16, patch=4, embed=16)
    task = NoisedContrastiveConfig(vision=vision, text=text, schedule=COSINE)
    return toy(openmoji_noised_clip(), task)


@RECIPES("toy-glide")
def toy_glide() -> Recipe:
    """Tiny twin of openmoji-glide."""
    full = openmoji_glide()
    assert isinstance(full.task, DenoisingConfig)
    text = TextTransformerConfig(vocab_size=300, context=8, width=16, depth=1, heads=2, padding="learned")
    sampling = replace(SAMPLING, steps=2)
    return toy(
        full, replace(full.task, net=_told(_encoder(8, (1,), (1, 2), 4), 16), text=text, sampling=sampling)
    )


@RECIPES("toy-glide-fill")
def toy_glide_fill() -> Recipe:
    """Tiny twin of openmoji-glide-fill, on the result of toy-glide."""
    full = toy_glide()
    assert isinstance(full.task, DenoisingConfig)
    return replace(full, name="toy-glide-fill", task=_filling(full.task, Path("runs/toy-glide")))
