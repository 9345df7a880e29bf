"""What tells the networks of a system something, as JSON data: settings of conditioners."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, Protocol, TypeVar

from pydantic import Field

from sfumato.checkpoints.native import Parts
from sfumato.conditioners.base import Conditioner
from sfumato.conditioners.clip import ClipText, Tower
from sfumato.conditioners.image import Depth, Edit, ImageEmbed, Inpaint, LowRes
from sfumato.conditioners.label import LabelCond, LabelToken
from sfumato.conditioners.places import Boxes, Semantic
from sfumato.conditioners.sizes import Sizes
from sfumato.conditioners.text import TokenText
from sfumato.conditioners.vision import ClipImage
from sfumato.core.registry import unknown
from sfumato.core.types import Reading
from sfumato.diffusion.schedules import ScheduleConfig
from sfumato.nets.clip import CLIPText, CLIPVision, EmbeddingMoments
from sfumato.nets.text import TextTransformer
from sfumato.nets.told import ClassMap, ClassToken
from sfumato.systems.codec import Codec, Latents

__all__ = [
    "READS_IMAGE",
    "TEXTS",
    "BoxesConfig",
    "ClipImageConfig",
    "ClipTextConfig",
    "ConditionerConfig",
    "DepthConfig",
    "EditConfig",
    "ImageEmbedConfig",
    "InpaintConfig",
    "LabelConfig",
    "LowResConfig",
    "SemanticConfig",
    "SizesConfig",
    "TokenTextConfig",
    "TowerConfig",
    "part_of",
]

T = TypeVar("T")


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
        tokenizer = part_of("tokenizer", self.tokenizer, parts.tokenizers)
        encoder = part_of("network", self.encoder, parts.nets)
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
        tokenizer = part_of("tokenizer", self.tokenizer, parts.tokenizers)
        encoder = part_of("network", self.encoder, parts.nets)
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
    reading: Reading = field(default_factory=Reading)
    mask: bool = False
    kind: Literal["clip_text"] = "clip_text"

    def build(self, parts: Parts, codec: Codec) -> Conditioner:
        """The conditioner itself."""
        towers = tuple(tower.build(parts) for tower in self.towers)
        return ClipText(towers, self.pooled, self.zero_null, self.reading, self.mask)


@dataclass(frozen=True, kw_only=True)
class SizesConfig:
    """See conditioners.sizes.Sizes."""

    size: tuple[int, int]
    scored: bool = False
    kind: Literal["sizes"] = "sizes"

    def build(self, parts: Parts, codec: Codec) -> Conditioner:
        """The conditioner itself."""
        return Sizes(self.size, self.scored)


@dataclass(frozen=True, kw_only=True)
class LabelConfig:
    """See conditioners.label.LabelCond; `names` are those of the classes, for people.

    `encoder` names a ClassToken among the parts, which makes a token of the class; "" = the net reads it.
    """

    num_classes: int
    names: tuple[str, ...] = ()
    null: bool = True
    encoder: str = ""
    kind: Literal["label"] = "label"

    def build(self, parts: Parts, codec: Codec) -> Conditioner:
        """The conditioner itself."""
        labels = LabelCond(self.num_classes, self.null)
        if not self.encoder:
            return labels
        encoder = part_of("network", self.encoder, parts.nets)
        rows = self.num_classes + self.null
        if not isinstance(encoder, ClassToken) or encoder.config.rows < rows:
            raise ValueError(f"network {self.encoder!r} must be a ClassToken of at least {rows} classes")
        return LabelToken(labels, encoder)


@dataclass(frozen=True, kw_only=True)
class LowResConfig:
    """See conditioners.image.LowRes."""

    factor: int = 4
    mode: Literal["bilinear", "bicubic"] = "bilinear"
    schedule: ScheduleConfig | None = None
    aug: float | None = None
    align: bool = False
    rounded: bool = False
    antialias: bool = False
    kind: Literal["low_res"] = "low_res"

    def build(self, parts: Parts, codec: Codec) -> Conditioner:
        """The conditioner itself."""
        return LowRes(
            self.factor, self.mode, self.schedule, self.aug, self.align, self.rounded, self.antialias
        )


@dataclass(frozen=True, kw_only=True)
class ImageEmbedConfig:
    """See conditioners.image.ImageEmbed; `empty` names a NullImage among the parts, "" = zeros."""

    empty: str = ""
    unit: bool = False
    kind: Literal["image_embed"] = "image_embed"

    def build(self, parts: Parts, codec: Codec) -> Conditioner:
        """The conditioner itself."""
        return ImageEmbed(part_of("network", self.empty, parts.nets) if self.empty else None, self.unit)


@dataclass(frozen=True, kw_only=True)
class InpaintConfig:
    """See conditioners.image.Inpaint."""

    mask_first: bool = True
    marks_known: bool = False
    black: bool = False
    kind: Literal["inpaint"] = "inpaint"

    def build(self, parts: Parts, codec: Codec) -> Conditioner:
        """The conditioner itself."""
        return Inpaint(codec.encode, self.mask_first, self.marks_known, self.black)


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """See conditioners.image.Edit; the latents are not normalized, as its networks were trained."""

    kind: Literal["edit"] = "edit"

    def build(self, parts: Parts, codec: Codec) -> Conditioner:
        """The conditioner itself."""
        if not isinstance(codec, Latents):
            return Edit(codec.encode)
        autoencoder = codec.autoencoder
        return Edit(lambda x: autoencoder.encode(x).mean)


@dataclass(frozen=True, kw_only=True)
class DepthConfig:
    """See conditioners.image.Depth."""

    kind: Literal["depth"] = "depth"

    def build(self, parts: Parts, codec: Codec) -> Conditioner:
        """The conditioner itself."""
        return Depth(codec.factor)


@dataclass(frozen=True, kw_only=True)
class ClipImageConfig:
    """See conditioners.vision.ClipImage; names of networks among the parts, "" = no moments."""

    encoder: str = "image_encoder"
    moments: str = ""
    schedule: ScheduleConfig | None = None
    aug: float = 0.0
    kind: Literal["clip_image"] = "clip_image"

    def build(self, parts: Parts, codec: Codec) -> Conditioner:
        """The conditioner itself."""
        tower = part_of("network", self.encoder, parts.nets)
        moments = part_of("network", self.moments, parts.nets) if self.moments else None
        if not isinstance(tower, CLIPVision) or not isinstance(moments, EmbeddingMoments | None):
            raise ValueError(
                f"networks {self.encoder!r} and {self.moments!r} must be a CLIPVision and EmbeddingMoments"
            )
        return ClipImage(tower, moments, self.schedule, self.aug)


@dataclass(frozen=True, kw_only=True)
class SemanticConfig:
    """See conditioners.places.Semantic; `encoder` names a ClassMap among the parts."""

    encoder: str = "map"
    kind: Literal["semantic"] = "semantic"

    def build(self, parts: Parts, codec: Codec) -> Conditioner:
        """The conditioner itself."""
        encoder = part_of("network", self.encoder, parts.nets)
        if not isinstance(encoder, ClassMap):
            raise ValueError(f"network {self.encoder!r} is a {type(encoder).__name__}; expected a ClassMap")
        return Semantic(encoder, codec.factor)


@dataclass(frozen=True, kw_only=True)
class BoxesConfig:
    """See conditioners.places.Boxes; `encoder` names a TextTransformer among the parts."""

    encoder: str = "text"
    kind: Literal["boxes"] = "boxes"

    def build(self, parts: Parts, codec: Codec) -> Conditioner:
        """The conditioner itself."""
        encoder = part_of("network", self.encoder, parts.nets)
        if not isinstance(encoder, TextTransformer) or (encoder.config.context - 2) % 3:
            raise ValueError(f"network {self.encoder!r} must be a TextTransformer of 3 n + 2 tokens")
        return Boxes(encoder)


ConditionerConfig = Annotated[
    TokenTextConfig
    | ClipTextConfig
    | ClipImageConfig
    | SizesConfig
    | LabelConfig
    | LowResConfig
    | ImageEmbedConfig
    | InpaintConfig
    | EditConfig
    | DepthConfig
    | SemanticConfig
    | BoxesConfig,
    Field(discriminator="kind"),
]
READS_IMAGE = (InpaintConfig, EditConfig, ClipImageConfig)
"""A stage with one of these is told the picture of a request, and does not begin with it noised."""

TEXTS = (TokenTextConfig, ClipTextConfig, BoxesConfig)
"""Those that read a text."""


def part_of(kind: str, name: str, parts: Mapping[str, T]) -> T:
    """The part of that name. Raises: ValueError if there is none."""
    if name not in parts:
        raise ValueError(unknown(f"{kind} part", name, list(parts)))
    return parts[name]


def _check_ids(tokenizer: str, ids: int, encoder: str, rows: int) -> None:
    if rows < ids:
        raise ValueError(
            f"tokenizer {tokenizer!r} has {ids} ids but network {encoder!r} embeds {rows}; "
            "they do not belong together"
        )
