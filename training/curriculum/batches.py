"""Which rows a step trains on, and how they are dealt to ranks: pure functions of config, lengths and seed."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.curriculum.clock import Curriculum, Pace
from training.curriculum.cuts import Cut, plain_cut
from training.curriculum.pools import Pools

PERCENT = 5
"""Percent of the rows in a class of easiness: rows of a row curriculum are told apart as finely as this."""

MAX_PADDING = 0.05
"""Share of padded positions below which micro-batches are not split further."""


EpochOrder = Callable[[int, NDArray[np.int64], NDArray[np.int64]], NDArray[np.int64]]
"""(epoch, rows_N, positions_N) → N places in ``rows_N``: what an epoch takes, in order. See `source.py`."""


class Cursor(NamedTuple):
    """Where the run stands: all that a resumed run needs to know of its data. JSON's lists do for its tuples."""

    step: int = 0
    epoch: int = 0
    """How often every row has been spent."""
    tokens_seen: int = 0
    """Loss-carrying positions trained on so far, over all ranks."""
    clock: int = 0
    """Tokens as the curricula count them: those seen, but for steps at which pacing held it."""
    spent: Sequence[int] = ()
    """Rows of each pool that are spent, since the start."""
    pace: Sequence[float] = Pace()
    """What pacing remembers of the gradient: a ``Pace``."""


class Prefix(NamedTuple):
    """The first positions of a row: ``ids[:positions]`` is fed, ``ids[1 : positions + 1]`` is predicted."""

    row: int
    positions: int


class BatchPlan:
    """Step after step of prefixes, in a global order that knows nothing of ranks."""

    def __init__(
        self,
        rows_N: NDArray[np.int64],
        lengths_N: NDArray[np.int32],
        tokens_per_step: int,
        seed: int,
        curriculum: Curriculum = Curriculum(),  # noqa: B008 (a tuple)
        cut: Cut = plain_cut,
        percent_N: NDArray[np.float64] | None = None,
        order: EpochOrder | None = None,
    ) -> None:
        """``rows_N`` are the numbers of the rows to train on, ``lengths_N`` their lengths in tokens.

        ``percent_N``, for a row curriculum: how many percent of the rows are as easy as each row, above 0 to 100.
        ``order``, for a mixture: what an epoch takes in place of every row once, shuffled.
        """
        usable_N = lengths_N > 1  # a row of one token has no position
        if curriculum.is_bucketed and curriculum.lengths is not None:
            usable_N &= lengths_N - 1 <= curriculum.lengths.max_difficulty
        self.rows_N, self.positions_N = rows_N[usable_N], lengths_N[usable_N].astype(np.int64) - 1
        self.tokens_per_step, self.curriculum, self.cut = tokens_per_step, curriculum, cut
        bucket_N = length_bucket(self.positions_N) if curriculum.is_bucketed else np.zeros_like(self.positions_N)
        class_N = np.zeros_like(self.positions_N)
        if percent_N is not None:
            class_N = np.ceil(percent_N[usable_N] / PERCENT).astype(np.int64) - 1
        of_epoch: Callable[[int], NDArray[np.int64]] | None = None
        if order is not None:
            of_epoch = partial(_of_epoch, order, self.rows_N, self.positions_N)
        self.pools = Pools(bucket_N, class_N, seed, curriculum.parts, of_epoch)
        num_buckets = self.pools.shape[0]
        self._longest_B = np.zeros(num_buckets, np.int64)
        np.maximum.at(self._longest_B, bucket_N, self.positions_N)
        sums_B = np.bincount(bucket_N, self.positions_N, num_buckets)
        self._mean_B = sums_B / np.maximum(np.bincount(bucket_N, minlength=num_buckets), 1)

    @property
    def longest(self) -> int:
        """Positions of the longest sequence that this plan ever makes."""
        longest = int(self.positions_N.max())
        return min(longest, self.curriculum.lengths.max_difficulty) if self.curriculum.lengths else longest

    @property
    def can_run_ahead(self) -> bool:
        """Whether steps follow from the cursor alone; under pacing the next one waits for the gradient of this one."""
        return self.curriculum.pacing is None

    def length(self, clock: int) -> int:
        """Most positions of a sequence at this time of the curriculum."""
        return self.curriculum.length(clock) or int(self.positions_N.max())

    def open(self, clock: int) -> NDArray[np.bool_]:
        """Which pools are trained on at this time of the curriculum."""
        percents_C = PERCENT * np.arange(1, self.pools.shape[1] + 1)
        is_easy_C = (percents_C <= self.curriculum.percent(clock)) | (self.curriculum.rows is None)
        fits_B = (self._longest_B <= self.length(clock)) | (not self.curriculum.is_bucketed)
        return fits_B[:, None] & is_easy_C

    def next(self, cursor: Cursor) -> tuple[list[Prefix], int, Cursor]:
        """The step at ``cursor``: its prefixes, its sequence length, and the cursor after it (see ``paced``).

        Rows are taken in the order of their pool, each giving ``min(length, T − 1)`` positions or fewer (``cut``),
        until the loss-carrying ones of the next would exceed ``tokens_per_step``. A row is spent once per epoch, even
        if it was cut, or carries no loss as far as it was cut; such a row is no part of the step.
        """
        length = self.length(cursor.clock)
        spent_BC = np.zeros(self.pools.shape, np.int64)
        if len(cursor.spent):
            spent_BC = np.array(cursor.spent, np.int64).reshape(self.pools.shape)
        prefixes: list[Prefix] = []
        tokens = 0
        for pool in self.pools.draw(spent_BC, self.open(cursor.clock), self._mean_B, cursor.step):
            i = self.pools.row(pool, int(spent_BC[pool]) - 1)
            row = int(self.rows_N[i])
            positions, carrying = self.cut(row, min(length, int(self.positions_N[i])))
            if tokens + carrying > self.tokens_per_step:
                spent_BC[pool] -= 1
                break
            if carrying:
                prefixes.append(Prefix(row, positions))
                tokens += carrying
        after = cursor._replace(
            step=cursor.step + 1,
            epoch=self.pools.epoch(spent_BC),
            tokens_seen=cursor.tokens_seen + tokens,
            clock=cursor.clock + tokens if self.can_run_ahead else cursor.clock,
            spent=tuple(spent_BC.reshape(-1).tolist()),
            pace=tuple(cursor.pace),
        )
        return prefixes, length, after

    def paced(self, before: Cursor, after: Cursor, gradient_norm: float) -> Cursor:
        """The cursor after a step, once the norm of its gradient is known; the same without pacing."""
        if self.can_run_ahead:
            return after
        tokens, pace = after.tokens_seen - before.tokens_seen, Pace(*before.pace)  # type: ignore[arg-type]
        clock, pace = self.curriculum.advanced(before.clock, pace, tokens, gradient_norm)
        return after._replace(clock=clock, pace=tuple(pace))


