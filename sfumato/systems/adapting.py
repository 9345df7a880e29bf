"""A system with an adapter merged into its nets, or guided by a net beside it, for drawing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from sfumato.checkpoints.adapters import read_adapters
from sfumato.checkpoints.files import sha256
from sfumato.checkpoints.native import Parts
from sfumato.diffusion.guidance import Guided
from sfumato.nets.classifier import NoisyClassifier
from sfumato.nets.lora import attach, detach, merged_copy, restore
from sfumato.systems.conditioning import TokenTextConfig
from sfumato.systems.config import SystemConfig
from sfumato.systems.guides import ByClassifierConfig, ByClipConfig, GuideConfig
from sfumato.systems.system import System, assemble
from sfumato.text.tokenizers import Tokenizer

__all__ = ["adapted", "guided_by"]


def adapted(system: System, path: str | Path, *, scale: float = 1.0) -> System:
    """The system as the adapter in a file changes it; the one that is given stays as it is.

    Args:
        path: adapter.safetensors of a run.
        scale: factor on the change; 1 = as trained, 0 = none.

    Returns: a system whose fingerprint is of the base, the file and the scale.
    Raises: ValueError in one line if the file is no adapter, or that of another system.
    """
    path = Path(path)
    file = read_adapters(path)
    if file.base != system.fingerprint:
        raise ValueError(
            f"{path} adapts a system with the fingerprint {file.base or 'unknown'}, and {system.about.name} "
            f"has {system.fingerprint or 'none'}; choose the system that it was trained on"
        )
    (stage,) = system.config.stages  # no other system can be adapted
    towers = [c.encoder for c in stage.conditioners if isinstance(c, TokenTextConfig)]
    names = {"denoiser": stage.net, **({"text": towers[0]} if towers else {})}
    nets: dict[str, nn.Module] = dict(system.parts.nets)
    for name, tensors in file.tensors.items():
        if name not in names:
            raise ValueError(f"{path} adapts a net {name!r}; {system.about.name} has {', '.join(names)}")
        net = nets[names[name]]
        attach(net, restore(net, tensors), weight=scale)
        nets[names[name]] = merged_copy(net).eval()
        detach(net)
    mark = hashlib.sha256(f"{system.fingerprint} {sha256(path)} {scale!r}".encode()).hexdigest()[:16]
    about = replace(system.about, name=f"{system.about.name} with {path.name}")
    parts = Parts(nets, system.parts.tokenizers)
    return assemble(system.config, parts, about=about, card=system.card, fingerprint=mark)


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
