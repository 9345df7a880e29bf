"""Convolutional autoencoders: continuous (KL) and vector-quantized (VQ) first stages of latent diffusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.nets.blocks import GroupNorm

__all__ = ["Autoencoder", "AutoencoderConfig", "DiagonalGaussian", "Quantized", "VectorQuantizer"]


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Shape of a first stage; the defaults are kl-f8, the autoencoder of Stable Diffusion.

    `attention_levels` counts from the image (0 = full resolution). The published configs speak of
    resolutions of a 256-pixel image instead: kl-f16's `[16]` is level 4. `patch` folds patch x patch
    pixels into channels around the whole network, which spares a CPU the convolutions at full resolution.
    `commitment` is the beta of the quantizer; `legacy_commitment` puts it where the published ones have it.
    """

    kind: Literal["kl", "vq"] = "kl"
    image_channels: int = 3
    channels: int = 128
    mults: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    attention_levels: tuple[int, ...] = ()
    mid_attention: bool = True
    z_channels: int = 4
    embed_dim: int = 4
    codebook_size: int = 0
    quant_conv: bool = True
    norm_groups: int = 32
    patch: int = 1
    commitment: float = 0.25
    legacy_commitment: bool = False

    def __post_init__(self) -> None:
        if (self.kind == "vq") != (self.codebook_size > 0):
            raise ValueError(
                f"kind {self.kind!r} with codebook_size {self.codebook_size}: only vq has a codebook"
            )
        if not self.quant_conv and self.embed_dim != self.z_channels:
            raise ValueError(
                f"without quant_conv embed_dim ({self.embed_dim}) must equal z_channels ({self.z_channels})"
            )

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel along one side."""
        return self.patch * 2 ** (len(self.mults) - 1)


class DiagonalGaussian(NamedTuple):
    """The posterior N(mean, exp(logvar)) of a KL encoder, each (B, C, h, w)."""

    mean: Tensor
    logvar: Tensor

    def sample(self, eps: Tensor) -> Tensor:
        """mean + std * eps, for eps ~ N(0, I) of the same shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * eps

    def kl(self) -> Tensor:
        """KL to N(0, I) in nats, summed over C, h, w: (B,)."""
        terms = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)


class Quantized(NamedTuple):
    """Quantized latents with straight-through gradient, the codebook loss and the chosen codes."""

    z: Tensor
    loss: Tensor
    codes: Tensor


class ResBlock(nn.Module):
    """GroupNorm-SiLU-conv twice plus a skip; no time embedding, no dropout."""

    def __init__(self, cin: int, cout: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, cin, eps=1e-6)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = GroupNorm(groups, cout, eps=1e-6)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class SpatialAttention(nn.Module):
    """Single-head self-attention over pixels."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.norm(x).flatten(2).transpose(1, 2)  # (B, h*w, C)
        y = F.scaled_dot_product_attention(self.q(y)[:, None], self.k(y)[:, None], self.v(y)[:, None])[:, 0]
        return x + self.out(y).transpose(1, 2).reshape(b, c, h, w)


class Downsample(nn.Module):
    """Stride-2 convolution padded at the right and bottom only, as the published first stages do."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest x2 and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(channels: int, c: AutoencoderConfig) -> nn.Sequential:
    attention = SpatialAttention(channels, c.norm_groups) if c.mid_attention else nn.Identity()
    g = c.norm_groups
    return nn.Sequential(ResBlock(channels, channels, g), attention, ResBlock(channels, channels, g))


