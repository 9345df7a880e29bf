"""Aspect-ratio buckets: pictures keep their proportions, and a batch has one size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sfumato.data.order import Draw, Order, sample_seed, shuffled

__all__ = ["BucketOrder", "assign", "bucket_sizes"]

Size = tuple[int, int]
LEAST_AREA = 0.9  # of side * side
MAX_RATIO = 4.0


def bucket_sizes(side: int, factor: int) -> tuple[Size, ...]:
    """All (height, width) that are multiples of `factor` with nearly the area of a square.

    The area is between 0.9 and 1 of side * side and the longer side at most four times the shorter: side 1024
    and factor 64 give the sizes of SDXL (Podell et al. 2023, arXiv:2307.01952, appendix I). A factor of about
    side / 16 is enough; a smaller one makes many buckets with few pictures in each.

    Returns: sorted by width / height; of sizes with one ratio the largest alone.

    Raises: ValueError if side is not a multiple of factor.
    """
    if factor < 1 or side < 1 or side % factor:
        raise ValueError(
            f"buckets of {factor} do not fit the size {side}; give a divisor of {side}, such as 64"
        )
    units = side // factor
    best: dict[float, Size] = {}
    for height in range(1, 2 * units + 1):
        for width in range(1, units * units // height + 1):
            close = height * width >= LEAST_AREA * units * units
            if close and max(height, width) <= MAX_RATIO * min(height, width):
                best[width / height] = (height * factor, width * factor)  # the later, the larger
    return tuple(size for _, size in sorted(best.items()))


def assign(sizes: Sequence[Size | None], table: Sequence[Size]) -> NDArray[np.int64]:
    """(N,) the bucket of each picture: that of the nearest ratio of width to height, on a logarithmic scale.

    Logarithmic, so that a picture and the same one lying on its side are treated alike. A picture of unknown
    size counts as square.
    """
    edges = np.log([width / height for height, width in table])
    ratios = np.log([1.0 if size is None else size[1] / size[0] for size in sizes])
    chosen = np.empty(len(sizes), np.int64)
    for start in range(0, len(sizes), 4096):  # the table of distances stays small
        part = ratios[start : start + 4096, None]
        chosen[start : start + 4096] = np.abs(part - edges).round(9).argmin(1)
    return chosen


class BucketOrder:
    """An endless sequence of batches, each from one bucket; a pure function of (seed, position) like `Order`.

    Every bucket is shuffled and gone through again and again by an `Order` of its own, `batch` pictures at a
    time. What an epoch leaves over in a bucket is no full batch: it is neither dropped nor repeated but
    begins the bucket's first batch of the next epoch. So all batches are full, and after any number of epochs
    two pictures of a bucket were drawn equally often or one time apart. The batches of an epoch come
    shuffled.

    A bucket with fewer pictures than a batch would show them several times in one: it is dissolved, the
    smallest first, and its pictures move to the nearest bucket that is left.

    Args:
        sizes: (height, width) of each picture; None if unknown.
        table: of the buckets, from `bucket_sizes`.
        batch: pictures of a step, over all processes. Positions within a step may be taken apart.
        seed: another seed, another order.
    """

    def __init__(
        self, sizes: Sequence[Size | None], table: Sequence[Size], batch: int, *, seed: int = 0
    ) -> None:
        self.batch = batch
        self.seed = seed
        bucket, kept = _large_enough(sizes, table, batch)
        self._sizes = [kept[number] for number in bucket]
        found = sorted(set(bucket.tolist()))
        self._size = [kept[number] for number in found]
        self._rows = [np.flatnonzero(bucket == number) for number in found]
        self._counts = np.array([len(rows) for rows in self._rows])
        self._orders = [
            Order(len(rows), seed=sample_seed(seed, -1 - number)) for number, rows in enumerate(self._rows)
        ]
        self._latest: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def sizes(self) -> Sequence[Size]:
        """(height, width) that each picture is cropped to."""
        return self._sizes

    @property
    def pictures(self) -> dict[Size, int]:
        """(height, width) -> pictures of that bucket."""
        return dict(zip(self._size, self._counts.tolist(), strict=True))

    def __getitem__(self, position: int) -> Draw:
        """The draw at a position from 0, without end."""
        if position < 0:
            raise IndexError(f"position {position} lies before the beginning, 0")
        step, place = divmod(position, self.batch)
        bucket, number = self._step(step)
        index = self._orders[bucket][number * self.batch + place].index
        row = int(self._rows[bucket][index])
        return Draw(position, row, sample_seed(self.seed, position), self._size[bucket])

    def take(self, position: int, count: int) -> list[Draw]:
        """The `count` draws from `position` on; of one size if they lie within one step."""
        return [self[p] for p in range(position, position + count)]

    def _step(self, step: int) -> tuple[int, int]:
        """Bucket of a step, and how many steps it had before."""
        epoch = step * self.batch // len(self)
        while self._before(epoch + 1).sum() <= step:
            epoch += 1
        if self._latest is None or self._latest[0] != epoch:
            self._latest = epoch, self._steps(epoch)
        bucket, number = self._latest[1][step - self._before(epoch).sum()]
        return int(bucket), int(number)

    def _before(self, epoch: int) -> NDArray[np.int64]:
        """(buckets,) the full batches of each bucket in all epochs before one."""
        return self._counts * epoch // self.batch

    def _steps(self, epoch: int) -> NDArray[np.int64]:
        """(steps, 2) bucket and number of each step of an epoch."""
        first, last = self._before(epoch), self._before(epoch + 1)
        pairs = [(b, n) for b in range(len(first)) for n in range(first[b], last[b])]
        return np.array(pairs, np.int64)[shuffled(len(pairs), self.seed, epoch, "steps")]


def _large_enough(
    sizes: Sequence[Size | None], table: Sequence[Size], batch: int
) -> tuple[NDArray[np.int64], list[Size]]:
    """Buckets of the pictures, and the table of those that are left."""
    kept = list(table)
    while True:
        bucket = assign(sizes, kept)
        counts = Counter(bucket.tolist())
        kept = [size for number, size in enumerate(kept) if counts[number]]
        small = min(counts, key=lambda number: (counts[number], number))
        if counts[small] >= batch or len(counts) == 1:
            return assign(sizes, kept), kept
        kept.pop(sorted(counts).index(small))
