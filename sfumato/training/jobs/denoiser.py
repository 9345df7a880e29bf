"""Job of a denoiser: codec, text tower, net or adapters, and the system that they make."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.checkpoints.adapters import write_adapters
from sfumato.checkpoints.native import Folder, Parts
from sfumato.core.config import to_json
from sfumato.core.image import to_float
from sfumato.core.random import Noise
from sfumato.core.types import Inputs
from sfumato.core.world import World
from sfumato.diffusion.sampling import NotFinite
from sfumato.diffusion.weights import Uncertainty
from sfumato.nets import NETS
from sfumato.nets.controlnet import fresh_control
from sfumato.nets.lora import Adapter, LoraConfig, inject, merged_copy
from sfumato.nets.t5 import T5Config, T5Encoder
from sfumato.nets.text import TextTransformer, TextTransformerConfig
from sfumato.nets.unet import UNet, UNetConfig
from sfumato.systems.conditioning import (
    ClipTextConfig,
    ConditionerConfig,
    ImageEmbedConfig,
    InpaintConfig,
    LabelConfig,
    LowResConfig,
    TokenTextConfig,
)
from sfumato.systems.config import ControlConfig, StageConfig, SystemConfig
from sfumato.systems.stage import Stage
from sfumato.systems.system import System, assemble
from sfumato.text.tokenizers import Tokenizer
from sfumato.training.batches import check_captions, check_labels
from sfumato.training.jobs.base import Base, BaseMark, read_base, take_over
from sfumato.training.jobs.job import Job, Place, settle, spread, vocabulary_of
from sfumato.training.jobs.sources import Source, Vectors, source_of
from sfumato.training.jobs.told import completion
from sfumato.training.recipe import Recipe
from sfumato.training.tasks.denoising import Complete, Denoising, DenoisingConfig
from sfumato.training.texts import remembering

__all__ = ["Built", "denoising", "drawn", "nearest"]

PROMPTS = 16  # captions or classes that the previews draw if the recipe names none


@dataclass(frozen=True)
class Built:
    """The nets of a run.

    Attributes:
        nets: "denoiser", and "text" if it is told texts.
        adapters: of some of them; if there are any, the nets themselves are not trained.
        lora: settings of the adapters.
    """

    nets: Mapping[str, nn.Module]
    tokenizers: Mapping[str, Tokenizer]
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    lora: Mapping[str, LoraConfig] = field(default_factory=dict)

    @property
    def trained(self) -> dict[str, nn.Module]:
        """What the optimizer gets."""
        if self.adapters:
            return dict(self.adapters)
        return {name: net for name, net in self.nets.items() if _learns(net)}

    @property
    def num_classes(self) -> int | None:
        """Classes of the net's table, if it has one."""
        config = getattr(self.nets["denoiser"], "config", None)
        if not isinstance(config, UNetConfig):
            return getattr(config, "num_classes", None)
        tables = [e.features[0] for e in config.embedding.extras if e.kind == "table"]
        return next((table.dim - 1 for table in tables if table.field == "label"), None)

    def beside(self, source: Source) -> Built:
        """The same with the tokenizer of the CLIP that reads the captions."""
        return self if source.clip is None else replace(self, tokenizers={"tokenizer": source.clip[1]})

    @property
    def told_pictures(self) -> bool:
        """Whether the net reads an image embedding."""
        config = getattr(self.nets["denoiser"], "config", None)
        if not isinstance(config, UNetConfig):
            return False
        fields = [f.field for e in config.embedding.extras for f in e.features]
        return "image_embed" in fields or bool(config.tokens and config.tokens.image_tokens)

    def whole(self, averaged: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """All nets with averages in their places, adapters merged into copies."""
        nets = dict(self.nets)
        for name, module in averaged.items():
            nets[name] = merged_copy(nets[name], module).eval() if isinstance(module, Adapter) else module
        return nets


def denoising(recipe: Recipe, config: DenoisingConfig, place: Place) -> Job:
    """Publishes the whole system: autoencoder, net, text tower and tokenizer; and adapters beside it.

    Raises: ValueError in one line if net, autoencoder, data and the system of `init` do not fit each other.
    """
    base = None if config.init is None else read_base(config.init, place.device)
    if base is not None:
        base.check(config)
    _check_told(config, base, place)
    source = source_of(recipe, _pictured(recipe, config), place, base)
    built = _frozen(_build(config, place, base), config).beside(source)
    if built.num_classes is not None:
        check_labels(place.pictures, built.num_classes)
    settings = _stage(config, source, built, place.pictures.classes)
    system, place = SystemConfig(stages=(settings,)), _credited(place, base)

    def parts(averaged: Mapping[str, nn.Module]) -> Parts:
        return Parts({**source.frozen, **built.whole(averaged)}, built.tokenizers)

    def result(averaged: Mapping[str, nn.Module]) -> Folder:
        return Folder(*_published(parts(averaged), system), to_json(place.about), place.card)

    def beside(averaged: Mapping[str, nn.Module]) -> None:
        adapters = {name: a for name, a in averaged.items() if isinstance(a, Adapter)}
        if adapters and base is not None:
            write_adapters(place.out / "adapter.safetensors", adapters, built.lora, base=base.fingerprint)

    clip = None if source.clip is None else source.clip[0]
    complete = completion(config, clip, embeds=built.told_pictures)
    wanted = _shown(config, place, built, complete)

    def draw(averaged: Mapping[str, nn.Module]) -> Tensor:
        made = drawn(assemble(system, parts(averaged)), wanted, place.world)
        return made if source.vectors is None else nearest(made, source.vectors, place)

    stage = settings.build(Parts({**source.frozen, **built.nets}, built.tokenizers))
    _check_fit(stage, config, complete)
    if config.cache and "text" not in built.trained:
        texts = remembering(stage.conditioner, place.pictures.texts, place.out / "texts")
        stage = replace(stage, conditioner=texts)
    task = _task(config, stage, built, base, source, draw)
    task.complete = complete
    return Job(task, source.batches, result, beside)


def _check_told(config: DenoisingConfig, base: Base | None, place: Place) -> None:
    """Raise ValueError in one line if captions are read and there are none."""
    if config.text is not None or config.clip is not None or (base is not None and base.text is not None):
        check_captions(place.pictures)


def _published(parts: Parts, system: SystemConfig) -> tuple[Parts, dict[str, Any]]:
    """All of it; or a ControlNet alone, which is added to its base."""
    if "control" in parts.nets:
        return Parts({"control": parts.nets["control"]}), {}
    return parts, to_json(system)


def _learns(net: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in net.parameters())


def _task(
    config: DenoisingConfig,
    stage: Stage,
    built: Built,
    base: Base | None,
    source: Source,
    draw: Callable[[Mapping[str, nn.Module]], Tensor],
) -> Denoising:
    task = Denoising(
        stage,
        copy.deepcopy(config.objective),  # its times may learn, and a recipe is used more than once
        dropout=config.dropout,
        posterior=config.posterior,
        modules=built.trained,
        draw=draw,
        uncertainty=Uncertainty(config.uncertainty).to(stage.device) if config.uncertainty else None,
        memories={} if base is None else {"base": BaseMark(base)},
    )
    task.dropout_image = config.dropout_image
    if config.degrade is not None:
        task.crop, task.cell = config.degrade.crop, config.degrade.factor
    task.embed = None if source.vectors is None else source.vectors.embed
    return task


def _build(config: DenoisingConfig, place: Place, base: Base | None) -> Built:
    """New nets, or those of the base, on the device."""
    nets: dict[str, nn.Module] = {"denoiser": _net(config, base)}
    tokenizers: dict[str, Tokenizer] = {}
    if base is not None and base.text is not None and base.tokenizer is not None:
        tokenizers["text"], nets["text"] = base.tokenizer, base.text
        if config.text is not None:
            shape = replace(config.text, vocab_size=base.text.config.vocab_size)
            nets["text"] = _tower(shape)
            take_over(nets["text"], base.text, base, "task.text")
    elif config.text is not None:
        if base is not None:
            raise ValueError(f"{base.path} has no text tower to begin from; set task.text None")
        tokenizers["text"] = vocabulary_of(place, config.text.vocab_size, config.text.context)
        nets["text"] = _tower(replace(config.text, vocab_size=tokenizers["text"].vocab_size))
    if config.control is not None:
        nets["control"] = _control(base)
    settle(nets, place.device)
    for net in nets.values():
        net.train()
    return Built(nets, tokenizers)


def _tower(shape: TextTransformerConfig | T5Config) -> nn.Module:
    return T5Encoder(shape) if isinstance(shape, T5Config) else TextTransformer(shape)


def _pictured(recipe: Recipe, config: DenoisingConfig) -> DenoisingConfig:
    """The same without cached latents where hints are made of pictures."""
    if config.control is None:
        return config
    if recipe.validation.split or recipe.validation.share:
        raise ValueError("a ControlNet has no validation loss; leave out validation.split and share")
    return replace(config, cache=False)


def _control(base: Base | None) -> nn.Module:
    """A fresh ControlNet for the net of a base. Raises: ValueError if that is no U-Net."""
    assert base is not None
    if not isinstance(base.net, UNet):
        raise ValueError(
            f"{base.path} draws with a {type(base.net).__name__}, and a ControlNet steers a U-Net: set "
            "task.init to the run of `sfumato train openmoji-unet`, or another system with one"
        )
    return fresh_control(base.net, 1 if base.autoencoder is None else base.autoencoder.config.factor)


def _net(config: DenoisingConfig, base: Base | None) -> nn.Module:
    if config.net is None:
        assert base is not None
        return base.net
    kind = next(kind for kind in NETS.values() if kind.config is type(config.net))
    net: nn.Module = kind.net(config.net)
    if base is not None:
        take_over(net, base.net, base, "task.net", partial=config.partial, widened=config.holes)
    return net


def _frozen(built: Built, config: DenoisingConfig) -> Built:
    """The same with what is not trained frozen, and fresh adapters if those are trained."""
    if (config.freeze_text or config.lora_text) and "text" not in built.nets:
        name = "freeze_text" if config.freeze_text else "lora_text"
        raise ValueError(f"task.{name} is about a text tower, and the system of task.init has none")
    if config.freeze_text:
        built.nets["text"].requires_grad_(False).eval()
    if config.control is not None:
        for name, net in built.nets.items():
            net.requires_grad_(name == "control").train(name == "control")
    if not config.adapts:
        return built
    wanted = {"denoiser": config.lora, "text": config.lora_text}
    lora = {name: one for name, one in wanted.items() if one is not None}
    for net in built.nets.values():
        net.requires_grad_(False)
    adapters = {name: inject(built.nets[name], one) for name, one in lora.items()}
    return replace(built, adapters=adapters, lora=lora)


def _stage(config: DenoisingConfig, source: Source, built: Built, classes: tuple[str, ...]) -> StageConfig:
    conditioners: list[ConditionerConfig] = [TokenTextConfig()] if "text" in built.nets else []
    if source.clip is not None:
        conditioners.append(ClipTextConfig(pooled=True, mask=True))
    if built.told_pictures:
        conditioners.append(ImageEmbedConfig(unit=True))
    if config.degrade is not None:
        conditioners.append(LowResConfig(factor=config.degrade.factor, mode="bicubic", antialias=True))
    if built.num_classes is not None:
        names = classes if len(classes) == built.num_classes else ()
        conditioners.append(LabelConfig(num_classes=built.num_classes, names=names))
    if config.holes:
        if source.codec.kind != "pixels":
            raise ValueError(
                f"task.holes is about pictures, and {source.codec.kind} are denoised; set it False"
            )
        conditioners.append(InpaintConfig(mask_first=False, marks_known=True))
    conditioners += [config.low_res] if config.low_res is not None else []
    return StageConfig(
        name="base" if config.low_res is None and config.degrade is None else "upsampler",
        schedule=config.schedule,
        parameterization=config.prediction,
        learned_var=config.learned_var,
        conditioners=tuple(conditioners),
        controls=(ControlConfig(),) if config.control is not None else (),
        codec=source.codec,
        shape=source.shape,
        emits="image" if source.vectors is None else "image_embed",
        defaults=config.sampling,
    )


def _shown(config: DenoisingConfig, place: Place, built: Built, complete: Complete | None) -> Inputs:
    """What the previews draw: the prompts, or captions, classes and pictures of the data."""
    pictures, classes = place.pictures, built.num_classes
    reads = "text" in built.nets or config.clip is not None
    if complete is not None and not config.holes:
        rows = list(spread(range(len(pictures)), PROMPTS))
        told = Inputs(n=len(rows), text=[pictures.texts[i] for i in rows] if reads else None)
        return replace(complete(told, to_float(pictures.images(rows)), Noise(rows)), aug=None)
    if "text" not in built.nets and classes is not None:
        labels = spread(range(classes), PROMPTS)
        return Inputs(n=len(labels), label=torch.tensor(labels))
    prompts = config.prompts or spread(pictures.texts, PROMPTS)
    known = classes is not None and not config.prompts
    label = torch.tensor(spread(pictures.labels, PROMPTS)) if known else None
    return Inputs(n=len(prompts), text=prompts if reads else None, label=label)


def drawn(system: System, wanted: Inputs, world: World) -> Tensor:
    """Pictures or embeddings; picture i has seed i, and each process draws some."""
    own, mine, broken = list[Tensor](), world.share(wanted.n), 0
    try:
        if mine:
            done = system.run(wanted.rows(mine), seed=list(mine))
            rows = done.low_res if done.low_res is not None else done.image_embed
            assert rows is not None
            own = list(rows.cpu())
    except NotFinite:
        broken = 1
    if world.most(broken):  # on one process is on all, which would wait for it
        raise NotFinite("a picture of the preview is not finite")
    return torch.stack(world.together(own, wanted.n))


def nearest(made: Tensor, vectors: Vectors, place: Place) -> Tensor:
    """The pictures of the data whose embeddings are nearest to those drawn."""
    return to_float(place.pictures.images(vectors.index[vectors.nearest(made)].tolist()))


def _credited(place: Place, base: Base | None) -> Place:
    """The same with the license and attribution of the system that the weights derive from."""
    if base is None:
        return place
    theirs, ours = base.about, place.about
    credits = dict.fromkeys(text for text in (theirs.attribution, ours.attribution) if text)
    about = replace(ours, license=ours.license or theirs.license, attribution="\n\n".join(credits))
    lines = ["", "## Base", "", f"Fine-tuned from {theirs.name} ({base.fingerprint})."]
    lines += [f"Its license: {theirs.license}."] if theirs.license else []
    lines += ["", theirs.attribution] if theirs.attribution else []
    return replace(place, about=about, card=place.card + "\n".join(lines) + "\n")


def _check_fit(stage: Stage, config: DenoisingConfig, complete: Complete | None) -> None:
    """Raise ValueError in one line if net, codec, tower and objective do not fit each other."""
    channels = stage.shape[0]
    wanted = channels * (2 if stage.denoiser.learned_var else 1)
    shape = getattr(stage.denoiser.net, "config", None)
    enlarges = config.low_res is not None or config.degrade is not None
    read = 2 * channels + 1 if config.holes else channels + 3 * enlarges
    found = getattr(shape, "in_channels", read), getattr(shape, "out_channels", wanted)
    if found != (read, wanted):
        raise ValueError(
            f"the net has in_channels {found[0]} and out_channels {found[1]}, but what it denoises has "
            f"{channels} channels; set task.net.in_channels {read} and task.net.out_channels {wanted}"
        )
    # One sample through all of it, with times that do not learn from it.
    objective, x0 = copy.deepcopy(config.objective), torch.zeros(1, *stage.shape, device=stage.device)
    with torch.no_grad():
        inputs = Inputs(n=1, text=("",))
        if complete is not None and stage.pixels is not None:
            picture = torch.zeros(1, 3, *stage.pixels, device=stage.device)
            inputs = complete(inputs, picture, Noise([0]))
        cond = stage.conditioner(inputs, Noise([0])).to(stage.device)
        try:
            objective(stage.denoiser, x0, cond, Noise([0]))
        except RuntimeError as error:
            raise ValueError(f"the net does not fit its inputs: {str(error).splitlines()[0]}") from None