def _stack(cin: int, cout: int, blocks: int, attend: bool, groups: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for i in range(blocks):
        layers.append(ResBlock(cin if i == 0 else cout, cout, groups))
        if attend:
            layers.append(SpatialAttention(cout, groups))
    return layers


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> moments (B, 2z, H/f, W/f) for KL, latents (B, z, H/f, W/f) for VQ."""

    def __init__(self, c: AutoencoderConfig) -> None:
        super().__init__()
        widths = [c.channels * m for m in c.mults]
        self.patch = c.patch
        self.conv_in = nn.Conv2d(c.image_channels * c.patch**2, c.channels, 3, padding=1)
        self.levels = nn.ModuleList()
        cin = c.channels
        for i, width in enumerate(widths):
            layers = _stack(cin, width, c.blocks, i in c.attention_levels, c.norm_groups)
            if i + 1 < len(widths):
                layers.append(Downsample(width))
            self.levels.append(nn.Sequential(*layers))
            cin = width
        self.middle = _middle(cin, c)
        self.norm_out = GroupNorm(c.norm_groups, cin, eps=1e-6)
        self.conv_out = nn.Conv2d(cin, c.z_channels * (2 if c.kind == "kl" else 1), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))
        for level in self.levels:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.middle(h))))


class Decoder(nn.Module):
    """Latents (B, z, h, w) -> image (B, 3, h*f, w*f); `levels` run from the coarsest to the finest."""

    def __init__(self, c: AutoencoderConfig) -> None:
        super().__init__()
        widths = [c.channels * m for m in c.mults]
        self.patch = c.patch
        cin = widths[-1]
        self.conv_in = nn.Conv2d(c.z_channels, cin, 3, padding=1)
        self.middle = _middle(cin, c)
        self.levels = nn.ModuleList()
        for i in reversed(range(len(widths))):
            layers = _stack(cin, widths[i], c.blocks + 1, i in c.attention_levels, c.norm_groups)
            if i > 0:
                layers.append(Upsample(widths[i]))
            self.levels.append(nn.Sequential(*layers))
            cin = widths[i]
        self.norm_out = GroupNorm(c.norm_groups, cin, eps=1e-6)
        self.conv_out = nn.Conv2d(cin, c.image_channels * c.patch**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.middle(self.conv_in(z))
        for level in self.levels:
            h = level(h)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)


class VectorQuantizer(nn.Module):
    """Nearest code by squared distance, straight-through gradient (van den Oord et al., arXiv:1711.00937).

    The published latent-diffusion checkpoints were trained with `beta` on the codebook term instead of the
    commitment term; `legacy=True` is that order, `legacy=False` the paper's.
    """

    def __init__(self, size: int, dim: int, beta: float = 0.25, legacy: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / size, 1.0 / size)
        self.beta, self.legacy = beta, legacy

    def forward(self, z: Tensor) -> Quantized:
        """Quantize z (B, C, h, w); codes are (B, h, w)."""
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        table = self.embedding.weight
        distance = flat.square().sum(1, keepdim=True) - 2 * flat @ table.T + table.square().sum(1)
        codes = distance.argmin(1)
        hard = self.lookup(codes.view(z.shape[0], *z.shape[2:]))
        commit, codebook = F.mse_loss(z, hard.detach()), F.mse_loss(hard, z.detach())
        loss = commit + self.beta * codebook if self.legacy else codebook + self.beta * commit
        return Quantized(z + (hard - z).detach(), loss, codes.view(z.shape[0], *z.shape[2:]))

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) -> latents (B, C, h, w)."""
        return self.embedding(codes).permute(0, 3, 1, 2)


class Autoencoder(nn.Module):
    """Image <-> latent, Rombach et al. 2022 (arXiv:2112.10752); images are (B, 3, H, W) in [-1, 1].

    A KL model encodes to a `DiagonalGaussian`. A VQ model encodes to the latents *before* quantization and
    quantizes at the start of `decode`, which is how latent diffusion uses it.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        c = self.config = config
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        twice = 2 if c.kind == "kl" else 1
        self.quant_conv: nn.Module = nn.Identity()
        self.post_quant_conv: nn.Module = nn.Identity()
        if c.quant_conv:
            self.quant_conv = nn.Conv2d(twice * c.z_channels, twice * c.embed_dim, 1)
            self.post_quant_conv = nn.Conv2d(c.embed_dim, c.z_channels, 1)
        if c.kind == "vq":
            self.quantizer = VectorQuantizer(c.codebook_size, c.embed_dim, c.commitment, c.legacy_commitment)

    def encode(self, image: Tensor) -> DiagonalGaussian:
        """Posterior of the latents; for VQ a point mass (logvar -30) at the unquantized latents.

        Raises: ValueError if a side is not a multiple of the factor.
        """
        f = self.config.factor
        if image.shape[-1] % f or image.shape[-2] % f:
            raise ValueError(
                f"image is {image.shape[-1]}x{image.shape[-2]}; both sides must be multiples of {f}"
            )
        moments = self.quant_conv(self.encoder(image))
        if self.config.kind == "vq":
            return DiagonalGaussian(moments, torch.full_like(moments, -30.0))
        mean, logvar = moments.chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(-30.0, 20.0))

    def quantize(self, z: Tensor) -> Quantized:
        """Nearest codes of z (B, C, h, w). Raises: ValueError for a KL model."""
        if self.config.kind != "vq":
            raise ValueError("a KL autoencoder has no codebook")
        quantized: Quantized = self.quantizer(z)
        return quantized

    def decode(self, z: Tensor, *, quantize: bool = True) -> Tensor:
        """Latents (B, C, h, w) -> image (B, 3, h*f, w*f); VQ latents are quantized first unless told."""
        if self.config.kind == "vq" and quantize:
            z = self.quantize(z).z
        image: Tensor = self.decoder(self.post_quant_conv(z))
        return image
