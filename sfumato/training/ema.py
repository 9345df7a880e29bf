"""Moving average of weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Average", "decay_at"]


def decay_at(updates: int, decay: float) -> float:
    """Decay of the update after `updates` others: min(decay, (1 + n) / (10 + n)) with n = updates + 1.

    The warm-up keeps the first weights, which are noise, from lingering (as latent diffusion trains).
    """
    n = updates + 1
    return min(decay, (1 + n) / (10 + n))


class Average:
    """Frozen copies of modules that follow them: average <- decay * average + (1 - decay) * weight.

    Buffers are copied, not averaged: a BatchNorm count has no mean.

    Args:
        modules: what to follow, by name.
        decay: final decay per optimizer step, in [0, 1).
    """

    def __init__(self, modules: Mapping[str, nn.Module], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay is {decay}; it must be at least 0 and below 1")
        self.decay = decay
        self.updates = 0
        self._sources = dict(modules)
        self.modules = {name: copy.deepcopy(m).requires_grad_(False).eval() for name, m in modules.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Follow the modules' present weights."""
        weight = 1 - decay_at(self.updates, self.decay)
        for name, source in self._sources.items():
            mine, theirs = _floats(self.modules[name]), _floats(source)
            if mine:
                torch._foreach_lerp_(mine, theirs, weight)
            for a, b in zip(self.modules[name].buffers(), source.buffers(), strict=True):
                a.copy_(b)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Averages and the number of updates."""
        return {
            "updates": self.updates,
            "modules": {name: m.state_dict() for name, m in self.modules.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.updates = int(state["updates"])
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])


def _floats(module: nn.Module) -> list[Tensor]:
    return [p.data for p in module.parameters()]
