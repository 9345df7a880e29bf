"""Published weights of DINOv2: files of facebookresearch/dinov2, and those of the model hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sfumato.checkpoints.files import read_tensors
from sfumato.checkpoints.keymap import KeyMap, Leaf, LeafTable, stacked
from sfumato.checkpoints.weights import assign, parameter_free
from sfumato.nets.dinov2 import DINOv2, DINOv2Config

__all__ = ["hub_map", "original_map", "read_dinov2"]

TOKENS = ("cls_token", "position_embeddings", "mask_token", "register_tokens")
HEAD = 64  # width of a head in every published size


def original_map(config: DINOv2Config) -> KeyMap:
    """Names of facebookresearch/dinov2."""
    mlp: LeafTable = {"w12": "up", "w3": "down"} if config.gated else {"fc1": "up", "fc2": "down"}
    block: LeafTable = {
        **{"norm1": "norm1", "attn.qkv": "attention.qkv", "attn.proj": "attention.out", "norm2": "norm2"},
        **{f"ls{i}.gamma": Leaf(f"scale{i}", tensors=()) for i in (1, 2)},
        **{f"mlp.{theirs}": f"mlp.{ours}" for theirs, ours in mlp.items()},
    }
    top: LeafTable = {
        **{"patch_embed.proj": "patches", "norm": "norm"},
        **_tokens(config, "cls_token", "pos_embed", "mask_token", "register_tokens"),
    }
    blocks = [(f"blocks.{i}", f"blocks.{i}", block) for i in range(config.depth)]
    return KeyMap.of([("", "", top), *blocks])


def hub_map(config: DINOv2Config) -> KeyMap:
    """Names of the model hub, as transformers has them."""
    names = ("weights_in", "weights_out") if config.gated else ("fc1", "fc2")
    block: LeafTable = {
        **{"norm1": "norm1", "norm2": "norm2", "attention.output.dense": "attention.out"},
        tuple(f"attention.attention.{n}" for n in ("query", "key", "value")): Leaf(
            "attention.qkv", stacked(3)
        ),
        **{f"layer_scale{i}.lambda1": Leaf(f"scale{i}", tensors=()) for i in (1, 2)},
        **{f"mlp.{theirs}": f"mlp.{ours}" for theirs, ours in zip(names, ("up", "down"), strict=True)},
    }
    top: LeafTable = {
        **{"embeddings.patch_embeddings.projection": "patches", "layernorm": "norm"},
        **_tokens(config, *(f"embeddings.{name}" for name in TOKENS)),
    }
    blocks = [(f"encoder.layer.{i}", f"blocks.{i}", block) for i in range(config.depth)]
    return KeyMap.of([("", "", top), *blocks])


def read_dinov2(path: Path) -> DINOv2:
    """The network of a file, of a size told by its shapes.

    Raises: ValueError in one line with the file and what is wrong in it.
    """
    state = read_tensors(path)
    hub = "embeddings.cls_token" in state
    config = _config(state, hub, path)
    state.setdefault("embeddings.mask_token" if hub else "mask_token", torch.zeros(1, config.width))
    names = hub_map(config) if hub else original_map(config)
    net = parameter_free(DINOv2, config)
    assign(net, names.load(state, where=str(path)), where=str(path))
    return net.eval()


def _tokens(config: DINOv2Config, cls: str, positions: str, mask: str, registers: str) -> LeafTable:
    names = {cls: "cls", positions: "positions", mask: "mask"}
    names |= {registers: "registers"} if config.registers else {}
    return {theirs: Leaf(ours, tensors=()) for theirs, ours in names.items()}


def _config(state: Mapping[str, Tensor], hub: bool, path: Path) -> DINOv2Config:
    prefix = "embeddings." if hub else ""
    positions = state.get(f"{prefix}{'position_embeddings' if hub else 'pos_embed'}")
    patches = state.get(f"{prefix}{'patch_embeddings.projection' if hub else 'patch_embed.proj'}.weight")
    if positions is None or patches is None or positions.ndim != 3 or patches.ndim != 4:
        raise ValueError(f"{path} is no DINOv2: it has no 'pos_embed' and 'patch_embed.proj.weight'")
    first = "encoder.layer" if hub else "blocks"
    numbers = [n.removeprefix(f"{first}.").split(".")[0] for n in state if n.startswith(f"{first}.")]
    gated = "weights_out" if hub else "w3"
    down = state.get(f"{first}.0.mlp.{gated}.weight")
    plain = state.get(f"{first}.0.mlp.fc2.weight") if down is None else down
    registers = state.get(f"{prefix}register_tokens")
    width = patches.shape[0]
    if plain is None or width % HEAD:
        raise ValueError(
            f"{path} is no DINOv2: its width is {width}, and it has no '{first}.0.mlp.fc2.weight'"
        )
    return DINOv2Config(
        width=width,
        depth=1 + max(map(int, numbers)),
        heads=width // HEAD,
        hidden=plain.shape[1],
        gated=down is not None,
        patch=patches.shape[-1],
        side=round((positions.shape[1] - 1) ** 0.5),
        registers=0 if registers is None else registers.shape[1],
    )
