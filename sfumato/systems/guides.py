"""What guides a stage from outside: a classifier of noisy pictures, or GLIDE's noised CLIP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field

from sfumato.checkpoints.native import Parts
from sfumato.conditioners.text import checked
from sfumato.core.types import Inputs
from sfumato.diffusion.score import LogProb, class_log_prob, similarity
from sfumato.nets.classifier import NoisyClassifier
from sfumato.nets.noised_clip import NoisedText, NoisedVision
from sfumato.systems.conditioning import ConditionerConfig, LabelConfig, part_of
from sfumato.text.tokenizers import Tokenizer

__all__ = ["ByClassifier", "ByClassifierConfig", "ByClip", "ByClipConfig", "Guide", "GuideConfig"]

Told = tuple[ConditionerConfig, ...]


class Guide(Protocol):
    """What a user asks for -> log p(y | x_t)."""

    def __call__(self, inputs: Inputs, shape: tuple[int, ...]) -> LogProb:
        """For one walk over samples of a shape (C, h, w). Raises: ValueError for what it cannot judge."""
        ...


@dataclass(frozen=True)
class ByClassifier:
    """Towards `inputs.label` (Dhariwal & Nichol 2021, arXiv:2105.05233)."""

    net: NoisyClassifier

    def __call__(self, inputs: Inputs, shape: tuple[int, ...]) -> LogProb:
        """See Guide."""
        c, label = self.net.config, inputs.label
        _check_shape("classifier", shape, c.encoder.in_channels, c.size if c.pool == "attention" else None)
        if (
            label is None
            or len(label) != inputs.n
            or int(label.min()) < 0
            or int(label.max()) >= c.num_classes
        ):
            given = "none" if label is None else str(label.tolist())
            raise ValueError(
                f"the classifier guides to a class and label is {given}; give one for each of {inputs.n} "
                f"pictures, from 0 to {c.num_classes - 1}, or guidance 0"
            )
        return class_log_prob(self.net, label)


@dataclass(frozen=True)
class ByClip:
    """Towards `inputs.text` (Nichol et al. 2021, arXiv:2112.10741, section 2.4)."""

    net: NoisedVision
    encoder: NoisedText
    tokenizer: Tokenizer

    def __call__(self, inputs: Inputs, shape: tuple[int, ...]) -> LogProb:
        """See Guide."""
        _check_shape("CLIP", shape, 3, self.net.config.size)
        if inputs.text is None:
            raise ValueError("CLIP guides to a text, and there is none; give one, or guidance 0")
        ids, mask = self.tokenizer(checked(inputs.text, inputs.n, "text"))
        with torch.no_grad():
            device = self.encoder.positions.device
            target = self.encoder(ids.to(device), mask.sum(1).to(device))
        return similarity(self.net, target)


@dataclass(frozen=True, kw_only=True)
class ByClassifierConfig:
    """See ByClassifier; `net` names a network among the parts."""

    net: str = "classifier"
    kind: Literal["classifier"] = "classifier"

    def build(self, parts: Parts, shape: tuple[int, ...], told: Told) -> Guide:
        """The guide itself. Raises: ValueError if the classifier is one of other classes or pictures."""
        net = part_of("network", self.net, parts.nets)
        if not isinstance(net, NoisyClassifier):
            raise ValueError(f"network {self.net!r} is a {type(net).__name__}; expected a NoisyClassifier")
        classes = [c.num_classes for c in told if isinstance(c, LabelConfig)]
        if classes and classes[0] != net.config.num_classes:
            raise ValueError(
                f"the classifier knows {net.config.num_classes} classes and the denoiser {classes[0]}; "
                "choose a classifier that was trained for it"
            )
        side = net.config.size if net.config.pool == "attention" else None
        _check_shape("classifier", shape, net.config.encoder.in_channels, side)
        return ByClassifier(net)


@dataclass(frozen=True, kw_only=True)
class ByClipConfig:
    """See ByClip; names of networks and a tokenizer among the parts."""

    net: str = "clip_image"
    encoder: str = "clip_text"
    tokenizer: str = "clip"
    kind: Literal["clip"] = "clip"

    def build(self, parts: Parts, shape: tuple[int, ...], told: Told) -> Guide:
        """The guide itself. Raises: ValueError if the CLIP is for other pictures."""
        net, encoder = (part_of("network", name, parts.nets) for name in (self.net, self.encoder))
        tokenizer = part_of("tokenizer", self.tokenizer, parts.tokenizers)
        if not isinstance(net, NoisedVision) or not isinstance(encoder, NoisedText):
            kinds = f"{type(net).__name__} and {type(encoder).__name__}"
            raise ValueError(f"CLIP guidance is by a NoisedVision and a NoisedText, not a {kinds}")
        if encoder.config.embed != net.config.embed or tokenizer.vocab_size > encoder.config.vocab:
            raise ValueError("the two towers and the tokenizer of CLIP do not belong together")
        _check_shape("CLIP", shape, 3, net.config.size)
        return ByClip(net, encoder, tokenizer)


GuideConfig = Annotated[ByClassifierConfig | ByClipConfig, Field(discriminator="kind")]


def _check_shape(what: str, shape: tuple[int, ...], channels: int, side: int | None) -> None:
    if shape[0] != channels or (side is not None and shape[1:] != (side, side)):
        own = f"{side}x{side} with {channels}" if side is not None else f"{channels}"
        drawn = "x".join(map(str, reversed(shape[1:])))
        raise ValueError(
            f"the {what} reads pictures of {own} channels, and this stage draws {drawn} with {shape[0]}; "
            "choose one of the same size, or guidance 0"
        )
