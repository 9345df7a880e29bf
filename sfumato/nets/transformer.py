"""Attention and feed-forward over token sequences, shared by the text tower and DiT."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.nets.patches import Rotation, rotate
from sfumato.nets.tags import fused

__all__ = ["CrossAttention", "FeedForward", "SelfAttention", "SwiGLU", "merge_heads", "split_heads"]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, L, heads * d) -> (B, heads, L, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, heads, L, d) -> (B, L, heads * d)."""
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head self-attention with fused q, k, v; optionally RMS-normalized queries and keys.

    Args:
        dim: token width.
        heads: number of heads; must divide dim.
        qk_norm: normalize q and k per head (Dehghani et al. 2023, arXiv:2302.05442, with RMSNorm).
        head_dim: width of a head where heads do not divide dim among them; q, k and v then have no bias.
    """

    def __init__(self, dim: int, heads: int, *, qk_norm: bool = False, head_dim: int = 0) -> None:
        super().__init__()
        self.heads = heads
        inner, each = (heads * head_dim, head_dim) if head_dim else (dim, dim // heads)
        self.qkv = fused(nn.Linear(dim, 3 * inner, bias=not head_dim), 3)
        self.out = nn.Linear(inner, dim)
        self.q_norm: nn.Module = nn.RMSNorm(each, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.RMSNorm(each, eps=1e-6) if qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, causal: bool = False, turn: Rotation | None = None
    ) -> Tensor:
        """x (B, L, D); mask (B, L) bool, True = may be attended to.

        Args:
            causal: what comes later is not attended to.
            turn: rotary positions.
        """
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if turn is not None:
            q, k = rotate(q, turn), rotate(k, turn)
        keys = None if mask is None else mask[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keys, is_causal=causal)
        return self.out(merge_heads(y))


class CrossAttention(nn.Module):
    """Queries from x, keys and values from a context whose projection can be computed once per walk."""

    entrances = ("project",)  # called from outside its block, see `tags.entrances_of`

    def __init__(self, dim: int, context_dim: int, heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = fused(nn.Linear(context_dim, 2 * dim), 2)
        self.out = nn.Linear(dim, dim)
        self.q_norm: nn.Module = nn.RMSNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = nn.RMSNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, heads, L, d) of context (B, L, D')."""
        k, v = (split_heads(part, self.heads) for part in self.kv(context).chunk(2, dim=-1))
        return self.k_norm(k), v

    def forward(self, x: Tensor, kv: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """x (B, N, D); kv from `project`; mask (B, L) bool over the context."""
        keys = None if mask is None else mask[:, None, None, :]
        q = self.q_norm(split_heads(self.q(x), self.heads))
        return self.out(merge_heads(F.scaled_dot_product_attention(q, *kv, attn_mask=keys)))


class FeedForward(nn.Module):
    """Linear, GELU, Linear.

    Args:
        approximate: of the GELU as in torch ("tanh" for DiT, "none" for OpenCLIP), or "quick" for
            x sigmoid(1.702 x) (OpenAI's CLIP).
    """

    def __init__(self, dim: int, hidden: int, *, approximate: str = "none") -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.approximate == "quick":
            return self.down(h * (1.702 * h).sigmoid())
        return self.down(F.gelu(h, approximate=self.approximate))


class SwiGLU(nn.Module):
    """down(silu(a) * b), with (a, b) = up(x) (Shazeer 2020, arXiv:2002.05202).

    With two thirds of the hidden width it has the parameters of a FeedForward.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = fused(nn.Linear(dim, 2 * hidden), 2)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(a) * b)
