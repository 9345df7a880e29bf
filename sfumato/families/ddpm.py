"""Pipelines of diffusers with a UNet2DModel: DDPMPipeline, DDIMPipeline, and those of latent diffusion."""

from __future__ import annotations

from typing import Any

from sfumato.checkpoints.foreign import Foreign
from sfumato.checkpoints.native import Parts
from sfumato.diffusion.guidance import CFG
from sfumato.families.assembly import ASSEMBLIES
from sfumato.families.latent_2021 import pictures
from sfumato.families.schedulers import sampling_of
from sfumato.nets.unet import UNet
from sfumato.systems.conditioning import LabelConfig
from sfumato.systems.config import About, StageConfig, SystemConfig
from sfumato.systems.system import System, assemble

__all__: list[str] = []  # everything is reached through ASSEMBLIES

STEPS = {"DDPMScheduler": 1000}  # what the pipelines draw with, and 50 with any other scheduler


@ASSEMBLIES("unet2d-diffusers")
def _ddpm(found: Foreign) -> System:
    """The pipeline's walk: every step of DDPM, or 50 of another scheduler; with a first stage, on latents."""
    if "vae" in found.nets:
        return pictures(found)
    net, settings = found.nets["net"], found.settings["net"]
    assert isinstance(net, UNet)
    told = found.extras.get("scheduler", {"_class_name": "DDPMScheduler"})
    steps = min(STEPS.get(str(told.get("_class_name")), 50), int(told.get("num_train_timesteps", 1000)))
    sampling = sampling_of(told, steps=steps, guidance=CFG())
    learned = told.get("variance_type") == "learned_range"
    c, size = net.config, settings.get("sample_size")
    if size is None or c.out_channels != c.in_channels * (1 + learned):
        raise ValueError(
            f"this U-Net has {c.in_channels} input and {c.out_channels} output channels, size {size}; a "
            "system draws what it reads in a known size; load_nets gives the network"
        )
    classes: Any = settings["num_class_embeds"]
    side: Any = size
    height, width = side if isinstance(side, list | tuple) else (side, side)
    stage = StageConfig(
        net="net",
        schedule=sampling.schedule,
        parameterization=sampling.parameterization,
        learned_var=learned,
        conditioners=(LabelConfig(num_classes=classes, null=False),) if classes else (),
        shape=(c.in_channels, height, width),
        defaults=sampling.defaults,
    )
    about = About(name="DDPM", summary="Read from a folder of diffusers.")
    return assemble(SystemConfig(stages=(stage,)), Parts({"net": net}), about=about)
