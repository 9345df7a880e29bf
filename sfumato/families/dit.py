"""DiT and SiT as systems: one stage that is told a class and works on latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sfumato.checkpoints.foreign import Foreign
from sfumato.checkpoints.native import Parts
from sfumato.core.registry import unknown
from sfumato.diffusion.guidance import CFG
from sfumato.diffusion.schedules import Discrete, Flow
from sfumato.families.assembly import ASSEMBLIES, PUBLICATIONS, Publication, latents_of
from sfumato.families.schedulers import Sampling, ddim_config, sampling_of
from sfumato.nets.autoencoder import Autoencoder
from sfumato.nets.dit import DiT
from sfumato.systems.conditioning import LabelConfig
from sfumato.systems.config import About, CodecConfig, LatentsConfig, PixelsConfig, StageConfig, SystemConfig
from sfumato.systems.options import SampleOptions
from sfumato.systems.system import System, assemble

__all__ = ["dit_system"]

ANCESTRAL = SampleOptions(sampler="ddpm", steps=250, spacing="respaced", guidance=CFG(4.0, channels=3))
STRAIGHT = SampleOptions(
    sampler="flow_sde",
    knobs={"last_step": "mean"},
    steps=250,
    spacing="linspace",
    spacing_knobs={"last": 0.04},
    guidance=CFG(4.0, channels=3),
)


@ASSEMBLIES("dit")
def _dit(found: Foreign) -> System:
    """250 ancestral steps, guidance 4 on three of four channels: the reference's sample.py."""
    return dit_system(found, Sampling(Discrete(), "eps", ANCESTRAL), "DiT")


@ASSEMBLIES("sit")
def _sit(found: Foreign) -> System:
    """The SDE with the last step from 0.04, guidance 4."""
    return dit_system(found, Sampling(Flow(towards_data=True), "velocity", STRAIGHT), "SiT")


@ASSEMBLIES("dit-diffusers")
def _diffusers(found: Foreign) -> System:
    """50 steps of the folder's scheduler, guidance 4 on all channels: DiTPipeline."""
    sampling = sampling_of(found.extras.get("scheduler", {"clip_sample": False}), steps=50, guidance=CFG(4.0))
    return dit_system(found, sampling, "DiT (diffusers)")


def dit_system(found: Foreign, sampling: Sampling, name: str) -> System:
    """A system of a DiT and, if there is one, its first stage; without it the stage emits its latent.

    Raises: ValueError if the latents of the two differ, or the DiT is told more than a class.
    """
    net, vae = found.nets["net"], found.nets.get("vae")
    assert isinstance(net, DiT)
    c, settings = net.config, found.settings["net"]
    size = settings.get("input_size", settings.get("sample_size", 32))
    assert isinstance(size, int)
    codec: CodecConfig = PixelsConfig()
    if vae is not None:
        assert isinstance(vae, Autoencoder)
        if vae.config.embed_dim != c.in_channels:
            raise ValueError(
                f"the first stage has {vae.config.embed_dim} latent channels, the DiT {c.in_channels}; "
                "they do not belong together"
            )
        codec = latents_of(found.settings["vae"])
    labels = (
        () if c.num_classes is None else (LabelConfig(num_classes=c.num_classes, names=_names(found.extras)),)
    )
    stage = StageConfig(
        net="net",
        schedule=sampling.schedule,
        parameterization=sampling.parameterization,
        learned_var=c.out_channels == 2 * c.in_channels,
        conditioners=labels,
        codec=codec,
        shape=(c.in_channels, size, size),
        emits="latent" if vae is None else "image",
        defaults=sampling.defaults if c.null_label else replace(sampling.defaults, guidance=CFG()),
    )
    summary = f"Read from a file of another program; {c.convention} convention."
    return assemble(SystemConfig(stages=(stage,)), Parts(found.nets), about=About(name=name, summary=summary))


def _names(extras: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of the classes from a pipeline's id2label, () if it has none."""
    table = extras.get("", {}).get("id2label") or {}
    return tuple(str(table.get(str(i), i)) for i in range(len(table)))


@PUBLICATIONS("dit")
@PUBLICATIONS("sit")
def _file(system: System) -> Publication:
    stage = _stage(system)
    return Publication({stage.net: (_layout(stage), "")}, {stage.net: {"input_size": stage.shape[1]}}, {}, {})


@PUBLICATIONS("dit-diffusers")
def _pipeline(system: System) -> Publication:
    """What DiTPipeline reads."""
    stage = _stage(system)
    parts, extra = {stage.net: ("dit-diffusers", "transformer")}, {stage.net: {"sample_size": stage.shape[1]}}
    codec = stage.codec
    if not isinstance(codec, LatentsConfig) or len(codec.std) > 1 or len(codec.mean) > 1:
        raise ValueError("DiTPipeline needs a first stage with one scale; save this as a sfumato system")
    parts[codec.autoencoder] = ("vae-diffusers", "vae")
    told: dict[str, Any] = {"scaling_factor": 1 / codec.std[0], "shift_factor": codec.mean[0] or None}
    names = next((label.names for label in stage.conditioners if isinstance(label, LabelConfig)), ())
    return Publication(
        parts,
        {**extra, codec.autoencoder: told},
        {
            "_class_name": "DiTPipeline",
            "scheduler": ["diffusers", "DDIMScheduler"],
            **({"id2label": {str(i): name for i, name in enumerate(names)}} if names else {}),
        },
        {"scheduler/scheduler_config.json": ddim_config(stage)},
    )


def _layout(stage: StageConfig) -> str:
    kinds = {"eps": "dit", "velocity": "sit"}
    if stage.parameterization not in kinds:
        raise ValueError(unknown("parameterization in this layout", stage.parameterization, list(kinds)))
    return kinds[stage.parameterization]


def _stage(system: System) -> StageConfig:
    if len(system.config.stages) != 1:
        raise ValueError(f"the layout holds one stage, and this system has {len(system.config.stages)}")
    return system.config.stages[0]
