"""What a system is, as JSON data: which parts it uses and how they are put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol, TypeVar

from pydantic import Field

from sfumato.checkpoints.native import Parts
from sfumato.conditioners.base import Conditioner, merged
from sfumato.conditioners.clip import ClipText, Tower
from sfumato.conditioners.image import Inpaint, LowRes
from sfumato.conditioners.label import LabelCond
from sfumato.conditioners.text import TokenText
from sfumato.core.registry import unknown
from sfumato.diffusion.denoiser import Denoiser
from sfumato.diffusion.parameterization import PARAMETERIZATIONS
from sfumato.diffusion.schedules import ScheduleConfig
from sfumato.nets.autoencoder import Autoencoder
from sfumato.nets.clip import CLIPText
from sfumato.systems.codec import Codec, Embeddings, Latents, Pixels
from sfumato.systems.options import SampleOptions
from sfumato.systems.stage import Emits, Stage

__all__ = [
    "About",
    "ClipTextConfig",
    "CodecConfig",
    "ConditionerConfig",
    "EmbeddingsConfig",
    "InpaintConfig",
    "LabelConfig",
    "LatentsConfig",
    "LowResConfig",
    "PixelsConfig",
    "StageConfig",
    "SystemConfig",
    "TokenTextConfig",
    "TowerConfig",
]

T = TypeVar("T")


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
    kind: Literal["latents"] = "latents"

    def build(self, parts: Parts) -> Codec:
        """The codec itself."""
        net = _part("network", self.autoencoder, parts.nets)
        if not isinstance(net, Autoencoder):
            raise ValueError(
                f"network {self.autoencoder!r} is a {type(net).__name__}; the codec needs an Autoencoder"
            )
        return Latents(net, self.mean, self.std)


@dataclass(frozen=True, kw_only=True)
class EmbeddingsConfig:
    """See codec.Embeddings."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    kind: Literal["embeddings"] = "embeddings"

    def build(self, parts: Parts) -> Codec:
        """The codec itself."""
        return Embeddings(self.mean, self.std)


class ConditionerSettings(Protocol):
    """Settings of a conditioner."""

    def build(self, parts: Parts, codec: Codec) -> Conditioner:
        """The conditioner itself."""
        ...


@dataclass(frozen=True, kw_only=True)
class TokenTextConfig:
    """See conditioners.text.TokenText; names of a tokenizer and a network among the parts."""

    tokenizer: str = "text"
    encoder: str = "text"
    kind: Literal["token_text"] = "token_text"

    def build(self, parts: Parts, codec: Codec) -> Conditioner:
        """The conditioner itself."""
        tokenizer = _part("tokenizer", self.tokenizer, parts.tokenizers)
        encoder = _part("network", self.encoder, parts.nets)
        rows = getattr(getattr(encoder, "config", None), "vocab_size", tokenizer.vocab_size)
        _check_ids(self.tokenizer, tokenizer.vocab_size, self.encoder, rows)
        return TokenText(tokenizer, encoder)


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """See conditioners.clip.Tower; names of a tokenizer and a network among the parts."""

    tokenizer: str = "tokenizer"
    encoder: str = "text_encoder"
    skip: int = 0
    norm: bool = True

    def build(self, parts: Parts) -> Tower:
        """The tower itself."""
        tokenizer = _part("tokenizer", self.tokenizer, parts.tokenizers)
        encoder = _part("network", self.encoder, parts.nets)
        if not isinstance(encoder, CLIPText):
            raise ValueError(f"network {self.encoder!r} is a {type(encoder).__name__}; a tower is a CLIPText")
        _check_ids(self.tokenizer, tokenizer.vocab_size, self.encoder, encoder.config.vocab)
        return Tower(tokenizer, encoder, self.skip, self.norm)


@dataclass(frozen=True, kw_only=True)
class ClipTextConfig:
    """See conditioners.clip.ClipText."""

    towers: tuple[TowerConfig, ...] = (TowerConfig(),)
    pooled: bool = False
    zero_null: bool = False
    kind: Literal["clip_text"] = "clip_text"

    def build(self, parts: Parts, codec: Codec) -> Conditioner:
        """The conditioner itself."""
        return ClipText(tuple(tower.build(parts) for tower in self.towers), self.pooled, self.zero_null)


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """See conditioners.label.LabelCond; `names` are those of the classes, for people."""

    num_classes: int
    names: tuple[str, ...] = ()
    kind: Literal["label"] = "label"

    def build(self, parts: Parts, codec: Codec) -> Conditioner:
        """The conditioner itself."""
        return LabelCond(self.num_classes)


@dataclass(frozen=True, kw_only=True)
class LowResConfig:
    """See conditioners.image.LowRes."""

    factor: int = 4
    mode: Literal["bilinear", "bicubic"] = "bilinear"
    schedule: ScheduleConfig | None = None
    aug: float | None = None
    kind: Literal["low_res"] = "low_res"

    def build(self, parts: Parts, codec: Codec) -> Conditioner:
        """The conditioner itself."""
        return LowRes(self.factor, self.mode, self.schedule, self.aug)


@dataclass(frozen=True, kw_only=True)
class InpaintConfig:
    """See conditioners.image.Inpaint."""

    mask_first: bool = True
    kind: Literal["inpaint"] = "inpaint"

    def build(self, parts: Parts, codec: Codec) -> Conditioner:
        """The conditioner itself."""
        return Inpaint(codec.encode, self.mask_first)


CodecConfig = Annotated[PixelsConfig | LatentsConfig | EmbeddingsConfig, Field(discriminator="kind")]
ConditionerConfig = Annotated[
    TokenTextConfig | ClipTextConfig | LabelConfig | LowResConfig | InpaintConfig, Field(discriminator="kind")
]


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Settings of a Stage; `net` names the denoiser's network among the parts.

    Attributes:
        parameterization: a name in PARAMETERIZATIONS.
        conditioners: their fields are merged.
    """

    name: str = "base"
    net: str = "denoiser"
    schedule: ScheduleConfig
    parameterization: str
    learned_var: bool = False
    conditioners: tuple[ConditionerConfig, ...] = ()
    codec: CodecConfig = PixelsConfig()
    shape: tuple[int, ...]
    emits: Emits = "image"
    defaults: SampleOptions = field(default_factory=SampleOptions)

    def __post_init__(self) -> None:
        PARAMETERIZATIONS[self.parameterization]
        if len(self.shape) not in (1, 3) or min(self.shape) < 1:
            raise ValueError(
                f"shape {self.shape}: expected (channels, height, width) or (dim,), all positive"
            )

    def build(self, parts: Parts) -> Stage:
        """The stage. Raises: ValueError if a part is missing or of the wrong kind."""
        codec = self.codec.build(parts)
        net = _part("network", self.net, parts.nets)
        parameterization = PARAMETERIZATIONS[self.parameterization]
        return Stage(
            name=self.name,
            denoiser=Denoiser(net, self.schedule, parameterization, self.learned_var),
            conditioner=merged([c.build(parts, codec) for c in self.conditioners]),
            codec=codec,
            shape=self.shape,
            emits=self.emits,
            defaults=self.defaults,
        )


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


def _part(kind: str, name: str, parts: Mapping[str, T]) -> T:
    if name not in parts:
        raise ValueError(unknown(f"{kind} part", name, list(parts)))
    return parts[name]


def _check_ids(tokenizer: str, ids: int, encoder: str, rows: int) -> None:
    if rows < ids:
        raise ValueError(
            f"tokenizer {tokenizer!r} has {ids} ids but network {encoder!r} embeds {rows}; "
            "they do not belong together"
        )
