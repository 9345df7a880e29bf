"""Muon: momentum whose update is orthogonalised, for the hidden matrices of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

__all__ = ["Muon", "orthogonalize"]

# Quintic whose iteration drives singular values in (0, 1] to about [0.7, 1.2] in five steps (Jordan et al.
# 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix, roughly, by Newton-Schulz iteration in the dtype of the argument.

    Args:
        matrix: (rows, columns); it is kept in its own dtype because half precision is hundreds of times
            slower than float32 on a CPU without instructions for it.

    Returns: the same shape, singular values in about [0.7, 1.2].

    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    a, b, c = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum with decoupled weight decay.

    The update is scaled by 0.2 sqrt(max(rows, columns)), which gives it the root-mean-square size of an
    AdamW update (Liu et al. 2025, arXiv:2502.16982, eq. 4), so that one learning rate serves both. Weights
    of more than two axes are matrices of their first axis by all others.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps}
        )
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    raise ValueError(f"Muon is for matrices, not for a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, float]) -> None:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        average = state["momentum"].lerp_(grad, 1 - group["momentum"])
        direction = grad.lerp(average, group["momentum"]).flatten(1)
        update = orthogonalize(direction, int(group["steps"])).view_as(p)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update, alpha=-group["lr"] * 0.2 * max(direction.shape) ** 0.5)
