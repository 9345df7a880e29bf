"""Imagen's U-Nets by the numbers of its paper, with the tokens of T5-XXL; their weights were never published.

Saharia et al. 2022 (arXiv:2205.11487), appendices B and F. Parameters are those of these nets: the paper has
2B, 600M and 400M, and does not say all of their shapes.
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


def _imagen(
    width: int, mults: Sequence[int], blocks: Sequence[int], at: Sequence[int], *, efficient: bool
) -> UNetConfig:
    """Widths and blocks of Saharia et al. 2022, appendix F; of the "efficient" nets, that enlarge, B.1.

    Those have a level without blocks in front, their skips are scaled, and they end at the published widths.
    """
    attention = AttentionConfig(kind="appended", heads=8, norm_tokens=True)
    pooled = EmbedderConfig(kind="mlp", features=(Feature(field="pooled", dim=4096),))
    aug = EmbedderConfig(kind="mlp", features=(Feature(field="aug", dim=1, sinusoid=width),))
    inner = [
        replace(level, once=efficient) for level in levels(width, mults, blocks, attention=attention, at=at)
    ]
    front = [LevelConfig(channels=width, blocks=0)] if efficient else []
    return UNetConfig(
        in_channels=6 if efficient else 3,
        out_channels=3,
        levels=(*front, *inner),
        middle=None if efficient else attention,
        embedding=EmbeddingConfig(
            time_dim=width, dim=4 * width, extras=(pooled, aug) if efficient else (pooled,)
        ),
        tokens=TokensConfig(dim=4096, norm=True, masked=True),
        block=BlockConfig(film=True, skip_scale=0.5**0.5 if efficient else 1.0),
    )


@UNETS("imagen-64")
def imagen_64() -> UNetConfig:
    """Text -> 64x64; 2258M."""
    return _imagen(512, (1, 2, 3, 4), (3, 3, 3, 3), (1, 2, 3), efficient=False)


@UNETS("imagen-256")
def imagen_256() -> UNetConfig:
    """64x64 -> 256x256; 652M."""
    return _imagen(128, (1, 2, 4, 8), (2, 4, 8, 8), (3,), efficient=True)


@UNETS("imagen-1024")
def imagen_1024() -> UNetConfig:
    """256x256 -> 1024x1024, trained on crops: attention to the text alone; 648M."""
    c = imagen_256()
    (last,) = (level for level in c.levels if level.attention)
    assert last.attention is not None
    alone = replace(last, attention=replace(last.attention, to_pixels=False))
    return replace(c, levels=(*c.levels[:-1], alone))
