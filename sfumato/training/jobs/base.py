"""A system whose training is taken up: what it holds, and what of it a new net takes over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.checkpoints.native import MANIFEST, read_folder, strict_json
from sfumato.nets import NETS
from sfumato.nets.autoencoder import Autoencoder
from sfumato.nets.text import TextTransformer
from sfumato.systems.conditioning import InpaintConfig, LabelConfig, TokenTextConfig
from sfumato.systems.config import About, CodecConfig, LatentsConfig, StageConfig, SystemConfig
from sfumato.text.tokenizers import Tokenizer
from sfumato.training.tasks.denoising import DenoisingConfig

__all__ = ["Base", "BaseMark", "read_base", "take_over"]

# The layers of each net that touch the sample; `partial` lets their shapes differ.
TOUCHING = {"dit": ("patches.", "out."), "unet": ("encoder.conv_in.", "conv_out."), "mlp": ("enter.", "out.")}


FIRST = "encoder.conv_in.weight"  # what reads the sample of a U-Net


@dataclass(frozen=True)
class Base:
    """A trained system of one stage.

    Attributes:
        path: of its folder.
        autoencoder: of its codec, if it works on latents.
        fingerprint: of its settings and weights.
    """

    path: Path
    net: nn.Module
    text: TextTransformer | None
    tokenizer: Tokenizer | None
    stage: StageConfig
    autoencoder: Autoencoder | None
    about: About
    fingerprint: str

    @property
    def codec(self) -> CodecConfig:
        """Its codec, by the name that jobs give to the autoencoder."""
        codec = self.stage.codec
        return replace(codec, autoencoder="autoencoder") if isinstance(codec, LatentsConfig) else codec

    def check(self, config: DenoisingConfig) -> None:
        """Raise ValueError in one line if a net of this system would be trained for something else."""
        if config.partial:
            return
        pairs = {
            "schedule": (config.schedule, self.stage.schedule),
            "prediction": (config.prediction, self.stage.parameterization),
            "learned_var": (config.learned_var, self.stage.learned_var),
        }
        for name, (wanted, found) in pairs.items():
            if wanted != found:
                raise ValueError(
                    f"task.{name} is {wanted}, but {self.path} was trained with {found}; set it to that, or "
                    "set task.partial to train it over"
                )


class BaseMark:
    """The fingerprint of the system that a run began from, kept in its checkpoints."""

    def __init__(self, base: Base) -> None:
        self.base = base

    def state_dict(self) -> dict[str, Any]:
        """The fingerprint."""
        return {"fingerprint": self.base.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: ValueError in one line if the system is not the one that the run began from."""
        if state["fingerprint"] != self.base.fingerprint:
            raise ValueError(
                f"this run began from a system with the fingerprint {state['fingerprint']}, and now "
                f"{self.base.path} has {self.base.fingerprint}; put that one back, or begin a new run"
            )


def read_base(path: Path, device: torch.device) -> Base:
    """The system in a folder, or the result of a run.

    Raises: ValueError in one line if there is none, or it has parts that cannot be trained on.
    """
    folder = path if (path / MANIFEST).is_file() else path / "system"
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"there is no system at {path}; task.init takes the folder of one, or of its run")
    read = read_folder(folder, device=device)
    if not read.system:
        raise ValueError(
            f"{folder} holds {', '.join(read.parts.nets)} but no stages; task.init takes a system that draws"
        )
    system = strict_json(SystemConfig, dict(read.system), where=f"{folder / MANIFEST}: system")
    about = strict_json(About, dict(read.about), where=f"{folder / MANIFEST}: about")
    if len(system.stages) > 1:
        names = ", ".join(stage.name for stage in system.stages)
        raise ValueError(f"{folder} has the stages {names}; task.init takes a system of one stage")
    (stage,) = system.stages
    text, tokenizer = None, None
    for conditioner in stage.conditioners:
        if isinstance(conditioner, TokenTextConfig):
            tower = read.parts.nets[conditioner.encoder]
            text = tower if isinstance(tower, TextTransformer) else None
            tokenizer = read.parts.tokenizers[conditioner.tokenizer]
        token = isinstance(conditioner, LabelConfig) and conditioner.encoder != ""
        if token or (not isinstance(conditioner, LabelConfig | InpaintConfig) and text is None):
            said = "a class as a token" if token else conditioner.kind
            raise ValueError(
                f"{folder} is conditioned by {said}; only texts of a tower of its own and plain labels can "
                "be trained on"
            )
    first = read.parts.nets[stage.codec.autoencoder] if isinstance(stage.codec, LatentsConfig) else None
    assert first is None or isinstance(first, Autoencoder)
    net = read.parts.nets[stage.net]
    return Base(folder, net, text, tokenizer, stage, first, about, read.fingerprint)


def take_over(
    net: nn.Module, source: nn.Module, base: Base, what: str, *, partial: bool = False, widened: bool = False
) -> None:
    """Copy the weights of a base's net into a new one of the same shape.

    Args:
        what: the setting that the new net comes from, for errors.
        partial: keep the fresh weights of layers that touch the sample where their shapes differ.
        widened: the new net may read more channels than the base's, whose weights are then zero.

    Raises: ValueError in one line that names the first tensor which differs, and both shapes.
    """
    if type(net) is not type(source):
        kinds = type(net).__name__, type(source).__name__
        raise ValueError(f"{what} is a {kinds[0]} and {base.path} holds a {kinds[1]}; {_fix(what)}")
    mine, theirs = net.state_dict(), source.state_dict()
    if widened:
        theirs = {name: _widened(v, mine[name]) if name == FIRST else v for name, v in theirs.items()}
    free = TOUCHING.get(NETS.tag(net), ()) if partial else ()
    for name in (*mine, *(name for name in theirs if name not in mine)):
        shapes = _shape(mine, name), _shape(theirs, name)
        if shapes[0] != shapes[1] and not name.startswith(free or ("\0",)):
            raise ValueError(
                f"tensor {name!r} is {shapes[0]} by {what} and {shapes[1]} in {base.path}; {_fix(what)}"
            )
    fitting = {name: v for name, v in theirs.items() if name in mine and mine[name].shape == v.shape}
    net.load_state_dict({**mine, **fitting})


def _widened(v: Tensor, like: Tensor) -> Tensor:
    """The first convolution's weights with zeros for channels that it did not read."""
    more = like.shape[1] - v.shape[1]
    return torch.cat([v, v.new_zeros(len(v), more, *v.shape[2:])], dim=1) if more > 0 else v


def _shape(state: Mapping[str, Tensor], name: str) -> str:
    return f"of shape {tuple(state[name].shape)}" if name in state else "absent"


def _fix(what: str) -> str:
    more = ", or task.partial if only the patch size differs" if what == "task.net" else ""
    return f"choose {what} None to train the net that is there{more}"
