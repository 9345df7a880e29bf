"""A system that is guided by a net beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from sfumato.checkpoints.native import Parts
from sfumato.diffusion.guidance import Guided
from sfumato.nets.classifier import NoisyClassifier
from sfumato.systems.config import SystemConfig
from sfumato.systems.guides import ByClassifierConfig, ByClipConfig, GuideConfig
from sfumato.systems.system import System, assemble
from sfumato.text.tokenizers import Tokenizer

__all__ = ["guided_by"]


def guided_by(
    system: System,
    nets: Mapping[str, nn.Module],
    tokenizer: Tokenizer | None = None,
    *,
    scale: float | None = None,
) -> System:
    """The system with its one stage guided by a noisy classifier, or by the two towers of a noised CLIP.

    Args:
        nets: the classifier under any name, or "clip_image" and "clip_text".
        tokenizer: of CLIP.
        scale: how strongly, unless a request says otherwise; None = 1 for a classifier, 3 for CLIP.

    Raises: ValueError in one line if they do not fit the stage.
    """
    if len(system.config.stages) != 1:
        raise ValueError(
            f"a guide is for one stage, and this system has {len(system.config.stages)}; join later"
        )
    classifiers = {name: net for name, net in nets.items() if isinstance(net, NoisyClassifier)}
    if not classifiers and not {"clip_image", "clip_text"} <= nets.keys():
        raise ValueError(
            f"a guide is a noisy classifier, or both towers of a noised CLIP; got {', '.join(nets) or 'none'}"
        )
    if not classifiers and tokenizer is None:
        raise ValueError(
            "the noised CLIP has no vocabulary; copy bpe_simple_vocab_16e6.txt.gz, or vocab.json and "
            "merges.txt, beside its files"
        )
    guide: GuideConfig = ByClassifierConfig() if classifiers else ByClipConfig()
    added = {"classifier": next(iter(classifiers.values()))} if classifiers else dict(nets)
    usual = 1.0 if classifiers else 3.0
    guidance = Guided(usual if scale is None else scale)
    defaults = replace(system.config.stages[0].defaults, guidance=guidance)
    stage = replace(system.config.stages[0], guide=guide, defaults=defaults)
    tokenizers = {**system.parts.tokenizers, **({} if tokenizer is None else {"clip": tokenizer})}
    parts = Parts({**system.parts.nets, **added}, tokenizers)
    return assemble(SystemConfig(stages=(stage,)), parts, about=system.about, card=system.card)
