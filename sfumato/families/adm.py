"""guided-diffusion's and improved-diffusion's files as systems: what draws, and what enlarges."""

from __future__ import annotations

from typing import Any

from sfumato.checkpoints.foreign import Foreign
from sfumato.checkpoints.layouts.layout import Settings
from sfumato.checkpoints.native import Parts
from sfumato.core.registry import unknown
from sfumato.diffusion.betas import FORMULAS
from sfumato.diffusion.constraints import Static
from sfumato.diffusion.guidance import CFG, Guidance
from sfumato.diffusion.schedules import Discrete
from sfumato.diffusion.spacings import respaced_indices
from sfumato.families.assembly import ASSEMBLIES
from sfumato.families.schedulers import Sampling
from sfumato.nets.unet import UNet
from sfumato.systems.conditioning import ConditionerConfig, LabelConfig, LowResConfig
from sfumato.systems.config import About, StageConfig, SystemConfig
from sfumato.systems.options import SampleOptions
from sfumato.systems.system import System, assemble

__all__ = ["diffusion_of", "picture_channels", "side_of", "size_ratio"]

LEGACY = {"squaredcos_cap_v2": "cosine"}
"""Schedules that GLIDE calls otherwise; all else has the names of our formulas."""


@ASSEMBLIES("adm")
def _adm(found: Foreign) -> System:
    """The ancestral walk of the file's settings, by default through every step: the reference's scripts."""
    net, settings = found.nets["net"], found.settings["net"]
    assert isinstance(net, UNet)
    c = net.config
    channels = picture_channels(c.in_channels, c.out_channels)
    enlarges = c.in_channels == 2 * channels
    if not enlarges and c.in_channels != channels:
        raise ValueError(
            f"this U-Net has {c.in_channels} input and {c.out_channels} output channels; a system is a "
            "denoiser of pictures or an upsampler; load_nets gives the network"
        )
    classes: Any = settings["num_classes"]
    labels: tuple[ConditionerConfig, ...] = (LabelConfig(num_classes=classes, null=False),) if classes else ()
    learned = c.out_channels == 2 * channels
    sampling = diffusion_of(settings, learned=learned, guidance=CFG())
    side = side_of(settings)
    stage = StageConfig(
        name="upsampler" if enlarges else "base",
        net="net",
        schedule=sampling.schedule,
        parameterization=sampling.parameterization,
        learned_var=learned,
        conditioners=(*labels, *((LowResConfig(factor=size_ratio(settings)),) if enlarges else ())),
        shape=(channels, side, side),
        defaults=sampling.defaults,
    )
    about = About(
        name="ADM upsampler" if enlarges else "ADM", summary="Read from a file of guided-diffusion."
    )
    return assemble(SystemConfig(stages=(stage,)), Parts({"net": net}), about=about)


def picture_channels(inputs: int, outputs: int) -> int:
    """Channels of a picture, where the file's first layer may read more and its last one tell a variance."""
    half, odd = divmod(outputs, 2)
    return outputs if odd or inputs % half > 1 else half


def side_of(settings: Settings) -> int:
    """Side of the pictures. Raises: ValueError if it is not known."""
    side = settings["image_size"]
    if not isinstance(side, int):
        raise ValueError(
            "no tensor tells the size of the pictures: give config={'image_size': ...}, or the file the name "
            "under which it was published"
        )
    return side


def size_ratio(settings: Settings) -> int:
    """How many times larger an upsampler makes a picture; 4 if small_size is not known.

    Raises: ValueError if the sizes are no multiples.
    """
    large, small = side_of(settings), settings["small_size"]
    if small is None:
        return 4
    if not isinstance(small, int) or large % small:
        raise ValueError(f"small_size is {small!r}, and image_size (large_size) {large} no multiple of it")
    return large // small


def diffusion_of(settings: Settings, *, learned: bool, guidance: Guidance) -> Sampling:
    """What the flags of the reference's create_gaussian_diffusion and of its sampling scripts say.

    Raises: ValueError in one line if the noise schedule is not known.
    """
    s: Any = settings
    name = s["noise_schedule"]
    if name is None:
        raise ValueError(
            "no tensor tells the noise schedule: give config={'noise_schedule': 'linear' or 'cosine'}, or "
            "the file the name under which it was published"
        )
    formula = LEGACY.get(name, name)
    if formula not in FORMULAS:
        raise ValueError(unknown("noise_schedule", name, [*FORMULAS, *LEGACY]))
    schedule = Discrete(formula=formula, steps=s["diffusion_steps"], rescale_timesteps=s["rescale_timesteps"])
    respacing = s["timestep_respacing"] or schedule.steps
    sections = ",".join(map(str, respacing)) if isinstance(respacing, list | tuple) else str(respacing)
    fixed = {} if learned or s["use_ddim"] else {"variance": "small" if s["sigma_small"] else "large"}
    return Sampling(
        schedule,
        "x0" if s["predict_xstart"] else "eps",
        SampleOptions(
            sampler="ddim" if s["use_ddim"] else "ddpm",
            knobs=fixed,
            steps=len(respaced_indices(schedule.steps, sections)),
            spacing="respaced",
            spacing_knobs={} if sections.isdecimal() else {"sections": sections},
            guidance=guidance,
            threshold=Static() if s["clip_denoised"] else None,
        ),
    )
