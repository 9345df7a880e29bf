"""DeepFloyd IF as systems: the first stage draws, the second enlarges, and `sfumato.cascade` joins them."""

from __future__ import annotations

from dataclasses import replace

from sfumato.checkpoints.foreign import Foreign
from sfumato.checkpoints.native import Parts
from sfumato.diffusion.guidance import CFG
from sfumato.diffusion.schedules import Discrete
from sfumato.families.assembly import ASSEMBLIES
from sfumato.families.schedulers import Sampling, sampling_of
from sfumato.nets.t5 import T5Encoder
from sfumato.nets.unet import UNet
from sfumato.systems.conditioning import ConditionerConfig, LowResConfig, TokenTextConfig
from sfumato.systems.config import About, StageConfig, SystemConfig
from sfumato.systems.system import System, assemble
from sfumato.text.t5 import tidy

__all__: list[str] = []  # everything is reached through ASSEMBLIES

FACTOR = 4  # by which the second stage enlarges
AUG = 250  # the step up to which its low-resolution picture is noised
SIDES = 64, 256  # of the published stages
# By stage: what diffusers' pipelines draw with, and what the original code does.
STEPS, GUIDANCE = (100, 50), (CFG(7.0), CFG(4.0))
SECTIONS = "150", "10,6,4,3,2,2,3,4,6,10"
LIMITS = 1.5, 1.0
SCHEDULER = {
    "_class_name": "DDPMScheduler",
    "beta_schedule": "squaredcos_cap_v2",
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.95,
}


@ASSEMBLIES("deepfloyd-diffusers")
def _folder(found: Foreign) -> System:
    """A pipeline folder of diffusers."""
    stage = _enlarges(found)
    sampling = sampling_of(found.extras.get("scheduler", {}), steps=STEPS[stage], guidance=GUIDANCE[stage])
    noising = sampling_of(found.extras.get("image_noising_scheduler", SCHEDULER), steps=1, guidance=CFG())
    return _system(found, sampling, noising.schedule, "Read from a folder of diffusers.")


@ASSEMBLIES("deepfloyd")
def _file(found: Foreign) -> System:
    """A file of the original code, with its respaced steps."""
    stage, schedule = _enlarges(found), Discrete(formula="cosine")
    scheduler = {**SCHEDULER, "sample_max_value": LIMITS[stage]}
    sampling = sampling_of(
        scheduler, steps=sum(map(int, SECTIONS[stage].split(","))), guidance=GUIDANCE[stage]
    )
    defaults = replace(
        sampling.defaults, spacing="respaced", spacing_knobs={"sections": SECTIONS[stage]} if stage else {}
    )
    return _system(found, replace(sampling, defaults=defaults), schedule, "Read from a file of DeepFloyd IF.")


def _enlarges(found: Foreign) -> bool:
    net = found.nets["net"]
    assert isinstance(net, UNet)
    return any(f.field == "aug" for e in net.config.embedding.extras for f in e.features)


def _system(found: Foreign, sampling: Sampling, noising: object, summary: str) -> System:
    """One stage of a U-Net, T5 and its tokenizer. Raises: ValueError if a part is missing or does not fit."""
    net, text, stage = found.nets["net"], found.nets.get("text_encoder"), _enlarges(found)
    assert isinstance(net, UNet)
    assert isinstance(noising, Discrete)
    if not isinstance(text, T5Encoder) or "tokenizer" not in found.tokenizers:
        raise ValueError(
            "IF reads texts with T5, and its encoder or tokenizer is missing; give the folder that holds "
            "both as text=..., or load_nets for the network alone"
        )
    dim = net.config.tokens.dim if net.config.tokens else 0
    if text.config.width != dim:
        raise ValueError(
            f"T5 has width {text.config.width}, the U-Net reads {dim}: they do not belong together"
        )
    channels = net.config.in_channels // (2 if stage else 1)
    side = found.settings["net"].get("sample_size") or found.settings["net"].get("image_size") or SIDES[stage]
    assert isinstance(side, int)
    told: list[ConditionerConfig] = [TokenTextConfig(tokenizer="tokenizer", encoder="text_encoder")]
    if stage:
        told.append(LowResConfig(factor=FACTOR, schedule=noising, aug=AUG, align=True))
    config = StageConfig(
        name=("base", "upsampler")[stage],
        net="net",
        schedule=sampling.schedule,
        parameterization=sampling.parameterization,
        learned_var=net.config.out_channels == 2 * channels,
        conditioners=tuple(told),
        shape=(channels, side, side),
        defaults=sampling.defaults,
    )
    parts = Parts({"net": net, "text_encoder": text}, {"tokenizer": tidy(found.tokenizers["tokenizer"])})
    about = About(name=f"DeepFloyd IF {'I' * (1 + stage)}", summary=summary)
    return assemble(SystemConfig(stages=(config,)), parts, about=about)
