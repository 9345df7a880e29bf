"""What files with input_blocks mean, written once more over their own names and in plain operations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Reading:
    """What the tensors of a file do not say of the net; `heads` of a width, groups of 32 as published."""

    state: dict[str, Tensor]
    heads: Callable[[int], int]
    new_order: bool = False
    activation: Callable[[Tensor], Tensor] = F.silu
    scale: float = 1.0
    groups: int = 32

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"].flatten(1), self.state[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-5)

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state[f"{name}.bias"], stride, weight.shape[-1] // 2)

    def res(self, name: str, x: Tensor, emb: Tensor, resample: Callable[[Tensor], Tensor]) -> Tensor:
        h = self.conv(f"{name}.in_layers.2", resample(self.activation(self.norm(f"{name}.in_layers.0", x))))
        e = self.linear(f"{name}.emb_layers.1", emb)[..., None, None]
        if e.shape[1] == 2 * h.shape[1]:
            scale, shift = e[:, : h.shape[1]], e[:, h.shape[1] :]
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + e)
        h = self.conv(f"{name}.out_layers.3", self.activation(h))
        skip = f"{name}.skip_connection"
        x = resample(x)
        return ((self.conv(skip, x) if f"{skip}.weight" in self.state else x) + h) * self.scale

    def attention(self, name: str, x: Tensor, tokens: Tensor | None) -> Tensor:
        """Channel by channel as the files order them, in einsum; `tokens` (B, L, D)."""
        b, c, height, width = x.shape
        heads = self.heads(c)
        flat = self.norm(f"{name}.norm", x).flatten(2)
        qkv = self.linear(f"{name}.qkv", flat.mT).mT
        count = qkv.shape[1] // c
        if self.new_order:
            parts = list(qkv.reshape(b, count, heads, c // heads, -1).unbind(1))
        else:
            parts = list(qkv.reshape(b, heads, count, c // heads, -1).unbind(2))
        if f"{name}.encoder_kv.weight" in self.state:
            assert tokens is not None
            if f"{name}.norm_encoder.weight" in self.state:
                tokens = self.norm(f"{name}.norm_encoder", tokens.mT).mT
            kv = self.linear(f"{name}.encoder_kv", tokens).mT.reshape(b, heads, 2, c // heads, -1)
            read = [kv[:, :, 0], kv[:, :, 1]]
            own = parts[1:] or [v[..., :0] for v in read]
            parts[1:] = [torch.cat([t, p], 3) for t, p in zip(read, own, strict=True)]
        q, k, v = parts
        weights = torch.einsum("bhct,bhcs->bhts", q, k).div(math.sqrt(c // heads)).softmax(-1)
        h = torch.einsum("bhts,bhcs->bhct", weights, v).reshape(b, c, -1)
        return x + self.linear(f"{name}.proj_out", h.mT).mT.reshape(b, c, height, width)

    def part(self, name: str, x: Tensor, emb: Tensor, tokens: Tensor | None, resample: str) -> Tensor:
        if f"{name}.in_layers.2.weight" in self.state:
            return self.res(name, x, emb, RESAMPLE[resample])
        if f"{name}.qkv.weight" in self.state:
            return self.attention(name, x, tokens)
        if f"{name}.op.weight" in self.state:
            return self.conv(f"{name}.op", x, stride=2)
        if f"{name}.conv.weight" in self.state:
            return self.conv(f"{name}.conv", RESAMPLE["up"](x))
        return self.conv(name, x)

    def children(self, name: str) -> list[str]:
        numbers = {int(k[len(name) + 1 :].split(".")[0]) for k in self.state if k.startswith(f"{name}.")}
        return [f"{name}.{n}" for n in sorted(numbers)]

    def embedded(self, t: Tensor, extra: Tensor | float = 0.0, name: str = "time_embed") -> Tensor:
        half = self.state[f"{name}.0.weight"].shape[1] // 2
        angles = t.float()[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        waves = torch.cat([angles.cos(), angles.sin()], 1)
        return self.linear(f"{name}.2", self.activation(self.linear(f"{name}.0", waves))) + extra

    def encode(
        self, x: Tensor, emb: Tensor, tokens: Tensor | None, down: set[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """`down`: numbers of the input_blocks that halve the resolution."""
        skips = []
        for i, block in enumerate(self.children("input_blocks")):
            for part in self.children(block):
                x = self.part(part, x, emb, tokens, "down" if i in down else "")
            skips.append(x)
        for part in self.children("middle_block"):
            x = self.part(part, x, emb, tokens, "")
        return x, skips

    def unet(self, x: Tensor, emb: Tensor, down: set[int], tokens: Tensor | None = None) -> Tensor:
        """`emb` before its activation."""
        emb = self.activation(emb)
        x, skips = self.encode(x, emb, tokens, down)
        for block in self.children("output_blocks"):
            x = torch.cat([x, skips.pop()], 1)
            for i, part in enumerate(self.children(block)):
                x = self.part(part, x, emb, tokens, "up" if i else "")
        return self.conv("out.2", self.activation(self.norm("out.0", x)))


RESAMPLE: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "down": lambda x: F.avg_pool2d(x, 2),
    "up": lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3),
}


@pytest.fixture
def reading() -> type[Reading]:
    return Reading


@pytest.fixture
def random_file() -> Callable[[dict[str, tuple[int, ...]]], dict[str, Tensor]]:
    """Tensors of given shapes with outputs of order 1; the same numbers each time."""

    def make(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        state = {}
        for name, shape in shapes.items():
            v = torch.randn(shape, generator=generator)
            fan = math.prod(shape[1:])
            gain = len(shape) == 1 and name.endswith("weight")
            state[name] = 1 + 0.2 * v if gain else 0.2 * v if len(shape) == 1 else 0.8 * v / math.sqrt(fan)
        return state

    return make


@pytest.fixture
def scaled() -> Callable[[nn.Module], nn.Module]:
    """Fill a net, that may have been made on the meta device, so that its outputs are of order 1."""

    def fill(net: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        for name, p in net.to_empty(device="cpu").named_parameters():
            nn.init.normal_(p, std=0.2 if p.ndim == 1 else 0.8 / math.sqrt(p[0].numel()))
            if p.ndim == 1 and name.endswith("weight"):
                p.data += 1
        return net.requires_grad_(False).eval()

    return fill
