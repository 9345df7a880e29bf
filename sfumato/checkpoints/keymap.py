"""Tables between the tensor names of a file layout and those of our networks, read in both directions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "SAME",
    "SWAPPED",
    "TRANSPOSED",
    "KeyMap",
    "Leaf",
    "LeafTable",
    "Op",
    "Row",
    "copied",
    "flattened",
    "regrouped",
    "squeezed",
    "stacked",
]

Tensors = tuple[Tensor, ...]
SHOWN = 4  # names that an error lists


@dataclass(frozen=True)
class Op:
    """An invertible change of tensors on their way from a file into a net.

    Attributes:
        load: the file's tensors to ours. Raises: ValueError or RuntimeError if their shapes do not fit.
        save: ours to the file's.
        bias: what befalls the bias beside a weight that is changed so; None = the same.
    """

    load: Callable[[Tensors], Tensors]
    save: Callable[[Tensors], Tensors]
    bias: Op | None = None

    @property
    def on_bias(self) -> Op:
        """The change of a bias."""
        return self if self.bias is None else self.bias

    @property
    def inverse(self) -> Op:
        """The same change where the file has what we have, and we what it has."""
        return Op(self.save, self.load, None if self.bias is None else self.bias.inverse)

    def then(self, other: Op) -> Op:
        """This change and, on loading, `other` after it."""
        plain = self.bias is None and other.bias is None
        return Op(
            lambda tensors: other.load(self.load(tensors)),
            lambda tensors: self.save(other.save(tensors)),
            None if plain else self.on_bias.then(other.on_bias),
        )


def _each(load: Callable[[Tensor], Tensor], save: Callable[[Tensor], Tensor], bias: Op | None = None) -> Op:
    """An Op that changes every tensor by itself."""
    return Op(lambda tensors: tuple(map(load, tensors)), lambda tensors: tuple(map(save, tensors)), bias)


def _unchanged(tensors: Tensors) -> Tensors:
    return tensors


def _swap(v: Tensor) -> Tensor:
    return torch.cat(_equal_rows(v, 2)[::-1])


def _equal_rows(v: Tensor, parts: int) -> Tensors:
    if v.ndim == 0 or v.shape[0] % parts:
        raise ValueError(f"its rows are not {parts} equal parts")
    return v.chunk(parts)


SAME = Op(_unchanged, _unchanged)
"""Tensors as they are."""
TRANSPOSED = _each(lambda v: v.mT, lambda v: v.mT, SAME)
"""Matrices that the file holds as (in, out); a bias stays."""
SWAPPED = _each(_swap, _swap)
"""Two halves of the rows in the other order, such as scale and shift."""


def squeezed(*axes: int) -> Op:
    """Axes of length 1, counted from 0 in the file's tensor, that ours lacks: (2, 3) for a 1x1 kernel."""

    def load(v: Tensor) -> Tensor:
        if any(axis >= v.ndim or v.shape[axis] != 1 for axis in axes):
            raise ValueError(f"axes {axes} are not of length 1")
        return v.squeeze(axes)

    def save(v: Tensor) -> Tensor:
        for axis in sorted(axes):
            v = v.unsqueeze(axis)
        return v

    return _each(load, save, SAME)


def flattened(*shape: int) -> Op:
    """Trailing axes of this shape in the file that are one axis of ours: a kernel of patches."""

    def load(v: Tensor) -> Tensor:
        if tuple(v.shape[-len(shape) :]) != shape:
            raise ValueError(f"its last axes are not {shape}")
        return v.flatten(-len(shape))

    return _each(load, lambda v: v.reshape(*v.shape[:-1], *shape), SAME)


def copied(times: int) -> Op:
    """Equal tensors of the file that are one of ours."""

    def load(tensors: Tensors) -> Tensors:
        first = tensors[0]
        if not first.is_meta and not all(torch.equal(v, first) for v in tensors):
            raise ValueError("they should be copies of one tensor, and differ")
        return (first,)

    return Op(load, lambda tensors: tensors * times)


def stacked(parts: int) -> Op:
    """`parts` tensors of the file that are one of ours, in equal shares of its rows: q, k and v."""
    return Op(lambda tensors: (torch.cat(tensors),), lambda tensors: _equal_rows(tensors[0], parts))


def regrouped(outer: int, inner: int) -> Op:
    """Rows that the file orders as (outer, inner, rest), and we as (inner, outer, rest).

    ADM's attention has its rows by head and then by q, k, v: regrouped(heads, 3) puts all of q first.
    """

    def turn(v: Tensor, first: int, second: int) -> Tensor:
        _equal_rows(v, outer * inner)
        return v.reshape(first, second, -1, *v.shape[1:]).transpose(0, 1).reshape(v.shape)

    return _each(lambda v: turn(v, outer, inner), lambda v: turn(v, inner, outer))


