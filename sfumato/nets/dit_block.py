"""The block of a DiT in its four designs: what time and class do to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from sfumato.nets.patches import Rotation
from sfumato.nets.tags import fused
from sfumato.nets.transformer import CrossAttention, FeedForward, SelfAttention, SwiGLU

__all__ = ["MODULATIONS", "Design", "DiTBlock", "DiTConfig", "Told", "modulate", "zero_"]

Design = Literal["adaln_zero", "adaln", "cross", "in_context"]
MODULATIONS: dict[Design, int] = {"adaln_zero": 6, "adaln": 4, "cross": 0, "in_context": 0}
"""Vectors per block that the signal is projected to."""


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shape of a DiT; the defaults are DiT-S/2 without labels.

    Attributes:
        block: how blocks learn of time and class (Peebles & Xie 2023, arXiv:2212.09748, section 3.2):
            scale, shift and gate of zero at the start; scale and shift; attention to them as two tokens;
            those tokens in front of the patches.
        num_classes: adds a table with one more row, the null class, unless null_label is False.
        text_dim: adds cross-attention to `cond.tokens` in every block.
        pooled_dim: adds `cond.pooled` to the signal.
        shared_modulation: computes the modulation once for all blocks, each of which adds a learned vector to
            it: a third fewer parameters (Chen et al. 2023, arXiv:2310.00426, section 2.3).
        qk_norm: RMS-normalized queries and keys.
        rope: rotary positions on two axes in addition to the fixed ones.
        swiglu: gated feed-forward of the same number of parameters.
        registers: learned tokens in front of the patches (Darcet et al. 2023, arXiv:2309.16588).
        spare_channels: outputs that are computed and dropped, as in SiT's released files.
        time_shift, norm2_eps, position_base: where diffusers' class computes something else than the
            original, see `sinusoid` and `sincos_positions`; the epsilon is that of each block's last norm.
    """

    in_channels: int = 4
    out_channels: int = 4
    patch: int = 2
    width: int = 384
    depth: int = 12
    heads: int = 6
    mlp_ratio: float = 4.0
    num_classes: int | None = None
    text_dim: int | None = None
    pooled_dim: int | None = None
    qk_norm: bool = False
    shared_modulation: bool = False
    block: Design = "adaln_zero"
    null_label: bool = True
    rope: bool = False
    swiglu: bool = False
    registers: int = 0
    spare_channels: int = 0
    time_shift: float = 0.0
    norm2_eps: float = 1e-6
    position_base: int | None = None

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of heads ({self.heads}) and of 4")
        if self.rope and self.width // self.heads % 4:
            raise ValueError(
                f"rope turns {self.width // self.heads} channels per head: make it a multiple of 4"
            )
        if self.shared_modulation and not MODULATIONS[self.block]:
            raise ValueError(f"block {self.block!r} has no modulation to share; use adaln_zero or adaln")

    @property
    def label_rows(self) -> int:
        """Rows of the class table; 0 = there is none."""
        return 0 if self.num_classes is None else self.num_classes + self.null_label

    @property
    def convention(self) -> str:
        """Whose numbers the net computes where facebookresearch/DiT and diffusers differ."""
        return "original" if self.time_shift == 0 else "diffusers" if self.time_shift == 1 else "own"


class Told(NamedTuple):
    """What all blocks read besides the patches.

    Attributes:
        memory: time and class as tokens (B, 2, D), for blocks that attend to them.
        mask: which text tokens are real, (B, L) bool.
        turn: rotary positions.
    """

    memory: Tensor | None
    mask: Tensor | None
    turn: Rotation | None


class DiTBlock(nn.Module):
    """Self-attention, optional cross-attentions, feed-forward."""

    entrances = ("modulated_by",)  # called for all blocks at once, see `tags.entrances_of`

    def __init__(self, c: DiTConfig) -> None:
        super().__init__()
        self.parts = MODULATIONS[c.block]
        self.norm1 = nn.LayerNorm(c.width, eps=1e-6, elementwise_affine=not self.parts)
        self.attention = SelfAttention(c.width, c.heads, qk_norm=c.qk_norm)
        self.norm2 = nn.LayerNorm(c.width, eps=c.norm2_eps, elementwise_affine=not self.parts)
        self.mlp: FeedForward | SwiGLU
        if c.swiglu:
            self.mlp = SwiGLU(c.width, round(c.width * c.mlp_ratio * 2 / 3))
        else:
            self.mlp = FeedForward(c.width, round(c.width * c.mlp_ratio), approximate="tanh")
        own, rows = self.parts and not c.shared_modulation, self.parts * c.width
        self.modulation = fused(nn.Linear(c.width, rows), self.parts) if own else None
        self.offset = nn.Parameter(torch.zeros(rows)) if c.shared_modulation else None
        self.memory: CrossAttention | None = None
        if c.block == "cross":
            self.norm_memory = nn.LayerNorm(c.width, eps=1e-6)
            self.memory = CrossAttention(c.width, c.width, c.heads, qk_norm=c.qk_norm)
        self.cross: CrossAttention | None = None
        if c.text_dim is not None:
            self.norm_cross = nn.LayerNorm(c.width, eps=1e-6)
            self.cross = CrossAttention(c.width, c.text_dim, c.heads, qk_norm=c.qk_norm)

    def modulated_by(self, signal: Tensor) -> Tensor:
        """What the norms and gates of this block need of the signal, (B, parts * D).

        Args:
            signal: (B, D), or what the shared projection made of it.
        """
        if self.offset is not None:
            return signal + self.offset
        return signal if self.modulation is None else self.modulation(signal)

    def forward(self, x: Tensor, parts: Tensor, kv: tuple[Tensor, Tensor] | None, told: Told) -> Tensor:
        """x (B, N, D), parts of `modulated_by`, kv of the text -> (B, N, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self._split(parts)
        y = self.attention(modulate(self.norm1(x), shift1, scale1), turn=told.turn)
        x = x + (y if gate1 is None else gate1 * y)
        if self.memory is not None and told.memory is not None:
            x = x + self.memory(self.norm_memory(x), self.memory.project(told.memory))
        if self.cross is not None and kv is not None:
            x = x + self.cross(self.norm_cross(x), kv, told.mask)
        y = self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x + (y if gate2 is None else gate2 * y)

    def zero(self) -> None:
        """Make the block the identity (adaLN-Zero), or one without modulation (adaLN)."""
        if self.modulation is not None:
            zero_(self.modulation)
        if self.cross is not None:
            zero_(self.cross.out)

    def _split(self, parts: Tensor) -> tuple[Tensor | None, ...]:
        """Shift, scale and gate of the attention and of the feed-forward, (B, 1, D) each."""
        if not self.parts:
            return (None,) * 6
        vectors = parts[:, None].chunk(self.parts, dim=-1)
        return vectors if self.parts == 6 else (*vectors[:2], None, *vectors[2:], None)


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """x (1 + scale) + shift; x itself without them."""
    return x if shift is None or scale is None else x * (1 + scale) + shift


def zero_(*layers: nn.Linear) -> None:
    """Set weights and biases to zero."""
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
