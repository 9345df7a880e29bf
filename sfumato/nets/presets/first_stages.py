"""The nine first stages of latent diffusion (arXiv:2112.10752), and the autoencoders of Stable Diffusion.

`attention_levels` is the published resolution of a 256-pixel picture as a level: 16 pixels are level 4.
"""

from __future__ import annotations

from collections.abc import Callable

from sfumato.core.registry import Registry
from sfumato.nets.autoencoder import AutoencoderConfig

__all__ = ["AUTOENCODERS"]

AUTOENCODERS: Registry[Callable[[], AutoencoderConfig]] = Registry("autoencoder preset")


def _kl(z: int, mults: tuple[int, ...], attention: tuple[int, ...] = ()) -> AutoencoderConfig:
    return AutoencoderConfig(z_channels=z, embed_dim=z, mults=mults, attention_levels=attention)


def _vq(
    z: int, mults: tuple[int, ...], codes: int, *, attention: tuple[int, ...] = (), middle: bool = True
) -> AutoencoderConfig:
    return AutoencoderConfig(
        kind="vq",
        z_channels=z,
        embed_dim=z,
        mults=mults,
        codebook_size=codes,
        attention_levels=attention,
        mid_attention=middle,
        legacy_commitment=True,
    )


@AUTOENCODERS("kl-f4")
def kl_f4() -> AutoencoderConfig:
    """4x, 3 channels; 55.3M."""
    return _kl(3, (1, 2, 4))


@AUTOENCODERS("kl-f8")
def kl_f8() -> AutoencoderConfig:
    """8x, 4 channels: latent diffusion, Stable Diffusion 1 and 2, SDXL; 83.7M."""
    return _kl(4, (1, 2, 4, 4))


@AUTOENCODERS("kl-f16")
def kl_f16() -> AutoencoderConfig:
    """16x, 16 channels; 69.6M."""
    return _kl(16, (1, 1, 2, 2, 4), (4,))


@AUTOENCODERS("kl-f32")
def kl_f32() -> AutoencoderConfig:
    """32x, 64 channels; 103.9M."""
    return _kl(64, (1, 1, 2, 2, 4, 4), (4, 5))


@AUTOENCODERS("vq-f4")
def vq_f4() -> AutoencoderConfig:
    """4x, 3 channels, 8192 codes; 55.3M."""
    return _vq(3, (1, 2, 4), 8192)


@AUTOENCODERS("vq-f4-noattn")
def vq_f4_noattn() -> AutoencoderConfig:
    """vq-f4 without any attention; 53.2M."""
    return _vq(3, (1, 2, 4), 8192, middle=False)


@AUTOENCODERS("vq-f8")
def vq_f8() -> AutoencoderConfig:
    """8x, 4 channels, 16384 codes; 67.7M."""
    return _vq(4, (1, 2, 2, 4), 16384, attention=(3,))


@AUTOENCODERS("vq-f8-n256")
def vq_f8_n256() -> AutoencoderConfig:
    """8x, 4 channels, 256 codes; 67.7M."""
    return _vq(4, (1, 2, 2, 4), 256, attention=(3,))


@AUTOENCODERS("vq-f16")
def vq_f16() -> AutoencoderConfig:
    """16x, 8 channels, 16384 codes; 69.6M."""
    return _vq(8, (1, 1, 2, 2, 4), 16384, attention=(4,))


@AUTOENCODERS("kl-f4-upscaler")
def kl_f4_upscaler() -> AutoencoderConfig:
    """4x, 4 channels: Stable Diffusion's x4 upscaler; 55.3M."""
    return _kl(4, (1, 2, 4))
