"""U-Nets on pixels: DDPM, improved DDPM, ADM, GLIDE, unCLIP (Karlo), DeepFloyd IF.

`in_channels` counts what is concatenated: the enlarged low-resolution picture, the masked picture, the mask.
The numbers that end a docstring are millions of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sfumato.nets.attention import AttentionConfig
from sfumato.nets.blocks import BlockConfig
from sfumato.nets.embedding import EmbedderConfig, EmbeddingConfig, Feature, TokensConfig
from sfumato.nets.presets.registry import UNETS
from sfumato.nets.unet import UNetConfig, levels

__all__: list[str] = []  # everything is reached through UNETS

HEADS_4 = AttentionConfig(heads=4)
HEAD_64 = AttentionConfig(head_dim=64)
MULTS_64, MULTS_256 = (1, 2, 3, 4), (1, 1, 2, 2, 4, 4)
IMAGENET = EmbedderConfig(kind="table", features=(Feature(field="label", dim=1000),))  # no null class
FILM = BlockConfig(film=True)
ADM = BlockConfig(film=True, resample="residual")


# DDPM: Ho et al. 2020 (arXiv:2006.11239), appendix B.


def _ddpm(mults: Sequence[int], at: int, dropout: float) -> UNetConfig:
    attention = AttentionConfig(heads=1)
    return UNetConfig(
        in_channels=3,
        out_channels=3,
        levels=levels(128, mults, attention=attention, at=(at,)),
        middle=attention,
        embedding=EmbeddingConfig(time_dim=128, dim=512, cos_first=False, shift=1.0),
        block=BlockConfig(resample="conv_asymmetric", norm_eps=1e-6, dropout=dropout),
    )


@UNETS("ddpm-cifar10")
def ddpm_cifar10() -> UNetConfig:
    """CIFAR-10 at 32x32; 35.7."""
    return _ddpm((1, 2, 2, 2), 1, 0.1)


@UNETS("ddpm-256")
def ddpm_256() -> UNetConfig:
    """CelebA-HQ and LSUN at 256x256; 113.7."""
    return _ddpm(MULTS_256, 4, 0.0)


# Improved DDPM: Nichol & Dhariwal 2021 (arXiv:2102.09672), the released files.


def _iddpm(width: int, mults: Sequence[int], blocks: int, at: Sequence[int]) -> UNetConfig:
    return UNetConfig(
        in_channels=3,
        out_channels=6,
        levels=levels(width, mults, blocks, attention=HEADS_4, at=at),
        middle=HEADS_4,
        embedding=EmbeddingConfig(time_dim=width, dim=4 * width),
        block=FILM,
    )


def _with_labels(config: UNetConfig, labels: EmbedderConfig = IMAGENET) -> UNetConfig:
    return replace(config, embedding=replace(config.embedding, extras=(labels,)))


@UNETS("iddpm-cifar10")
def iddpm_cifar10() -> UNetConfig:
    """CIFAR-10 at 32x32, L_hybrid and L_vlb; 52.5."""
    return replace(_iddpm(128, (1, 2, 2, 2), 3, at=(1, 2)), block=replace(FILM, dropout=0.3))


@UNETS("iddpm-imagenet64-uncond")
def iddpm_imagenet64_uncond() -> UNetConfig:
    """ImageNet at 64x64 without classes, L_hybrid and L_vlb; 121.1."""
    return _iddpm(128, MULTS_64, 3, at=(2, 3))


@UNETS("iddpm-imagenet64")
def iddpm_imagenet64() -> UNetConfig:
    """ImageNet at 64x64 with classes; 273.0."""
    return _with_labels(_iddpm(192, MULTS_64, 3, at=(2, 3)))


@UNETS("iddpm-upsampler")
def iddpm_upsampler() -> UNetConfig:
    """ImageNet 64x64 -> 256x256 with classes; 279.8."""
    return replace(_with_labels(_iddpm(192, MULTS_256, 2, at=(4, 5))), in_channels=6)


@UNETS("iddpm-lsun")
def iddpm_lsun() -> UNetConfig:
    """LSUN bedrooms at 256x256; 113.7."""
    attention = AttentionConfig(heads=1)
    return UNetConfig(
        in_channels=3,
        out_channels=6,
        levels=levels(128, MULTS_256, attention=attention, at=(4,)),
        middle=attention,
        embedding=EmbeddingConfig(time_dim=128, dim=512),
    )


# ADM: Dhariwal & Nichol 2021 (arXiv:2105.05233), attention at 32, 16 and 8 pixels.


def _adm(
    width: int, mults: Sequence[float], blocks: int, attention: AttentionConfig, size: int
) -> UNetConfig:
    at = [i for i in range(len(mults)) if size >> i in (32, 16, 8)]
    return UNetConfig(
        in_channels=3,
        out_channels=6,
        levels=levels(width, mults, blocks, attention=attention, at=at),
        middle=attention,
        embedding=EmbeddingConfig(time_dim=width, dim=4 * width),
        block=ADM,
    )


@UNETS("adm-imagenet64")
def adm_imagenet64() -> UNetConfig:
    """ImageNet at 64x64; 295.9."""
    return replace(_with_labels(_adm(192, MULTS_64, 3, HEAD_64, 64)), block=replace(ADM, dropout=0.1))


@UNETS("adm-imagenet128")
def adm_imagenet128() -> UNetConfig:
    """ImageNet at 128x128; 421.5."""
    return _with_labels(_adm(256, (1, 1, 2, 3, 4), 2, HEADS_4, 128))


@UNETS("adm-imagenet256")
def adm_imagenet256() -> UNetConfig:
    """ImageNet at 256x256; 553.8."""
    return _with_labels(adm_imagenet256_uncond())


@UNETS("adm-imagenet256-uncond")
def adm_imagenet256_uncond() -> UNetConfig:
    """ImageNet at 256x256 without classes; 552.8."""
    return _adm(256, MULTS_256, 2, HEAD_64, 256)


@UNETS("adm-imagenet512")
def adm_imagenet512() -> UNetConfig:
    """ImageNet at 512x512; 559.0."""
    return _with_labels(_adm(256, (0.5, *MULTS_256), 2, HEAD_64, 512))


@UNETS("adm-lsun")
def adm_lsun() -> UNetConfig:
    """LSUN bedroom, cat and horse at 256x256; 552.8."""
    return replace(adm_imagenet256_uncond(), block=replace(ADM, dropout=0.1))


@UNETS("adm-upsampler-64-256")
def adm_upsampler_64_256() -> UNetConfig:
    """ImageNet 64x64 -> 256x256; 311.8."""
    return replace(_with_labels(_adm(192, MULTS_256, 2, HEADS_4, 256)), in_channels=6)


@UNETS("adm-upsampler-128-512")
def adm_upsampler_128_512() -> UNetConfig:
    """ImageNet 128x128 -> 512x512; 308.8."""
    return replace(_with_labels(_adm(192, MULTS_256, 2, HEAD_64, 512)), in_channels=6)


# GLIDE (filtered): Nichol et al. 2022 (arXiv:2112.10741). The text transformer is not part of the U-Net; the
# projection of its last token is.


def _glide(mults: Sequence[int], blocks: int, size: int, in_channels: int) -> UNetConfig:
    pooled = EmbedderConfig(kind="linear", features=(Feature(field="pooled", dim=512),))
    base = _adm(192, mults, blocks, AttentionConfig(kind="appended", head_dim=64), size)
    return replace(
        _with_labels(base, pooled),
        in_channels=in_channels,
        tokens=TokensConfig(dim=512),
        block=replace(ADM, dropout=0.1),
    )


@UNETS("glide-base")
def glide_base() -> UNetConfig:
    """Text -> 64x64; 308.7, with the text transformer 385.0."""
    return _glide(MULTS_64, 3, 64, 3)


@UNETS("glide-base-inpaint")
def glide_base_inpaint() -> UNetConfig:
    """Text, masked picture (3) and mask (1) -> 64x64; 308.7."""
    return _glide(MULTS_64, 3, 64, 7)


@UNETS("glide-upsampler")
def glide_upsampler() -> UNetConfig:
    """Text and 64x64 -> 256x256; 322.1, with the text transformer 398.4."""
    return _glide(MULTS_256, 2, 256, 6)


@UNETS("glide-upsampler-inpaint")
def glide_upsampler_inpaint() -> UNetConfig:
    """Text, masked picture (3), mask (1) and low resolution (3) -> 256x256; 322.1."""
    return _glide(MULTS_256, 2, 256, 10)


# unCLIP: Ramesh et al. 2022 (arXiv:2204.06125), as Karlo v1.0.alpha.


@UNETS("karlo-decoder")
def karlo_decoder() -> UNetConfig:
    """CLIP image embedding and text -> 64x64; 893.3 with the learned null image embedding."""
    extras = (
        EmbedderConfig(kind="linear", features=(Feature(field="image_embed", dim=768),)),
        EmbedderConfig(kind="linear", features=(Feature(field="pooled", dim=768),)),
    )
    base = _adm(320, MULTS_64, 3, AttentionConfig(kind="appended", head_dim=64), 64)
    return replace(
        base,
        embedding=replace(base.embedding, extras=extras),
        tokens=TokensConfig(dim=768, width=1536, norm=True, image_tokens=4, image_dim=768, masked=True),
        block=replace(ADM, dropout=0.1),
    )


@UNETS("karlo-upsampler")
def karlo_upsampler() -> UNetConfig:
    """64x64 -> 256x256 without attention; two of them, one for the last step; 691.6 each."""
    return UNetConfig(
        in_channels=6,
        out_channels=3,
        levels=levels(320, MULTS_64, 3),
        embedding=EmbeddingConfig(time_dim=320, dim=1280),
        block=BlockConfig(resample="residual"),
    )


# Imagen (Saharia et al. 2022, arXiv:2205.11487) as DeepFloyd IF, with T5-XXL tokens of width 4096.


def _deepfloyd(
    width: int, mults: Sequence[int], blocks: int | Sequence[int], at: Sequence[int], in_channels: int = 3
) -> UNetConfig:
    attention = AttentionConfig(kind="appended", head_dim=64, norm_tokens=True)
    pool = EmbedderConfig(kind="pool", features=(Feature(field="tokens", dim=4096),), heads=64)
    dim = width * mults[-1]
    return UNetConfig(
        in_channels=in_channels,
        out_channels=6,
        levels=levels(width, mults, blocks, attention=attention, at=at),
        middle=attention,
        embedding=EmbeddingConfig(time_dim=width, dim=dim, extras=(pool,)),
        tokens=TokensConfig(dim=4096, width=dim),
        block=replace(ADM, activation="gelu"),
    )


@UNETS("if-i-m")
def if_i_m() -> UNetConfig:
    """Text -> 64x64, 400M model; 371.6."""
    return _deepfloyd(192, MULTS_64, 3, at=(1, 2, 3))


@UNETS("if-i-l")
def if_i_l() -> UNetConfig:
    """Text -> 64x64, 900M model; 935.4."""
    return _deepfloyd(320, MULTS_64, 3, at=(1, 2, 3))


@UNETS("if-i-xl")
def if_i_xl() -> UNetConfig:
    """Text -> 64x64, 4.3B model; 4304.7."""
    return _deepfloyd(704, MULTS_64, 3, at=(1, 2, 3))


@UNETS("if-ii-l")
def if_ii_l() -> UNetConfig:
    """Text, 64x64 and its augmentation level -> 256x256, 1.2B model; 1243.3.

    Its widths were derived from the published block and parameter counts, not read from a file.
    """
    base = _deepfloyd(160, (1, 2, 4, 6, 8), (2, 2, 3, 5, 5), at=(3, 4), in_channels=6)
    aug = EmbedderConfig(kind="mlp", features=(Feature(field="aug", dim=1, sinusoid=160),))
    return replace(
        base,
        embedding=replace(base.embedding, extras=(*base.embedding.extras, aug)),
        block=replace(base.block, residual_scale=0.7071),
    )