def _of_epoch(
    order: EpochOrder, rows_N: NDArray[np.int64], positions_N: NDArray[np.int64], epoch: int
) -> NDArray[np.int64]:
    return order(epoch, rows_N, positions_N)


def length_bucket(positions_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bucket b holds rows of more than 2^(b−1), at most 2^b tokens: pieces of a power of two have one to themselves."""
    return np.frexp(positions_N)[1].astype(np.int64)  # the bits of T − 1


def padded_positions(positions: int, length: int | None = None) -> int:
    """To how many positions a micro-batch is padded whose longest prefix has so many.

    Sixteen sizes in each power of two, so that kernels that are compiled or tuned for a shape are used again, at 6 % of
    padding at most and 2 % in the middle; never beyond ``length``, the curriculum's.
    """
    step = 1 << max((positions - 1).bit_length() - 5, 0)
    size = -(-positions // step) * step
    return size if length is None else max(positions, min(size, length))


def micro_batches(
    prefixes: Sequence[Prefix], num_ranks: int, micro_batch_tokens: int, length: int | None = None
) -> list[list[list[Prefix]]]:
    """Deal a step's prefixes: for each rank the same number of micro-batches, some perhaps empty.

    Prefixes are sorted by length and split into rounds, each of which gives every rank a micro-batch, of about equal
    costs (positions when padded); where there are fewer prefixes than ranks, some get an empty one. There are as few
    rounds as keep each micro-batch within ``micro_batch_tokens`` (a single prefix may exceed it) and all padding below
    ``MAX_PADDING``, as far as the sizes of ``padded_positions`` allow.
    """
    ordered = sorted(prefixes, key=lambda prefix: (-prefix.positions, prefix.row))
    padded_N = [padded_positions(prefix.positions, length) for prefix in ordered]
    deal = cache(partial(_spread, padded_N, num_ranks))
    borders = _full_rounds(padded_N, num_ranks, micro_batch_tokens)
    most = sum(prefix.positions for prefix in ordered) / (1 - MAX_PADDING)
    while sum(deal(start, stop).cost for start, stop in pairwise(borders)) > most:
        border = _best_border(padded_N, borders, num_ranks, deal)
        if border is None:
            break
        borders = sorted([*borders, border])
    rounds = [deal(start, stop).bounds_R for start, stop in pairwise(borders)]
    return [[ordered[bounds_R[rank] : bounds_R[rank + 1]] for bounds_R in rounds] for rank in range(num_ranks)]


class _Round(NamedTuple):
    bounds_R: list[int]
    """Where each rank's share begins, and the last one ends."""
    cost: int
    """Positions of all ranks when padded."""


Deal = Callable[[int, int], _Round]
"""(start, stop) → how a round of these rows is dealt."""

FINER = 32
"""A round's dearest share is the least possible one, or at most by this part of it more."""


def _full_rounds(padded_N: Sequence[int], num_ranks: int, micro_batch_tokens: int) -> list[int]:
    """Borders of rounds in which each rank has as many rows as fit when all are as long as the first."""
    borders = [0]
    while borders[-1] < len(padded_N):
        of_rank = max(1, micro_batch_tokens // padded_N[borders[-1]])
        borders.append(min(borders[-1] + num_ranks * of_rank, len(padded_N)))
    return borders if padded_N else [0, 0]


def _spread(padded_N: Sequence[int], num_ranks: int, start: int, stop: int) -> _Round:
    """Deal rows ``start`` to ``stop``, the longest first, so that the dearest share costs as little as it can."""
    if start == stop:
        return _Round([start] * (num_ranks + 1), 0)
    even = -(-(stop - start) // num_ranks) * padded_N[start]  # equal numbers of rows cost no share more
    cap = min(max(padded_N[start], -(-sum(padded_N[start:stop]) // num_ranks)), even)
    while (bounds_R := _within(padded_N, num_ranks, start, stop, cap))[-1] < stop:
        cap = min(cap + cap // FINER + 1, even)
    return _Round(bounds_R, sum((b - a) * padded_N[a] for a, b in pairwise(bounds_R) if a < b))


def _within(padded_N: Sequence[int], num_ranks: int, start: int, stop: int, cap: int) -> list[int]:
    """Bounds of shares that cost ``cap`` at most: equal numbers of the rows that are left, or what fits if that is
    fewer. Where it is too little the last one ends before ``stop``.
    """
    bounds_R = [start]
    for ranks_left in range(num_ranks, 0, -1):
        at = bounds_R[-1]
        count = -(-(stop - at) // ranks_left)
        bounds_R.append(at + min(count, cap // padded_N[at]) if count else at)
    return bounds_R


def _best_border(padded_N: Sequence[int], borders: Sequence[int], num_ranks: int, deal: Deal) -> int | None:
    """The border between rounds that saves most padding, if one does: where padded lengths change, or just before, so
    that every rank has equally many rows of the first round.
    """
    best, border = 0, None
    for start, stop in pairwise(borders):
        changes = [i for i in range(start + 1, stop) if padded_N[i] < padded_N[i - 1]]
        for place in sorted({*changes, *(i - (i - start) % num_ranks for i in changes)} - {start}):
            saved = deal(start, stop).cost - deal(start, place).cost - deal(place, stop).cost
            if saved > best:
                best, border = saved, place
    return border


def padding_share(dealt: Sequence[Sequence[Sequence[Prefix]]], length: int | None = None) -> float:
    """1 − real / padded positions of all micro-batches of all ranks; 0 where there are none."""
    groups = [group for of_rank in dealt for group in of_rank if group]
    padded = sum(_padded(group, length) for group in groups)
    return 1.0 - sum(prefix.positions for group in groups for prefix in group) / padded if padded else 0.0


def _padded(group: Sequence[Prefix], length: int | None) -> int:
    return len(group) * padded_positions(max(prefix.positions for prefix in group), length)
