"""What a system is, as JSON data: which parts it uses and how they are put together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol

from pydantic import Field
from torch import nn

from sfumato.checkpoints.native import Parts
from sfumato.conditioners.base import merged
from sfumato.conditioners.image import Hint
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.parameterization import PARAMETERIZATIONS
from sfumato.diffusion.schedules import ScheduleConfig
from sfumato.nets.autoencoder import Autoencoder
from sfumato.nets.controlled import Controlled, ControlUse
from sfumato.nets.controlnet import ControlNet
from sfumato.nets.t2i_adapter import T2IAdapter
from sfumato.nets.unet import UNet
from sfumato.systems.codec import Codec, Embeddings, Latents, Pixels
from sfumato.systems.conditioning import ConditionerConfig, part_of
from sfumato.systems.guides import GuideConfig
from sfumato.systems.options import SampleOptions
from sfumato.systems.stage import Emits, Stage

__all__ = [
    "About",
    "CodecConfig",
    "ControlConfig",
    "EmbeddingsConfig",
    "LatentsConfig",
    "PixelsConfig",
    "StageConfig",
    "SystemConfig",
]


@dataclass(frozen=True, kw_only=True)
class About:
    """What a person should know of a system."""

    name: str = "unnamed"
    summary: str = ""
    license: str = ""
    """SPDX expression of the weights."""
    attribution: str = ""
    """Whose data it was trained on; goes with every copy of the weights."""
    data: str = ""

    @property
    def notice(self) -> dict[str, str]:
        """PNG text of a picture without a record: whose data it is made from, and under which license."""
        parts = [self.attribution, f"License: {self.license}" if self.license else ""]
        return {"Copyright": "\n".join(p for p in parts if p)} if any(parts) else {}


class CodecSettings(Protocol):
    """Settings of a codec."""

    def build(self, parts: Parts) -> Codec:
        """The codec itself."""
        ...


@dataclass(frozen=True, kw_only=True)
class PixelsConfig:
    """See codec.Pixels."""

    kind: Literal["pixels"] = "pixels"

    def build(self, parts: Parts) -> Codec:
        """The codec itself."""
        return Pixels()


@dataclass(frozen=True, kw_only=True)
class LatentsConfig:
    """See codec.Latents; `autoencoder` names a network among the parts."""

    autoencoder: str = "autoencoder"
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    full: bool = False
    kind: Literal["latents"] = "latents"

    def build(self, parts: Parts) -> Codec:
        """The codec itself."""
        net = part_of("network", self.autoencoder, parts.nets)
        if not isinstance(net, Autoencoder):
            raise ValueError(
                f"network {self.autoencoder!r} is a {type(net).__name__}; the codec needs an Autoencoder"
            )
        return Latents(net, self.mean, self.std, self.full)


@dataclass(frozen=True, kw_only=True)
class EmbeddingsConfig:
    """See codec.Embeddings."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    kind: Literal["embeddings"] = "embeddings"

    def build(self, parts: Parts) -> Codec:
        """The codec itself."""
        return Embeddings(self.mean, self.std)


CodecConfig = Annotated[PixelsConfig | LatentsConfig | EmbeddingsConfig, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """A ControlNet or T2I-Adapter of a stage: its network among the parts, and how it acts."""

    net: str = "control"
    use: ControlUse = field(default_factory=ControlUse)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Settings of a Stage; `net` names the denoiser's network among the parts.

    Attributes:
        parameterization: a name in PARAMETERIZATIONS.
        conditioners: their fields are merged.
        guide: what guidance of kind "guide" goes by.
        controls: ControlNets and T2I-Adapters of a U-Net, in the order of the pictures in `Inputs.hint`.
    """

    name: str = "base"
    net: str = "denoiser"
    schedule: ScheduleConfig
    parameterization: str
    learned_var: bool = False
    conditioners: tuple[ConditionerConfig, ...] = ()
    controls: tuple[ControlConfig, ...] = ()
    codec: CodecConfig = PixelsConfig()
    shape: tuple[int, ...]
    emits: Emits = "image"
    defaults: SampleOptions = field(default_factory=SampleOptions)
    guide: GuideConfig | None = None

    def __post_init__(self) -> None:
        PARAMETERIZATIONS[self.parameterization]
        if len(self.shape) not in (1, 3) or min(self.shape) < 1:
            raise ValueError(
                f"shape {self.shape}: expected (channels, height, width) or (dim,), all positive"
            )

    def build(self, parts: Parts) -> Stage:
        """The stage. Raises: ValueError if a part is missing or of the wrong kind."""
        codec = self.codec.build(parts)
        net = part_of("network", self.net, parts.nets)
        told = [c.build(parts, codec) for c in self.conditioners]
        if self.controls:
            net = self._controlled(net, parts)
            told.append(Hint(net.guesses, net.channels))
        parameterization = PARAMETERIZATIONS[self.parameterization]
        return Stage(
            name=self.name,
            denoiser=Denoiser(net, self.schedule, parameterization, self.learned_var),
            conditioner=merged(told),
            codec=codec,
            shape=self.shape,
            emits=self.emits,
            defaults=self.defaults,
            guide=None if self.guide is None else self.guide.build(parts, self.shape, self.conditioners),
        )

    def _controlled(self, net: nn.Module, parts: Parts) -> Controlled:
        branches = [part_of("network", control.net, parts.nets) for control in self.controls]
        nets = [branch for branch in branches if isinstance(branch, ControlNet | T2IAdapter)]
        if not isinstance(net, UNet) or len(nets) < len(branches):
            kinds = ", ".join(type(one).__name__ for one in (net, *branches))
            raise ValueError(
                f"ControlNets and T2I-Adapters steer a U-Net; stage {self.name!r} has networks {kinds}"
            )
        return Controlled(net, nets, [control.use for control in self.controls])


@dataclass(frozen=True, kw_only=True)
class SystemConfig:
    """Settings of a System.

    Raises: ValueError if there is no stage, or two have the same name.
    """

    stages: tuple[StageConfig, ...]

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"stages are named {names}; expected at least one, each with a name of its own")
