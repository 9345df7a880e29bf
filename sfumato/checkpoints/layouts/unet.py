"""What the layouts of Stable Diffusion's U-Net share: where its blocks are, and what shapes tell of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sfumato.checkpoints.keymap import KeyMap, Leaf, LeafTable, squeezed
from sfumato.checkpoints.layouts.layout import Shapes, indices, shape_of
from sfumato.nets.attention import AttentionConfig
from sfumato.nets.blocks import BlockConfig
from sfumato.nets.embedding import EmbedderConfig, EmbeddingConfig, TokensConfig
from sfumato.nets.unet import LevelConfig, UNetConfig

__all__ = ["SELF", "Dialect", "Stack", "attentions", "config_of", "names_of", "stack_of", "supported"]

Rows = list[tuple[str, str, LeafTable]]
SELF: LeafTable = {
    "group_norm": "norm",
    **{f"to_{name}": f"attention.{name}" for name in ("q", "k", "v")},
    "to_out.0": "attention.out",
}
"""Attention of pixels among themselves in diffusers' names."""


@dataclass(frozen=True)
class Dialect:
    """How a layout names the parts of the U-Net.

    Places are format strings of i (level, from the first one that is walked), j (block of the level), n
    (block of the half, changes of resolution counted on the way down) and k (place behind the attention).

    Attributes:
        down, up: residual block, attention, change of resolution.
        middle: residual block, attention, residual block.
        top: layers outside the blocks.
        guidance: the projection of a scale that a distilled net is told.
        block: layers of a residual block.
        skip: its 1x1 convolution, if the width changes.
        extra: layers of a term that is added to the embedding of time.
        appended: layers of an attention of kind "appended".
    """

    down: tuple[str, str, str]
    up: tuple[str, str, str]
    middle: tuple[str, str, str]
    top: LeafTable
    guidance: str
    block: LeafTable
    skip: str
    extra: Callable[[EmbedderConfig], LeafTable]
    appended: Callable[[AttentionConfig], LeafTable] = lambda _: {}

    def layer(self, table: LeafTable, ours: str) -> str:
        """The name of one of our layers in one of the tables."""
        return next(str(name) for name, entry in table.items() if entry == ours)


def names_of(c: UNetConfig, d: Dialect) -> KeyMap:
    """The rows of a config."""
    rows: Rows = [("", "", d.top)]
    if c.embedding.guidance_dim:
        rows.append(("", "", {d.guidance: Leaf("encoder.embedding.guidance", tensors=("weight",))}))
    rows += [("", f"encoder.embedding.extras.{i}", d.extra(e)) for i, e in enumerate(c.embedding.extras)]
    n, width, skips = 1, c.levels[0].channels, [c.levels[0].channels]
    change: tuple[str, LeafTable] = ("resample.conv", {"": ""})
    if c.block.resample == "residual":
        change = ("resample", d.block)
    for i, level in enumerate(c.levels):
        for j in range(level.blocks):
            theirs = [place.format(i=i, j=j, n=n) for place in d.down]
            rows += _block(d, theirs, f"encoder.blocks.{n - 1}", width != level.channels, level.attention)
            n, width = n + 1, level.channels
            skips.append(width)
        if i + 1 < len(c.levels):
            rows.append((d.down[2].format(i=i, n=n), f"encoder.blocks.{n - 1}.{change[0]}", change[1]))
            n, skips = n + 1, [*skips, width]
    rows += _block(d, d.middle[:2], "encoder.middle.0", False, c.middle)
    rows += _block(d, d.middle[2:], "encoder.middle.1", False, None)
    n = 0
    for i, level in enumerate(reversed(c.levels)):
        for j in range(level.blocks + 1):
            theirs = [place.format(i=i, j=j, n=n, k=1 + (level.attention is not None)) for place in d.up]
            changes = width + skips.pop() != level.channels
            rows += _block(d, theirs, f"decoder.{n}", changes, level.attention)
            if j == level.blocks and i + 1 < len(c.levels):
                rows.append((theirs[2], f"decoder.{n}.{change[0]}", change[1]))
            n, width = n + 1, level.channels
    return KeyMap.of(rows)


def _block(
    d: Dialect, theirs: Sequence[str], ours: str, skip: bool, attention: AttentionConfig | None
) -> Rows:
    rows: Rows = [(theirs[0], f"{ours}.res", {**d.block, d.skip: "skip"} if skip else d.block)]
    if attention is not None and attention.kind == "self":
        rows.append((theirs[1], f"{ours}.attention", SELF))
    elif attention is not None and attention.kind == "appended":
        rows.append((theirs[1], f"{ours}.attention", d.appended(attention)))
    elif attention is not None:
        around = squeezed(2, 3) if attention.conv_proj else None
        projections: LeafTable = {n: Leaf(n, around) if around else n for n in ("proj_in", "proj_out")}
        rows.append((theirs[1], f"{ours}.attention", {"norm": "norm", **projections}))
        for b in range(attention.depth):
            inner = f"{theirs[1]}.transformer_blocks.{b}"
            rows.append((inner, f"{ours}.attention.blocks.{b}", _transformer(attention.to_pixels)))
    return rows


def _transformer(to_pixels: bool) -> LeafTable:
    """A transformer block, whose names are the same everywhere."""
    first = "" if to_pixels else "token_"
    reads = {
        "attn1.to_q": "attention1.q",
        "attn1.to_k": f"attention1.{first}k",
        "attn1.to_v": f"attention1.{first}v",
        "attn2.to_q": "attention2.q",
        "attn2.to_k": "attention2.token_k",
        "attn2.to_v": "attention2.token_v",
    }
    return {
        **{name: name for name in ("norm1", "norm2", "norm3")},
        **{theirs: Leaf(ours, tensors=("weight",)) for theirs, ours in reads.items()},
        **{"attn1.to_out.0": "attention1.out", "attn2.to_out.0": "attention2.out"},
        **{"ff.net.0.proj": "mlp.up", "ff.net.2": "mlp.down"},
    }


