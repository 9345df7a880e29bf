"""Latent diffusion on OpenMoji: perceptual net, autoencoder and denoiser, and tiny twins of each.

They are trained in this order, each from the run folders of those before it. Counts are in images.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sfumato.data.openmoji_groups import GROUPS
from sfumato.diffusion.guidance import CFG
from sfumato.diffusion.objective import Objective
from sfumato.diffusion.schedules import Flow
from sfumato.diffusion.times import LogitNormal
from sfumato.evaluation.openmoji import PROMPTS
from sfumato.families.registry import RECIPES
from sfumato.nets.attention import AttentionConfig
from sfumato.nets.autoencoder import AutoencoderConfig
from sfumato.nets.blocks import BlockConfig
from sfumato.nets.discriminator import DiscriminatorConfig
from sfumato.nets.dit import DiTConfig
from sfumato.nets.embedding import EmbedderConfig, EmbeddingConfig, Feature, TokensConfig
from sfumato.nets.lora import LoraConfig
from sfumato.nets.mlp import MLPConfig
from sfumato.nets.perceptual import PerceptualConfig
from sfumato.nets.text import TextTransformerConfig
from sfumato.nets.unet import UNetConfig, levels
from sfumato.systems.config import About
from sfumato.systems.options import SampleOptions
from sfumato.training.batches import DataConfig
from sfumato.training.optim import OptimConfig
from sfumato.training.recipe import Recipe, TaskConfig
from sfumato.training.tasks.autoencoding import AutoencodingConfig
from sfumato.training.tasks.denoising import DenoisingConfig
from sfumato.training.tasks.perceptual import CaptionWordsConfig
from sfumato.training.trainer import TrainerConfig

__all__ = [
    "ADAMW",
    "AUGMENTED",
    "OPENMOJI",
    "about",
    "latent_unet",
    "toy",
]  # all else is reached through RECIPES

RUNS = Path("runs")
BUNDLED = Path(__file__).resolve().parents[1] / "assets" / "default"
OPENMOJI = DataConfig(path=Path("data/openmoji"), size=64, split="train")
# Captions tell left from right ("face facing right"), so only nets that read none are shown flips.
AUGMENTED = replace(OPENMOJI, flip=True, shift=4)
TEXT_WIDTH = 192
SAMPLING = SampleOptions(sampler="euler", steps=20, spacing="trailing", guidance=CFG(3.0))
MUON = OptimConfig(
    kind="muon",
    lr=1e-3,
    muon_lr=0.01,
    betas=(0.9, 0.95),
    weight_decay=0.01,
    lr_schedule="wsd",
    warmup=6400,
    decay=0.3,
    final=0.02,
    clip=10.0,
)
# For denoisers: in trials of 150 seconds small batches and AdamW went further than Muon and batches of 64.
ADAMW = OptimConfig(
    lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, lr_schedule="wsd", warmup=3200, decay=0.35, final=0.02
)


@RECIPES("openmoji-perceptual")
def openmoji_perceptual() -> Recipe:
    """A stand-in for LPIPS: features that tell which words describe a picture."""
    return Recipe(
        name="openmoji-perceptual",
        task=CaptionWordsConfig(net=PerceptualConfig(widths=(32, 64, 128), convs=(2, 2, 2))),
        data=AUGMENTED,
        optim=OptimConfig(lr=1e-3, lr_schedule="constant", weight_decay=0.01, clip=0.0),
        trainer=TrainerConfig(images=45_000, batch=64, ema=0.9, save_every=15_000),
        about=about("Perceptual features trained on caption words: a stand-in for LPIPS."),
    )


@RECIPES("openmoji-autoencoder")
def openmoji_autoencoder() -> Recipe:
    """A KL autoencoder, 64x64 to 16x16x4: L1, L2, perceptual and KL losses, PatchGAN in the last fifth."""
    task = AutoencodingConfig(
        net=AutoencoderConfig(channels=64, mults=(1, 2), blocks=1, norm_groups=8, patch=2),
        discriminator=DiscriminatorConfig(channels=32, layers=2),
        perceptual_net=RUNS / "openmoji-perceptual",
        l1=1.0,
        l2=1.0,
        perceptual=0.5,
        kl=3e-4,
        adversarial=0.1,
        perceptual_start=0.2,
        discriminator_start=0.77,
        adversarial_start=0.8,
        discriminator_optim=OptimConfig(lr=4e-4, betas=(0.5, 0.9), lr_schedule="constant", clip=0.0),
    )
    return Recipe(
        name="openmoji-autoencoder",
        task=task,
        data=AUGMENTED,
        optim=replace(MUON, lr_schedule="cosine", warmup=800, final=0.03),
        trainer=TrainerConfig(images=50_000, batch=16, ema=0.999),
        about=about("KL autoencoder of 64x64 OpenMoji pictures."),
    )


@RECIPES("openmoji-dit")
def openmoji_dit() -> Recipe:
    """A text-to-image DiT on the latents of openmoji-autoencoder, 4x4 of them to a token."""
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
    return _denoiser("openmoji-dit", net)


@RECIPES("openmoji-classes")
def openmoji_classes() -> Recipe:
    """The DiT of openmoji-dit told one of OpenMoji's groups instead of a text; untried.

    The metadata must have the column "group": `sfumato data openmoji` adds it to an earlier rendering.
    """
    full = openmoji_dit()
    assert isinstance(full.task, DenoisingConfig)
    assert isinstance(full.task.net, DiTConfig)
    net = replace(full.task.net, text_dim=None, pooled_dim=None, num_classes=len(GROUPS))
    return replace(
        full,
        name="openmoji-classes",
        task=replace(full.task, net=net, text=None, prompts=()),
        data=replace(full.data, label="group"),
        about=about("Class-conditional latent diffusion on OpenMoji, 64x64."),
    )


@RECIPES("openmoji-unet")
def openmoji_unet() -> Recipe:
    """A text-to-image U-Net of Stable Diffusion's shape on the latents of openmoji-autoencoder."""
    return _denoiser("openmoji-unet", latent_unet(TEXT_WIDTH))


