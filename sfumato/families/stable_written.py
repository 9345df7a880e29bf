"""How systems of Stable Diffusion and SDXL are written: folders of diffusers, and single files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from sfumato.checkpoints.weights import assign, parameter_free
from sfumato.diffusion.guidance import CFG
from sfumato.families import sdxl, stable
from sfumato.families.assembly import PUBLICATIONS, SCALE, Publication
from sfumato.families.schedulers import SAMPLERS, ddim_config, sampling_of
from sfumato.families.stable_inputs import extended
from sfumato.nets.clip import CLIPText
from sfumato.nets.unet import UNet
from sfumato.systems.conditioning import ClipTextConfig, SizesConfig, TowerConfig
from sfumato.systems.config import LatentsConfig, StageConfig
from sfumato.systems.system import System
from sfumato.text.clip import clip_files

__all__: list[str] = []  # everything is reached through PUBLICATIONS

OWN = "save this as a sfumato system"
HEAD = 64  # width of a tower's heads, which single files do not say


@dataclass(frozen=True)
class _Said:
    """A system that other programs have a pipeline for."""

    stage: StageConfig
    codec: LatentsConfig
    towers: tuple[TowerConfig, ...]
    encoders: tuple[CLIPText, ...]
    sizes: SizesConfig | None
    zeros: bool
    distilled: bool

    @property
    def places(self) -> tuple[str, ...]:
        """Names of the towers elsewhere: SDXL's refiner has the second of its base alone."""
        names = ("text_encoder", "text_encoder_2")
        return names[1:] if self.sizes and self.sizes.scored else names[: len(self.towers)]


def _said(system: System) -> _Said:
    """Raises: ValueError if there are more stages, other conditioners, or latents with several scales."""
    stage = system.config.stages[0]
    text = next((c for c in stage.conditioners if isinstance(c, ClipTextConfig)), None)
    sizes = next((c for c in stage.conditioners if isinstance(c, SizesConfig)), None)
    codec, net = stage.codec, system.parts.nets[stage.net]
    if (
        len(system.config.stages) != 1
        or text is None
        or len(stage.conditioners) != 1 + (sizes is not None)
        or not isinstance(codec, LatentsConfig)
        or len(codec.std) > 1
        or len(codec.mean) > 1
        or not isinstance(net, UNet)
        or any((t.skip, t.norm) != (1, False) if sizes else not t.norm for t in text.towers)
        or len(text.towers) > 1 + (sizes is not None and not sizes.scored)
    ):
        raise ValueError(
            "pipelines of Stable Diffusion have one stage with a text and a first stage with one scale, and "
            f"SDXL's take the last state but one of each tower; {OWN}"
        )
    encoders = tuple(n for t in text.towers if isinstance(n := system.parts.nets[t.encoder], CLIPText))
    distilled = bool(net.config.embedding.guidance_dim)
    return _Said(stage, codec, text.towers, encoders, sizes, text.zero_null, distilled)


@PUBLICATIONS("unet-diffusers")
def _pipeline(system: System) -> Publication:
    """What StableDiffusionPipeline, StableDiffusionXLPipeline and their relatives read."""
    if (more := extended(system, _pipeline)) is not None:
        return more
    said = _said(system)
    stage, codec, classes = said.stage, said.codec, {ours: theirs for theirs, ours in SAMPLERS.items()}
    scheduler = classes.get(stage.defaults.sampler, "DDIMScheduler")
    parts = {stage.net: ("unet-diffusers", "unet"), codec.autoencoder: ("vae-diffusers", "vae")}
    index: dict[str, object] = {"scheduler": ["diffusers", scheduler]}
    files: dict[str, str] = {}
    for place, tower in zip(said.places, said.towers, strict=True):
        parts[tower.encoder] = ("clip-text-projected" if place == "text_encoder_2" else "clip-text", place)
        words = place.replace("text_encoder", "tokenizer")
        index[words] = ["transformers", "CLIPTokenizer"]
        files |= {f"{words}/{n}": v for n, v in clip_files(system.parts.tokenizers[tower.tokenizer]).items()}
    absent = [None, None]
    if said.sizes is None:
        name = "LatentConsistencyModelPipeline" if said.distilled else "StableDiffusionPipeline"
        unchecked = {"safety_checker": absent, "feature_extractor": absent, "requires_safety_checker": False}
        index |= {"_class_name": name, **unchecked}
    else:
        index |= {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": said.zeros}
    if said.sizes and said.sizes.scored:
        index |= {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}
        index |= {"text_encoder": absent, "tokenizer": absent}
    skipped = {"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}
    config = {**ddim_config(stage), "_class_name": scheduler, **skipped}
    scales = {"scaling_factor": 1 / codec.std[0], "shift_factor": codec.mean[0] or None}
    return Publication(
        parts,
        {
            stage.net: {"sample_size": stage.shape[1]},
            codec.autoencoder: {**scales, "force_upcast": codec.full or said.sizes is None},
        },
        index,
        {"scheduler/scheduler_config.json": config},
        files,
        {
            tower.encoder: _shortened(encoder, tower.skip)
            for tower, encoder in zip(said.towers, said.encoders, strict=True)
            if tower.norm and tower.skip
        },
    )


def _shortened(text: CLIPText, skip: int) -> CLIPText:
    """A tower without its last blocks and its projection; the weights are shared."""
    config = replace(text.config, depth=text.config.depth - skip, embed=0)
    net = parameter_free(CLIPText, config)
    kept = net.state_dict().keys()
    assign(net, {n: v for n, v in text.state_dict().items() if n in kept}, where="the text tower")
    return net


def _single(system: System, layout: str) -> Publication:
    """Raises: ValueError if a file of the layout would mean another system."""
    said, large, second = _said(system), layout.startswith("sdxl"), layout == "sd2-compvis"
    stage, codec = said.stage, said.codec
    usual = sampling_of((sdxl if large else stable).SCHEDULER, steps=1, guidance=CFG())
    scored = bool(said.sizes and said.sizes.scored)
    last = said.encoders[-1].config
    whole = (1, 0)[last.embed == 0] if second else int(large)  # blocks that readers leave out
    fits = {
        "text towers": (said.sizes is not None, scored) == (large, layout == "sdxl-refiner-compvis")
        and all(e.config.heads * HEAD == e.config.width for e in said.encoders)
        and said.encoders[0].config.activation == ("none" if second or scored else "quick")
        and all(t.skip == whole for t in said.towers),
        "schedule": stage.schedule == usual.schedule,
        "prediction": stage.parameterization == "eps" or second,
        "scale of latents": abs(1 / codec.std[0] - (sdxl.SCALE if large else SCALE)) < 1e-6
        and codec.mean[0] == 0,
    }
    if wrong := [name for name, ok in fits.items() if not ok]:
        raise ValueError(f"files of layout {layout!r} have another {wrong[0]} than this system; {OWN}")
    towers = {t.encoder: (layout, place) for t, place in zip(said.towers, said.places, strict=True)}
    return Publication({stage.net: (layout, "net"), codec.autoencoder: (layout, "vae"), **towers}, {}, {}, {})


for _layout in ("sd1-compvis", "sd2-compvis", "sdxl-compvis", "sdxl-refiner-compvis"):
    PUBLICATIONS(_layout)(partial(_single, layout=_layout))
