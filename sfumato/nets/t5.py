"""T5's encoder: the text tower of Imagen and DeepFloyd IF."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.nets.transformer import merge_heads, split_heads

__all__ = ["T5Config", "T5Encoder"]


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """Shape of the encoder; the defaults are those of T5 v1.1 XXL, which Imagen and IF read.

    Args:
        context: ids per text, where it is trained here; it reads any number.
        head_dim: width of one head; heads times it need not be the width.
        gated: a second, linear branch multiplies the activation (v1.1; Shazeer 2020, arXiv:2002.05202).
        activation: "relu" in the first T5, "gelu_tanh" in v1.1.
        buckets, max_distance: of relative positions; those further away share the last bucket.
    """

    vocab_size: int = 32128
    context: int = 77
    width: int = 4096
    depth: int = 24
    heads: int = 64
    head_dim: int = 64
    hidden: int = 10240
    gated: bool = True
    activation: Literal["relu", "gelu", "gelu_tanh", "silu"] = "gelu_tanh"
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


class T5Encoder(nn.Module):
    """Token ids -> states and their mean (Raffel et al. 2020, arXiv:1910.10683, section 2.1).

    Pre-norm blocks with RMS norms and without biases. Scores are not scaled; all blocks add the same learned
    bias of the relative position to them.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        c = self.config = config
        self.tokens = nn.Embedding(c.vocab_size, c.width)
        self.distances = nn.Embedding(c.buckets, c.heads)
        self.blocks = nn.ModuleList(T5Block(c) for _ in range(c.depth))
        self.norm = nn.RMSNorm(c.width, eps=c.eps)
        nn.init.normal_(self.distances.weight, std=c.width**-0.5)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Ids (B, L) int64 -> tokens (B, L, width) and the mean of the real ones (B, width).

        Args:
            mask: (B, L) bool, True = a real token; None = all are. Padding is not read, and has
                states all the same.
        """
        x = self.tokens(ids)
        bias = self.distances(self._buckets(ids.shape[1], ids.device)).permute(2, 0, 1)[None]
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        bias = bias.expand(len(ids), -1, -1, -1).masked_fill(~real[:, None, None, :], -math.inf)
        for block in self.blocks:
            x = block(x, bias)
        x = self.norm(x)
        weight = real[..., None].to(x.dtype)
        return x, (x * weight).sum(1) / weight.sum(1).clamp_min(1)

    def _buckets(self, length: int, device: torch.device) -> Tensor:
        """Bucket of every distance from query to key, (L, L): half of them for keys that come later.

        Short distances have one each, longer ones share them on a logarithmic scale.
        """
        half = self.config.buckets // 2
        exact = half // 2
        at = torch.arange(length, device=device)
        ahead = at[None, :] - at[:, None]
        far = ahead.abs()
        steps = (far.clamp_min(1).float() / exact).log() / math.log(self.config.max_distance / exact)
        shared = (exact + (steps * (half - exact)).long()).clamp_max(half - 1)
        return torch.where(far < exact, far, shared) + half * (ahead > 0)


class T5Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to what came in."""

    def __init__(self, c: T5Config) -> None:
        super().__init__()
        inner = c.heads * c.head_dim
        self.heads, self.gated = c.heads, c.gated
        self.activation = ACTIVATIONS[c.activation]
        self.norm1, self.norm2 = nn.RMSNorm(c.width, eps=c.eps), nn.RMSNorm(c.width, eps=c.eps)
        self.q, self.k, self.v = (nn.Linear(c.width, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, c.width, bias=False)
        self.up = nn.Linear(c.width, c.hidden, bias=False)
        self.gate = nn.Linear(c.width, c.hidden, bias=False) if c.gated else None
        self.down = nn.Linear(c.hidden, c.width, bias=False)
        with torch.no_grad():  # the published deviations, which stand in for the scaling of the scores
            self.q.weight.normal_(std=inner**-0.5 * c.heads**0.5 / c.width**0.5)
            for layer in (self.k, self.v, self.up, *([self.gate] if self.gate is not None else [])):
                layer.weight.normal_(std=c.width**-0.5)
            self.out.weight.normal_(std=inner**-0.5)
            self.down.weight.normal_(std=c.hidden**-0.5)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, L, width), bias (B, heads, L, L) of the scores, -inf where nothing is read -> same as x."""
        h = self.norm1(x)
        q, k, v = (split_heads(layer(h), self.heads) for layer in (self.q, self.k, self.v))
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)
        x = _finite(x + self.out(merge_heads(read)))
        h = self.norm2(x)
        up = self.activation(self.up(h))
        return _finite(x + self.down(up if self.gate is None else up * self.gate(h)))


def _finite(x: Tensor) -> Tensor:
    """What float16 cannot hold as a large number: the sums of the large encoders overflow there."""
    if x.dtype != torch.float16:
        return x
    most = torch.finfo(x.dtype).max
    limit = torch.where(x.isinf().any(), most - 1000, most).to(x.dtype)
    return x.clamp(-limit, limit)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": F.silu,
}
