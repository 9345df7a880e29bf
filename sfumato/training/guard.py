"""Numbers that are not finite: seen before an optimizer steps, undone, and traced to where they began."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from sfumato.core.world import local
from sfumato.training.task import Task

__all__ = ["Fault", "Snapshot", "Watch", "bad_weight", "finite"]


@dataclass(frozen=True)
class Fault:
    """What was not finite in a step, in which phase, and where it began if somebody watched ("" if not)."""

    phase: str
    what: Literal["loss", "gradient"]
    culprit: str = ""


def finite(*values: Tensor) -> bool:
    """Whether all scalars are finite. The one place where that is decided."""
    return bool(torch.stack([value.detach().cpu().double() for value in values]).isfinite().all())


def bad_weight(modules: Mapping[str, nn.Module]) -> str | None:
    """Name of the first parameter or buffer that is not finite; None if all are."""
    for prefix, module in modules.items():
        for name, value in (*module.named_parameters(prefix), *module.named_buffers(prefix)):
            if not _finite(value):
                return name
    return None


class Snapshot:
    """What the forward passes of a step change by themselves: buffers (BatchNorm) and the task's memories."""

    def __init__(self, task: Task) -> None:
        self._buffers = [(b, b.clone()) for module in task.modules.values() for b in module.buffers()]
        self._memories = [(m, copy.deepcopy(m.state_dict())) for m in task.memories.values()]

    @torch.no_grad()
    def restore(self) -> None:
        """Put them back."""
        for buffer, value in self._buffers:
            buffer.copy_(value)
        for memory, state in self._memories:
            memory.load_state_dict(state)


class Watch:
    """Looks at every module's output, and at the gradient that comes back to it, while it is open.

    That costs a pass over all activations: it is for a step that is expected to fail.

    Compiled parts run as they are written, or they could not be looked into.

    Args:
        modules: whose parts are called by their names; others (frozen nets) by their class.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._names = {id(m): n for key, root in modules.items() for n, m in root.named_modules(prefix=key)}
        parts = (m for root in modules.values() for m in root.modules())
        self._compiled = any(m._compiled_call_impl is not None for m in parts)
        self._stack = contextlib.ExitStack()
        self.output = self.gradient = ""

    def __enter__(self) -> Watch:
        if self._compiled:
            self._stack.enter_context(torch.compiler.set_stance("force_eager"))
        hook = nn.modules.module.register_module_forward_hook(self._seen)
        self._stack.callback(hook.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def culprit(self, what: Literal["loss", "gradient"]) -> str:
        """Where it began, in words; to be asked before the gradients are cleared."""
        if self.output:
            return self.output
        if what == "loss":
            return "the loss itself, while every module's output is finite"
        parameters = (pair for key, m in self._modules.items() for pair in m.named_parameters(key))
        bad = (f"the gradient of {n}" for n, p in parameters if p.grad is not None and not _finite(p.grad))
        return self.gradient or next(bad, "the norm of finite gradients")

    def _seen(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        name = f"{self._names.get(id(module), 'a frozen net')} ({type(module).__name__})"
        for value in _tensors(output):
            if not self.output and not _finite(value):
                side = "output" if all(map(_finite, _tensors(args))) else "input"
                self.output = f"the {side} of {name}"
            if value.requires_grad and torch.is_grad_enabled():
                value.register_hook(partial(self._came_back, name))

    def _came_back(self, name: str, gradient: Tensor) -> None:
        if not self.gradient and not _finite(gradient):
            self.gradient = f"the gradient at the output of {name}"


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(local(value.detach()).isfinite().all())


def _tensors(value: object) -> Iterator[Tensor]:
    """Every tensor in what a module takes or returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        yield from _tensors(tuple(getattr(value, field.name) for field in fields(value)))
