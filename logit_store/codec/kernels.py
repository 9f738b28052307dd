"""The inner loops of encoding and decoding, in numpy: what they mean, and what runs where numba is not installed.

`compiled.py` holds the same functions for numba; ``fastest()`` gives whichever module can be had. They give equal
integers; sums of probabilities may differ in float64's last bits.

Shapes: P positions, N entries of all positions together (those of position p follow those of p − 1), L levels.
"""

from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=1)
def fastest() -> ModuleType:
    """The module whose functions to call. Imported late: numba takes half a second."""
    try:
        from logit_store.codec import compiled
    except ImportError:
        import sys

        return sys.modules[__name__]
    return compiled


def join_planes(
    p0: NDArray[np.uint8], p1: NDArray[np.uint8], p2: NDArray[np.uint8], p3: NDArray[np.uint8], out: NDArray[Any]
) -> None:
    """``out = p0 | p1 << 8 | p2 << 16 | p3 << 24``; an empty plane is one of zeros."""
    out[:] = p0 if len(p0) else 0
    for i, plane in enumerate((p1, p2, p3), 1):
        if len(plane):
            out |= np.left_shift(plane, 8 * i, dtype=out.dtype)


def sum_bins(steps_N: NDArray[np.uint16], counts_P: NDArray[np.int32], bin_bits: NDArray[np.uint8]) -> int:
    """Turn each position's differences into bins, in place; how many low bits their ids have, or −1 where there is no
    such bin.
    """
    if not len(steps_N):
        return 0
    sums_N = np.cumsum(steps_N, dtype=np.int64)
    firsts = _firsts(counts_P)
    sums_N -= np.repeat(sums_N[firsts] - steps_N[firsts], counts_P[counts_P > 0])
    if sums_N.max() >= len(bin_bits):
        return -1
    steps_N[:] = sums_N
    return int(np.take(bin_bits, steps_N).sum(dtype=np.int64))


def join_ids(
    bins_N: NDArray[np.uint16],
    packed: NDArray[np.uint8],
    bin_start: NDArray[np.int32],
    bin_bits: NDArray[np.uint8],
    ids_N: NDArray[np.int32],
) -> int:
    """Fill in ids from bins and their packed low bits; the largest id."""
    bits_N = np.take(bin_bits, bins_N)
    starts_N = np.cumsum(bits_N, dtype=np.int64) - bits_N
    padded = np.zeros(len(packed) + 4, np.uint8)
    padded[: len(packed)] = packed
    # every 32-bit window, one per byte; 7 + 19 bits are the most that is needed of one
    windows = np.lib.stride_tricks.as_strided(padded[:4].view("<u4"), (len(packed) + 1,), (1,))
    low_N = np.take(windows, starts_N >> 3, mode="clip")
    low_N >>= (starts_N & 7).astype(np.uint32)
    low_N &= (np.uint32(1) << bits_N.astype(np.uint32)) - np.uint32(1)
    np.add(np.take(bin_start, bins_N), low_N.view(np.int32), out=ids_N)
    return int(ids_N.max(initial=0))


def split_ids(
    ids_N: NDArray[np.int32],
    counts_P: NDArray[np.int32],
    bin_start: NDArray[np.int32],
    bin_bits: NDArray[np.uint8],
    mantissa: int,
    steps_N: NDArray[np.uint16],
    packed: NDArray[np.uint8],
) -> int:
    """Fill in differences of bins and packed low bits of ids that ascend in each position; the number of low bits."""
    exponents_N = np.maximum(np.frexp(ids_N)[1] - 1, mantissa)
    shifts_N = exponents_N - mantissa
    bins_N = np.where(ids_N < 1 << mantissa, ids_N, (shifts_N + 1 << mantissa) + (ids_N >> shifts_N) - (1 << mantissa))
    firsts = _firsts(counts_P)
    steps_N[:] = np.diff(bins_N, prepend=0)
    steps_N[firsts] = bins_N[firsts]
    return _pack_bits((ids_N - bin_start[bins_N]).astype(np.uint32), bin_bits[bins_N], packed)


