"""Systems of Stable Diffusion whose U-Net reads more than text: what it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from sfumato.checkpoints.foreign import Foreign
from sfumato.checkpoints.native import Parts
from sfumato.diffusion.guidance import CFG, InstructPix2Pix
from sfumato.diffusion.schedules import Discrete, ScheduleConfig
from sfumato.families.assembly import Publication, latents_of
from sfumato.families.schedulers import Sampling, ddim_config, sampling_of
from sfumato.nets.autoencoder import Autoencoder
from sfumato.nets.clip import PIXEL_MEAN, PIXEL_STD, CLIPVision
from sfumato.nets.unet import UNet
from sfumato.systems.conditioning import (
    ClipImageConfig,
    ConditionerConfig,
    DepthConfig,
    EditConfig,
    InpaintConfig,
    LowResConfig,
)
from sfumato.systems.config import About, StageConfig, SystemConfig
from sfumato.systems.system import System, assemble

__all__ = ["UPSCALER", "Told", "extended", "told_of", "variations"]

PIPELINES: Mapping[type, str] = {
    InpaintConfig: "StableDiffusionInpaintPipeline",
    EditConfig: "StableDiffusionInstructPix2PixPipeline",
    DepthConfig: "StableDiffusionDepth2ImgPipeline",
    LowResConfig: "StableDiffusionUpscalePipeline",
    ClipImageConfig: "StableUnCLIPImg2ImgPipeline",
}
"""What a system is told besides text -> the class of diffusers that does so, too."""
ABSENT: Mapping[type, tuple[str, ...]] = {
    InpaintConfig: ("safety_checker", "feature_extractor"),
    EditConfig: ("safety_checker", "feature_extractor"),
    DepthConfig: ("depth_estimator", "feature_extractor"),
    LowResConfig: ("safety_checker", "feature_extractor", "watermarker"),
}
"""Parts of those classes that a system does without."""
VERSION = "0.9.0"  # of diffusers; a folder without one is taken for older, and its sizes are not believed
PREPARED: Mapping[str, object] = {
    "image_processor_type": "CLIPImageProcessor",
    "image_mean": PIXEL_MEAN,
    "image_std": PIXEL_STD,
}
UPSCALER = {"beta_schedule": "scaled_linear", "beta_start": 1e-4, "beta_end": 0.02}
NOISE_LEVEL = 20  # of the picture that the x4 upscaler is given, unless it is said otherwise


@dataclass(frozen=True)
class Told:
    """What a U-Net reads besides x_t, t and text.

    Attributes:
        conditioners: what makes it of the inputs.
        steps, guidance: the usual ones of the pipeline; None = those of text to image.
    """

    conditioners: tuple[ConditionerConfig, ...] = ()
    steps: int | None = None
    guidance: CFG | InstructPix2Pix | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks that the conditioners read."""
        clip = [c for c in self.conditioners if isinstance(c, ClipImageConfig)]
        return tuple(name for c in clip for name in (c.encoder, c.moments) if name)

    def walk(self, sampling: Sampling) -> Sampling:
        """The sampling with these steps and this guidance."""
        defaults = replace(
            sampling.defaults,
            steps=self.steps or sampling.defaults.steps,
            guidance=self.guidance or sampling.defaults.guidance,
        )
        return replace(sampling, defaults=defaults)


def told_of(found: Foreign, net: UNet, vae: Autoencoder) -> Told | None:
    """By the channels beyond the latents' and the fields of the embedding; None if no system is told so."""
    latent = vae.config.embed_dim
    spare = net.config.in_channels - latent
    fields = tuple(sorted(f.field for e in net.config.embedding.extras for f in e.features))
    kinds: dict[tuple[int, tuple[str, ...]], Told] = {
        (0, ()): Told(),
        (1, ()): Told((DepthConfig(),)),
        (latent, ()): Told((EditConfig(),), 100, InstructPix2Pix()),
        (latent + 1, ()): Told((InpaintConfig(),)),
    }
    if (spare, fields) == (3, ("aug",)):
        schedule = _schedule(found, "low_res_scheduler", UPSCALER)
        return Told((LowResConfig(factor=1, schedule=schedule, aug=NOISE_LEVEL),), 75, CFG(9.0))
    if (spare, fields) == (0, ("aug", "image_embed")) and "image_encoder" in found.nets:
        moments = "image_normalizer" if "image_normalizer" in found.nets else ""
        schedule = _schedule(found, "image_noising_scheduler", {"beta_schedule": "squaredcos_cap_v2"})
        return Told((ClipImageConfig(moments=moments, schedule=schedule),), 20, CFG(10.0))
    return kinds.get((spare, fields))


