"""Text-to-image on the scenes that can be read back: the first entry of `sfumato bench scenes`.

The autoencoder is trained first; both draw their pictures as they go and need no files. Counts are in images.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sfumato.diffusion.guidance import CFG
from sfumato.diffusion.objective import Objective
from sfumato.diffusion.schedules import Flow
from sfumato.diffusion.times import LogitNormal
from sfumato.families.latent import latent_unet
from sfumato.families.registry import RECIPES
from sfumato.nets.autoencoder import AutoencoderConfig
from sfumato.nets.dit import DiTConfig
from sfumato.nets.text import TextTransformerConfig
from sfumato.systems.config import About
from sfumato.systems.options import SampleOptions
from sfumato.training.batches import DataConfig
from sfumato.training.optim import OptimConfig
from sfumato.training.recipe import Recipe
from sfumato.training.tasks.autoencoding import AutoencodingConfig
from sfumato.training.tasks.denoising import DenoisingConfig
from sfumato.training.trainer import TrainerConfig

__all__: list[str] = []  # everything is reached through RECIPES

RUNS = Path("runs")
SCENES = DataConfig(path=Path("scenes:40000"), size=64)
TEXT_WIDTH = 128
PROMPTS = (
    *("a red circle", "a small blue ring", "a large striped yellow square", "a dotted pink triangle"),
    *(
        "a green star on white",
        "two red circles",
        "three small cyan stars on lavender",
        "four purple squares",
    ),
    *("a red square and a blue circle", "a yellow star and two green rings on gray"),
    *("a red circle left of a blue square", "a green triangle above an orange ring"),
    *("a pink star right of a yellow cross", "a small cyan cross below a large red triangle on beige"),
    *("a red star", "a triangle left of a circle"),
)
"""To look at; picture i has seed i. The last two are held out from training."""


@RECIPES("scenes-autoencoder")
def scenes_autoencoder() -> Recipe:
    """A KL autoencoder of scenes, 64x64 to 16x16x4: L1, L2 and KL losses."""
    task = AutoencodingConfig(
        net=AutoencoderConfig(
            channels=32, mults=(1, 2), blocks=1, mid_attention=False, norm_groups=8, patch=2
        ),
        l1=1.0,
        l2=4.0,  # most of a picture is background, and large errors are what matters
        kl=1e-4,
        adversarial=0.0,
    )
    optim = OptimConfig(
        kind="muon",
        lr=1e-3,
        muon_lr=0.01,
        betas=(0.9, 0.95),
        weight_decay=0.01,
        warmup=800,
        final=0.03,
        clip=10.0,
    )
    return Recipe(
        name="scenes-autoencoder",
        task=task,
        data=SCENES,
        optim=optim,
        trainer=TrainerConfig(images=12_000, batch=8, ema=0.998, preview_every=3000),
        about=_about("KL autoencoder of 64x64 scenes."),
    )


@RECIPES("scenes-dit")
def scenes_dit() -> Recipe:
    """A text-to-image DiT on the latents of scenes-autoencoder, 4x4 of them to a token.

    An hour of two cores; what it reached is in docs/scenes/leaderboard.md: shapes are not learned yet. The
    report on DiT derives its cells from this recipe.
    """
    net = DiTConfig(
        patch=4,
        width=256,
        depth=7,
        heads=4,
        text_dim=TEXT_WIDTH,
        pooled_dim=TEXT_WIDTH,
        qk_norm=True,
        shared_modulation=True,
    )
    task = DenoisingConfig(
        net=net,
        text=TextTransformerConfig(vocab_size=512, context=32, width=TEXT_WIDTH, depth=2, heads=4),
        autoencoder=RUNS / "scenes-autoencoder",
        posterior="mean",
        schedule=Flow(multiplier=1000.0),
        prediction="flow",
        objective=Objective(times=LogitNormal(mean=1.0, std=1.2)),
        dropout=0.1,
        sampling=SampleOptions(sampler="euler", steps=20, spacing="trailing", guidance=CFG(2.0)),
        prompts=PROMPTS,
    )
    return Recipe(
        name="scenes-dit",
        task=task,
        data=replace(SCENES, path=Path("scenes:60000")),
        optim=OptimConfig(
            lr=1e-3,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            lr_schedule="wsd",
            warmup=1600,
            decay=0.3,
            final=0.02,
        ),
        trainer=TrainerConfig(images=310_000, batch=32, ema=0.995, preview_every=20_000, save_every=10_000),
        about=_about("Text-to-image latent diffusion on scenes, 64x64."),
    )


@RECIPES("scenes-autoencoder-8")
def scenes_autoencoder_8() -> Recipe:
    """As scenes-autoencoder, 64x64 to 8x8x8: four times fewer places, where a shape is a few numbers."""
    full = scenes_autoencoder()
    assert isinstance(full.task, AutoencodingConfig)
    net = replace(full.task.net, mults=(1, 2, 4), z_channels=8, embed_dim=8)
    return replace(
        full,
        name="scenes-autoencoder-8",
        task=replace(full.task, net=net),
        trainer=replace(full.trainer, images=16_000),
    )


@RECIPES("scenes-unet")
def scenes_unet() -> Recipe:
    """A text-to-image U-Net of Stable Diffusion's shape on the latents of scenes-autoencoder-8.

    27 minutes of two cores; what it reached is in docs/scenes/leaderboard.md.
    """
    full = scenes_dit()
    assert isinstance(full.task, DenoisingConfig)
    net = latent_unet(TEXT_WIDTH, channels=8, width=96, mults=(1, 2), at=(0, 1))
    return replace(
        full,
        name="scenes-unet",
        task=replace(full.task, net=net, autoencoder=RUNS / "scenes-autoencoder-8"),
        trainer=replace(full.trainer, images=135_000),
    )


@RECIPES("toy-scenes")
def toy_scenes() -> Recipe:
    """Tiny twin of scenes-dit for tests, on pixels."""
    full = scenes_dit()
    assert isinstance(full.task, DenoisingConfig)
    net = DiTConfig(
        in_channels=3, out_channels=3, patch=8, width=16, depth=1, heads=2, text_dim=16, pooled_dim=16
    )
    text = TextTransformerConfig(vocab_size=300, context=8, width=16, depth=1, heads=2)
    return replace(
        full,
        name="toy-scenes",
        task=replace(full.task, net=net, text=text, autoencoder=None, prompts=()),
        data=DataConfig(path=Path("scenes:64,size=32"), size=32),
        optim=replace(full.optim, warmup=8),
        trainer=TrainerConfig(images=64, batch=4, ema=0.9, log_every=16, preview_every=32, save_every=32),
        about=About(summary="A tiny twin for tests; its pictures mean nothing."),
    )


def _about(summary: str) -> About:
    return About(summary=summary, license="Apache-2.0", data="scenes drawn by sfumato")
