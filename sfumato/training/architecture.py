"""A state goes back into the objects that it came from, or one line says why it does not fit them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from sfumato.training.shards import load_into
from sfumato.training.task import Task

__all__ = ["mismatches", "restore"]

SHOWN = 3  # differences that an error names; it counts the rest


class Restorable(Protocol):
    """Anything with a state."""

    def load_state_dict(self, state: Any) -> object: ...


def restore(
    state: Mapping[str, Any], task: Task, average: Restorable, optimizers: Mapping[str, Restorable]
) -> None:
    """Load the states of a task's modules and memories, of their averages and of the optimizers.

    Raises: ValueError in one line, before anything is loaded if a module has another architecture.
    """
    if wrong := mismatches(state["modules"], task.modules):
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ValueError(
            f"the checkpoint is of another architecture: {', '.join(wrong[:SHOWN])}{more}; "
            "choose another --out, or the settings that it was made with"
        )
    for name, module in task.modules.items():
        load_into(module, state["modules"][name])
    _load("the averages", average, state["average"])
    for kind, parts in (("memories", task.memories), ("optimizers", optimizers)):
        for name, part in parts.items():
            _load(f"{kind} of {name}", part, state[kind].get(name))


def mismatches(saved: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, nn.Module]) -> list[str]:
    """How saved tensors differ from those of modules in name and shape, one phrase each."""
    theirs = {f"{m}.{name}": tuple(v.shape) for m, tensors in saved.items() for name, v in tensors.items()}
    ours = {f"{m}.{k}": tuple(v.shape) for m, net in modules.items() for k, v in net.state_dict().items()}
    missing = [f"it has no {name}" for name in ours if name not in theirs]
    unknown = [f"it has {name}, unknown here" for name in theirs if name not in ours]
    shapes = [
        f"{name} is {theirs[name]} there and {shape} here"
        for name, shape in ours.items()
        if theirs.get(name, shape) != shape
    ]
    return shapes + missing + unknown


def _load(what: str, part: Restorable, state: object) -> None:
    try:
        part.load_state_dict(state)
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the checkpoint does not fit this run: {what} cannot be restored ({reason}); "
            "choose another --out"
        ) from None
