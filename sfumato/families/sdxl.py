"""Stable Diffusion XL as a system: two text towers, sizes and crops, and a refiner for the last steps."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from sfumato.checkpoints.foreign import Foreign
from sfumato.checkpoints.native import Parts
from sfumato.diffusion.guidance import CFG
from sfumato.families.assembly import ASSEMBLIES, latents_of, needed
from sfumato.families.schedulers import Sampling, sampling_of
from sfumato.nets.autoencoder import Autoencoder
from sfumato.nets.clip import CLIPText
from sfumato.nets.unet import UNet
from sfumato.systems.conditioning import ClipTextConfig, SizesConfig, TowerConfig
from sfumato.systems.config import About, StageConfig, SystemConfig
from sfumato.systems.start import Continue, FromImage
from sfumato.systems.system import System, assemble

__all__ = ["is_sdxl", "refined", "sdxl_system"]

STEPS, GUIDANCE = 50, CFG(5.0)
SCALE = 0.13025  # of the latents of its first stage
HANDED_ON = 0.8  # of the walk, after which the refiner goes on
# The sampler of the published folders, for single files.
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def is_sdxl(net: nn.Module) -> bool:
    """Whether a U-Net is told sizes, as SDXL's are."""
    extras = net.config.embedding.extras if isinstance(net, UNet) else ()
    return any(f.field == "micro" for e in extras for f in e.features)


@ASSEMBLIES("sdxl-compvis")
@ASSEMBLIES("sdxl-refiner-compvis")
def _file(found: Foreign) -> System:
    """A single file, which predicts the noise unless it is said or marked otherwise."""
    told = found.settings["net"]
    config = {**SCHEDULER, "rescale_betas_zero_snr": bool(told["zero_snr"])}
    sampling = sampling_of(config, steps=STEPS, guidance=GUIDANCE)
    sampling = replace(sampling, parameterization=str(told["parameterization"] or "eps"))
    settings = {**found.settings, "vae": {"scaling_factor": SCALE, "force_upcast": True}}
    return sdxl_system(replace(found, settings=settings), sampling, "Read from a single file.")


def sdxl_system(found: Foreign, sampling: Sampling, summary: str) -> System:
    """A system of SDXL's base (towers text_encoder and text_encoder_2) or refiner (text_encoder_2 alone).

    Raises: ValueError if a part is missing, or the parts do not fit each other.
    """
    names = [n for n in ("text_encoder", "text_encoder_2") if n in found.nets or n == "text_encoder_2"]
    net, vae, *encoders = needed(found, "net", "vae", *names)
    assert isinstance(net, UNet)
    assert isinstance(vae, Autoencoder)
    micro = next(f for e in net.config.embedding.extras for f in e.features if f.field == "micro")
    widths = [e.config.width for e in encoders if isinstance(e, CLIPText)]
    if net.config.in_channels != vae.config.embed_dim or sum(widths) != net.config.token_dim:
        raise ValueError(
            f"this U-Net has {net.config.in_channels} input channels and reads tokens of width "
            f"{net.config.token_dim}, the first stage has {vae.config.embed_dim} and the towers {widths}; "
            "they make no system of SDXL"
        )
    side = found.settings["net"].get("sample_size") or 128
    assert isinstance(side, int)
    towers = tuple(
        TowerConfig(tokenizer=n.replace("text_encoder", "tokenizer"), encoder=n, skip=1, norm=False)
        for n in names
    )
    scored = micro.dim == 5
    zeros = bool(found.extras.get("", {}).get("force_zeros_for_empty_prompt", not scored))
    codec = replace(latents_of(found.settings["vae"]), full=bool(found.settings["vae"]["force_upcast"]))
    size = (side * vae.config.factor,) * 2
    text = ClipTextConfig(towers=towers, pooled=True, zero_null=zeros)
    stage = StageConfig(
        net="net",
        schedule=sampling.schedule,
        parameterization=sampling.parameterization,
        conditioners=(text, SizesConfig(size=size, scored=scored)),
        codec=codec,
        shape=(net.config.in_channels, side, side),
        defaults=replace(sampling.defaults, start=FromImage()) if scored else sampling.defaults,
    )
    about = About(name=f"Stable Diffusion XL{' refiner' * scored}", summary=summary)
    parts = Parts(
        {n: found.nets[n] for n in ("net", "vae", *names)},
        {t.tokenizer: found.tokenizers[t.tokenizer] for t in towers},
    )
    return assemble(SystemConfig(stages=(stage,)), parts, about=about)


def refined(base: System, refiner: System, at: float = HANDED_ON) -> System:
    """Base and refiner as one system: at the fraction `at` of the steps the refiner takes over the latent.

    It works on the base's latents, and shares a text tower that is the same.

    Raises: ValueError unless both are systems of SDXL of one stage, and the second a refiner.
    """
    stages = [system.config.stages for system in (base, refiner)]
    sizes = [[c for c in s[0].conditioners if isinstance(c, SizesConfig)] for s in stages]
    if any(len(s) > 1 for s in stages) or not all(sizes) or [s[0].scored for s in sizes] != [False, True]:
        raise ValueError(
            f"{base.about.name} and {refiner.about.name} are not SDXL and its refiner; give those two"
        )
    (first,), (second,) = stages
    text = next(c for c in second.conditioners if isinstance(c, ClipTextConfig))
    (tower,), parts = text.towers, base.parts
    mine, theirs = refiner.parts.nets[tower.encoder], parts.nets.get(tower.encoder)
    nets = {**parts.nets, "refiner": refiner.parts.nets[second.net]}
    words = dict(parts.tokenizers)
    if theirs is None or not _same(mine, theirs):
        tower = replace(tower, encoder="refiner_text", tokenizer="refiner_text")
        nets["refiner_text"] = mine
        words["refiner_text"] = refiner.parts.tokenizers[text.towers[0].tokenizer]
    conditioners = (replace(text, towers=(tower,)), SizesConfig(size=sizes[0][0].size, scored=True))
    last = replace(
        second,
        name="refiner",
        net="refiner",
        conditioners=conditioners,
        codec=first.codec,
        shape=first.shape,
        defaults=replace(first.defaults, window=(at, 1.0), start=Continue()),
    )
    start = replace(first, emits="latent", defaults=replace(first.defaults, window=(0.0, at)))
    about = replace(base.about, name=f"{base.about.name} with refiner")
    return assemble(SystemConfig(stages=(start, last)), Parts(nets, words), about=about)


def _same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(v, other[n]) for n, v in one.items())
