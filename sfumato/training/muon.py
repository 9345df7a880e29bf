"""Muon: momentum whose update is orthogonalised, for the hidden matrices of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sfumato.core.world import whole
from sfumato.training.shards import like

__all__ = ["Muon", "orthogonalize"]

# Quintic whose iteration drives singular values in (0, 1] to about [0.7, 1.2] in five steps (Jordan et al.
# 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalize(matrix: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrix, roughly, by five Newton-Schulz steps in the dtype of the argument.

    Args:
        matrix: (..., rows, columns); kept in its own dtype because half precision is hundreds of times
            slower than float32 on a CPU without instructions for it.

    Returns: the same shape, singular values in about [0.7, 1.2].

    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    a, b, c = QUINTIC
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum with decoupled weight decay.

    The update is scaled by sqrt(max(1, rows / columns)), so that its effect on the size of activations does
    not depend on the shape. Weights of more than two axes are matrices of their first axis by all others.

    Args:
        params: parameter -> how many matrices of equal size lie upon each other in it; each is
            orthogonalised by itself.
    """

    def __init__(
        self,
        params: Mapping[nn.Parameter, int],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        for p, parts in params.items():
            if p.ndim < 2 or p.shape[0] % parts:
                raise ValueError(
                    f"Muon is for matrices; a parameter of shape {tuple(p.shape)} is not {parts}"
                )
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._parts = dict(params)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: nn.Parameter, grad: Tensor, group: dict[str, float]) -> None:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        average = state["momentum"].lerp_(grad, 1 - group["momentum"])
        direction = grad.lerp(average, group["momentum"])
        full = whole(direction)  # where it is sharded, every process does the work of all
        parts = full.reshape(self._parts[p], -1, full[0].numel())  # (parts, rows, columns)
        scale = max(1.0, parts.shape[1] / parts.shape[2]) ** 0.5
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(like(p, orthogonalize(parts).reshape(p.shape)), alpha=-group["lr"] * scale)
