"""How a net is computed: in which precision, compiled or not, keeping its activations or not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Precision", "autocast", "blocks_of", "compile_parts", "has_bfloat16", "recompute"]

Precision = Literal["float32", "bfloat16", "auto"]


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies matrices in bfloat16 itself.

    A CPU does with AVX512-BF16 or AMX. Others emulate it, a hundred times slower than float32.
    """
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "xpu" and torch.xpu.is_bf16_supported()


def autocast(
    device: torch.device, precision: Precision
) -> Callable[[], contextlib.AbstractContextManager[object]]:
    """Contexts for forward passes; weights, gradients and optimizers stay float32 in any case.

    Args:
        precision: "auto" is bfloat16 where the device has it, else float32.

    Raises: ValueError in one line if bfloat16 is asked of a device that does not have it.
    """
    if precision == "float32" or not has_bfloat16(device):
        if precision == "bfloat16":
            raise ValueError(
                f"trainer.precision is bfloat16, which device {str(device)!r} only emulates, much slower; "
                "allowed here: float32, auto"
            )
        return contextlib.nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def recompute(modules: Mapping[str, nn.Module]) -> None:
    """Let every block keep its input alone, and compute the rest again in the backward pass.

    Blocks are the elements of a net's lists of layers (Chen et al. 2016, arXiv:1604.06174).
    """
    for module in modules.values():
        for block in blocks_of(module):
            block.forward = _Recomputed(block.forward)


def compile_parts(modules: Mapping[str, nn.Module]) -> None:
    """Compile every part of a net, and of its lists of blocks every block, where it is called.

    Blocks that are alike share what is compiled. Names in state dicts stay as they are.
    """
    for module in modules.values():
        for part in _parts(module):
            part.compile()


class _Recomputed:
    """A forward whose activations are not kept."""

    def __init__(self, forward: Callable[..., object]) -> None:
        self._forward = forward

    def __call__(self, *args: object, **named: object) -> object:
        if not torch.is_grad_enabled():
            return self._forward(*args, **named)
        # Not reentrant: that one loses the gradient to the input when the weights are frozen.
        result: object = checkpoint(partial(self._forward, **named), *args, use_reentrant=False)
        return result


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """Elements of the outermost lists."""
    for child in module.children():
        yield from child.children() if isinstance(child, nn.ModuleList) else blocks_of(child)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """Children, and of lists their elements."""
    for child in module.children():
        yield from _parts(child) if isinstance(child, nn.ModuleList) else (child,)
