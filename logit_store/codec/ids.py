"""Sorted token ids as floating-point numbers: small differences of exponents, and raw low bits.

With m bits of mantissa, an id below 2^m is its own bin. A larger id is written as floating point would write it: its
exponent and the m bits after the leading one make its bin, the other bits are kept as they are. Token ids are nearly
in the order of their frequency, so that the ids of a head lie about evenly over bins: the difference to the previous
bin is a small number of the same distribution everywhere, which a plain entropy coder codes well, where the
differences of the ids themselves grow with the id (docs/log.md has the figures).

Shapes: N ids of all positions together, P positions.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from logit_store.codec.kernels import fastest

MAX_ID_BITS = 24
LONG_LIST = 48
"""Ids per position from which six bits of mantissa pay; below, four, whose differences mostly fit one byte."""


class Bins(NamedTuple):
    """Bins of ids with one size of mantissa."""

    mantissa: int
    start: NDArray[np.int32]
    """Smallest id of each bin."""
    bits: NDArray[np.uint8]
    """Low bits of the ids of each bin."""

    @classmethod
    def of(cls, mantissa: int) -> "Bins":
        """All bins of ids below 2^24."""
        bins = np.arange((MAX_ID_BITS - mantissa + 1) << mantissa)
        bits = np.maximum((bins >> mantissa) - 1, 0)
        one = 1 << mantissa
        start = np.where(bins < one, bins, (one + (bins & one - 1)) << bits)
        return cls(mantissa, start.astype(np.int32), bits.astype(np.uint8))


_SHORT, _LONG = Bins.of(4), Bins.of(6)


def bins_for(num_ids: int, num_positions: int) -> Bins:
    """The bins that lists of this mean length are stored in."""
    return _LONG if num_ids >= LONG_LIST * max(num_positions, 1) else _SHORT


def split_ids(ids_N: NDArray[np.int32], counts_P: NDArray[np.int32]) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
    """Differences of bins [N] (a position's first bin whole) and the packed low bits [bytes], first id first,
    lowest bit of the lowest byte first. The ids of each position must ascend; repeats are allowed.
    """
    bins = bins_for(len(ids_N), len(counts_P))
    steps_N, packed = np.empty(len(ids_N), np.uint16), np.empty(3 * len(ids_N) + 8, np.uint8)
    bits = fastest().split_ids(ids_N, counts_P, bins.start, bins.bits, bins.mantissa, steps_N, packed)
    return steps_N, packed[: (bits + 7) // 8]


def sum_bins(steps_N: NDArray[np.uint16], counts_P: NDArray[np.int32]) -> int:
    """Undo the differences in place; how many bytes the low bits of these bins take. Raises ValueError."""
    bits: int = fastest().sum_bins(steps_N, counts_P, bins_for(len(steps_N), len(counts_P)).bits)
    if bits < 0:
        raise ValueError("an id beyond 2^24")
    return (bits + 7) // 8


def sum_lone_bins(bins_T: NDArray[np.uint16]) -> int:
    """The same for ids that stand alone, each its position's first: how many bytes their low bits take."""
    if len(bins_T) and int(bins_T.max()) >= len(_SHORT.bits):
        raise ValueError("an id beyond 2^24")
    return (int(np.take(_SHORT.bits, bins_T).sum(dtype=np.int64)) + 7) // 8


def join_ids(
    bins_N: NDArray[np.uint16], packed: NDArray[np.uint8], num_positions: int
) -> tuple[NDArray[np.int32], int]:
    """Ids from bins and low bits, and the largest of them."""
    bins = bins_for(len(bins_N), num_positions)
    ids_N = np.empty(len(bins_N), np.int32)
    return ids_N, fastest().join_ids(bins_N, packed, bins.start, bins.bits, ids_N)
