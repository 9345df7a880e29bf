"""torch's own optimizers by name, with their own options checked before a run begins."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping

import torch
from torch import nn

from sfumato.core.registry import unknown

__all__ = ["Option", "check_options", "optimizer_class", "takes_decay"]

Option = bool | int | float | str | tuple[float, float] | None
"""A value of an optimizer's option."""

OURS = ("adamw", "muon")  # built by `sfumato.training.optim`, with settings of their own
UNFIT = ("LBFGS", "SparseAdam")  # one evaluates the loss again and again, the other wants sparse gradients
SET_ELSEWHERE = ("lr", "weight_decay")  # by the phase, step by step and group by group


def optimizer_class(kind: str) -> type[torch.optim.Optimizer]:
    """The class of that name in torch.optim, in upper or lower case.

    Raises: ValueError in one line with the nearest name and all that are allowed.
    """
    table = {
        name.lower(): item
        for name, item in vars(torch.optim).items()
        if inspect.isclass(item)
        and issubclass(item, torch.optim.Optimizer)
        and item is not torch.optim.Optimizer
        and name not in UNFIT
        and name.lower() not in OURS
    }
    if kind.lower() not in table:
        raise ValueError(unknown("optimizer", kind, [*OURS, *table]))
    found: type[torch.optim.Optimizer] = table[kind.lower()]
    return found


def takes_decay(kind: str) -> bool:
    """Whether an optimizer of torch has a weight decay."""
    return "weight_decay" in inspect.signature(optimizer_class(kind)).parameters


def check_options(kind: str, options: Mapping[str, Option], weight_decay: float) -> None:
    """Refuse what the optimizer would refuse when the run begins, and what it would ignore.

    Raises: ValueError in one line for an unknown name, an option it does not have, a value it does not take,
        or a weight decay it does not know.
    """
    kind_of = optimizer_class(kind)
    make: Callable[..., torch.optim.Optimizer] = kind_of
    allowed = [n for n in inspect.signature(kind_of).parameters if n != "params" and n not in SET_ELSEWHERE]
    for name in options:
        if name in SET_ELSEWHERE:
            raise ValueError(f"option {name!r} of {kind}: set optim.{name} instead")
        if name not in allowed:
            raise ValueError(unknown(f"option of {kind_of.__name__}", name, allowed))
    if weight_decay and not takes_decay(kind):
        raise ValueError(f"weight_decay is {weight_decay}, but {kind_of.__name__} has none; set it to 0")
    try:
        make([nn.Parameter(torch.zeros(1))], **options)
    except (TypeError, ValueError, RuntimeError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"options of {kind_of.__name__} {dict(options)}: {said}") from None
