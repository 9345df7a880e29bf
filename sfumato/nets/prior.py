"""The diffusion prior of unCLIP: text tokens and a noised image embedding -> the clean one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.types import Conditioning
from sfumato.nets.blocks import EmbeddingMLP, dtype_of, sinusoid
from sfumato.nets.text import TextBlock
from sfumato.nets.transformer import merge_heads, split_heads

__all__ = ["Captioned", "CausalBlock", "Past", "Prior", "PriorConfig", "PriorShape", "read_causally"]

Past = tuple[Tensor, Tensor]
"""Keys and values (B, heads, L, d) of the positions before."""
EXTRA = 4  # text embedding, time, noised image embedding, query


@dataclass(frozen=True, kw_only=True)
class PriorShape:
    """Shape of a prior.

    Attributes:
        dim: of the embeddings of picture and text.
        text_dim: of the text tokens.
        context: number of text tokens.
    """

    dim: int = 768
    text_dim: int = 768
    context: int = 77
    width: int = 2048
    depth: int = 20
    heads: int = 32

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"prior width {self.width} is not a multiple of heads {self.heads}")


@dataclass(frozen=True, kw_only=True)
class PriorConfig(PriorShape):
    """Shape of the diffusion prior.

    Attributes:
        moments: whether it holds the mean and deviation by which embeddings were normalized, as files of
            diffusers do.
    """

    kind: Literal["prior"] = "prior"
    moments: bool = False


class CausalBlock(TextBlock):
    """A pre-norm block whose positions see themselves and what stands before them."""

    def forward(self, x: Tensor, mask: Tensor | None, past: Past | None = None) -> tuple[Tensor, Past]:  # type: ignore[override]
        """x (B, N, D), mask (B or 1, 1, N, L + N) bool, past of L positions -> x, and past of L + N."""
        a = self.attention
        q, k, v = (split_heads(part, a.heads) for part in a.qkv(self.norm1(x)).chunk(3, dim=-1))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        x = x + a.out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
        return x + self.mlp(self.norm2(x)), (k, v)


def read_causally(
    blocks: nn.ModuleList, x: Tensor, visible: Tensor, past: tuple[Past, ...] = ()
) -> tuple[Tensor, tuple[Past, ...]]:
    """x (B, N, D) through causal blocks, behind L positions that were read before.

    Args:
        visible: (B, L + N) bool, what may be attended to at all.
        past: of every block; () = L is 0.
    """
    n, total = x.shape[1], visible.shape[1]
    order = torch.ones(n, total, dtype=torch.bool, device=x.device).tril(total - n)
    # Whatever is not visible sees itself: nobody reads it, and a softmax over nothing is not a number.
    mask, read = order & visible[:, None, None, :] | order.triu(total - n), list[Past]()
    for i, block in enumerate(blocks):
        x, one = block(x, mask, past[i] if past else None)
        read.append(one)
    return x, tuple(read)


class Captioned(nn.Module):
    """A causal transformer whose first positions are text tokens and a text embedding.

    They depend on nothing else: `prepare` reads them once per walk.

    Args:
        config: of the shape.
        more: positions behind them.
    """

    def __init__(self, config: PriorShape, more: int) -> None:
        super().__init__()
        c = self.shape = config
        self.text = nn.Linear(c.text_dim, c.width)
        self.pooled = nn.Linear(c.dim, c.width)
        self.positions = nn.Parameter(0.01 * torch.randn(c.context + 1 + more, c.width))
        self.blocks = nn.ModuleList(CausalBlock(c.width, c.heads) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width)

    def prepare(self, cond: Conditioning) -> Conditioning:
        """Add keys and values of the text in every block.

        Raises: ValueError if the text is missing, or not of the length and widths of this prior.
        """
        if cond.kv is not None:
            return cond
        c = self.shape
        wanted = {"tokens": (c.context, c.text_dim), "pooled": (c.dim,)}
        for name, shape in wanted.items():
            value: Tensor | None = getattr(cond, name)
            found = None if value is None else tuple(value.shape[1:])
            if found != shape:
                raise ValueError(
                    f"this prior reads cond.{name} of shape {shape} for each picture and got {found}: its "
                    "CLIP is another one; take the text tower that it was trained with"
                )
        assert cond.tokens is not None
        assert cond.pooled is not None
        dtype = dtype_of(self.text)
        x = torch.cat([self.text(cond.tokens.to(dtype)), self.pooled(cond.pooled.to(dtype))[:, None]], dim=1)
        x = x + self.positions[: c.context + 1]
        return replace(cond, kv=read_causally(self.blocks, x, self._visible(cond, 1))[1])

    def _visible(self, cond: Conditioning, more: int) -> Tensor:
        """(B, context + more) bool: the text that is not padding, and whatever stands behind it."""
        assert cond.tokens is not None
        real = cond.mask if cond.mask is not None else cond.tokens.new_ones(cond.tokens.shape[:2]).bool()
        return F.pad(real, (0, more), value=True)

    def _check(self, x: Tensor, does: str) -> None:
        if x.shape[1:] != (self.shape.dim,):
            raise ValueError(f"x has shape {tuple(x.shape)}; this prior {does} vectors (B, {self.shape.dim})")


class Prior(Captioned):
    """net(x, t, cond) on image embeddings; it predicts the clean one.

    A causal transformer over text tokens, text embedding, time, noised embedding and a query, whose output is
    the prediction (Ramesh et al. 2022, arXiv:2204.06125, section 2.2). A step has three positions.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, config: PriorConfig) -> None:
        super().__init__(config, EXTRA - 1)
        c = self.config = config
        self.image = nn.Linear(c.dim, c.width)
        self.time = EmbeddingMLP(c.width, c.width, "silu")
        self.query = nn.Parameter(0.01 * torch.randn(c.width))
        self.out = nn.Linear(c.width, c.dim)
        self.register_buffer("mean", torch.zeros(c.dim) if c.moments else None)
        self.register_buffer("std", torch.ones(c.dim) if c.moments else None)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x (B, dim), t (B,) -> (B, dim). Raises: ValueError if x is of another width."""
        c = self.config
        self._check(x, "denoises")
        cond = self.prepare(cond)
        assert cond.kv is not None
        dtype = dtype_of(self.image)
        time = self.time(sinusoid(t, c.width).to(dtype))
        h = torch.stack([time, self.image(x.to(dtype)), self.query.expand_as(time)], dim=1)
        h = h + self.positions[c.context + 1 :]
        h, _ = read_causally(self.blocks, h, self._visible(cond, EXTRA), cond.kv)
        return self.out(self.norm(h[:, -1]))
