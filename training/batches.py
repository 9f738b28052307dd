"""Which rows a step trains on, and how they are dealt to ranks: pure functions of config, lengths and seed."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.config import CurriculumConfig
from training.schedules import difficulty

EpochOrder = Callable[[int, int, NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]
"""(seed, epoch, rows_N, positions_N) → N places in ``rows_N``: what an epoch takes, in order. See `source.py`."""


class Cursor(NamedTuple):
    """Where the run stands: all that a resumed run needs to know of its data."""

    step: int = 0
    epoch: int = 0
    offset: int = 0
    """Rows of this epoch's order that are spent."""
    tokens_seen: int = 0
    """Positions trained on so far, over all ranks."""


class Prefix(NamedTuple):
    """The first positions of a row: ``ids[:positions]`` is fed, ``ids[1 : positions + 1]`` is predicted."""

    row: int
    positions: int


class BatchPlan:
    """Step after step of prefixes, in a global order that knows nothing of ranks."""

    can_run_ahead = True
    """Whether ``next`` knows the steps to come from the cursor alone, so that they can be read before they are due."""

    def __init__(
        self,
        rows_N: NDArray[np.int64],
        lengths_N: NDArray[np.int32],
        tokens_per_step: int,
        seed: int,
        curriculum: CurriculumConfig | None,
        order: EpochOrder,
    ) -> None:
        """``rows_N`` are the numbers of the rows to train on, ``lengths_N`` their lengths in tokens."""
        usable = lengths_N > 1  # a row of one token has no position
        self.rows_N, self.positions_N = rows_N[usable], lengths_N[usable].astype(np.int64) - 1
        self.tokens_per_step, self.seed, self.curriculum = tokens_per_step, seed, curriculum
        self.order = order
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))

    def next(self, cursor: Cursor) -> tuple[list[Prefix], int, Cursor]:
        """The step at ``cursor``: its prefixes, its sequence length, and the cursor after it.

        Rows are taken in the epoch's order, each giving ``min(length, T − 1)`` positions, until the next
        would exceed ``tokens_per_step``. A row is spent once per epoch (of its own text), even if it was cut.
        """
        longest = int(self.positions_N.max())
        length = difficulty(self.curriculum, cursor.tokens_seen) if self.curriculum else longest
        prefixes: list[Prefix] = []
        epoch, offset, tokens = cursor.epoch, cursor.offset, 0
        while True:
            if offset == len(self.rows_N):
                epoch, offset = epoch + 1, 0
            i = self._epoch_order(epoch)[offset]
            positions = min(length, int(self.positions_N[i]))
            if tokens + positions > self.tokens_per_step:
                return prefixes, length, Cursor(cursor.step + 1, epoch, offset, cursor.tokens_seen + tokens)
            prefixes.append(Prefix(int(self.rows_N[i]), positions))
            tokens, offset = tokens + positions, offset + 1

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        if self._order[0] != epoch:
            self._order = (epoch, self.order(self.seed, epoch, self.rows_N, self.positions_N))
        return self._order[1]


def micro_batches(prefixes: Sequence[Prefix], num_ranks: int, micro_batch_tokens: int) -> list[list[list[Prefix]]]:
    """Deal a step's prefixes: for each rank the same number of micro-batches, some perhaps empty.

    Prefixes are sorted by length and split into as few groups of about equal numbers of positions as keep
    each within ``micro_batch_tokens`` when padded to its longest (a single prefix may exceed it), a multiple
    of ``num_ranks`` of them, so that padding is small and ranks carry about the same load.
    """
    ordered = sorted(prefixes, key=lambda prefix: (-prefix.positions, prefix.row))
    ends = np.cumsum([0] + [prefix.positions for prefix in ordered])
    count = num_ranks
    while True:
        bounds = np.searchsorted(ends, [ends[-1] * i / count for i in range(count)]).tolist()
        groups = [ordered[a:b] for a, b in pairwise([*bounds, len(ordered)])]
        if all(len(group) <= 1 or len(group) * group[0].positions <= micro_batch_tokens for group in groups):
            return [groups[rank::num_ranks] for rank in range(num_ranks)]
        count += num_ranks
