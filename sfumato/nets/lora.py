"""Low-rank adapters beside the linear and convolution layers of any net: make, attach, scale, merge, extract.

A layer with weight W computes W x + scale * up(down(x)) (Hu et al. 2021, arXiv:2106.09685, eq. 3). An adapter
is a module of its own: the net keeps its names, its `parameters()` and its `state_dict()` as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor, nn

from sfumato.nets.adapted import ADAPTED, PLAIN, Adapted, Attached, Layer, LowRank

__all__ = [
    "ATTENTION",
    "Adapter",
    "LoraConfig",
    "attach",
    "detach",
    "extract",
    "fresh",
    "inject",
    "merge",
    "merged_copy",
    "restore",
    "set_weight",
    "targets",
    "unmerge",
]

N = TypeVar("N", bound=nn.Module)
ATTENTION = ("*.q", "*.k", "*.v", "*.qkv", "*.kv", "*.token_[kv]", "*.out")
"""Query, key, value and output projections, by the names that all nets here give them."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which layers of a net get low-rank pairs, and how large.

    Attributes:
        rank: inner width of each pair; of each part of a fused layer (q, k, v).
        alpha: the pair's output is scaled by alpha / rank; None = alpha is the rank.
        targets: globs on the names of linear and convolution layers, such as "*.mlp.*" or "*.conv?".
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ATTENTION

    def __post_init__(self) -> None:
        if self.rank < 1 or (self.alpha is not None and not self.alpha > 0) or not self.targets:
            raise ValueError(
                f"lora with rank {self.rank}, alpha {self.alpha}, targets {self.targets}: rank must be at "
                "least 1, alpha positive, and there must be a target"
            )


class Adapter(nn.Module):
    """Low-rank pairs by the name of their layer; LAYER.down.weight and LAYER.up.weight in its state_dict."""

    def __init__(self, pairs: Mapping[str, LowRank]) -> None:
        super().__init__()
        for name, pair in pairs.items():
            *path, last = name.split(".")
            home: nn.Module = self
            for part in path:
                if part not in home._modules:
                    home.add_module(part, nn.Module())
                home = home.get_submodule(part)
            home.add_module(last, pair)

    @property
    def pairs(self) -> dict[str, LowRank]:
        """Every pair by the name of its layer."""
        return {name: module for name, module in self.named_modules() if isinstance(module, LowRank)}


def targets(net: nn.Module, patterns: Sequence[str]) -> dict[str, Layer]:
    """The linear and convolution layers of a net whose names fit one of the patterns, in the net's order.

    `ATTENTION` as a whole may fit a net in part; any other pattern must fit something.

    Raises: ValueError in one line for a pattern that fits nothing, with the names that there are.
    """
    layers = _layers(net)
    chosen = {n: layer for n, layer in layers.items() if any(fnmatchcase(n, p) for p in patterns)}
    idle = [p for p in patterns if not any(fnmatchcase(n, p) for n in layers)]
    if chosen and set(patterns) == set(ATTENTION):
        idle = []
    if idle:
        names = sorted({".".join("*" if part.isdigit() else part for part in n.split(".")) for n in layers})
        raise ValueError(
            f"lora target {idle[0]!r} fits no linear or convolution layer of {type(net).__name__}; "
            f"its layers: {', '.join(names) or 'none'}"
        )
    return chosen


def fresh(net: nn.Module, config: LoraConfig) -> Adapter:
    """An adapter that changes nothing yet, on the device of the net, in float32; not attached.

    Raises: ValueError as `targets` does.
    """
    pairs = {}
    for name, layer in targets(net, config.targets).items():
        pair = LowRank(layer, config.rank, float(config.alpha or config.rank))
        pairs[name] = pair.to(layer.weight.device)
    return Adapter(pairs)


def inject(net: nn.Module, config: LoraConfig, *, name: str = "default") -> Adapter:
    """A fresh adapter, attached."""
    adapter = fresh(net, config)
    attach(net, adapter, name=name)
    return adapter


def attach(net: nn.Module, adapter: Adapter, *, name: str = "default", weight: float = 1.0) -> None:
    """Let an adapter act on a net; several with different names add up.

    The net holds the adapter's own pairs, so training one trains the other; `net.to` moves them along, and
    `copy.deepcopy(net)` copies them.

    Args:
        weight: factor on the adapter's change; see `set_weight`.

    Raises: ValueError in one line if the name is taken or the adapter belongs to another net.
    """
    layers = _layers(net)
    for layer_name, pair in adapter.pairs.items():
        _check_pair(layers, layer_name, pair, net)
        layer = layers[layer_name]
        if isinstance(layer, Adapted) and name in layer.attached:
            raise ValueError(f"an adapter {name!r} is attached already; detach it or choose another name")
    for layer_name, pair in adapter.pairs.items():
        layer = layers[layer_name]
        if not isinstance(layer, Adapted):
            _become(layer, ADAPTED[type(layer)])
            assert isinstance(layer, Adapted)
            layer.attached, layer.kept = {}, None
        layer.attached[name] = Attached(pair.to(layer.weight.device), weight)
        layer.refresh()


def detach(net: nn.Module, *, name: str | None = None) -> None:
    """Take an adapter off a net, or all of them; the weights are those without it, bit for bit.

    Raises: ValueError if no such adapter is attached.
    """
    for layer in _adapted(net, name):
        for key in [name] if name is not None else list(layer.attached):
            layer.attached.pop(key, None)
        layer.refresh()
        if not layer.attached:
            layer.restore()
            _plain(layer)


