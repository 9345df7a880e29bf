"""One U-Net for DDPM, ADM, GLIDE, unCLIP, DeepFloyd IF, latent diffusion, Stable Diffusion and SDXL."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sfumato.core.types import Conditioning
from sfumato.nets.attention import AttentionConfig, spatial_attention, token_readers
from sfumato.nets.blocks import (
    ACTIVATIONS,
    BlockConfig,
    Context,
    Downsample,
    GroupNorm,
    ResBlock,
    Upsample,
    zeroed,
)
from sfumato.nets.embedding import Embedding, EmbeddingConfig, Tokens, TokensConfig

__all__ = ["Encoded", "Encoder", "LevelConfig", "UNet", "UNetBlock", "UNetConfig", "levels", "skip_widths"]


@dataclass(frozen=True, kw_only=True)
class LevelConfig:
    """One resolution: width, residual blocks (one more on the way up) and the attention after each.

    With 0 blocks there are none on the way up either. Such a first level makes the rest Imagen's Efficient
    U-Net: the resolution falls before the first blocks, and rises after the last.

    Args:
        once: attention follows the last block alone (Imagen).
    """

    channels: int
    blocks: int = 2
    attention: AttentionConfig | None = None
    once: bool = False

    def attends(self, left: int) -> AttentionConfig | None:
        """The attention of a block with so many more of its level behind it."""
        return None if self.once and left else self.attention


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of a U-Net; named ones are in `sfumato.nets.presets`.

    Args:
        in_channels: of x with everything that is concatenated to it.
        out_channels: of the prediction; twice the channels of the picture if the variance is learned.
        levels: from the full resolution to the coarsest, each half of the one before.
        middle: attention between the two residual blocks at the coarsest resolution; None = none.
        embedding: the vector of time and pooled conditioning.
        tokens: the sequence that attention of kind "appended" and "transformer" reads.
        block: what all residual blocks share.
    """

    in_channels: int
    out_channels: int
    levels: tuple[LevelConfig, ...]
    embedding: EmbeddingConfig
    middle: AttentionConfig | None = None
    tokens: TokensConfig | None = None
    block: BlockConfig = field(default_factory=BlockConfig)

    def __post_init__(self) -> None:
        groups = self.block.norm_groups
        if any(level.blocks < 1 for level in self.levels[1:]):
            raise ValueError("only the first level may have 0 blocks; give the others at least 1")
        for i, level in enumerate(self.levels):
            if level.channels % groups:
                raise ValueError(
                    f"level {i} has {level.channels} channels; norm_groups {groups} must divide it"
                )

    @property
    def factor(self) -> int:
        """Both sides of x must be multiples of this."""
        return 2 ** (len(self.levels) - 1)

    @property
    def token_dim(self) -> int:
        """Width of the tokens as the attention reads them; 0 = none."""
        return self.tokens.out_dim if self.tokens else 0


def levels(
    width: int,
    mults: Sequence[float],
    blocks: int | Sequence[int] = 2,
    *,
    attention: AttentionConfig | None = None,
    at: Collection[int] = (),
) -> tuple[LevelConfig, ...]:
    """Levels of `width` times each of `mults`, with the same attention at those whose index is in `at`."""
    counts = [blocks] * len(mults) if isinstance(blocks, int) else blocks
    return tuple(
        LevelConfig(channels=int(width * mult), blocks=n, attention=attention if i in at else None)
        for i, (mult, n) in enumerate(zip(mults, counts, strict=True))
    )


