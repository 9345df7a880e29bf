"""Stable Diffusion as a system: one stage that is told a text and works on latents."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from sfumato.checkpoints.foreign import Foreign
from sfumato.checkpoints.native import Parts
from sfumato.core.types import Conditioning, Inputs
from sfumato.diffusion.denoiser import Net
from sfumato.diffusion.guidance import CFG
from sfumato.families.assembly import ASSEMBLIES, PUBLICATIONS, Publication, latents_of
from sfumato.families.schedulers import SAMPLERS, Sampling, ddim_config, sampling_of
from sfumato.families.stable_inputs import Told, extended, told_of, variations
from sfumato.nets.autoencoder import Autoencoder
from sfumato.nets.clip import CLIPText
from sfumato.nets.unet import UNet
from sfumato.systems.conditioning import ClipTextConfig, TowerConfig
from sfumato.systems.config import About, LatentsConfig, StageConfig, SystemConfig
from sfumato.systems.system import System, assemble
from sfumato.text.clip import clip_files

__all__ = ["stable_system"]

# What the original scripts and diffusers draw with; the folder's scheduler says the rest.
STEPS, GUIDANCE = 50, CFG(7.5)
NEEDED = ("net", "vae", "text_encoder")


# What the single files of both versions were trained with; the sampler is that of their scripts.
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


@ASSEMBLIES("unet-diffusers")
def _folder(found: Foreign) -> System:
    """A pipeline folder of Stable Diffusion 1 or 2."""
    sampling = sampling_of(found.extras.get("scheduler", {}), steps=STEPS, guidance=GUIDANCE)
    if "image_encoder" in found.nets and "text_encoder" not in found.nets:
        return variations(found, sampling)
    return stable_system(found, sampling, "Read from a folder of diffusers.")


@ASSEMBLIES("sd1-compvis")
def _first(found: Foreign) -> System:
    """A single file of the first version, which predicts the noise unless it is said otherwise."""
    said = found.settings["net"]["parameterization"] or "eps"
    sampling = replace(sampling_of(SCHEDULER, steps=STEPS, guidance=GUIDANCE), parameterization=str(said))
    return stable_system(found, sampling, "Read from a single file.")


@ASSEMBLIES("sd2-compvis")
def _second(found: Foreign) -> System:
    """A single file of the second version: its tensors do not tell whether it predicts eps or v."""
    said = found.settings["net"]["parameterization"]
    sampling = sampling_of(SCHEDULER, steps=STEPS, guidance=GUIDANCE)
    system = stable_system(found, sampling, "Read from a single file.", skip=1)
    stage, how = system.stages[0], "as was said"
    if said is None:
        cond = system.config.stages[0].conditioners[0].build(system.parts, stage.codec)(Inputs())
        said, how = (
            predicts(stage.denoiser.net, cond, stage.shape[0], stage.factor // stage.codec.factor),
            "as found",
        )
    sampling = replace(sampling, parameterization=str(said))
    return stable_system(found, sampling, f"Read from a single file; it predicts {said}, {how}.", skip=1)


@torch.no_grad()
def predicts(net: Net, cond: Conditioning, channels: int, factor: int) -> str:
    """Whether a net predicts "eps" or "v", from one evaluation at the noisiest step.

    There x_t is nearly all noise. A net of eps returns it, with a correlation near 1; a net of v returns
    alpha eps - sigma x0, which is nearly -x0 and hardly correlated with x_t.
    """
    x = torch.randn(1, channels, 4 * factor, 4 * factor, generator=torch.Generator().manual_seed(0))
    x = x.to(cond.tokens.device if cond.tokens is not None else "cpu")
    wide = getattr(getattr(net, "config", None), "in_channels", channels)  # what else it reads is left black
    x_in = F.pad(x, (0, 0, 0, 0, 0, wide - channels))
    out = net(x_in, torch.tensor([999.0], device=x.device), cond)[:, :channels].float()
    correlation = (out * x).mean() / (out.square().mean() * x.square().mean()).sqrt().clamp(min=1e-12)
    return "eps" if correlation > 0.5 else "v"


def stable_system(found: Foreign, sampling: Sampling, summary: str, *, skip: int = 0) -> System:
    """A system of a U-Net, a first stage, a text tower and its tokenizer.

    Args:
        skip: blocks of the text tower that are left out at the end.

    Raises: ValueError if a part is missing, or the parts make another system than text to image.
    """
    for name in NEEDED:
        if name not in found.nets:
            raise ValueError(
                f"a system of Stable Diffusion needs {', '.join(NEEDED)}, and {name} is missing; "
                "give the whole pipeline folder, or load_nets for the networks that there are"
            )
    if "tokenizer" not in found.tokenizers:
        raise ValueError(
            "there is no CLIP vocabulary; copy a folder 'tokenizer' with vocab.json and merges.txt beside "
            "the networks"
        )
    net, vae, text = (found.nets[name] for name in NEEDED)
    assert isinstance(net, UNet)
    assert isinstance(vae, Autoencoder)
    assert isinstance(text, CLIPText)
    told = told_of(found, net, vae)
    _check(net, text, told)
    assert told is not None
    size = found.settings["net"].get("sample_size") or 64
    assert isinstance(size, int)
    tower = TowerConfig(tokenizer="tokenizer", encoder="text_encoder", skip=skip)
    stage = StageConfig(
        net="net",
        schedule=sampling.schedule,
        parameterization=sampling.parameterization,
        conditioners=(ClipTextConfig(towers=(tower,)), *told.conditioners),
        codec=latents_of(found.settings["vae"]),
        shape=(vae.config.embed_dim, size, size),
        defaults=told.walk(sampling).defaults,
    )
    about = About(name="Stable Diffusion", summary=summary)
    parts = Parts({name: found.nets[name] for name in (*NEEDED, *told.parts)}, dict(found.tokenizers))
    return assemble(SystemConfig(stages=(stage,)), parts, about=about)


def _check(net: UNet, text: CLIPText, told: Told | None) -> None:
    c = net.config
    if told is None:
        fields = [f.field for e in c.embedding.extras for f in e.features]
        raise ValueError(
            f"this U-Net has {c.in_channels} input channels and is told {', '.join(['text', *fields])}: "
            "no system here tells it that, or its folder is not whole; load_nets gives its networks"
        )
    if c.token_dim != text.config.width:
        raise ValueError(
            f"the text tower has width {text.config.width}, the U-Net reads {c.token_dim}; "
            "they do not belong together"
        )


@PUBLICATIONS("unet-diffusers")
def _pipeline(system: System) -> Publication:
    """What StableDiffusionPipeline reads."""
    if (more := extended(system, _pipeline)) is not None:
        return more
    stage = system.config.stages[0]
    text, codec = stage.conditioners[0] if stage.conditioners else None, stage.codec
    if (
        len(system.config.stages) != 1
        or len(stage.conditioners) != 1
        or not isinstance(text, ClipTextConfig)
        or [(tower.skip, tower.norm) for tower in text.towers] != [(0, True)]
        or not isinstance(codec, LatentsConfig)
        or len(codec.std) > 1
        or len(codec.mean) > 1
    ):
        raise ValueError(
            "StableDiffusionPipeline needs one stage with one whole text tower and a first stage with one "
            "scale; save this as a sfumato system"
        )
    tower = text.towers[0]
    classes = {ours: theirs for theirs, ours in SAMPLERS.items()}
    scheduler = classes.get(stage.defaults.sampler, "DDIMScheduler")
    absent = [None, None]
    return Publication(
        {
            stage.net: ("unet-diffusers", "unet"),
            codec.autoencoder: ("vae-diffusers", "vae"),
            tower.encoder: ("clip-text", "text_encoder"),
        },
        {
            stage.net: {"sample_size": stage.shape[1]},
            codec.autoencoder: {"scaling_factor": 1 / codec.std[0], "shift_factor": codec.mean[0] or None},
        },
        {
            "_class_name": "StableDiffusionPipeline",
            "scheduler": ["diffusers", scheduler],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "safety_checker": absent,
            "feature_extractor": absent,
            "requires_safety_checker": False,
        },
        {
            "scheduler/scheduler_config.json": {
                **ddim_config(stage),
                "_class_name": scheduler,
                **({"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}),
            }
        },
        {f"tokenizer/{n}": v for n, v in clip_files(system.parts.tokenizers[tower.tokenizer]).items()},
    )
