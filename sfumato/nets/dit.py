"""DiT: a transformer over patches whose norms are modulated by time and conditioning."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.types import Conditioning
from sfumato.nets.blocks import sinusoid
from sfumato.nets.tags import fused, tagged
from sfumato.nets.transformer import CrossAttention, FeedForward, SelfAttention

__all__ = ["DiT", "DiTConfig", "sincos_positions"]


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Shape of a DiT with adaLN-Zero blocks; the defaults are DiT-S/2 without labels.

    `num_classes` adds a label table with one more row, the null class. `text_dim` adds cross-attention to
    `cond.tokens` in every block, `pooled_dim` adds `cond.pooled` to the modulation. `shared_modulation`
    computes the modulation once for all blocks, each of which adds a learned vector to it: a third fewer
    parameters (Chen et al. 2023, arXiv:2310.00426, section 2.3).
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

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of heads ({self.heads}) and of 4")


class DiT(nn.Module):
    """Scalable diffusion transformer (Peebles & Xie 2023, arXiv:2212.09748), adaLN-Zero, any size and aspect.

    A fresh net is zero everywhere, for every block starts as the identity and the last layer at zero.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patches = tagged(nn.Linear(c.in_channels * c.patch**2, c.width), "edge")
        first, second = nn.Linear(TIME_FEATURES, c.width), nn.Linear(c.width, c.width)
        self.time = nn.Sequential(tagged(first, "edge"), nn.SiLU(), tagged(second, "edge"))
        self.label = nn.Embedding(c.num_classes + 1, c.width) if c.num_classes is not None else None
        self.pooled = tagged(nn.Linear(c.pooled_dim, c.width), "edge") if c.pooled_dim is not None else None
        self.blocks = nn.ModuleList(DiTBlock(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, eps=1e-6, elementwise_affine=False)
        self.shared = fused(nn.Linear(c.width, 6 * c.width), 6) if c.shared_modulation else None
        self.modulation = tagged(nn.Linear(c.width, 2 * c.width), "edge")
        self.out = tagged(nn.Linear(c.width, c.out_channels * c.patch**2), "edge")
        self._initialize()

    def prepare(self, cond: Conditioning) -> Conditioning:
        """Keys and values of the text for every block, once per walk."""
        if self.config.text_dim is None:
            return cond
        tokens = _need(cond.tokens, "tokens")
        return replace(
            cond, kv=tuple(block.cross.project(tokens) for block in self._blocks() if block.cross is not None)
        )

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x (B, C, H, W), t (B,) -> (B, out_channels, H, W).

        Raises: ValueError if a side is not a multiple of the patch, or a conditioning it needs is missing.
        """
        c = self.config
        if x.shape[-2] % c.patch or x.shape[-1] % c.patch:
            raise ValueError(f"{x.shape[-2]}x{x.shape[-1]} is not a multiple of the patch size {c.patch}")
        grid = (x.shape[-2] // c.patch, x.shape[-1] // c.patch)
        h = self.patches(patchify(x, c.patch)) + sincos_positions(*grid, c.width).to(x)  # (B, N, D)
        signal = F.silu(self._signal(t, cond, h.dtype))
        kv = None if c.text_dim is None else (cond.kv or self.prepare(cond).kv)
        to_blocks = signal if self.shared is None else self.shared(signal)
        for i, block in enumerate(self.blocks):
            h = block(h, to_blocks, None if kv is None else kv[i], cond.mask)
        shift, scale = self.modulation(signal)[:, None].chunk(2, dim=-1)
        return unpatchify(self.out(modulate(self.norm(h), shift, scale)), grid, c.patch)

    def _signal(self, t: Tensor, cond: Conditioning, dtype: torch.dtype) -> Tensor:
        """What modulates the blocks: time, label and pooled text, (B, D)."""
        signal = self.time(sinusoid(t, TIME_FEATURES).to(dtype))
        if self.label is not None:
            signal = signal + self.label(_need(cond.label, "label"))
        if self.pooled is not None:
            signal = signal + self.pooled(_need(cond.pooled, "pooled"))
        return signal

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in self.time:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)
        _zero(self.modulation, self.out)
        if self.shared is not None:
            _zero(self.shared)
        for block in self._blocks():
            block.zero()

    def _blocks(self) -> list[DiTBlock]:
        return [block for block in self.blocks if isinstance(block, DiTBlock)]


class DiTBlock(nn.Module):
    """Self-attention, optional cross-attention to text, feed-forward; all modulated by the signal."""

    def __init__(self, c: DiTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(c.width, eps=1e-6, elementwise_affine=False)
        self.attention = SelfAttention(c.width, c.heads, qk_norm=c.qk_norm)
        self.norm2 = nn.LayerNorm(c.width, eps=1e-6, elementwise_affine=False)
        self.mlp = FeedForward(c.width, int(c.width * c.mlp_ratio), approximate="tanh")
        self.modulation = None if c.shared_modulation else fused(nn.Linear(c.width, 6 * c.width), 6)
        self.offset = nn.Parameter(torch.zeros(6 * c.width)) if c.shared_modulation else None
        self.cross: CrossAttention | None = None
        if c.text_dim is not None:
            self.norm_cross = nn.LayerNorm(c.width, eps=1e-6)
            self.cross = CrossAttention(c.width, c.text_dim, c.heads, qk_norm=c.qk_norm)

    def forward(
        self, x: Tensor, signal: Tensor, kv: tuple[Tensor, Tensor] | None, mask: Tensor | None
    ) -> Tensor:
        if self.offset is not None:
            parts = signal + self.offset
        else:
            assert self.modulation is not None
            parts = self.modulation(signal)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(modulate(self.norm1(x), shift1, scale1))
        if self.cross is not None and kv is not None:
            x = x + self.cross(self.norm_cross(x), kv, mask)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))

    def zero(self) -> None:
        """Make the block the identity (adaLN-Zero)."""
        if self.modulation is not None:
            _zero(self.modulation)
        if self.cross is not None:
            _zero(self.cross.out)


TIME_FEATURES = 256  # width of the sinusoids of t, as published


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return x * (1 + scale) + shift


def sincos_positions(height: int, width: int, dim: int) -> Tensor:
    """Fixed 2-D positions (1, height * width, dim), float32.

    Half of the channels for the column, half for the row; float64 arithmetic, as published.
    """
    quarter = dim // 4
    omega = torch.exp(-torch.arange(quarter, dtype=torch.float64) * (LOG_PERIOD / quarter))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    parts = [axis.reshape(-1, 1) * omega for axis in (columns, rows)]
    table = torch.cat([f(p) for p in parts for f in (torch.sin, torch.cos)], dim=1)
    return table.float()[None]


LOG_PERIOD = 9.210340371976184  # ln 10000


def patchify(x: Tensor, p: int) -> Tensor:
    """(B, C, H, W) -> (B, H/p * W/p, C * p * p), channel-major inside a patch."""
    return F.pixel_unshuffle(x, p).flatten(2).transpose(1, 2)


def unpatchify(x: Tensor, grid: tuple[int, int], p: int) -> Tensor:
    """Inverse of patchify for a grid of (rows, columns)."""
    return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, grid), p)


def _zero(*layers: nn.Linear) -> None:
    for layer in layers:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def _need(value: Tensor | None, name: str) -> Tensor:
    if value is None:
        raise ValueError(f"this DiT needs cond.{name}")
    return value