class UNetBlock(nn.Module):
    """A residual block, attention, a change of resolution: each optional, in this order."""

    def __init__(
        self,
        res: ResBlock | None = None,
        attention: nn.Module | None = None,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.res, self.attention, self.resample = res, attention, resample

    def forward(self, h: Tensor, context: Context) -> Tensor:
        """h (B, C, H, W) -> (B, C', H', W')."""
        for part in (self.res, self.attention, self.resample):
            if part is not None:
                h = part(h, context)
        return h


class Encoded(NamedTuple):
    """What the descending half of a U-Net hands to the ascending one."""

    h: Tensor
    """(B, C, h, w) feature map after the middle."""
    skips: tuple[Tensor, ...]
    """Feature maps from full resolution down, one for every block of the decoder."""
    context: Context


class Encoder(nn.Module):
    """The descending half with the middle: a U-Net's, a noisy classifier's, a ControlNet's."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        c, build = config, BlockFactory(config)
        self.embedding = Embedding(c.embedding, c.block.activation)
        self.tokens = Tokens(c.tokens) if c.tokens else None
        self.conv_in = nn.Conv2d(c.in_channels, c.levels[0].channels, 3, padding=1)
        self.blocks = nn.ModuleList()
        width = c.levels[0].channels
        for i, level in enumerate(c.levels):
            for n in reversed(range(level.blocks)):
                self.blocks.append(build.block(width, level.channels, level.attends(n)))
                width = level.channels
            if i + 1 < len(c.levels):
                self.blocks.append(UNetBlock(resample=build.down(width)))
        self.middle = nn.ModuleList([build.block(width, width, c.middle), build.block(width, width, None)])

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        cond: Conditioning,
        hint: Tensor | None = None,
        added: Mapping[int, Tensor] | None = None,
    ) -> Encoded:
        """x (B, C_in, H, W), t (B,), cond as `UNet.prepare` returns it.

        Args:
            hint: added after conv_in.
            added: feature maps by the number of the block behind which each is added; the two of the middle
                come after all others.
        """
        context = self.context(t, cond)
        h = self.conv_in(x.to(self.conv_in.weight.dtype))
        h = h if hint is None else h + hint
        skips = [h]
        for i, block in enumerate((*self.blocks, *self.middle)):
            h = block(h, context)
            h = h + added[i] if added and i in added else h
            skips.append(h)
        return Encoded(h, tuple(skips[: len(self.blocks) + 1]), context)

    def context(self, t: Tensor, cond: Conditioning) -> Context:
        """What every block reads."""
        mask = self.tokens.mask(cond) if self.tokens is not None else None
        return Context(self.embedding(t, cond), cond.kv or (), mask)


class UNet(nn.Module):
    """net(x, t, cond) -> prediction; see `UNetConfig` for the published systems that it covers.

    Ho et al. 2020 (arXiv:2006.11239), Dhariwal & Nichol 2021 (arXiv:2105.05233), Rombach et al. 2022
    (arXiv:2112.10752). A fresh net predicts zero: its last convolution starts there, as the references' does.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        c, build = config, BlockFactory(config)
        self.config = config
        self.encoder = Encoder(c)
        self.decoder = nn.ModuleList()
        skips, width = skip_widths(c), c.levels[-1].channels
        for i, level in reversed(list(enumerate(c.levels))):
            for n in reversed(range(level.blocks + (level.blocks > 0))):
                up = build.up(level.channels) if i > 0 and n == 0 else None
                self.decoder.append(build.block(width + skips.pop(), level.channels, level.attends(n), up))
                width = level.channels
        self.norm_out = GroupNorm(c.block.norm_groups, width, eps=c.block.norm_eps)
        self.activation = ACTIVATIONS[c.block.activation]
        self.conv_out = zeroed(nn.Conv2d(width, c.out_channels, 3, padding=1))
        readers = token_readers(self)
        self.num_readers = len(readers)
        for slot, reader in enumerate(readers):
            reader.slot = slot

    def prepare(self, cond: Conditioning) -> Conditioning:
        """Add the keys and values of the tokens for every attention that reads them, once per walk.

        Raises: ValueError if the net reads tokens and the conditioning has none.
        """
        if cond.kv is not None or self.encoder.tokens is None:
            return cond
        tokens = self.encoder.tokens(cond, self.conv_out.weight.dtype)
        return replace(cond, kv=tuple(reader.keys_values(tokens) for reader in token_readers(self)))

    def forward(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """x (B, in_channels, H, W), t (B,) -> (B, out_channels, H, W) in the dtype of the weights.

        Raises: ValueError if x has other channels or sides, or a conditioning that the net needs is missing.
        """
        return self.decode(self.encoded(x, t, cond))

    def encoded(
        self, x: Tensor, t: Tensor, cond: Conditioning, added: Mapping[int, Tensor] | None = None
    ) -> Encoded:
        """The descending half with the middle; arguments and errors as of `forward` and of the encoder."""
        cond = self.prepare(cond)
        self._check(x, cond)
        return self.encoder(x, t, cond, added=added)

    def decode(self, encoded: Encoded) -> Tensor:
        """The ascending half: every block reads the skip of its mirror image."""
        h, scale = encoded.h, self.config.block.skip_scale
        skips = encoded.skips[-len(self.decoder) :]  # a first level without blocks reads none
        for block, skip in zip(self.decoder, reversed(skips), strict=True):
            h = block(torch.cat([h, skip if scale == 1 else scale * skip], dim=1), encoded.context)
        return self.conv_out(self.activation(self.norm_out(h)))

    def _check(self, x: Tensor, cond: Conditioning) -> None:
        c = self.config
        if x.shape[1] != c.in_channels:
            raise ValueError(f"x has {x.shape[1]} channels; this U-Net needs {c.in_channels}")
        if x.shape[-1] % c.factor or x.shape[-2] % c.factor:
            raise ValueError(f"x is {x.shape[-1]}x{x.shape[-2]}; both sides must be multiples of {c.factor}")
        if len(cond.kv or ()) != self.num_readers:
            raise ValueError(
                f"the conditioning was prepared by a net with {len(cond.kv or ())} token readers, "
                f"not {self.num_readers}: prepare it with this net"
            )


class BlockFactory:
    """Builds the blocks of one U-Net from its configuration."""

    def __init__(self, config: UNetConfig) -> None:
        self.config = config

    def block(
        self, cin: int, cout: int, attention: AttentionConfig | None, resample: nn.Module | None = None
    ) -> UNetBlock:
        """Residual block, attention if there is one, change of resolution if there is one."""
        c = self.config
        res = ResBlock((cin, cout), c.embedding.dim, c.block)
        if attention is None:
            return UNetBlock(res, None, resample)
        norm = c.block
        attend = spatial_attention(cout, attention, c.token_dim, groups=norm.norm_groups, eps=norm.norm_eps)
        return UNetBlock(res, attend, resample)

    def down(self, channels: int) -> nn.Module:
        """Halve the resolution."""
        c = self.config
        if c.block.resample == "residual":
            return ResBlock((channels, channels), c.embedding.dim, c.block, "down")
        return Downsample(channels, asymmetric=c.block.resample == "conv_asymmetric")

    def up(self, channels: int) -> nn.Module:
        """Double the resolution."""
        c = self.config
        if c.block.resample == "residual":
            return ResBlock((channels, channels), c.embedding.dim, c.block, "up")
        return Upsample(channels)


def skip_widths(config: UNetConfig) -> list[int]:
    """Width of every entry of `Encoded.skips`."""
    widths = [config.levels[0].channels]
    for i, level in enumerate(config.levels):
        widths += [level.channels] * (level.blocks + (i + 1 < len(config.levels)))
    return widths
