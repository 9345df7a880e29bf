"""Stable Diffusion as a system: one stage that is told a text and works on latents."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from sfumato.checkpoints.foreign import Foreign
from sfumato.checkpoints.native import Parts
from sfumato.core.types import Conditioning, Inputs
from sfumato.diffusion.denoiser import Net
from sfumato.diffusion.guidance import CFG, Embedded
from sfumato.families import sdxl
from sfumato.families.assembly import ASSEMBLIES, latents_of, needed
from sfumato.families.schedulers import Sampling, sampling_of
from sfumato.families.stable_inputs import UPSCALER, Told, told_of, variations
from sfumato.nets.autoencoder import Autoencoder
from sfumato.nets.clip import CLIPText
from sfumato.nets.unet import UNet
from sfumato.systems.adapting import controlled
from sfumato.systems.conditioning import ClipTextConfig, TowerConfig
from sfumato.systems.config import About, StageConfig, SystemConfig
from sfumato.systems.system import System, assemble

__all__ = ["stable_system"]

# What the original scripts and diffusers draw with; the folder's scheduler says the rest.
STEPS, GUIDANCE = 50, CFG(7.5)
DISTILLED_STEPS = 4
NEEDED = ("net", "vae", "text_encoder")
UPSCALER_SCALE = 0.08333  # of the latents of the x4 upscaler
BESIDE = ("controlnet", "adapter")  # nets beside the U-Net that the pipelines with pictures have


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
    """A pipeline folder of Stable Diffusion 1 or 2, of SDXL, or of a net that was distilled from them."""
    net, large = found.nets["net"], sdxl.is_sdxl(found.nets["net"])
    guidance = sdxl.GUIDANCE if large else GUIDANCE
    sampling = sampling_of(found.extras.get("scheduler", {}), steps=STEPS, guidance=guidance)
    if sampling.defaults.sampler == "lcm":
        sampling = replace(sampling, defaults=replace(sampling.defaults, steps=DISTILLED_STEPS))
    if isinstance(net, UNet) and net.config.embedding.guidance_dim:
        sampling = replace(sampling, defaults=replace(sampling.defaults, guidance=Embedded()))
    if "image_encoder" in found.nets and "text_encoder" not in found.nets:
        return variations(found, sampling)
    system = (sdxl.sdxl_system if large else stable_system)(
        found, sampling, "Read from a folder of diffusers."
    )
    for name in BESIDE:
        system = controlled(system, found.nets[name]) if name in found.nets else system
    return system


@ASSEMBLIES("sd1-compvis")
def _first(found: Foreign) -> System:
    """A single file of the first version, which predicts the noise unless it is said otherwise."""
    said = found.settings["net"]["parameterization"] or "eps"
    sampling = replace(sampling_of(SCHEDULER, steps=STEPS, guidance=GUIDANCE), parameterization=str(said))
    return stable_system(found, sampling, "Read from a single file.")


@ASSEMBLIES("sd1-control-compvis")
def _steered(found: Foreign) -> System:
    """The same with the ControlNet that is in the file."""
    return controlled(_first(found), found.nets["control"])


@ASSEMBLIES("sd2-compvis")
@ASSEMBLIES("sd2-unclip-compvis")
def _second(found: Foreign) -> System:
    """A single file of the second version: its tensors do not tell whether it predicts eps or v."""
    said = found.settings["net"]["parameterization"]
    scheduler, found = _of_kind(found)
    sampling = sampling_of(scheduler, steps=STEPS, guidance=GUIDANCE)
    text = found.nets["text_encoder"]
    # Published towers have a block more than is read, and a projection; those that diffusers had do not.
    skip = int(isinstance(text, CLIPText) and text.projection is not None)
    system = stable_system(found, sampling, "Read from a single file.", skip=skip)
    stage, how = system.stages[0], "as was said"
    if said is None and "sample_size" in found.settings["net"]:
        said, how = "v", "as the published one"
    elif said is None:
        cond = system.config.stages[0].conditioners[0].build(system.parts, stage.codec)(Inputs())
        said, how = (
            predicts(stage.denoiser.net, cond, stage.shape[0], stage.factor // stage.codec.factor),
            "as found",
        )
    sampling = replace(sampling, parameterization=str(said))
    return stable_system(found, sampling, f"Read from a single file; it predicts {said}, {how}.", skip=skip)


def _of_kind(found: Foreign) -> tuple[dict[str, object], Foreign]:
    """The scheduler of a file, and what its settings would say in a folder, by what is told beside the time.

    The x4 upscaler and unCLIP were published with schedules, scales and sizes of their own.
    """
    net, settings, scheduler = found.nets["net"], dict(found.settings), dict[str, object](SCHEDULER)
    told = net.config.embedding.extras if isinstance(net, UNet) else ()
    if told and told[0].kind == "table":
        scheduler |= UPSCALER
        settings |= {
            "net": {**settings["net"], "sample_size": 128},
            "vae": {"scaling_factor": UPSCALER_SCALE},
        }
    elif told:
        settings["net"] = {**settings["net"], "sample_size": 96}
    return scheduler, replace(found, settings=settings)


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
    net, vae, text = needed(found, *NEEDED)
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
