"""Published LPIPS: the VGG-16 or SqueezeNet 1.1 of torchvision, and the linear heads of lpips 0.1.

The trunk is a file of torchvision with names `features.N...`, the heads are one with `lin0.model.1.weight`
and so on, as in the folder weights/v0.1 of the lpips package; latent diffusion trains with the VGG pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sfumato.checkpoints.files import read_tensors
from sfumato.checkpoints.keymap import KeyMap, Leaf, LeafTable, Row, squeezed
from sfumato.checkpoints.weights import assign
from sfumato.nets.perceptual import (
    FeatureDistance,
    PerceptualConfig,
    PerceptualNet,
    SqueezeConfig,
    SqueezePerceptualNet,
)

__all__ = ["heads_map", "read_lpips", "squeeze_map", "vgg_map"]

CLASSIFIER = ("classifier.",)  # what torchvision's trunks feed; LPIPS has no use for it
CONVS = (2, 2, 3, 3, 3)  # of the stages of VGG-16
FIRE: LeafTable = {"squeeze": "squeeze", "expand1x1": "expand1", "expand3x3": "expand3"}


def vgg_map(config: PerceptualConfig) -> KeyMap:
    """Names of a VGG trunk: torchvision counts convolutions, activations and pools in one row."""
    table: dict[str | tuple[str, ...], str | Leaf] = {}
    index = 0
    for i, convs in enumerate(config.convs):
        index += i > 0  # the pool before the stage
        for j in range(convs):
            table[str(index)] = f"{i}.{2 * j}"
            index += 2
    return KeyMap.of([("features", "trunk.stages", table)], CLASSIFIER)


def squeeze_map(config: SqueezeConfig) -> KeyMap:
    """Names of a SqueezeNet trunk; the first fire module follows convolution, activation and pool."""
    blocks = [
        (f"features.{index}", f"trunk.stages.{stage}.{place}", FIRE)
        for index, (stage, place) in zip(_fire_indices(config), config.places, strict=True)
    ]
    stem: tuple[str, str, LeafTable] = ("features.0", "trunk.stages.0.0", {"": ""})
    return KeyMap.of([stem, *blocks], CLASSIFIER)


def heads_map(count: int) -> KeyMap:
    """Names of the heads: 1x1 convolutions to one channel without bias."""
    row = squeezed(0, 2, 3)
    return KeyMap(tuple(Row((f"lin{i}.model.1.weight",), (f"weights.{i}",), row) for i in range(count)))


def read_lpips(trunk: Path, heads: Path) -> FeatureDistance:
    """The perceptual distance of two files; which trunk it has is told by the names in the first.

    Raises: ValueError in one line with the file and what is wrong in it.
    """
    state, linear = read_tensors(trunk), read_tensors(heads)
    if "features.0.weight" not in state:
        raise ValueError(
            f"{trunk} has no tensor 'features.0.weight'; give the VGG-16 or SqueezeNet 1.1 of torchvision"
        )
    net: FeatureDistance
    if any(".squeeze." in name for name in state):
        squeeze = _squeeze_config(state, trunk)
        net, names = SqueezePerceptualNet(squeeze), squeeze_map(squeeze)
    else:
        vgg = _vgg_config(state, trunk)
        net, names = PerceptualNet(vgg), vgg_map(vgg)
    weights = names.load(state, where=str(trunk)) | heads_map(len(net.weights)).load(linear, where=str(heads))
    assign(net, dict(net.named_buffers()) | weights, where=f"{trunk} with {heads}")
    return net


def _vgg_config(state: Mapping[str, Tensor], path: Path) -> PerceptualConfig:
    """VGG-16 of the widths in the file."""
    rows = vgg_map(PerceptualConfig()).rows
    first = [row.theirs[0] for row in rows if row.ours[0].endswith(".0.weight")]
    return PerceptualConfig(widths=tuple(_rows(state, name, path) for name in first), convs=CONVS)


def _squeeze_config(state: Mapping[str, Tensor], path: Path) -> SqueezeConfig:
    """SqueezeNet 1.1 of the widths in the file."""
    fires = tuple(
        (
            _rows(state, f"features.{i}.squeeze.weight", path),
            _rows(state, f"features.{i}.expand1x1.weight", path),
        )
        for i in _fire_indices(SqueezeConfig())
    )
    return SqueezeConfig(stem=_rows(state, "features.0.weight", path), fires=fires)


def _fire_indices(config: SqueezeConfig) -> list[int]:
    """Places of the fire modules in torchvision's row, where pools have places too."""
    indices, index, last = [], 2, 0
    for stage, _ in config.places:
        index += stage != last and stage in config.pooled
        indices.append(index)
        index, last = index + 1, stage
    return indices


def _rows(state: Mapping[str, Tensor], name: str, path: Path) -> int:
    if name not in state or state[name].ndim == 0:
        raise ValueError(f"{path} has no weight {name!r}; give the VGG-16 or SqueezeNet 1.1 of torchvision")
    return state[name].shape[0]
