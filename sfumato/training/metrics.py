"""What a log line says of a metric over its window: the mean of a number, the spread of a histogram."""

from __future__ import annotations

from torch import Tensor

__all__ = ["summary"]


def summary(name: str, total: Tensor, steps: int) -> dict[str, float]:
    """Numbers of one metric.

    Args:
        total: its sum over the steps of the window. A number, (), gives its mean. A histogram, (n,), gives
            `NAME_used`, the share of the n entries that occurred at all, and `NAME_perplexity`, the number of
            equally frequent entries that would be as hard to guess: exp of the entropy.
        steps: how many steps reported it.
    """
    if total.ndim == 0:
        return {name: float(total) / steps}
    count = total.double()
    share = count / count.sum()
    entropy = -(share[share > 0] * share[share > 0].log()).sum()
    return {f"{name}_used": float((count > 0).double().mean()), f"{name}_perplexity": float(entropy.exp())}
