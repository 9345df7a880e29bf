"""The order of samples as a pure function of (seed, position): where a run stands is one integer."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Draw", "Order", "sample_seed", "shuffled"]


@dataclass(frozen=True, slots=True)
class Draw:
    """One sample of the endless sequence."""

    position: int
    """Samples drawn before this one since the beginning."""
    index: int
    """Row of the data set."""
    seed: int
    """Of its crop, flip and so on: another at each position."""
    size: tuple[int, int] | None = None
    """(height, width) that it is cropped to; None = what the preparation says."""


class Order:
    """An endless shuffled sequence of rows; an epoch is as many draws as there are rows.

    Plainly, an epoch has every row once. With `groups` every group is drawn equally often, whatever its size;
    with `weights` a row is drawn in proportion to its weight, within its group if there are groups. Then an
    epoch has each row and each group as often as its share of the draws says, rounded up or down (systematic
    sampling), and not just on average.

    With `blocks` and `mix` an epoch goes through the blocks in a shuffled order, `mix` of them at a time, and
    shuffles what these hold: so few shards need to be at hand, and where a run stands is one integer still.

    Args:
        count: rows of the data set.
        seed: another seed, another order.
        weights: one number >= 0 per row.
        groups: one key per row, such as the concept of its caption.
        blocks: one number per row, such as that of its shard.
        mix: blocks whose rows are shuffled among each other; None = all.

    Raises: ValueError if a length does not fit or the weights have no positive sum.
    """

    def __init__(
        self,
        count: int,
        *,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        groups: Sequence[Hashable] | None = None,
        blocks: Sequence[int] | None = None,
        mix: int | None = None,
    ) -> None:
        if count < 1:
            raise ValueError(f"an order needs at least one row, not {count}")
        for name, values in (("weights", weights), ("groups", groups), ("blocks", blocks)):
            if values is not None and len(values) != count:
                raise ValueError(f"{len(values)} {name} for {count} rows; give one for each row")
        if mix is not None and mix < 1:
            raise ValueError(f"{mix} blocks cannot be mixed; mix at least 1, or None for all")
        self.count = count
        self.seed = seed
        self.mix = mix
        self._block = None if blocks is None or mix is None else _numbered(blocks)
        self._group = None if groups is None else _numbered(groups)
        self._share = None if weights is None and groups is None else self._shares(weights)
        self._latest: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return self.count

    @property
    def sizes(self) -> None:
        """No picture has a size of its own; see `buckets.BucketOrder`."""
        return None

    def __getitem__(self, position: int) -> Draw:
        """The draw at a position from 0, without end."""
        if position < 0:
            raise IndexError(f"position {position} lies before the beginning, 0")
        epoch, place = divmod(position, self.count)
        return Draw(position, int(self.epoch(epoch)[place]), sample_seed(self.seed, position))

    def take(self, position: int, count: int) -> list[Draw]:
        """The `count` draws from `position` on."""
        return [self[p] for p in range(position, position + count)]

    def epoch(self, number: int) -> NDArray[np.int64]:
        """(count,) rows of one epoch, in their order."""
        if self._latest is None or self._latest[0] != number:
            self._latest = number, self._in_blocks(self._rows(number), number)
        return self._latest[1]

    def _rows(self, epoch: int) -> NDArray[np.int64]:
        rows = self._shuffle(self.count, epoch, "rows")
        if self._share is None:
            return rows
        if self._group is not None:  # the rows of a group side by side, so that the group too gets its share
            place = self._shuffle(int(self._group.max()) + 1, epoch, "groups")
            rows = rows[np.argsort(place[self._group[rows]], kind="stable")]
        edges = np.cumsum(self._share[rows])
        start = (_hash(self.seed, epoch, "start") >> 75) / 2**53
        points = (np.arange(self.count) + start) / self.count
        drawn = rows[np.searchsorted(edges / edges[-1], points, side="right")]
        return drawn[self._shuffle(self.count, epoch, "draws")]

    def _in_blocks(self, drawn: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """The rows of an epoch, those of `mix` blocks together, otherwise as they were."""
        if self._block is None or self.mix is None:
            return drawn
        place = self._shuffle(int(self._block.max()) + 1, epoch, "blocks")
        return drawn[np.argsort(place[self._block[drawn]] // self.mix, kind="stable")]

    def _shuffle(self, count: int, epoch: int, name: str) -> NDArray[np.int64]:
        return shuffled(count, self.seed, epoch, name)

    def _shares(self, weights: Sequence[float] | None) -> NDArray[np.float64]:
        share = np.ones(self.count) if weights is None else np.asarray(weights, np.float64)
        if not (np.isfinite(share).all() and (share >= 0).all() and share.sum() > 0):
            raise ValueError("weights must be finite numbers >= 0 with a positive sum")
        if self._group is None:
            return share
        total = np.bincount(self._group, weights=share)
        return np.divide(share, total[self._group], out=np.zeros_like(share), where=share > 0)


def sample_seed(seed: int, position: int) -> int:
    """The seed of the random choices for the sample at a position: 63 bits."""
    return _hash(seed, position, "sample") >> 65


def shuffled(count: int, seed: int, epoch: int, name: str) -> NDArray[np.int64]:
    """(count,) a permutation for a purpose and an epoch."""
    # Philox's raw bits are the same in every release of numpy; its shuffling methods are not.
    bits = np.random.Philox(key=_hash(seed, epoch, name)).random_raw(count)
    return np.argsort(bits, kind="stable").astype(np.int64)


def _numbered(keys: Sequence[Hashable]) -> NDArray[np.int64]:
    number: dict[Hashable, int] = {}
    try:
        return np.array([number.setdefault(key, len(number)) for key in keys], np.int64)
    except TypeError:
        raise ValueError("groups must be plain values such as strings or numbers, not lists") from None


def _hash(seed: int, number: int, name: str) -> int:
    """128 bits that differ for every (seed, number, name)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}/{name}".encode()).digest()[:16], "little")