def variations(found: Foreign, sampling: Sampling) -> System:
    """A system that is told a picture in place of a text: Stable Diffusion image variations.

    Raises: ValueError if the networks do not belong together.
    """
    net, vae, tower = (found.nets.get(name) for name in ("net", "vae", "image_encoder"))
    if not (isinstance(net, UNet) and isinstance(vae, Autoencoder) and isinstance(tower, CLIPVision)):
        raise ValueError("image variations need net, vae and image_encoder; give the whole pipeline folder")
    if (net.config.in_channels, net.config.token_dim) != (vae.config.embed_dim, tower.config.embed):
        raise ValueError(
            f"the U-Net reads {net.config.in_channels} channels and tokens of {net.config.token_dim}, the "
            f"others give {vae.config.embed_dim} and {tower.config.embed}; they do not belong together"
        )
    size = found.settings["net"].get("sample_size") or 64
    assert isinstance(size, int)
    stage = StageConfig(
        net="net",
        schedule=sampling.schedule,
        parameterization=sampling.parameterization,
        conditioners=(ClipImageConfig(),),
        codec=latents_of(found.settings["vae"]),
        shape=(vae.config.embed_dim, size, size),
        defaults=sampling.defaults,
    )
    about = About(name="Stable Diffusion image variations", summary="Read from a folder of diffusers.")
    return assemble(SystemConfig(stages=(stage,)), Parts(dict(found.nets), {}), about=about)


def extended(system: System, plain: Callable[[System], Publication]) -> Publication | None:
    """How a system that is told more than text is written; None if it is not.

    Args:
        plain: how the same is written without the rest.
    """
    stage = system.config.stages[0]
    rest = [c for c in stage.conditioners if type(c) in PIPELINES]
    if len(rest) != 1:
        return None
    (told,) = rest
    bare = replace(stage, conditioners=tuple(c for c in stage.conditioners if c is not told))
    plan = plain(replace(system, config=SystemConfig(stages=(bare, *system.config.stages[1:]))))
    index = {k: v for k, v in plan.index.items() if v != [None, None] and k != "requires_safety_checker"}
    index |= {"_class_name": PIPELINES[type(told)], "_diffusers_version": VERSION}
    index |= {name: [None, None] for name in ABSENT.get(type(told), ())}
    parts, extras = dict(plan.parts), dict(plan.extras)
    if isinstance(told, LowResConfig | ClipImageConfig) and told.schedule is not None:
        name = "low_res_scheduler" if isinstance(told, LowResConfig) else "image_noising_scheduler"
        config = ddim_config(replace(stage, schedule=told.schedule, parameterization="eps"))
        extras[f"{name}/scheduler_config.json"] = {**config, "_class_name": "DDPMScheduler"}
        index[name] = ["diffusers", "DDPMScheduler"]
    if isinstance(told, ClipImageConfig):
        parts[told.encoder] = ("clip-vision", "image_encoder")
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
        tower = system.parts.nets[told.encoder]
        assert isinstance(tower, CLIPVision)
        side = {"size": {"shortest_edge": tower.config.side}, "crop_size": tower.config.side}
        extras["feature_extractor/preprocessor_config.json"] = {**PREPARED, **side}
        if told.moments:
            parts[told.moments] = ("clip-moments", "image_normalizer")
    return replace(plan, index=index, parts=parts, extras=extras)


def _schedule(found: Foreign, name: str, usual: Mapping[str, object]) -> ScheduleConfig:
    config = {"_class_name": "DDPMScheduler", **(found.extras.get(name) or usual)}
    schedule = sampling_of(config, steps=1, guidance=CFG()).schedule
    assert isinstance(schedule, Discrete)
    return schedule
