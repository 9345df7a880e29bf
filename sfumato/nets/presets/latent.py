"""U-Nets on latents: latent diffusion, Stable Diffusion 1 and 2, SDXL.

`in_channels` counts what is concatenated (masked latent, mask, depth, low resolution, semantic map). The
numbers that end a docstring are millions of parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sfumato.nets.attention import AttentionConfig
from sfumato.nets.blocks import BlockConfig
from sfumato.nets.embedding import EmbedderConfig, EmbeddingConfig, Feature, TokensConfig
from sfumato.nets.presets.registry import UNETS
from sfumato.nets.unet import LevelConfig, UNetConfig, levels

__all__: list[str] = []  # everything is reached through UNETS

HEAD_32 = AttentionConfig(head_dim=32)
HEADS_8 = AttentionConfig(heads=8)
ADM = BlockConfig(film=True, resample="residual")


# Latent diffusion: Rombach et al. 2022 (arXiv:2112.10752), the released files.


def _latent(
    width: int,
    mults: Sequence[int],
    attention: AttentionConfig,
    *,
    at: Sequence[int],
    channels: tuple[int, int] = (3, 3),
    context: int = 0,
    conv: bool = True,
) -> UNetConfig:
    """`context`: width of the tokens; the attention is then a spatial transformer."""
    if context:
        attention = replace(attention, kind="transformer", conv_proj=conv)
    return UNetConfig(
        in_channels=channels[0],
        out_channels=channels[1],
        levels=levels(width, mults, attention=attention, at=at),
        middle=attention,
        embedding=EmbeddingConfig(time_dim=width, dim=4 * width),
        tokens=TokensConfig(dim=context) if context else None,
    )


@UNETS("ldm-unconditional")
def ldm_unconditional() -> UNetConfig:
    """CelebA-HQ, FFHQ and LSUN bedrooms at 256x256, on vq-f4; 274.1."""
    return _latent(224, (1, 2, 3, 4), HEAD_32, at=(1, 2, 3))


@UNETS("ldm-churches")
def ldm_churches() -> UNetConfig:
    """LSUN churches at 256x256, on kl-f8; 295.0."""
    base = _latent(192, (1, 2, 2, 4, 4), HEADS_8, at=(0, 1, 2, 3), channels=(4, 4))
    return replace(base, block=ADM)


@UNETS("ldm-imagenet")
def ldm_imagenet() -> UNetConfig:
    """ImageNet at 256x256, on vq-f8, the class as one token; 395.0."""
    return _latent(256, (1, 2, 4), HEAD_32, at=(0, 1, 2), channels=(4, 4), context=512)


@UNETS("ldm-imagenet-cfg")
def ldm_imagenet_cfg() -> UNetConfig:
    """ImageNet at 256x256, on vq-f4, the class or "none" as one token; 400.9."""
    return _latent(192, (1, 2, 3, 5), AttentionConfig(heads=1), at=(1, 2, 3), context=512)


@UNETS("ldm-text2img-256")
def ldm_text2img_256() -> UNetConfig:
    """LAION at 256x256, on vq-f4, text tokens of width 640; 403.6."""
    return _latent(192, (1, 2, 3, 5), HEAD_32, at=(1, 2, 3), context=640)


@UNETS("ldm-text2img")
def ldm_text2img() -> UNetConfig:
    """LAION-400M, on kl-f8, text tokens of width 1280, the 1.4B system; 872.3."""
    return _latent(320, (1, 2, 4, 4), HEADS_8, at=(0, 1, 2), channels=(4, 4), context=1280)


@UNETS("ldm-layout2img")
def ldm_layout2img() -> UNetConfig:
    """OpenImages layouts at 256x256, on vq-f4; 246.3."""
    return _latent(128, (1, 2, 3, 4), replace(HEAD_32, depth=3), at=(1, 2, 3), context=512)


@UNETS("ldm-semantic")
def ldm_semantic() -> UNetConfig:
    """Landscapes from semantic maps, on vq-f4; 215.2."""
    return _latent(128, (1, 4, 8), HEADS_8, at=(), channels=(6, 3))


@UNETS("ldm-superres")
def ldm_superres() -> UNetConfig:
    """x4 super-resolution, on vq-f4; 113.6."""
    return _latent(160, (1, 2, 2, 4), HEAD_32, at=(3,), channels=(6, 3))


@UNETS("ldm-inpaint")
def ldm_inpaint() -> UNetConfig:
    """Inpainting, on vq-f4-noattn; 387.3."""
    base = _latent(256, (1, 2, 3, 4), HEADS_8, at=(1, 2, 3), channels=(7, 3))
    return replace(base, block=BlockConfig(resample="residual"))


@UNETS("rdm-768")
def rdm_768() -> UNetConfig:
    """Retrieval-augmented, on kl-f16, CLIP embeddings as tokens; 1335.5."""
    return _latent(448, (1, 2, 3, 4), HEAD_32, at=(0, 1, 2), channels=(16, 16), context=768)


# Stable Diffusion: the same net on kl-f8.


def _stable(context: int, attention: AttentionConfig, in_channels: int = 4) -> UNetConfig:
    conv = attention == HEADS_8  # Stable Diffusion 1
    channels = (in_channels, 4)
    return _latent(320, (1, 2, 4, 4), attention, at=(0, 1, 2), channels=channels, context=context, conv=conv)


def _with_embedder(config: UNetConfig, embedder: EmbedderConfig) -> UNetConfig:
    return replace(config, embedding=replace(config.embedding, extras=(embedder,)))


@UNETS("sd15")
def sd15() -> UNetConfig:
    """Stable Diffusion 1.1 to 1.5; 859.5."""
    return _stable(768, HEADS_8)


@UNETS("sd15-inpaint")
def sd15_inpaint() -> UNetConfig:
    """Stable Diffusion 1.5 with mask (1) and masked latent (4); 859.5."""
    return _stable(768, HEADS_8, in_channels=9)


@UNETS("sd15-edit")
def sd15_edit() -> UNetConfig:
    """InstructPix2Pix (arXiv:2211.09800): Stable Diffusion 1.5 with the latent (4) of the picture to edit."""
    return _stable(768, HEADS_8, in_channels=8)


@UNETS("sd2")
def sd2() -> UNetConfig:
    """Stable Diffusion 2.0 and 2.1, base and 768; 865.9."""
    return _stable(1024, AttentionConfig(head_dim=64))


@UNETS("sd2-inpaint")
def sd2_inpaint() -> UNetConfig:
    """Stable Diffusion 2 with mask (1) and masked latent (4)."""
    return _stable(1024, AttentionConfig(head_dim=64), in_channels=9)


@UNETS("sd2-depth")
def sd2_depth() -> UNetConfig:
    """Stable Diffusion 2 with depth (1); 865.9."""
    return _stable(1024, AttentionConfig(head_dim=64), in_channels=5)


@UNETS("sd2-unclip-h")
def sd2_unclip_h() -> UNetConfig:
    """Stable Diffusion 2.1 with a noised CLIP image embedding and its noise level; 870.2."""
    features = (Feature(field="image_embed", dim=1024), Feature(field="aug", dim=1, sinusoid=1024))
    return _with_embedder(sd2(), EmbedderConfig(kind="mlp", features=features))


@UNETS("sd-x4-upscaler")
def sd_x4_upscaler() -> UNetConfig:
    """Latents of an f4 autoencoder beside the low-resolution picture (3), with its noise level; 473.4."""
    attention = AttentionConfig(kind="transformer", heads=8)
    tokens_only = replace(attention, to_pixels=False)
    base = _latent(256, (1, 2, 2, 4), attention, at=(), channels=(7, 4), context=1024, conv=False)
    by_level = (None, tokens_only, tokens_only, attention)
    base = replace(
        base,
        levels=tuple(replace(level, attention=a) for level, a in zip(base.levels, by_level, strict=True)),
    )
    return _with_embedder(base, EmbedderConfig(kind="table", features=(Feature(field="aug", dim=1000),)))


# SDXL: Podell et al. 2023 (arXiv:2307.01952).


def _sdxl(width: int, context: int, numbers: int, stack: tuple[LevelConfig, ...], depth: int) -> UNetConfig:
    """`numbers`: how many sizes, crops and scores stand beside the pooled text of width 1280."""
    features = (Feature(field="pooled", dim=1280), Feature(field="micro", dim=numbers, sinusoid=256))
    return UNetConfig(
        in_channels=4,
        out_channels=4,
        levels=stack,
        middle=_transformer(depth),
        embedding=EmbeddingConfig(
            time_dim=width, dim=4 * width, extras=(EmbedderConfig(kind="mlp", features=features),)
        ),
        tokens=TokensConfig(dim=context),
    )


def _transformer(depth: int) -> AttentionConfig:
    return AttentionConfig(kind="transformer", head_dim=64, depth=depth)


@UNETS("sdxl-base")
def sdxl_base() -> UNetConfig:
    """SDXL base, micro = original size, crop, target size; 2567.5."""
    stack = (
        LevelConfig(channels=320),
        LevelConfig(channels=640, attention=_transformer(2)),
        LevelConfig(channels=1280, attention=_transformer(10)),
    )
    return _sdxl(320, 2048, 6, stack, 10)


@UNETS("sdxl-refiner")
def sdxl_refiner() -> UNetConfig:
    """SDXL refiner, micro = original size, crop, aesthetic score; 2259.5."""
    stack = levels(384, (1, 2, 4, 4), attention=_transformer(4), at=(1, 2))
    return _sdxl(384, 1280, 5, stack, 4)