def _pack_bits(values_N: NDArray[np.uint32], bits_N: NDArray[np.uint8], packed: NDArray[np.uint8]) -> int:
    """Write the lowest ``bits_N`` bits of each value, which must hold no others, one after the other."""
    ends_N = np.cumsum(bits_N, dtype=np.int64)
    total = int(ends_N[-1]) if len(ends_N) else 0
    if total:
        starts_N = ends_N - bits_N
        word_N = starts_N >> 5
        within_N = (starts_N & 31).astype(np.uint32)
        # Values that begin in one word are or-ed together; what the last of them runs over goes to the next word.
        firsts = np.flatnonzero(np.concatenate([[True], word_N[1:] != word_N[:-1]]))
        lasts = np.append(firsts[1:], len(word_N)) - 1
        words = np.zeros(total // 32 + 2, np.uint32)
        words[word_N[firsts]] = np.bitwise_or.reduceat(values_N << within_N, firsts)
        words[word_N[lasts] + 1] |= values_N[lasts] >> np.uint32(1) >> (np.uint32(31) - within_N[lasts])
        num_bytes = (total + 7) // 8
        packed[:num_bytes] = words.astype("<u4").view(np.uint8)[:num_bytes]
    return total


def encode_head(
    logprobs_N: NDArray[np.float32],
    counts_P: NDArray[np.int32],
    nearest: NDArray[np.uint16],
    cells_per_nat: float,
    base_P: NDArray[np.uint16],
    codes_N: NDArray[np.uint16],
) -> None:
    """Fill in the largest level of each position's finite log-probs, and each entry's code: base + 1 − level, or 0 for
    −inf. ``nearest[int(−logprob × cells_per_nat)]`` is a log-prob's level.
    """
    is_zero_N = np.isneginf(logprobs_N)
    cells_N = np.where(is_zero_N, np.float32(0), logprobs_N) * np.float32(-cells_per_nat)
    levels_N = np.where(is_zero_N, np.uint16(0), np.take(nearest, cells_N.astype(np.int64), mode="clip"))
    base_P[:] = 0
    if len(levels_N):
        base_P[counts_P > 0] = np.maximum.reduceat(levels_N, _firsts(counts_P))
    codes_N[:] = np.where(is_zero_N, 0, np.repeat(base_P + np.uint16(1), counts_P) - levels_N)


def decode_head(
    codes_N: NDArray[np.uint16],
    base_P: NDArray[np.uint16],
    counts_P: NDArray[np.int32],
    logprobs_L: NDArray[np.float32],
    probs_L: NDArray[np.float64],
    logprobs_N: NDArray[np.float32],
    sums_P: NDArray[np.float64],
) -> None:
    """Fill in the log-prob of each code's level, and the sum of each position's probabilities."""
    levels_N = np.repeat(base_P.astype(np.int64) + 1, counts_P) - codes_N
    is_zero_N = codes_N == 0
    logprobs_N[:] = np.where(is_zero_N, np.float32(-np.inf), np.take(logprobs_L, levels_N, mode="clip"))
    sums_P[:] = 0.0
    if len(codes_N):
        probs_N = np.where(is_zero_N, 0.0, np.take(probs_L, levels_N, mode="clip"))
        sums_P[counts_P > 0] = np.add.reduceat(probs_N, _firsts(counts_P))


def shift_heads(logprobs_N: NDArray[np.float32], counts_P: NDArray[np.int32], shift_P: NDArray[np.float32]) -> None:
    """Add a number to all entries of each position, in place."""
    logprobs_N += np.repeat(shift_P, counts_P)


def find_in_heads(
    ids_N: NDArray[np.int32], counts_P: NDArray[np.int32], wanted_P: NDArray[np.int32], places_P: NDArray[np.int64]
) -> None:
    """Fill in where in ``ids_N`` each position's wanted id is, −1 where its head lacks it."""
    found = np.flatnonzero(ids_N == np.repeat(wanted_P, counts_P))
    places_P[:] = -1
    places_P[np.searchsorted(np.cumsum(counts_P), found, side="right")] = found


def _firsts(counts_P: NDArray[np.int32]) -> NDArray[np.int64]:
    """Places of the first entry of each position that has any."""
    return (np.cumsum(counts_P, dtype=np.int64) - counts_P)[counts_P > 0]
