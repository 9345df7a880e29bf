"""Inception-V3 as the published FID uses it: TensorFlow's graph of 2015-12-05 with 1008 classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SIDE", "InceptionFeatures", "InceptionV3"]

SIDE = 299
"""Height and width of its pictures."""
SPATIAL = 7  # channels of the 17x17 map that sFID takes
Kernel = tuple[int, int]


@dataclass(frozen=True)
class InceptionFeatures:
    """What metrics take.

    Attributes:
        pool: (B, 2048) mean over places of the last block (FID, KID, precision).
        spatial: (B, 2023) the first 7 channels of "mixed_6/conv", before its normalization, by row, column
            and channel (sFID: Nash et al. 2021, arXiv:2103.03841, in the form of the ADM evaluator).
        logits: (B, 1008) without the bias, as in the published Inception scores.
    """

    pool: Tensor
    spatial: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Conv:
    """A convolution: name in the published file, channels, kernel; padded to its input's size at stride 1."""

    name: str
    out: int
    kernel: Kernel = (1, 1)
    stride: int = 1


Step = (
    str | Conv | tuple[Conv, Conv]
)  # "avg" or "max" pool at stride 1, "half" max pool at stride 2, or a fork
Block = tuple[tuple[Step, ...], ...]  # branches


def _row(name: str, *kernels: tuple[int, Kernel], stride: int = 1, first: int = 1) -> tuple[Conv, ...]:
    """Convolutions in a row, name_1, name_2 ...; the last has the stride."""
    last = len(kernels) - 1
    return tuple(
        Conv(f"{name}_{i + first}", out, kernel, stride if i == last else 1)
        for i, (out, kernel) in enumerate(kernels)
    )


ONE, THREE, FIVE = (1, 1), (3, 3), (5, 5)
WIDE, TALL = (1, 7), (7, 1)


def _a(pool: int) -> Block:
    return (
        (Conv("branch1x1", 64),),
        _row("branch5x5", (48, ONE), (64, FIVE)),
        _row("branch3x3dbl", (64, ONE), (96, THREE), (96, THREE)),
        ("avg", Conv("branch_pool", pool)),
    )


def _c(between: int) -> Block:
    b = between
    return (
        (Conv("branch1x1", 192),),
        _row("branch7x7", (b, ONE), (b, WIDE), (192, TALL)),
        _row("branch7x7dbl", (b, ONE), (b, TALL), (b, WIDE), (b, TALL), (192, WIDE)),
        ("avg", Conv("branch_pool", 192)),
    )


def _e(pool: str) -> Block:
    def fork(name: str) -> tuple[Conv, Conv]:
        return Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1))

    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), fork("branch3x3_2")),
        (Conv("branch3x3dbl_1", 448), Conv("branch3x3dbl_2", 384, THREE), fork("branch3x3dbl_3")),
        (pool, Conv("branch_pool", 192)),
    )


B: Block = (
    (Conv("branch3x3", 384, THREE, 2),),
    _row("branch3x3dbl", (64, ONE), (96, THREE), (96, THREE), stride=2),
    ("half",),
)
D: Block = (
    _row("branch3x3", (192, ONE), (320, THREE), stride=2),
    _row("branch7x7x3", (192, ONE), (192, WIDE), (192, TALL), (192, THREE), stride=2),
    ("half",),
)
# The last block pools by the maximum: a slip of the published graph, which the published figures share.
BLOCKS: tuple[tuple[str, int, Block], ...] = (
    *(("Mixed_5b", 192, _a(32)), ("Mixed_5c", 256, _a(64)), ("Mixed_5d", 288, _a(64)), ("Mixed_6a", 288, B)),
    *(("Mixed_6b", 768, _c(128)), ("Mixed_6c", 768, _c(160)), ("Mixed_6d", 768, _c(160))),
    *(("Mixed_6e", 768, _c(192)), ("Mixed_7a", 768, D)),
    *(("Mixed_7b", 1280, _e("avg")), ("Mixed_7c", 2048, _e("max"))),
)
# (convolution, input channels, padding, pool after it); unlike within blocks some are not padded.
STEM: tuple[tuple[Conv, int, int, bool], ...] = (
    (Conv("Conv2d_1a_3x3", 32, THREE, 2), 3, 0, False),
    (Conv("Conv2d_2a_3x3", 32, THREE), 32, 0, False),
    (Conv("Conv2d_2b_3x3", 64, THREE), 32, 1, True),
    (Conv("Conv2d_3b_1x1", 80), 64, 0, False),
    (Conv("Conv2d_4a_3x3", 192, THREE), 80, 0, True),
)


class Unit(nn.Module):
    """Convolution without bias, batch normalization, ReLU."""

    def __init__(self, cin: int, conv: Conv, padding: Kernel | int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, conv.out, conv.kernel, conv.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(conv.out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, whose channels are joined."""

    def __init__(self, cin: int, block: Block) -> None:
        super().__init__()
        self.block = block
        for branch in block:
            width = cin
            for step in branch:
                convs = () if isinstance(step, str) else (step,) if isinstance(step, Conv) else step
                for conv in convs:
                    same = (conv.kernel[0] // 2, conv.kernel[1] // 2) if conv.stride == 1 else 0
                    self.add_module(conv.name, Unit(width, conv, same))
                width = convs[0].out if convs else width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._branch(x, branch) for branch in self.block], dim=1)

    def _branch(self, x: Tensor, branch: tuple[Step, ...]) -> Tensor:
        for step in branch:
            if isinstance(step, str):
                x = _pool(x, step)
            elif isinstance(step, Conv):
                x = getattr(self, step.name)(x)
            else:
                x = torch.cat([getattr(self, conv.name)(x) for conv in step], dim=1)
        return x


class InceptionV3(nn.Module):
    """The network of FID (Szegedy et al. 2015, arXiv:1512.00567); its tensors have the published names.

    It differs from torchvision's: average pools leave the padding out, the last block pools by the maximum,
    there are 1008 classes, and the weights are others.
    """

    def __init__(self) -> None:
        super().__init__()
        for conv, cin, padding, _ in STEM:
            self.add_module(conv.name, Unit(cin, conv, padding))
        for name, cin, block in BLOCKS:
            self.add_module(name, Mixed(cin, block))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> InceptionFeatures:
        """x (B, 3, 299, 299): (p - 128) / 128 of pixels p in 0..255."""
        for conv, _, _, pooled in STEM:
            x = getattr(self, conv.name)(x)
            x = _pool(x, "half") if pooled else x
        spatial = x
        for name, _, _ in BLOCKS:
            block = getattr(self, name)
            if name == "Mixed_6d":
                spatial = F.conv2d(x, block.branch1x1.conv.weight[:SPATIAL])
            x = block(x)
        pool = x.mean((2, 3))
        return InceptionFeatures(pool, spatial.permute(0, 2, 3, 1).flatten(1), pool @ self.fc.weight.T)


def _pool(x: Tensor, kind: str) -> Tensor:
    if kind == "half":
        return F.max_pool2d(x, 3, 2)
    if kind == "max":
        return F.max_pool2d(x, 3, 1, padding=1)
    return F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)
