"""DINOv2: the vision transformer whose class token FD-DINOv2 compares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.nets.encoder import EncoderBlock, Gated
from sfumato.nets.transformer import FeedForward

__all__ = ["DINOv2", "DINOv2Config"]


@dataclass(frozen=True, kw_only=True)
class DINOv2Config:
    """Shape; the published ones are S (384, 12, 6), B (768, 12, 12), L (1024, 24, 16) and g (1536, 40, 24).

    Attributes:
        width, depth, heads: of the transformer.
        hidden: of the feed-forward network; gated in g, with 4096.
        gated: SwiGLU in place of GELU.
        patch: side of a patch in pixels.
        side: patches per row for which there are positions; 37 is a picture of 518 pixels.
        registers: tokens beside the class token (Darcet et al. 2024, arXiv:2309.16588).
    """

    width: int = 1024
    depth: int = 24
    heads: int = 16
    hidden: int = 4096
    gated: bool = False
    patch: int = 14
    side: int = 37
    registers: int = 0


class DINOv2(nn.Module):
    """Picture -> normalized class token (Oquab et al. 2024, arXiv:2304.07193)."""

    registers: Tensor | None

    def __init__(self, config: DINOv2Config) -> None:
        super().__init__()
        c = self.config = config
        self.patches = nn.Conv2d(3, c.width, c.patch, c.patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, c.width))
        self.positions = nn.Parameter(torch.zeros(1, c.side**2 + 1, c.width))
        self.mask = nn.Parameter(torch.zeros(1, c.width))  # of the training only; published files hold it
        registers = nn.Parameter(torch.zeros(1, c.registers, c.width)) if c.registers else None
        self.register_parameter("registers", registers)
        self.blocks = nn.ModuleList(
            EncoderBlock(
                c.width,
                c.heads,
                Gated(c.width, c.hidden) if c.gated else FeedForward(c.width, c.hidden),
                eps=1e-6,
                scaled=True,
            )
            for _ in range(c.depth)
        )
        self.norm = nn.LayerNorm(c.width, eps=1e-6)

    def forward(self, image: Tensor) -> Tensor:
        """Image (B, 3, H, W), normalized by ImageNet's mean and deviation -> (B, width).

        Raises: ValueError if a side is no multiple of the patch.
        """
        c, (height, width) = self.config, image.shape[-2:]
        if height % c.patch or width % c.patch:
            raise ValueError(f"DINOv2 takes sides that are multiples of {c.patch}, not {width}x{height}")
        x = self.patches(image).flatten(2).mT  # (B, L, D)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)
        x = x + self._positions(height // c.patch, width // c.patch)
        if self.registers is not None:
            x = torch.cat([x[:, :1], self.registers.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])

    def _positions(self, height: int, width: int) -> Tensor:
        """Positions (1, 1 + height * width, D), interpolated as the published code does."""
        side = self.config.side
        if height == width == side:
            return self.positions
        first, rest = self.positions[:, :1], self.positions[:, 1:]
        plane = rest.unflatten(1, (side, side)).permute(0, 3, 1, 2).float()
        if self.registers is None:
            # The models without registers were trained with scales a tenth of a patch too large.
            scales = ((height + 0.1) / side, (width + 0.1) / side)
            plane = F.interpolate(plane, scale_factor=scales, mode="bicubic")
        else:
            plane = F.interpolate(plane, (height, width), mode="bicubic", antialias=True)
        return torch.cat([first, plane.flatten(2).mT.to(first.dtype)], dim=1)
