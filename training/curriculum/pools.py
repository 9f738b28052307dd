"""Rows in pools of like length and easiness, each spent in an endless shuffled order of its own.

Shapes: N rows, B buckets of length, C classes of easiness; a pool is a pair of bucket and class.
"""

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray


class Pools:
    """The rows of a run by pool. All state is ``spent_BC``, how many rows of each pool are used up since the start."""

    def __init__(self, bucket_N: NDArray[np.int64], class_N: NDArray[np.int64], seed: int, parts: int,
                 order: Callable[[int], NDArray[np.int64]] | None = None) -> None:  # fmt: skip
        """``parts``: in how many rounds an epoch is spent. A row's number here is its place in the arrays.

        ``order``, where there is one pool alone: the rows that an epoch takes, as many as there are.
        """
        self._order = order
        self.seed, self.parts = seed, parts
        self.shape = (int(bucket_N.max(initial=0)) + 1, int(class_N.max(initial=0)) + 1)
        self.pool_N = pool_N = np.ravel_multi_index((bucket_N, class_N), self.shape)
        """The pool of each row, as its place in the flat [B, C]."""
        self._rows_N = np.argsort(pool_N, kind="stable")
        self.sizes_BC = np.bincount(pool_N, minlength=self.shape[0] * self.shape[1]).reshape(self.shape)
        self._starts_BC = (np.cumsum(self.sizes_BC) - self.sizes_BC.reshape(-1)).reshape(self.shape)
        self._orders: dict[tuple[int, int], tuple[int, NDArray[np.int64]]] = {}

    def row(self, pool: tuple[int, int], place: int) -> int:
        """The row at a place of a pool's order: a permutation for each epoch, decided by the seed."""
        size = int(self.sizes_BC[pool])
        epoch, place = divmod(place, size)
        if self._orders.get(pool, (-1,))[0] != epoch:
            order = self._shuffled(pool, epoch) if self._order is None else self._order(epoch)
            self._orders[pool] = (epoch, order)
        return int(self._rows_N[self._starts_BC[pool] + self._orders[pool][1][place]])

    def _shuffled(self, pool: tuple[int, int], epoch: int) -> NDArray[np.int64]:
        entropy = [self.seed, epoch, int(np.ravel_multi_index(pool, self.shape))]
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
        return generator.permutation(int(self.sizes_BC[pool]))

    def left(self, spent_BC: NDArray[np.int64], open_BC: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Rows of each open pool that are to be spent before any open pool begins another round.

        A round is 1/parts of each pool, so that every row of the open pools is spent once before any is spent again;
        a pool that opens late is behind, and alone until it has caught up.
        """
        open_BC = open_BC & (self.sizes_BC > 0)
        sizes_BC = np.maximum(self.sizes_BC, 1)
        round_ = int((spent_BC * self.parts // sizes_BC)[open_BC].min())
        ends_BC = -(-(round_ + 1) * sizes_BC // self.parts)
        return np.where(open_BC, np.maximum(ends_BC - spent_BC, 0), 0)

    def draw(
        self, spent_BC: NDArray[np.int64], open_BC: NDArray[np.bool_], weight_B: NDArray[np.float64], step: int
    ) -> Iterator[tuple[int, int]]:
        """The pools of a step's rows, one after the other, for ever; ``spent_BC`` is counted up for each.

        Rows come from one bucket, drawn in proportion to what is left of each (times ``weight_B``, the length of its
        rows), until nothing of it is left in this round; among its classes each row that is left is as likely.
        """
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, step], spawn_key=(1,))))
        while True:
            left_BC = self.left(spent_BC, open_BC)
            bucket = _drawn(left_BC.sum(1) * weight_B, generator)
            left_C = left_BC[bucket]
            while left_C.any():
                pool = (bucket, _drawn(left_C, generator))
                left_C[pool[1]] -= 1
                spent_BC[pool] += 1
                yield pool

    def epoch(self, spent_BC: NDArray[np.int64]) -> int:
        """How often every row has been spent."""
        filled_BC = self.sizes_BC > 0
        return int((spent_BC[filled_BC] // self.sizes_BC[filled_BC]).min())


def _drawn(weights: NDArray[np.float64] | NDArray[np.int64], generator: np.random.Generator) -> int:
    """An index in proportion to the weights; nothing is drawn where only one is there."""
    ends = np.cumsum(weights)
    if len(ends) == 1:
        return 0
    return int(np.searchsorted(ends, generator.random() * ends[-1], side="right"))