@RECIPES("openmoji-lora")
def openmoji_lora() -> Recipe:
    """Low-rank adapters of the bundled system, on pictures of your own; the settings are untried."""
    full = openmoji_dit()
    assert isinstance(full.task, DenoisingConfig)
    task = replace(
        full.task, net=None, text=None, autoencoder=None, init=BUNDLED, lora=LoraConfig(rank=8), prompts=()
    )
    return replace(
        full,
        name="openmoji-lora",
        task=task,
        data=replace(full.data, split=None, even=None),
        optim=OptimConfig(lr=1e-3, weight_decay=0.01, lr_schedule="cosine", warmup=320),
        trainer=TrainerConfig(images=16_000, batch=16, ema=0.99, preview_every=4000, save_every=4000),
        about=about("Text-to-image latent diffusion on OpenMoji, 64x64, with adapters merged in."),
    )


@RECIPES("openmoji-control")
def openmoji_control() -> Recipe:
    """A ControlNet that draws along edges, for the result of openmoji-unet; the settings are untried.

    The bundled system is a DiT, which a ControlNet cannot steer: train openmoji-unet first.
    """
    full = openmoji_lora()
    assert isinstance(full.task, DenoisingConfig)
    return replace(
        full,
        name="openmoji-control",
        task=replace(full.task, init=RUNS / "openmoji-unet", lora=None, control="edges"),
        data=replace(OPENMOJI, even="concept"),
        optim=replace(full.optim, lr=3e-4),
        trainer=replace(full.trainer, images=64_000),
        about=about("A ControlNet for text-to-image latent diffusion on OpenMoji: drawn along edges."),
    )


def latent_unet(
    text: int,
    *,
    channels: int = 4,
    width: int = 64,
    mults: tuple[int, ...] = (1, 2, 3),
    at: tuple[int, ...] = (1, 2),
) -> UNetConfig:
    """A small U-Net of Stable Diffusion's shape for latents; by default of (4, 16, 16).

    Args:
        text: width of the tokens that it reads.
        channels: of the latents.
        at: levels with attention; at 16x16 it would cost most and tell the caption no more.
    """
    attention = AttentionConfig(kind="transformer", head_dim=32)
    pooled = EmbedderConfig(kind="linear", features=(Feature(field="pooled", dim=text),))
    return UNetConfig(
        in_channels=channels,
        out_channels=channels,
        levels=levels(width, mults, 1, attention=attention, at=at),
        middle=attention,
        embedding=EmbeddingConfig(time_dim=width, dim=4 * width, extras=(pooled,)),
        tokens=TokensConfig(dim=text, masked=True),
        block=BlockConfig(norm_groups=8, film=True),
    )


def _denoiser(name: str, net: DiTConfig | UNetConfig) -> Recipe:
    """Linear flow on normalised latent means, text tower trained jointly.

    Times are noisier than usual: below t = 0.85 a noisy latent of so small a set tells which picture it is,
    and the caption is learned from what lies above. A third of the draws do, not 4 % as of LogitNormal(0, 1).
    """
    task = DenoisingConfig(
        net=net,
        text=TextTransformerConfig(vocab_size=4096, context=16, width=TEXT_WIDTH, depth=2, heads=4),
        autoencoder=RUNS / "openmoji-autoencoder",
        posterior="mean",
        schedule=Flow(multiplier=1000.0),
        prediction="flow",
        objective=Objective(times=LogitNormal(mean=1.0, std=1.2)),
        dropout=0.1,
        sampling=SAMPLING,
        prompts=PROMPTS[:16],
    )
    return Recipe(
        name=name,
        task=task,
        data=replace(OPENMOJI, even="concept"),
        optim=ADAMW,
        trainer=TrainerConfig(images=440_000, batch=32, ema=0.999, preview_every=50_000, save_every=25_000),
        about=about("Text-to-image latent diffusion on OpenMoji, 64x64."),
    )