def set_weight(net: nn.Module, name: str, weight: float) -> None:
    """How strongly an attached adapter acts: 0 = not at all, 1 = as trained; on a merged net too.

    Raises: ValueError if no such adapter is attached.
    """
    for layer in _adapted(net, name):
        if name in layer.attached:
            layer.attached[name] = Attached(layer.attached[name].pair, weight)
            layer.refresh()


def merge(net: nn.Module) -> None:
    """Add all attached adapters into the weights, so that they cost nothing at run time.

    The weights before are kept beside the new ones (as much memory again, for adapted layers only):
    subtracting the change would not give their bits back.
    """
    for layer in _adapted(net, None):
        if layer.kept is None:
            layer.kept = layer.weight.detach().clone()
            layer.refresh()


def unmerge(net: nn.Module) -> None:
    """Inverse of `merge`: the weights are those of before, bit for bit, and the adapters act beside them."""
    for layer in _adapted(net, None):
        layer.restore()


def merged_copy(net: N, adapter: Adapter | None = None) -> N:
    """A copy of a net with plain layers whose weights hold what is attached to it; the net is untouched.

    Args:
        adapter: merge this one alone instead, in place of all that is attached.

    Raises: ValueError if the adapter belongs to another net.
    """
    twin = copy.deepcopy(net)
    if adapter is not None:
        detach(twin)
        attach(twin, copy.deepcopy(adapter))
    merge(twin)
    for layer in _adapted(twin, None):
        layer.kept = None
        _plain(layer)
    return twin


def extract(adapter: Adapter) -> dict[str, Tensor]:
    """LAYER.down.weight, LAYER.up.weight and LAYER.alpha () of every pair: all that a file needs.

    In a layer of `parts` parts (q, k, v) rows [i rank, (i + 1) rank) of down and the i-th of `parts` equal
    blocks of rows of up form the pair of part i. The shapes are otherwise those of kohya's and PEFT's files.
    """
    tensors: dict[str, Tensor] = {}
    for name, pair in adapter.pairs.items():
        tensors[f"{name}.down.weight"] = pair.down.weight.detach().clone()
        tensors[f"{name}.up.weight"] = pair.up.weight.detach().clone()
        tensors[f"{name}.alpha"] = torch.tensor(pair.alpha)
    return tensors


def restore(net: nn.Module, tensors: Mapping[str, Tensor]) -> Adapter:
    """The adapter of `extract`, for a net that it fits; not attached. Ranks may differ from layer to layer.

    A pair without alpha is not scaled: alpha is its rank.

    Raises: ValueError in one line for a tensor that does not fit the net, or a pair with a half missing.
    """
    layers, pairs = _layers(net), {}
    names = dict.fromkeys(_owner(key) for key in tensors)
    for name in names:
        down, up = tensors.get(f"{name}.down.weight"), tensors.get(f"{name}.up.weight")
        if name not in layers or down is None or up is None or up.ndim < 2:
            what = "a pair" if down is not None and up is not None else "half a pair"
            raise ValueError(
                f"the adapter holds {what} for {name!r}; {type(net).__name__} needs both halves for a layer "
                "of its own: this adapter belongs to another net"
            )
        rank = up.shape[1]
        alpha = float(tensors.get(f"{name}.alpha", torch.tensor(float(rank))))
        pair = LowRank(layers[name], rank, alpha)
        if (pair.down.weight.shape, pair.up.weight.shape) != (down.shape, up.shape):
            raise ValueError(
                f"the adapter's pair for {name!r} has shapes {tuple(down.shape)} and {tuple(up.shape)}, the "
                f"layer needs {tuple(pair.down.weight.shape)} and {tuple(pair.up.weight.shape)}: "
                "this adapter belongs to another net"
            )
        pair.load_state_dict({"down.weight": down, "up.weight": up})
        pairs[name] = pair.to(layers[name].weight.device)
    return Adapter(pairs)


def _owner(key: str) -> str:
    for ending in (".down.weight", ".up.weight", ".alpha"):
        if key.endswith(ending):
            return key.removesuffix(ending)
    raise ValueError(f"{key!r} is no tensor of an adapter; expected LAYER.down.weight, .up.weight or .alpha")


def _layers(net: nn.Module) -> dict[str, Layer]:
    """Layers that can be adapted, by name. Subclasses of torch's layers may compute something else."""
    kinds = (*ADAPTED, *PLAIN)
    return {
        name: m
        for name, m in net.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d) and type(m) in kinds and getattr(m, "groups", 1) == 1
    }


def _adapted(net: nn.Module, name: str | None) -> list[Adapted]:
    """Adapted layers; ValueError if an adapter of that name is wanted and there is none."""
    layers = [m for m in net.modules() if isinstance(m, Adapted)]
    known = sorted({key for layer in layers for key in layer.attached})
    if name is not None and name not in known:
        raise ValueError(f"no adapter {name!r} is attached; attached: {', '.join(known) or 'none'}")
    return layers


def _plain(layer: Adapted) -> None:
    del layer.attached, layer.kept
    _become(layer, PLAIN[type(layer)])


def _become(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Another class for the same object: its parameters, its tags and whoever refers to it stay."""
    layer.__class__ = kind  # type: ignore[assignment]


def _check_pair(layers: Mapping[str, Layer], name: str, pair: LowRank, net: nn.Module) -> None:
    found = tuple(layers[name].weight.shape) if name in layers else None
    if found != pair.shape:
        has = f"of shape {found}" if found else "not there"
        raise ValueError(
            f"the adapter changes a layer {name!r} of shape {pair.shape}, which in {type(net).__name__} is "
            f"{has}: this adapter belongs to another net"
        )
