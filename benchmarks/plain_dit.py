"""A DiT as its paper's code is built, and its training loop, without anything beyond plain PyTorch.

Peebles & Xie 2023 (arXiv:2212.09748). The loss is the mean squared error of eps alone.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from setting import LOG_EVERY, LR, Pace, Samples, Size
from torch import Tensor, nn

from sfumato.nets.dit import DiTConfig

__all__ = ["PlainDiT", "dit"]

DECAY = 0.9999  # of the moving average, as published


def dit(size: Size, data: Path, pace: Pace) -> None:
    """AdamW without decay, an average by a loop over parameters, a mean loss every so many steps."""
    net = PlainDiT(size.dit, size.side)
    average = copy.deepcopy(net).requires_grad_(False).eval()
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0)
    net.train()
    samples, steps, running = Samples.of(size), 0, 0.0
    for rows in samples.endless():
        pace()
        x, y = samples.latents[rows], samples.labels[rows]
        t = torch.randint(0, 1000, (len(x),))
        noise = torch.randn_like(x)
        a = alpha_bar[t].view(-1, 1, 1, 1)
        loss = (net(a.sqrt() * x + (1 - a).sqrt() * noise, t, y) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        follow(average, net)
        running, steps = running + loss.item(), steps + 1
        if steps % LOG_EVERY == 0:
            running = 0.0


@torch.no_grad()
def follow(average: nn.Module, net: nn.Module) -> None:
    """Average <- decay * average + (1 - decay) * net, one parameter after the other."""
    mine = dict(average.named_parameters())
    for name, parameter in net.named_parameters():
        mine[name].mul_(DECAY).add_(parameter.data, alpha=1 - DECAY)


class PlainDiT(nn.Module):
    """Patch embedding, blocks with adaLN-Zero, final layer; classes, fixed positions."""

    def __init__(self, c: DiTConfig, side: int) -> None:
        super().__init__()
        assert c.num_classes is not None
        self.config, self.classes, self.side = c, c.num_classes, side // c.patch
        self.x_embedder = nn.Conv2d(c.in_channels, c.width, c.patch, stride=c.patch)
        self.t_embedder = nn.Sequential(nn.Linear(256, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.y_embedder = nn.Embedding(c.num_classes + 1, c.width)
        self.register_buffer("positions", torch.randn(1, self.side**2, c.width) * 0.02)
        self.blocks = nn.ModuleList(PlainBlock(c) for _ in range(c.depth))
        self.norm = nn.LayerNorm(c.width, elementwise_affine=False, eps=1e-6)
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 2 * c.width))
        self.linear = nn.Linear(c.width, c.patch**2 * c.out_channels)
        for parameter in (*self.adaln.parameters(), *self.linear.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (B, C, H, W), t (B,), y (B,) -> (B, C, H, W); a tenth of the labels is dropped in training."""
        h = self.x_embedder(x).flatten(2).transpose(1, 2) + self.positions
        if self.training:
            y = torch.where(torch.rand(len(y)) < 0.1, self.classes, y)
        c = self.t_embedder(frequencies(t)) + self.y_embedder(y)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.adaln(c).chunk(2, dim=1)
        h = self.linear(modulated(self.norm(h), shift, scale))
        p, s = self.config.patch, self.side
        h = h.reshape(len(x), s, s, p, p, -1)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(len(x), -1, s * p, s * p)


class PlainBlock(nn.Module):
    """Attention and feed-forward, each shifted, scaled and gated by the conditioning."""

    def __init__(self, c: DiTConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.norm1 = nn.LayerNorm(c.width, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(c.width, 3 * c.width), nn.Linear(c.width, c.width)
        self.norm2 = nn.LayerNorm(c.width, elementwise_affine=False, eps=1e-6)
        hidden = int(c.width * c.mlp_ratio)
        self.mlp = nn.Sequential(
            nn.Linear(c.width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, c.width)
        )
        self.adaln = nn.Sequential(nn.SiLU(), nn.Linear(c.width, 6 * c.width))
        for parameter in self.adaln.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attend(modulated(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulated(self.norm2(x), shift2, scale2))

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention, (B, N, D) -> same."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def frequencies(t: Tensor) -> Tensor:
    """Cosines and sines of t, (B, 256)."""
    angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128) / 128)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