def about(summary: str) -> About:
    """Of what is made from OpenMoji."""
    return About(summary=summary, license="CC-BY-SA-4.0", data="OpenMoji")


# Twins for smoke tests: any folder of captioned pictures, seconds on one core.


def toy(recipe: Recipe, task: TaskConfig) -> Recipe:
    """The twin of a recipe with a tiny task."""
    name = recipe.name.replace("openmoji", "toy")
    trainer = TrainerConfig(images=64, batch=4, ema=0.9, log_every=16, preview_every=32, save_every=32)
    data = replace(recipe.data, path=Path("data"), size=16, split=None, even=None, label=None)
    about = About(summary="A tiny twin for tests; its pictures mean nothing.")
    optim = replace(recipe.optim, warmup=8)
    return replace(recipe, name=name, task=task, trainer=trainer, data=data, optim=optim, about=about)


@RECIPES("toy-perceptual")
def toy_perceptual() -> Recipe:
    """Tiny twin of openmoji-perceptual."""
    net = PerceptualConfig(widths=(4, 8), convs=(1, 1))
    return toy(openmoji_perceptual(), CaptionWordsConfig(net=net))


@RECIPES("toy-autoencoder")
def toy_autoencoder() -> Recipe:
    """Tiny twin of openmoji-autoencoder, without a perceptual net; its discriminator starts half way."""
    full = openmoji_autoencoder()
    assert isinstance(full.task, AutoencodingConfig)
    task = replace(
        full.task,
        net=AutoencoderConfig(channels=8, mults=(1, 2), blocks=1, norm_groups=4, patch=2),
        discriminator=DiscriminatorConfig(channels=4, layers=1),
        perceptual_net=None,
        discriminator_start=0.4,
        adversarial_start=0.5,
    )
    return toy(full, task)


def _toy_denoiser(full: Recipe, net: DiTConfig | UNetConfig | MLPConfig) -> Recipe:
    assert isinstance(full.task, DenoisingConfig)
    task = replace(
        full.task,
        net=net,
        text=TextTransformerConfig(vocab_size=300, context=8, width=16, depth=1, heads=2),
        autoencoder=None,
        sampling=replace(SAMPLING, steps=2),
        prompts=(),
    )
    return toy(full, task)


@RECIPES("toy-dit")
def toy_dit() -> Recipe:
    """Tiny twin of openmoji-dit, on pixels unless --task.autoencoder is given."""
    net = DiTConfig(
        in_channels=3, out_channels=3, patch=4, width=16, depth=1, heads=2, text_dim=16, pooled_dim=16
    )
    return _toy_denoiser(openmoji_dit(), net)


@RECIPES("toy-unet")
def toy_unet() -> Recipe:
    """Tiny twin of openmoji-unet, on pixels."""
    attention = AttentionConfig(kind="transformer", heads=2)
    net = UNetConfig(
        in_channels=3,
        out_channels=3,
        levels=levels(8, (1, 2), 1, attention=attention, at=(1,)),
        middle=attention,
        embedding=EmbeddingConfig(time_dim=8, dim=16),
        tokens=TokensConfig(dim=16, masked=True),
        block=BlockConfig(norm_groups=4),
    )
    return _toy_denoiser(openmoji_unet(), net)


@RECIPES("toy-classes")
def toy_classes() -> Recipe:
    """A tiny DiT that is told a class, for class folders; --task.net.num-classes is their number."""
    net = DiTConfig(in_channels=3, out_channels=3, patch=4, width=16, depth=1, heads=2, num_classes=3)
    full = _toy_denoiser(openmoji_dit(), net)
    assert isinstance(full.task, DenoisingConfig)
    return replace(full, name="toy-classes", task=replace(full.task, text=None))


@RECIPES("toy-prior")
def toy_prior() -> Recipe:
    """A tiny net from texts to the features of toy-perceptual, as unCLIP's prior is to those of CLIP."""
    net = MLPConfig(in_channels=12, out_channels=12, width=16, depth=1, pooled_dim=16)
    full = _toy_denoiser(openmoji_dit(), net)
    assert isinstance(full.task, DenoisingConfig)
    return replace(full, name="toy-prior", task=replace(full.task, embedder=RUNS / "toy-perceptual"))


@RECIPES("toy-lora")
def toy_lora() -> Recipe:
    """Tiny twin of openmoji-lora, on the result of toy-dit."""
    full = openmoji_lora()
    assert isinstance(full.task, DenoisingConfig)
    task = replace(
        full.task, init=RUNS / "toy-dit", lora=LoraConfig(rank=2), sampling=replace(SAMPLING, steps=2)
    )
    return toy(full, task)


@RECIPES("toy-control")
def toy_control() -> Recipe:
    """Tiny twin of openmoji-control, on the result of toy-unet."""
    full = openmoji_control()
    assert isinstance(full.task, DenoisingConfig)
    return toy(full, replace(full.task, init=RUNS / "toy-unet", sampling=replace(SAMPLING, steps=2)))
