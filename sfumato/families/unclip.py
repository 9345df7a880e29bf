"""unCLIP as a system: a prior draws an image embedding, a decoder a picture from it, then it is enlarged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from sfumato.checkpoints.foreign import Foreign
from sfumato.checkpoints.native import Parts
from sfumato.checkpoints.weights import assign, parameter_free
from sfumato.diffusion.guidance import CFG
from sfumato.families.assembly import ASSEMBLIES
from sfumato.families.schedulers import Sampling, sampling_of
from sfumato.nets.clip import CLIPText
from sfumato.nets.prior import Prior
from sfumato.nets.unclip import LastStep, LastStepConfig, Projections, told_both
from sfumato.nets.unet import UNet
from sfumato.systems.conditioning import ClipTextConfig, ImageEmbedConfig, LowResConfig
from sfumato.systems.config import About, EmbeddingsConfig, StageConfig, SystemConfig
from sfumato.systems.system import System, assemble

__all__ = ["karlo_system"]

NEEDED = ("net", "text_proj", "text_encoder", "super_res_first", "super_res_last")
TEXT = ClipTextConfig(pooled=True, mask=True)
PRIOR_STEPS, DECODER_STEPS, SR_STEPS = 25, 25, 7
PRIOR_GUIDANCE, DECODER_GUIDANCE = CFG(4.0), CFG(8.0)


@ASSEMBLIES("karlo-decoder-diffusers")
def karlo_system(found: Foreign) -> System:
    """UnCLIPPipeline, or UnCLIPImageVariationPipeline, which has no prior but an image tower.

    Raises: ValueError if a part is missing, or parts of different CLIPs come together.
    """
    missing = [name for name in NEEDED if name not in found.nets]
    missing += ["tokenizer"] if "tokenizer" not in found.tokenizers else []
    if missing:
        raise ValueError(
            f"a folder of Karlo needs {', '.join((*NEEDED[1:], 'decoder', 'tokenizer'))}, and "
            f"{', '.join(missing)} is missing; load_nets gives the networks that there are"
        )
    nets = dict(found.nets)
    projections, text = nets.pop("text_proj"), nets["text_encoder"]
    assert isinstance(projections, Projections)
    assert isinstance(text, CLIPText)
    dims = {"text_encoder": text.config.embed, "text_proj": projections.config.dim}
    if isinstance(prior := nets.get("prior"), Prior):
        dims["prior"] = prior.config.dim
    if len(set(dims.values())) > 1 or text.config.width != projections.config.dim:
        told = ", ".join(f"{name} {dim}" for name, dim in {**dims, "text states": text.config.width}.items())
        raise ValueError(f"the parts have embeddings of different widths ({told}); they are of several CLIPs")
    decoder = nets.pop("net")
    assert isinstance(decoder, UNet)
    nets |= {"decoder": joined(decoder, projections), "null_image": projections.null}
    nets["super_res"] = _both(nets.pop("super_res_first"), nets.pop("super_res_last"))
    first = (_prior(found, prior),) if isinstance(prior, Prior) else ()
    stages = (*first, _decoder(found), _upsampler(found))
    about = About(name="Karlo", summary="unCLIP, read from a folder of diffusers.")
    return assemble(SystemConfig(stages=stages), Parts(nets, dict(found.tokenizers)), about=about)


def joined(bare: UNet, projections: Projections) -> UNet:
    """The whole decoder of a U-Net that gets projected embeddings, and of what projects them."""
    c = projections.config
    embedding = told_both(bare.config.embedding, c.dim, c.dim)
    net = parameter_free(UNet, replace(bare.config, embedding=embedding, tokens=c.tokens))
    places = {"extras": "encoder.embedding.extras", "tokens": "encoder.tokens"}
    theirs = {
        f"{places[name.split('.')[0]]}.{name.partition('.')[2]}": v
        for name, v in projections.state_dict().items()
        if name.split(".")[0] in places
    }
    assign(net, {**bare.state_dict(), **theirs}, where="text_proj and decoder")
    return net.eval()


def _prior(found: Foreign, prior: Prior) -> StageConfig:
    sampling = _sampling(found.extras, "prior_scheduler", PRIOR_STEPS, PRIOR_GUIDANCE)
    assert prior.mean is not None
    assert prior.std is not None
    codec = EmbeddingsConfig(mean=tuple(prior.mean.tolist()), std=tuple(prior.std.tolist()))
    return replace(
        _stage("prior", "prior", sampling, (prior.config.dim,)),
        conditioners=(TEXT,),
        codec=codec,
        emits="image_embed",
    )


def _decoder(found: Foreign) -> StageConfig:
    sampling = _sampling(found.extras, "decoder_scheduler", DECODER_STEPS, DECODER_GUIDANCE)
    size: Any = found.settings["net"].get("sample_size") or 64
    return replace(
        _stage("decoder", "decoder", sampling, (3, size, size)),
        learned_var=True,
        conditioners=(TEXT, ImageEmbedConfig(empty="null_image")),
    )


def _upsampler(found: Foreign) -> StageConfig:
    sampling = _sampling(found.extras, "super_res_scheduler", SR_STEPS, CFG())
    large: Any = found.settings["super_res_first"].get("sample_size") or 256
    small: Any = found.settings["net"].get("sample_size") or 64
    enlarged = LowResConfig(factor=large // small, mode="bicubic", antialias=True)
    return replace(_stage("super_res", "super_res", sampling, (3, large, large)), conditioners=(enlarged,))


def _both(first: nn.Module, last: nn.Module) -> LastStep:
    assert isinstance(first, UNet)
    assert isinstance(last, UNet)
    if first.config != last.config:
        raise ValueError("super_res_first and super_res_last have different shapes; take them of one folder")
    net = parameter_free(LastStep, LastStepConfig(net=first.config))
    net.first, net.last = first, last
    return net.eval()


def _stage(name: str, net: str, sampling: Sampling, shape: tuple[int, ...]) -> StageConfig:
    return StageConfig(
        name=name,
        net=net,
        schedule=sampling.schedule,
        parameterization=sampling.parameterization,
        shape=shape,
        defaults=sampling.defaults,
    )


def _sampling(extras: Mapping[str, Mapping[str, Any]], name: str, steps: int, guidance: CFG) -> Sampling:
    """What UnCLIPScheduler says: ancestral steps, evenly from the noisiest level to the cleanest."""
    own = {"beta_schedule": "squaredcos_cap_v2", **extras.get(name, {})}
    own |= {"_class_name": "DDPMScheduler", "timestep_spacing": "linspace"}
    return sampling_of(own, steps=steps, guidance=guidance)
