"""A system that knows one word more: textual inversion for CLIP's text towers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sfumato.checkpoints.files import read_weights, sha256
from sfumato.checkpoints.kinds import looks_like
from sfumato.checkpoints.native import Parts
from sfumato.checkpoints.weights import assign, parameter_free
from sfumato.nets.clip import CLIPText
from sfumato.systems.conditioning import ClipTextConfig
from sfumato.systems.system import System, assemble

__all__ = ["read_word", "taught"]

TOWERS = ("clip_l", "clip_g")  # names in files for SDXL, in the order of its towers


def taught(system: System, path: str | Path, *, word: str = "") -> System:
    """The system with the word of an embedding file; the one that is given stays as it is.

    Args:
        path: a .pt, .bin or .safetensors file; see `read_word`.
        word: how prompts say it; "" = the word in the file, or its name. Capitals do not count.

    Raises: ValueError in one line if the file is no embedding, one for other text towers, or the word is
        known already.
    """
    path = Path(path)
    named, vectors = read_word(path)
    word = word or named
    kinds = [c for stage in system.config.stages for c in stage.conditioners if isinstance(c, ClipTextConfig)]
    towers = list(dict.fromkeys((t.tokenizer, t.encoder) for kind in kinds for t in kind.towers))
    nets, tokenizers = dict(system.parts.nets), dict(system.parts.tokenizers)
    encoders = [net for _, name in towers if isinstance(net := nets[name], CLIPText)]
    for (tokenizer, name), net, vector in zip(
        towers, encoders, _by_tower(vectors, encoders, path), strict=True
    ):
        end = int(tokenizers[tokenizer]([""])[0].max())
        tokenizers[tokenizer], ids = tokenizers[tokenizer].taught(word, len(vector))
        nets[name] = _grown(net, ids, vector, end)
    mark = hashlib.sha256(f"{system.fingerprint} {sha256(path)} {word}".encode()).hexdigest()[:16]
    parts = Parts(nets, tokenizers)
    return assemble(system.config, parts, about=system.about, card=system.card, fingerprint=mark)


def read_word(path: Path) -> tuple[str, list[Tensor]]:
    """The word of a file of A1111, of the original scripts, or of diffusers; its vectors for every tower.

    Gal et al. 2022 (arXiv:2208.01618). Only diffusers' files name it; else it is the name of the file.

    Raises: ValueError in one line if the file is something else.
    """
    content = read_weights(path)
    inside, word = content.get("string_to_param", content), path.stem
    items = inside.items() if isinstance(inside, Mapping | nn.ParameterDict) else ()
    tensors = {name: v for name, v in items if isinstance(v, Tensor)}
    if set(tensors) == set(TOWERS):
        found = [tensors[name] for name in TOWERS]
    elif len(tensors) == 1:
        ((name, vector),) = tensors.items()
        found, word = [vector], path.stem if name in ("*", "emb_params", *TOWERS) else name
    else:
        found = []
    found = [(v[None] if v.ndim == 1 else v).detach().float() for v in found]
    if not found or any(v.ndim != 2 or len(v) != len(found[0]) for v in found):
        hint = looks_like(content) or f"it holds {', '.join(map(repr, list(content)[:3]))}"
        raise ValueError(f"{path} is no embedding of textual inversion: {hint}")
    return word, found


def _by_tower(vectors: Sequence[Tensor], towers: Sequence[CLIPText], path: Path) -> list[Tensor]:
    """One for each tower; of a file for two the one that fits, where there is one tower."""
    widths = [tower.config.width for tower in towers]
    if len(towers) == 1:
        vectors = [v for v in vectors if v.shape[1] == widths[0]] or vectors
    found = [v.shape[1] for v in vectors]
    if not widths or found != widths:
        have = ", ".join(map(str, widths)) or "none of CLIP"
        raise ValueError(
            f"{path} has vectors of width {', '.join(map(str, found))}, and the text towers of this system "
            f"are of width {have}: it is for another base"
        )
    return list(vectors)


def _grown(net: CLIPText, ids: Sequence[int], vectors: Tensor, end: int) -> CLIPText:
    """The tower with rows for new ids, which still ends texts at the same id."""
    c, state = net.config, net.state_dict()
    old = state["tokens.weight"]
    config = replace(c, vocab=max(c.vocab, ids[-1] + 1), end=end if c.end is None else c.end)
    table = torch.cat([old, old.new_zeros(config.vocab - c.vocab, c.width)])
    table[list(ids)] = vectors.to(old)
    grown = parameter_free(CLIPText, config)
    assign(grown, {**state, "tokens.weight": table}, where="a learned word")
    return grown.eval()
