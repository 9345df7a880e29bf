"""Tensors into networks: strict about names, shapes and finite values, sparing with memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from sfumato.checkpoints.files import COPY_AGAIN

__all__ = ["assign", "floating", "parameter_free"]

T = TypeVar("T")
N = TypeVar("N", bound=nn.Module)
MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)


def parameter_free(build: Callable[[T], N], config: T) -> N:
    """A network whose parameters take no memory and no time until `assign` puts tensors in their place."""
    with torch.device("meta"):
        net = build(config)
    persistent = set(net.state_dict())
    if any(name not in persistent for name, _ in net.named_buffers()):
        return build(config)  # no file has the values of such a buffer, so the constructor must compute them
    return net


def floating(net: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of matrices, convolutions and tables as `dtype`, other floating tensors as float32.

    Norms, gains and positions stay in float32 at any dtype: they are few, and half precision hurts them most.
    """

    def wanted(name: str, v: Tensor) -> torch.dtype:
        if not v.is_floating_point() or dtype == torch.float32:
            return torch.float32 if v.is_floating_point() else v.dtype
        owner = modules.get(name.rpartition(".")[0])
        return dtype if isinstance(owner, MATRICES) else torch.float32

    modules = dict(net.named_modules())
    return {name: v.to(wanted(name, v)) for name, v in state.items()}


def assign(net: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Make the tensors of `state` the parameters and buffers of `net`.

    Args:
        where: the file that they come from, for errors.

    Raises: ValueError in one line for the first tensor that is missing, unexpected, of another shape or
    kind, or not finite.
    """
    expected = net.state_dict()
    fix = f"the file does not fit its settings: {COPY_AGAIN}"
    for name, want in expected.items():
        if name not in state:
            raise ValueError(
                f"{where}: tensor {name!r} is missing, expected shape {tuple(want.shape)}; {fix}"
            )
        _check(name, state[name], want, where, fix)
    for name, v in state.items():
        if name not in expected:
            shape, kind = tuple(v.shape), type(net).__name__
            raise ValueError(
                f"{where}: unexpected tensor {name!r} of shape {shape}, {kind} has no such tensor; {fix}"
            )
    net.load_state_dict(dict(state), strict=True, assign=True)


def _check(name: str, found: Tensor, want: Tensor, where: str, fix: str) -> None:
    if found.shape != want.shape:
        shapes = f"has shape {tuple(found.shape)}, expected {tuple(want.shape)}"
        raise ValueError(f"{where}: tensor {name!r} {shapes}; {fix}")
    if found.is_floating_point() != want.is_floating_point():
        raise ValueError(f"{where}: tensor {name!r} is {found.dtype}, expected {want.dtype}; {fix}")
    if found.is_floating_point() and not torch.isfinite(found).all():
        count = int((~torch.isfinite(found)).sum())
        raise ValueError(
            f"{where}: tensor {name!r} has {count} values that are NaN or infinite, expected finite ones; "
            f"{COPY_AGAIN}, or take an earlier checkpoint"
        )
