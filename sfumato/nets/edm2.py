"""EDM2: a U-Net in which every operation keeps the magnitude of what passes through it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.core.types import Conditioning

__all__ = ["EDM2", "EDM2Config", "mp_cat", "mp_silu", "mp_sum", "normalize"]

Flavor = Literal["encoder", "decoder"]


@dataclass(frozen=True, kw_only=True)
class EDM2Config:
    """Shape of an EDM2 net; the defaults are the smallest published one, XS.

    Attributes:
        attention_levels: counted from the full resolution, 0; the middle attends as well.
        head_dim: width of a head.
        num_classes: length of the class vector, of which one entry is 1; the null class has none.
        resolution: side of the samples it was made for; others work, published names contain it.
        logvar_features: of the learned log-variance of the loss.
        residual, label, concat: shares t of the second operand of `mp_sum` and `mp_cat`.
        clip: activations are clamped to this after every block.
    """

    channels: int = 4
    width: int = 128
    mults: tuple[int, ...] = (1, 2, 3, 4)
    blocks: int = 3
    attention_levels: tuple[int, ...] = (2, 3)
    head_dim: int = 64
    num_classes: int | None = 1000
    resolution: int = 64
    logvar_features: int = 128
    dropout: float = 0.0
    residual: float = 0.3
    label: float = 0.5
    concat: float = 0.5
    clip: float = 256.0

    def __post_init__(self) -> None:
        for level in {*self.attention_levels, len(self.mults) - 1}:
            if level >= len(self.mults) or self.width * self.mults[level] % self.head_dim:
                raise ValueError(
                    f"attention at level {level} of mults {self.mults}: it must exist, and head_dim "
                    f"{self.head_dim} divide its width"
                )

    @property
    def factor(self) -> int:
        """Both sides must be multiples of this."""
        return 2 ** (len(self.mults) - 1)


class EDM2(nn.Module):
    """Magnitude-preserving U-Net (Karras et al. 2024, arXiv:2312.02696), without its preconditioning.

    That is `parameterization.edm` on a `VE` schedule, whose t = ln(sigma) / 4 the net embeds.
    """

    def __init__(self, config: EDM2Config) -> None:
        super().__init__()
        c = self.config = config
        widths = [c.width * mult for mult in c.mults]
        embed = max(widths)
        self.fourier = Fourier(c.width)
        self.noise = MPConv(c.width, embed)
        self.label = MPConv(c.num_classes, embed) if c.num_classes is not None else None
        self.conv_in = MPConv(c.channels + 1, c.width, 3)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        cout, skips = c.width, [c.width]
        for level, width in enumerate(widths):
            blocks = [MPBlock(c, cout, cout, embed, "encoder", resample="down")] if level else []
            for _ in range(c.blocks):
                blocks.append(MPBlock(c, cout, width, embed, "encoder", level in c.attention_levels))
                cout = width
            self.encoder.extend(blocks)
            skips += [block.width for block in blocks]
        for level, width in reversed(list(enumerate(widths))):
            if level == len(widths) - 1:
                self.decoder.append(MPBlock(c, cout, cout, embed, "decoder", attention=True))
                self.decoder.append(MPBlock(c, cout, cout, embed, "decoder"))
            else:
                self.decoder.append(MPBlock(c, cout, cout, embed, "decoder", resample="up"))
            for _ in range(c.blocks + 1):
                self.decoder.append(
                    MPBlock(c, cout, width, embed, "decoder", level in c.attention_levels, skip=skips.pop())
                )
                cout = width
        self.conv_out, self.gain = MPConv(cout, c.channels, 3), nn.Parameter(torch.zeros(()))
        self.logvar_fourier, self.logvar = Fourier(c.logvar_features), MPConv(c.logvar_features, 1)

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x (B, C, H, W), t = ln(sigma) / 4 (B,) -> (B, C, H, W).

        Raises: ValueError if a side is not a multiple of the factor, or a class is out of range.
        """
        f = self.config.factor
        if x.shape[-1] % f or x.shape[-2] % f:
            raise ValueError(f"{x.shape[-2]}x{x.shape[-1]}: both sides must be multiples of {f}")
        signal = self._signal(t, cond, x.dtype)
        x = self.conv_in(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))
        skips = [x]
        for block in self.encoder:
            x = block(x, signal)
            skips.append(x)
        for block in self.decoder:
            if block.skip:
                x = mp_cat(x, skips.pop(), self.config.concat)
            x = block(x, signal)
        return self.conv_out(x, self.gain)

    def log_variance(self, t: Tensor) -> Tensor:
        """u(t) of the loss w / e^u |D - x|^2 + u, (B,)."""
        return self.logvar(self.logvar_fourier(t))[:, 0]

    def _signal(self, t: Tensor, cond: Conditioning, dtype: torch.dtype) -> Tensor:
        """What the blocks are told, (B, E)."""
        signal = self.noise(self.fourier(t).to(dtype))
        if self.label is not None:
            n = self.config.num_classes
            assert n is not None
            label = cond.label if cond.label is not None else torch.full_like(t, n, dtype=torch.long)
            if label.device.type == "cpu" and bool(((label < 0) | (label > n)).any()):
                wrong = int(label[(label < 0) | (label > n)][0])
                raise ValueError(
                    f"label {wrong} is out of range: this net has classes 0..{n - 1}, and {n} is none"
                )
            vector = F.one_hot(label, n + 1)[:, :n].to(dtype) * math.sqrt(n)
            signal = mp_sum(signal, self.label(vector), self.config.label)
        return mp_silu(signal)