@dataclass(frozen=True)
class Stack:
    """What shapes tell of the levels, from the full resolution down; the middle is last in `places`.

    Attributes:
        widths, blocks: of the levels.
        places: where the first attention of each is in the file; "" = it has none.
    """

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    places: tuple[str, ...]


def stack_of(shapes: Shapes, d: Dialect) -> Stack:
    """The levels of a file. Raises: ValueError if tensors of the descending half are missing."""
    widths: list[int] = []
    blocks: list[int] = []
    places: list[str] = []
    conv1, n = d.layer(d.block, "conv1"), 1
    while True:
        i, j = len(widths), 0
        first, attention, _ = (place.format(i=i, j=0, n=n) for place in d.down)
        widths.append(shape_of(shapes, f"{first}.{conv1}.weight", 4)[0])
        marks = (f"{attention}.{layer}.weight" for layer in ("proj_in", "group_norm", "to_q"))
        places.append(attention if any(mark in shapes for mark in marks) else "")
        while f"{d.down[0].format(i=i, j=j, n=n)}.{conv1}.weight" in shapes:
            j, n = j + 1, n + 1
        blocks.append(j)
        change = d.down[2].format(i=i, n=n)
        if f"{change}.weight" not in shapes and f"{change}.{conv1}.weight" not in shapes:
            middle = d.middle[1] if any(name.startswith(f"{d.middle[1]}.") for name in shapes) else ""
            return Stack(tuple(widths), tuple(blocks), (*places, middle))
        n += 1


def attentions(
    shapes: Shapes, stack: Stack, heads: Sequence[int], tokens_only: Sequence[bool]
) -> list[AttentionConfig | None]:
    """Attention of every level and of the middle.

    Args:
        heads, tokens_only: of every level and of the middle, where the shapes leave it open.

    Raises: ValueError if the file has no such tensors, or the heads do not divide the width.
    """
    widths = (*stack.widths, stack.widths[-1])
    used = [(w, h) for w, h, place in zip(widths, heads, stack.places, strict=True) if place]
    for width, number in used:
        if number < 1 or width % number:
            raise ValueError(f"{number} heads do not divide the width {width}")
    by_width = len({h for _, h in used}) > 1 and len({w // h for w, h in used}) == 1
    found: list[AttentionConfig | None] = []
    for width, number, only, place in zip(widths, heads, tokens_only, stack.places, strict=True):
        if not place:
            found.append(None)
            continue
        read = shape_of(shapes, f"{place}.transformer_blocks.0.attn1.to_k.weight", 2)[1]
        base = AttentionConfig(head_dim=width // number) if by_width else AttentionConfig(heads=number)
        found.append(
            replace(
                base,
                kind="transformer",
                depth=indices(shapes, f"{place}.transformer_blocks"),
                to_pixels=read == width and not only,
                conv_proj=len(shapes[f"{place}.proj_in.weight"]) == 4,
            )
        )
    return found


def config_of(
    shapes: Shapes,
    d: Dialect,
    attention: Sequence[AttentionConfig | None],
    extras: tuple[EmbedderConfig, ...],
    block: BlockConfig | None = None,
) -> UNetConfig:
    """Our config of what was found. Raises: ValueError if a tensor is missing."""
    stack = stack_of(shapes, d)
    named = {ours: d.layer(d.top, ours) + ".weight" for ours in ("encoder.conv_in", "conv_out", TIME)}
    embed, time = shape_of(shapes, named[TIME], 2)
    context = shape_of(shapes, f"{d.middle[1]}.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    return UNetConfig(
        in_channels=shape_of(shapes, named["encoder.conv_in"], 4)[1],
        out_channels=shape_of(shapes, named["conv_out"], 4)[0],
        levels=tuple(
            LevelConfig(channels=w, blocks=n, attention=a)
            for w, n, a in zip(stack.widths, stack.blocks, attention[:-1], strict=True)
        ),
        middle=attention[-1],
        embedding=EmbeddingConfig(
            time_dim=time,
            dim=embed,
            guidance_dim=shapes.get(f"{d.guidance}.weight", (0, 0))[1],
            extras=extras,
        ),
        tokens=TokensConfig(dim=context),
        block=block or BlockConfig(),
    )


TIME = "encoder.embedding.time.linear1"


def supported(c: UNetConfig, reference: str) -> None:
    """Raises: ValueError if a config is of another family than latent diffusion with spatial transformers."""
    plain = BlockConfig(norm_groups=c.block.norm_groups, norm_eps=c.block.norm_eps, dropout=c.block.dropout)
    kinds = {a.kind for a in (c.middle, *(level.attention for level in c.levels)) if a is not None}
    e, t = c.embedding, c.tokens
    if (
        c.middle is None
        or kinds != {"transformer"}
        or any(level.once or not level.blocks for level in c.levels)
        or c.block != plain
        or t != TokensConfig(dim=c.token_dim)
        or (e.time_dim, e.dim, e.cos_first, e.shift)
        != (c.levels[0].channels, 4 * c.levels[0].channels, True, 0.0)
        or len(e.extras) > 1
    ):
        raise ValueError(f"{reference} computes no U-Net of this kind; save it as a sfumato system")
