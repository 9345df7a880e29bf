"""unCLIP on OpenMoji: CLIP, both priors, decoder at 32 pixels and upsampler to 64, and tiny twins of each.

CLIP is trained first; priors and decoder build upon its run, the upsampler upon none. Sizes are meant for 20
to 40 minutes each on two cores; what they reach is not known yet.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sfumato.data.degrade import DegradeConfig
from sfumato.diffusion.constraints import Static
from sfumato.diffusion.guidance import CFG, LogitCFG
from sfumato.diffusion.objective import Objective
from sfumato.diffusion.schedules import Discrete
from sfumato.families.latent import ADAMW, AUGMENTED, OPENMOJI, RUNS, about, toy
from sfumato.families.registry import RECIPES
from sfumato.nets.attention import AttentionConfig
from sfumato.nets.blocks import BlockConfig
from sfumato.nets.clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig
from sfumato.nets.embedding import EmbeddingConfig, TokensConfig
from sfumato.nets.prior import PriorConfig
from sfumato.nets.token_prior import TokenPriorConfig
from sfumato.nets.unclip import told_both
from sfumato.nets.unet import UNetConfig, levels
from sfumato.systems.options import SampleOptions
from sfumato.training.optim import OptimConfig
from sfumato.training.recipe import Recipe
from sfumato.training.tasks.contrastive import ContrastiveConfig
from sfumato.training.tasks.denoising import DenoisingConfig
from sfumato.training.tasks.predicting import PredictingConfig
from sfumato.training.trainer import TrainerConfig

__all__: list[str] = []  # everything is reached through RECIPES

WIDTH, EMBED, CONTEXT = 192, 128, 16  # of CLIP's towers
COSINE = Discrete(formula="cosine")
ANCESTRAL = SampleOptions(sampler="ddpm", steps=25, spacing="respaced", threshold=Static(1.0))
CAPTIONED = replace(OPENMOJI, even="concept")


def _clip(side: int, patch: int, width: int, embed: int, depth: int, vocab: int, context: int) -> CLIPConfig:
    shape: dict[str, Any] = {"width": width, "hidden": 4 * width, "heads": max(width // 48, 2)}
    vision = CLIPVisionConfig(side=side, patch=patch, depth=depth, embed=embed, **shape)
    text = CLIPTextConfig(vocab=vocab, context=context, depth=depth, embed=embed, **shape)
    return CLIPConfig(vision=vision, text=text)


@RECIPES("openmoji-clip")
def openmoji_clip() -> Recipe:
    """Two transformers of width 192, pictures in patches of 8 pixels."""
    return Recipe(
        name="openmoji-clip",
        task=ContrastiveConfig(net=_clip(64, 8, WIDTH, EMBED, 5, 4096, CONTEXT)),
        data=replace(CAPTIONED, shift=4),
        optim=OptimConfig(
            lr=1e-3, betas=(0.9, 0.98), weight_decay=0.2, lr_schedule="cosine", warmup=6400, final=0.01
        ),
        trainer=TrainerConfig(images=120_000, batch=128, ema=0.99, save_every=20_000),
        about=about("CLIP of OpenMoji pictures and their names, 64x64."),
    )


@RECIPES("openmoji-prior")
def openmoji_prior() -> Recipe:
    """Captions to the image embeddings of openmoji-clip."""
    net = PriorConfig(dim=EMBED, text_dim=WIDTH, context=CONTEXT, width=256, depth=6, heads=4)
    task = DenoisingConfig(
        net=net,
        clip=RUNS / "openmoji-clip",
        schedule=COSINE,
        prediction="x0",
        dropout=0.1,
        sampling=replace(ANCESTRAL, threshold=Static(10.0), guidance=CFG(2.0), candidates=2),
    )
    return Recipe(
        name="openmoji-prior",
        task=task,
        data=CAPTIONED,
        optim=replace(ADAMW, lr=5e-4, weight_decay=0.06, betas=(0.9, 0.96)),
        trainer=TrainerConfig(images=250_000, batch=64, ema=0.999, save_every=50_000),
        about=about("unCLIP's diffusion prior on OpenMoji."),
    )


@RECIPES("openmoji-ar-prior")
def openmoji_ar_prior() -> Recipe:
    """The same token by token: 64 principal coordinates in 128 buckets, as large as openmoji-prior."""
    shape: dict[str, Any] = {"width": 256, "depth": 6, "heads": 4, "kept": 64, "buckets": 128}
    net = TokenPriorConfig(dim=EMBED, text_dim=WIDTH, context=CONTEXT, **shape)
    sampling = SampleOptions(steps=1, guidance=LogitCFG(2.0), candidates=2)
    return Recipe(
        name="openmoji-ar-prior",
        task=PredictingConfig(net=net, clip=RUNS / "openmoji-clip", sampling=sampling),
        data=CAPTIONED,
        optim=replace(ADAMW, lr=5e-4, weight_decay=0.04, betas=(0.9, 0.91)),
        trainer=TrainerConfig(images=60_000, batch=64, ema=0.999, save_every=15_000),
        about=about("unCLIP's autoregressive prior on OpenMoji."),
    )


def _unet(width: int, groups: int, in_channels: int = 3, out: int = 3, **more: int) -> UNetConfig:
    """unCLIP's decoder if `more` has widths of tokens and embeddings, else a U-Net without attention."""
    embedding, tokens, attention = EmbeddingConfig(time_dim=width, dim=4 * width), None, None
    if more:
        attention = AttentionConfig(kind="appended", head_dim=width)
        embedding = told_both(embedding, more["embed"], more["embed"])
        tokens = TokensConfig(
            dim=more["text"],
            width=2 * width,
            norm=True,
            image_tokens=4,
            image_dim=more["embed"],
            masked=True,
        )
    return UNetConfig(
        in_channels=in_channels,
        out_channels=out,
        levels=levels(width, (1, 2, 3), 1, attention=attention, at=(1, 2)),
        middle=attention,
        embedding=embedding,
        tokens=tokens,
        block=BlockConfig(film=True, resample="residual", norm_groups=groups),
    )


