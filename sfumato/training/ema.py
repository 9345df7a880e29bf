"""Moving averages of weights: of a fixed decay, and of the power-function profiles of EDM2."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.core.world import local
from sfumato.training.shards import distribute, gathered, load_into

__all__ = ["Average", "Copies", "PowerAverage", "decay_at", "gamma_of", "sigma_rel_of"]

WIDEST = 12**-0.5  # sigma_rel of gamma 0, the plain mean over the whole run


def decay_at(updates: int, decay: float) -> float:
    """Decay of the update after `updates` others: min(decay, (1 + n) / (10 + n)) with n = updates + 1.

    The warm-up keeps the first weights, which are noise, from lingering (as latent diffusion trains).
    """
    n = updates + 1
    return min(decay, (1 + n) / (10 + n))


def sigma_rel_of(gamma: float) -> float:
    """Standard deviation of the profile t^gamma on [0, T], as a share of T.

    Karras et al. 2024 (arXiv:2312.02696), eq. 123.
    """
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_of(sigma_rel: float) -> float:
    """Inverse of `sigma_rel_of` for gamma >= 0: the largest root of its cubic.

    Karras et al. 2024 (arXiv:2312.02696), eq. 126 and algorithm 2.

    Raises: ValueError in one line outside (0, 0.2886].
    """
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(f"sigma_rel is {sigma_rel}; it must be above 0 and at most 0.2886, a plain mean")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class Copies:
    """Frozen copies of modules that follow them: copy <- (1 - weight) * copy + weight * present.

    Buffers are copied, not averaged: a BatchNorm count has no mean.

    Args:
        modules: what to follow, by name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._sources = dict(modules)
        self.modules = {name: copy.deepcopy(m).requires_grad_(False).eval() for name, m in modules.items()}

    def shard(self) -> None:
        """Spread the copies over the processes as what they follow has been."""
        for name, source in self._sources.items():
            distribute(self.modules[name], source)

    def whole(self) -> dict[str, nn.Module]:
        """The copies with whole parameters, to compute with; all processes must call."""
        return {name: gathered(module) for name, module in self.modules.items()}

    @torch.no_grad()
    def follow(self, weight: float) -> None:
        """Take in the present weights with a share of `weight`."""
        for name, source in self._sources.items():
            mine, theirs = _floats(self.modules[name]), _floats(source)
            if mine:
                torch._foreach_lerp_(mine, theirs, weight)
            for a, b in zip(self.modules[name].buffers(), source.buffers(), strict=True):
                a.copy_(b)

    def state_dict(self) -> dict[str, Any]:
        """The copies' own states."""
        return {"modules": {name: m.state_dict() for name, m in self.modules.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        for name, module in self.modules.items():
            load_into(module, state["modules"][name])


class Average(Copies):
    """Exponential average: each optimizer step weighs `decay` times the next one.

    Args:
        modules: what to follow, by name.
        decay: final decay per optimizer step, in [0, 1); see `decay_at`.
    """

    def __init__(self, modules: Mapping[str, nn.Module], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema decay is {decay}; it must be at least 0 and below 1")
        super().__init__(modules)
        self.decay = decay
        self.updates = 0

    def update(self) -> None:
        """Follow the modules' present weights."""
        self.follow(1 - decay_at(self.updates, self.decay))
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Averages and the number of updates."""
        return {"updates": self.updates, **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.updates = int(state["updates"])
        super().load_state_dict(state)


class PowerAverage(Copies):
    """Average whose width grows with the run: weights at time t count t^gamma.

    Time is the number of images seen, so that the profile does not depend on the batch size. The weights of
    the initialization count nothing.

    Karras et al. 2024 (arXiv:2312.02696), eq. 2.

    Args:
        modules: what to follow, by name.
        sigma_rel: standard deviation of the profile as a share of its length; see `gamma_of`.
    """

    def __init__(self, modules: Mapping[str, nn.Module], sigma_rel: float) -> None:
        self.gamma = gamma_of(sigma_rel)
        super().__init__(modules)

    def update(self, before: int, after: int) -> None:
        """Follow the weights that the step from `before` to `after` images has made."""
        # 1 - (before / after)^(gamma + 1), without the cancellation late in a run.
        kept = (self.gamma + 1) * math.log(before / after) if before else -math.inf
        self.follow(-math.expm1(kept))


def _floats(module: nn.Module) -> list[Tensor]:
    return [local(p.data) for p in module.parameters()]
