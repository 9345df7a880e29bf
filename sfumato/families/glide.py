"""GLIDE's files as systems: base, upsampler, and those that fill holes; `sfumato.cascade` joins them."""

from __future__ import annotations

from dataclasses import replace

from sfumato.checkpoints.foreign import Foreign
from sfumato.checkpoints.native import Parts
from sfumato.diffusion.guidance import CFG
from sfumato.families.adm import diffusion_of, picture_channels, side_of, size_ratio
from sfumato.families.assembly import ASSEMBLIES
from sfumato.nets.unet import UNet
from sfumato.systems.conditioning import ConditionerConfig, InpaintConfig, LowResConfig, TokenTextConfig
from sfumato.systems.config import About, StageConfig, SystemConfig
from sfumato.systems.options import SampleOptions
from sfumato.systems.start import Fill, FromNoise
from sfumato.systems.system import System, assemble

__all__: list[str] = []  # everything is reached through ASSEMBLIES

KINDS = {(1, 0): False, (2, 1): False, (2, 0): True, (3, 1): True}
"""Pictures and masks that a net reads -> whether one of them is of low resolution."""
TEMPERATURE = 0.997  # of the upsampler's first noise: 1 is sharper, with grain
GUIDANCE, GUIDANCE_OF_HOLES = CFG(3.0), CFG(5.0)


@ASSEMBLIES("glide")
def _glide(found: Foreign) -> System:
    """As the published notebooks draw: 100 steps with guidance, then 27 of DDIM without it.

    Raises: ValueError in one line if the vocabulary is missing, or the net is of another kind.
    """
    net, settings = found.nets["net"], found.settings["net"]
    assert isinstance(net, UNet)
    if "tokenizer" not in found.tokenizers:
        raise ValueError(
            "GLIDE's vocabulary is missing; copy encoder.json and vocab.bpe beside the file, give "
            "config={'tokenizer': their folder}, or install the package glide_text2im"
        )
    channels = picture_channels(net.config.in_channels, net.config.out_channels)
    pictures, fills = divmod(net.config.in_channels, channels)
    if (pictures, fills) not in KINDS:
        raise ValueError(
            f"this U-Net reads {net.config.in_channels} channels and draws {channels}; a GLIDE system reads "
            "a picture, and more: a masked one with its mask, a low-resolution one, or both"
        )
    enlarges = KINDS[pictures, fills]
    side = side_of(settings)
    told: list[ConditionerConfig] = [TokenTextConfig(tokenizer="tokenizer", encoder="text")]
    if fills:
        told.append(InpaintConfig(mask_first=False, marks_known=True))
    if enlarges:
        told.append(LowResConfig(factor=size_ratio(settings), rounded=True))
    learned = net.config.out_channels == 2 * channels
    sampling = diffusion_of(settings, learned=learned, guidance=CFG())
    kind = ("base", "upsampler")[enlarges]
    stage = StageConfig(
        name=kind,
        net="net",
        schedule=sampling.schedule,
        parameterization=sampling.parameterization,
        learned_var=learned,
        conditioners=tuple(told),
        shape=(channels, side, side),
        defaults=_defaults(sampling.defaults, enlarges=enlarges, fills=bool(fills)),
    )
    about = About(name=f"GLIDE {kind}", summary=f"Read from a file of GLIDE{', for holes' if fills else ''}.")
    parts = Parts({name: found.nets[name] for name in ("net", "text")}, dict(found.tokenizers))
    return assemble(SystemConfig(stages=(stage,)), parts, about=about)


def _defaults(options: SampleOptions, *, enlarges: bool, fills: bool) -> SampleOptions:
    """What the notebooks add to the flags: the start, guidance of the base, DDIM of the plain upsampler."""
    temperature = TEMPERATURE if enlarges else 1.0
    start = Fill(temperature) if fills else FromNoise(temperature=temperature)
    if enlarges:
        options = options if fills else replace(options, sampler="ddim", knobs={})
        return replace(options, start=start)
    return replace(options, start=start, guidance=GUIDANCE_OF_HOLES if fills else GUIDANCE)