@dataclass(frozen=True)
class Row:
    """Names in the file and names in our net that hold the same numbers, up to `op`."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    op: Op = SAME


@dataclass(frozen=True)
class Leaf:
    """Our side of an entry of a LeafTable.

    Attributes:
        ours: a layer, or several if the file has one for them.
        op: of the weight; a bias takes what `op` says of biases.
        tensors: what the layer has; () = the names are those of tensors themselves.
    """

    ours: str | tuple[str, ...]
    op: Op = SAME
    tensors: tuple[str, ...] = ("weight", "bias")


LeafTable = Mapping[str | tuple[str, ...], str | Leaf]
"""The file's layer (or layers, of which ours is made) -> our layer; a name alone is a Leaf of that name."""


@dataclass(frozen=True)
class KeyMap:
    """The rows of a layout.

    Attributes:
        rows: every name occurs once on its side.
        ignored: prefixes of names in the file that are of no use to the net; a saved file lacks them.
    """

    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for side in ("theirs", "ours"):
            names = [name for row in self.rows for name in getattr(row, side)]
            twice = [name for name, times in Counter(names).items() if times > 1]
            assert not twice, f"rows of a key map name {twice[0]!r} twice"

    @staticmethod
    def of(blocks: Iterable[tuple[str, str, LeafTable]], ignored: tuple[str, ...] = ()) -> KeyMap:
        """The rows of tables below prefixes: (prefix in the file, prefix in the net, table), "" = none."""
        rows: list[Row] = []
        for theirs, ours, table in blocks:
            for name, entry in table.items():
                leaf = Leaf(entry) if isinstance(entry, str) else entry
                for tensor in leaf.tensors or ("",):
                    rows.append(
                        Row(
                            tuple(_joined(theirs, part, tensor) for part in _names(name)),
                            tuple(_joined(ours, part, tensor) for part in _names(leaf.ours)),
                            leaf.op.on_bias if tensor == "bias" else leaf.op,
                        )
                    )
        return KeyMap(tuple(rows), ignored)

    def __add__(self, other: KeyMap) -> KeyMap:
        """The rows of both."""
        return KeyMap(self.rows + other.rows, self.ignored + other.ignored)

    def under(self, theirs: str, ours: str = "") -> KeyMap:
        """The same rows below prefixes, as in a file that holds several nets."""
        rows = tuple(
            Row(
                tuple(_joined(theirs, name) for name in row.theirs),
                tuple(_joined(ours, name) for name in row.ours),
                row.op,
            )
            for row in self.rows
        )
        return KeyMap(rows, tuple(_joined(theirs, prefix) for prefix in self.ignored))

    def load(self, state: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
        """Our names and tensors of a file's.

        Args:
            where: the file, for errors.

        Raises: ValueError in one line with the names that are missing or unexpected, or with the tensors
            whose shapes do not fit.
        """
        given = {name: v for name, v in state.items() if not name.startswith(self.ignored)}
        return _mapped(given, [(row.theirs, row.ours, row.op.load) for row in self.rows], where)

    def save(self, state: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
        """The file's names and tensors of ours; arguments and errors as of `load`."""
        return _mapped(state, [(row.ours, row.theirs, row.op.save) for row in self.rows], where)


def _names(name: str | tuple[str, ...]) -> tuple[str, ...]:
    return (name,) if isinstance(name, str) else name


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _mapped(
    state: Mapping[str, Tensor],
    rows: list[tuple[tuple[str, ...], tuple[str, ...], Callable[[Tensors], Tensors]]],
    where: str,
) -> dict[str, Tensor]:
    wanted = {name: None for sources, _, _ in rows for name in sources}  # a set that keeps its order
    missing, unexpected = [n for n in wanted if n not in state], [n for n in state if n not in wanted]
    if missing or unexpected:
        said = [
            _listed(names, what)
            for names, what in ((missing, "missing"), (unexpected, "unexpected"))
            if names
        ]
        raise ValueError(f"{where}: {'; '.join(said)}; the tensors are not of this layout")
    result: dict[str, Tensor] = {}
    for sources, targets, change in rows:
        tensors = tuple(state[name] for name in sources)
        try:
            result.update(zip(targets, change(tensors), strict=True))
        except (ValueError, RuntimeError) as error:
            named = list(zip(sources, tensors, strict=True))
            held = ", ".join(f"{name!r} {tuple(v.shape)}" for name, v in named[:SHOWN])
            more = f" and {len(named) - SHOWN} more" if len(named) > SHOWN else ""
            reason, made = str(error).splitlines()[0], ", ".join(map(repr, targets))
            raise ValueError(f"{where}: {held}{more} cannot become {made}: {reason}") from None
    return result


def _listed(names: list[str], what: str) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} {what}: {', '.join(map(repr, names[:SHOWN]))}{more}"