class MPBlock(nn.Module):
    """Resampling, two convolutions around the signal, attention; each sum keeps the magnitude.

    Args:
        flavor: the encoder normalizes its input per pixel, after the skip convolution; the decoder does not.
        skip: channels that `mp_cat` has put behind the input.
    """

    def __init__(
        self,
        c: EDM2Config,
        cin: int,
        cout: int,
        embed: int,
        flavor: Flavor,
        attention: bool = False,
        *,
        resample: Literal["up", "down"] | None = None,
        skip: int = 0,
    ) -> None:
        super().__init__()
        self.width, self.encodes, self.resample, self.skip = cout, flavor == "encoder", resample, skip
        self.residual, self.clip, self.heads = c.residual, c.clip, cout // c.head_dim if attention else 0
        cin += skip
        self.conv1 = MPConv(cout if self.encodes else cin, cout, 3)
        self.embed, self.gain = MPConv(embed, cout), nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(c.dropout)
        self.conv2 = MPConv(cout, cout, 3)
        self.conv_skip = MPConv(cin, cout, 1) if cin != cout else None
        self.qkv = MPConv(cout, 3 * cout, 1) if attention else None
        self.out = MPConv(cout, cout, 1) if attention else None

    def forward(self, x: Tensor, signal: Tensor) -> Tensor:
        """x (B, C_in, H, W), signal (B, E) -> (B, C_out, H', W')."""
        if self.resample is not None:
            x = F.avg_pool2d(x, 2) if self.resample == "down" else F.interpolate(x, scale_factor=2.0)
        if self.encodes:
            x = normalize(x if self.conv_skip is None else self.conv_skip(x), 1)
        y = self.conv1(mp_silu(x)) * (self.embed(signal, self.gain) + 1)[:, :, None, None]
        y = self.conv2(self.dropout(mp_silu(y)))
        if not self.encodes and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, self.residual)
        if self.qkv is not None and self.out is not None:
            x = mp_sum(x, self.out(self._attend(self.qkv(x))), self.residual)
        return x.clamp(-self.clip, self.clip)

    def _attend(self, qkv: Tensor) -> Tensor:
        """Rows of `qkv` are by head, then channel, then query, key and value, as in published files."""
        b, _, height, width = qkv.shape
        parts = normalize(qkv.reshape(b, self.heads, -1, 3, height * width), 2)
        q, k, v = (part.transpose(-1, -2) for part in parts.unbind(3))  # (B, heads, H * W, d)
        return F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, -1, height, width)


class MPConv(nn.Module):
    """Convolution (kernel 1 or more) or linear layer (kernel 0) whose rows have unit magnitude; no bias.

    In training the stored weight itself is kept at that magnitude (section 2.3, "forced weight norm").
    """

    def __init__(self, cin: int, cout: int, kernel: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin, *[kernel] * (2 if kernel else 0)))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """x (B, C_in) or (B, C_in, H, W)."""
        w = self.weight.float() if self.weight.dtype in (torch.float16, torch.bfloat16) else self.weight
        if self.training:
            with torch.no_grad():
                self.weight.copy_(normalize(w))
        w = (normalize(w) * (gain / math.sqrt(w[0].numel()))).to(x.dtype)
        return F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class Fourier(nn.Module):
    """sqrt(2) cos(2 pi (f t + p)) with random f and p that are kept with the weights, (B,) -> (B, dim)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.freqs: Tensor
        self.phases: Tensor
        self.register_buffer("freqs", 2 * math.pi * torch.randn(dim))
        self.register_buffer("phases", 2 * math.pi * torch.rand(dim))

    def forward(self, t: Tensor) -> Tensor:
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        return (t[:, None] * self.freqs.to(t) + self.phases.to(t)).cos() * math.sqrt(2)


def normalize(x: Tensor, dim: int | None = None, eps: float = 1e-4) -> Tensor:
    """x over its root mean square (plus eps) along an axis; None = along all but the first. Eq. 47."""
    dims = tuple(range(1, x.ndim)) if dim is None else (dim,)
    if not dims:
        return x / (x.abs() + eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=wide)
    return x / torch.add(eps, norm, alpha=math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """silu(x) / 0.596, of unit magnitude for a normal input. Eq. 81."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b over its magnitude for independent a and b. Eq. 88."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Channels of a and b side by side, each contributing its share whatever its width. Eq. 103."""
    n, m = a.shape[1], b.shape[1]
    scale = math.sqrt((n + m) / ((1 - t) ** 2 + t**2))
    return torch.cat([scale * (1 - t) / math.sqrt(n) * a, scale * t / math.sqrt(m) * b], dim=1)
