"""The latent diffusion systems of 2021 (Rombach et al. 2022, arXiv:2112.10752), from their single files."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sfumato.checkpoints.foreign import Foreign
from sfumato.checkpoints.native import Parts
from sfumato.diffusion.guidance import CFG
from sfumato.families.assembly import ASSEMBLIES, latents_of
from sfumato.families.schedulers import sampling_of
from sfumato.nets.autoencoder import Autoencoder
from sfumato.nets.text import TextTransformer
from sfumato.nets.told import ClassToken
from sfumato.nets.unet import UNet
from sfumato.systems.conditioning import (
    BoxesConfig,
    ConditionerConfig,
    InpaintConfig,
    LabelConfig,
    LowResConfig,
    SemanticConfig,
    TokenTextConfig,
)
from sfumato.systems.config import About, StageConfig, SystemConfig
from sfumato.systems.system import System, assemble

__all__ = ["pictures"]  # all else is reached through ASSEMBLIES

SIDE = 256  # pixels that all but one were trained on
BOXES = 92  # tokens of a layout: 30 boxes of 3, and the 2 corners of the picture
IMAGENET = 1000  # classes; a table with one row more has a null class
# Their DDIM: steps 1, 1 + n, ..., down to the first level of the table and not to the clean picture.
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


@dataclass(frozen=True)
class _Task:
    """What a system does, and how the published scripts and notebooks draw with it.

    Attributes:
        eta: noise of DDIM.
        betas: of the first and the last step, for files that have lost their table.
    """

    name: str
    conditioners: tuple[ConditionerConfig, ...] = ()
    steps: int = 200
    guidance: float = 1.0
    eta: float = 0.0
    betas: tuple[float, float] = (0.0015, 0.0195)


@ASSEMBLIES("ldm-compvis")
def pictures(found: Foreign) -> System:
    """Without tokens: what else the U-Net reads is in its channels; also from a folder of diffusers.

    Raises: ValueError if it is of no known number.
    """
    net, vae = found.nets["net"], found.nets["vae"]
    assert isinstance(net, UNet)
    assert isinstance(vae, Autoencoder)
    latent, colors = vae.config.embed_dim, vae.config.image_channels
    holes, small = InpaintConfig(mask_first=False, black=True), LowResConfig(factor=1)
    kinds = {
        0: _Task("unconditional", betas=(0.0015, 0.0195 if vae.config.kind == "vq" else 0.0155)),
        colors: _Task("super-resolution", (small,), steps=100, eta=1.0, betas=(0.0015, 0.0155)),
        latent + 1: _Task("inpainting", (holes,), steps=50, betas=(0.0015, 0.0205)),
    }
    spare = net.config.in_channels - latent
    if spare not in kinds:
        allowed = ", ".join(f"{n} more ({task.name})" for n, task in kinds.items())
        raise ValueError(
            f"this U-Net has {net.config.in_channels} input channels for {latent} of the latents; allowed: "
            f"{allowed}; load_nets gives its networks"
        )
    return _system(found, kinds[spare])


@ASSEMBLIES("ldm-semantic-compvis")
def _semantic(found: Foreign) -> System:
    """Pictures of a map of classes."""
    return _system(found, _Task("semantic synthesis", (SemanticConfig(),), betas=(0.0015, 0.0205)))


@ASSEMBLIES("ldm-class-compvis")
def _classes(found: Foreign) -> System:
    """ImageNet; with a null class as its notebook draws, without one as its FID was measured."""
    label = found.nets["label"]
    assert isinstance(label, ClassToken)
    null = label.config.rows == IMAGENET + 1
    told = LabelConfig(num_classes=label.config.rows - null, null=null, encoder="label")
    guided = _Task("class-conditional", (told,), steps=20, guidance=3.0)
    return _system(found, guided if null else _Task("class-conditional", (told,), eta=1.0))


@ASSEMBLIES("ldm-text-compvis")
def _text(found: Foreign) -> System:
    """Text to image, or a layout of boxes. Raises: ValueError if the vocabulary is missing."""
    text = found.nets["text"]
    if isinstance(text, TextTransformer) and text.config.context == BOXES:
        return _system(found, _Task("layout to image", (BoxesConfig(),), betas=(0.0015, 0.0205)))
    if "tokenizer" not in found.tokenizers:
        raise ValueError(
            "there is no vocabulary of BERT; copy vocab.txt of bert-base-uncased beside the file, or into a "
            "folder 'tokenizer' there"
        )
    told = TokenTextConfig(tokenizer="tokenizer", encoder="text")
    vae = found.nets["vae"]
    assert isinstance(vae, Autoencoder)
    betas = (0.00085, 0.012) if vae.config.kind == "kl" else (0.0015, 0.0195)
    return _system(found, _Task("text to image", (told,), steps=50, guidance=5.0, betas=betas))


def _system(found: Foreign, task: _Task) -> System:
    """Raises: ValueError if the networks do not belong together."""
    net, vae, text = found.nets["net"], found.nets["vae"], found.nets.get("text", found.nets.get("label"))
    assert isinstance(net, UNet)
    assert isinstance(vae, Autoencoder)
    width = text.config.width if isinstance(text, TextTransformer | ClassToken) else 0
    if (net.config.out_channels, net.config.token_dim) != (vae.config.embed_dim, width):
        raise ValueError(
            f"the U-Net draws {net.config.out_channels} channels and reads tokens of {net.config.token_dim}, "
            f"the others have {vae.config.embed_dim} and {width}; they do not belong together"
        )
    told = found.extras.get("scheduler") or dict(zip(("beta_start", "beta_end"), task.betas, strict=True))
    told = told if "_class_name" in told else {**SCHEDULER, **told}  # of a folder, or of a file's own table
    sampling = sampling_of(told, steps=task.steps, guidance=CFG(task.guidance))
    side = found.settings["net"].get("sample_size") or SIDE // vae.config.factor
    assert isinstance(side, int)
    # Latents before quantization are taken as they are, and diffusers' super-resolution scales none.
    usual = {"scaling_factor": 1.0} if vae.config.kind == "vq" else {}
    enlarges = any(isinstance(c, LowResConfig) for c in task.conditioners)
    own = {} if enlarges else found.settings["vae"]
    stage = StageConfig(
        net="net",
        schedule=sampling.schedule,
        parameterization=sampling.parameterization,
        conditioners=task.conditioners,
        codec=latents_of({**usual, **own, **found.extras.get("vae", {})}),
        shape=(vae.config.embed_dim, side, side),
        defaults=replace(sampling.defaults, knobs={"eta": task.eta} if task.eta else {}),
    )
    about = About(name=f"Latent diffusion, {task.name}", summary="Read from files of another program.")
    return assemble(
        SystemConfig(stages=(stage,)), Parts(dict(found.nets), dict(found.tokenizers)), about=about
    )
