"""Pipelines of diffusers that draw pixels with a UNet2DModel: DDPMPipeline and DDIMPipeline."""

from __future__ import annotations

from typing import Any

from sfumato.checkpoints.foreign import Foreign
from sfumato.checkpoints.native import Parts
from sfumato.diffusion.guidance import CFG
from sfumato.families.assembly import ASSEMBLIES, PUBLICATIONS, Publication
from sfumato.families.schedulers import ddim_config, sampling_of
from sfumato.nets.unet import UNet
from sfumato.systems.conditioning import LabelConfig
from sfumato.systems.config import About, StageConfig, SystemConfig
from sfumato.systems.system import System, assemble

__all__: list[str] = []  # everything is reached through ASSEMBLIES and PUBLICATIONS

STEPS = {"DDPMScheduler": 1000}  # what the pipelines draw with, and 50 with any other scheduler


@ASSEMBLIES("unet2d-diffusers")
def _ddpm(found: Foreign) -> System:
    """The pipeline's walk: every step of DDPM, or 50 of another scheduler."""
    net, settings = found.nets["net"], found.settings["net"]
    assert isinstance(net, UNet)
    told = found.extras.get("scheduler", {"_class_name": "DDPMScheduler"})
    steps = min(STEPS.get(str(told.get("_class_name")), 50), int(told.get("num_train_timesteps", 1000)))
    sampling = sampling_of(told, steps=steps, guidance=CFG())
    learned = told.get("variance_type") == "learned_range"
    c, size = net.config, settings.get("sample_size")
    if size is None or c.out_channels != c.in_channels * (1 + learned):
        raise ValueError(
            f"this U-Net has {c.in_channels} input and {c.out_channels} output channels and sample_size {size}; "
            "a system draws pictures of its input channels in a known size; load_nets gives the network"
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


@PUBLICATIONS("unet2d-diffusers")
def _pipeline(system: System) -> Publication:
    """What DDPMPipeline, or DDIMPipeline, reads."""
    stage = system.config.stages[0]
    if len(system.config.stages) != 1 or stage.guide is not None or stage.codec.kind != "pixels":
        raise ValueError(
            "a DDPMPipeline holds one stage on pixels and no guide; save this as a sfumato system"
        )
    kind = "DDPM" if stage.defaults.sampler == "ddpm" else "DDIM"
    scheduler = {**ddim_config(stage), "_class_name": f"{kind}Scheduler"}
    if kind == "DDPM":
        fixed = stage.defaults.knobs.get("variance", "small")
        scheduler["variance_type"] = "learned_range" if stage.learned_var else f"fixed_{fixed}"
    return Publication(
        {stage.net: ("unet2d-diffusers", "unet")},
        {stage.net: {"sample_size": stage.shape[1]}},
        {"_class_name": f"{kind}Pipeline", "scheduler": ["diffusers", f"{kind}Scheduler"]},
        {"scheduler/scheduler_config.json": scheduler},
    )