@RECIPES("openmoji-unclip-decoder")
def openmoji_unclip_decoder() -> Recipe:
    """Image embeddings and captions to pictures of 32 pixels, as Karlo's decoder at a tenth of its width."""
    task = DenoisingConfig(
        net=_unet(48, 16, out=6, embed=EMBED, text=WIDTH),
        clip=RUNS / "openmoji-clip",
        schedule=COSINE,
        prediction="eps",
        learned_var=True,
        objective=Objective(vlb=0.001),
        dropout=0.5,
        dropout_image=0.1,
        sampling=replace(ANCESTRAL, guidance=CFG(2.0)),
    )
    return Recipe(
        name="openmoji-unclip-decoder",
        task=task,
        data=replace(CAPTIONED, size=32),
        optim=replace(ADAMW, lr=5e-4),
        trainer=TrainerConfig(images=45_000, batch=32, ema=0.999, preview_every=15_000, save_every=9_000),
        about=about("unCLIP's decoder on OpenMoji, 32x32."),
    )


@RECIPES("openmoji-unclip-upsampler")
def openmoji_unclip_upsampler() -> Recipe:
    """32 to 64 pixels, trained on quarters of pictures that were blurred after shrinking."""
    task = DenoisingConfig(
        net=_unet(48, 16, in_channels=6),
        degrade=DegradeConfig(factor=2, kind="blur", crop=32),
        schedule=COSINE,
        prediction="eps",
        dropout=0.0,
        sampling=replace(ANCESTRAL, steps=15),
    )
    return Recipe(
        name="openmoji-unclip-upsampler",
        task=task,
        data=AUGMENTED,
        optim=replace(ADAMW, lr=5e-4),
        trainer=TrainerConfig(images=45_000, batch=32, ema=0.999, preview_every=15_000, save_every=9_000),
        about=about("unCLIP's upsampler on OpenMoji, 32x32 to 64x64."),
    )


# Twins for smoke tests, in the order in which they build upon each other.


@RECIPES("toy-clip")
def toy_clip() -> Recipe:
    """Tiny twin of openmoji-clip."""
    return toy(openmoji_clip(), ContrastiveConfig(net=_clip(16, 8, 16, 8, 1, 300, 8)))


def _denoiser(full: Recipe, net: UNetConfig | PriorConfig, degrade: DegradeConfig | None = None) -> Recipe:
    assert isinstance(full.task, DenoisingConfig)
    sampling = replace(full.task.sampling, steps=2)
    clip = RUNS / "toy-clip" if full.task.clip else None
    return toy(full, replace(full.task, net=net, clip=clip, sampling=sampling, degrade=degrade))


@RECIPES("toy-clip-prior")
def toy_clip_prior() -> Recipe:
    """Tiny twin of openmoji-prior, on the result of toy-clip."""
    net = PriorConfig(dim=8, text_dim=16, context=8, width=16, depth=1, heads=2)
    return replace(_denoiser(openmoji_prior(), net), name="toy-clip-prior")


@RECIPES("toy-ar-prior")
def toy_ar_prior() -> Recipe:
    """Tiny twin of openmoji-ar-prior, on the result of toy-clip."""
    full = openmoji_ar_prior()
    assert isinstance(full.task, PredictingConfig)
    net = TokenPriorConfig(dim=8, text_dim=16, context=8, width=16, depth=1, heads=2, kept=5, buckets=8)
    return toy(full, replace(full.task, net=net, clip=RUNS / "toy-clip"))


@RECIPES("toy-unclip-decoder")
def toy_unclip_decoder() -> Recipe:
    """Tiny twin of openmoji-unclip-decoder, on the result of toy-clip."""
    return _denoiser(openmoji_unclip_decoder(), _unet(8, 4, out=6, embed=8, text=16))


@RECIPES("toy-unclip-upsampler")
def toy_unclip_upsampler() -> Recipe:
    """Tiny twin of openmoji-unclip-upsampler."""
    degrade = DegradeConfig(factor=2, kind="bsr", crop=8)
    return _denoiser(openmoji_unclip_upsampler(), _unet(8, 4, in_channels=6), degrade)
