"""The inner loops of encoding and decoding, compiled by numba: they run without the interpreter's lock.

Each function equals the one of the same name in `kernels.py`, which says what it does. Only `kernels.py` imports this
file, when a block is first touched and numba is there.
"""

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


def jit(function: Any) -> Any:
    """Compile, and keep what was compiled where there is a folder for it: not in every container there is."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        return njit(nogil=True)(function)


@jit
def join_planes(
    p0: NDArray[Any], p1: NDArray[Any], p2: NDArray[Any], p3: NDArray[Any], out: NDArray[Any]
) -> None:  # fmt: skip
    n = len(out)
    zero = out.dtype.type(0)
    for i in range(n if len(p0) == 0 else 0):
        out[i] = zero
    for i in range(len(p0)):
        out[i] = p0[i]
    for i in range(len(p1)):
        out[i] |= out.dtype.type(p1[i]) << 8
    for i in range(len(p2)):
        out[i] |= out.dtype.type(p2[i]) << 16
    for i in range(len(p3)):
        out[i] |= out.dtype.type(p3[i]) << 24


@jit
def sum_bins(steps_N: NDArray[Any], counts_P: NDArray[Any], bin_bits: NDArray[Any]) -> int:
    at, total, last = 0, 0, len(bin_bits) - 1
    for p in range(len(counts_P)):
        bin_ = 0
        for i in range(at, at + counts_P[p]):
            bin_ += steps_N[i]
            if bin_ > last:
                return -1
            steps_N[i] = bin_
            total += bin_bits[bin_]
        at += counts_P[p]
    return total


@jit
def join_ids(
    bins_N: NDArray[Any], packed: NDArray[Any], bin_start: NDArray[Any], bin_bits: NDArray[Any], ids_N: NDArray[Any]
) -> int:
    at, largest = 0, 0
    size = len(packed)
    for i in range(len(bins_N)):
        bits = bin_bits[bins_N[i]]
        byte = at >> 3
        window = np.uint32(0)
        if byte + 3 < size:
            window = (
                np.uint32(packed[byte])
                | np.uint32(packed[byte + 1]) << np.uint32(8)
                | np.uint32(packed[byte + 2]) << np.uint32(16)
                | np.uint32(packed[byte + 3]) << np.uint32(24)
            )
        else:
            for j in range(max(0, size - byte)):
                window |= np.uint32(packed[byte + j]) << np.uint32(8 * j)
        low = (window >> np.uint32(at & 7)) & ((np.uint32(1) << np.uint32(bits)) - np.uint32(1))
        id_ = bin_start[bins_N[i]] + np.int32(low)
        ids_N[i] = id_
        largest = max(largest, id_)
        at += bits
    return largest


@jit
def split_ids(
    ids_N: NDArray[Any], counts_P: NDArray[Any], bin_start: NDArray[Any], bin_bits: NDArray[Any],
    mantissa: int, steps_N: NDArray[Any], packed: NDArray[Any],
) -> int:  # fmt: skip
    at, bit = 0, 0
    window, filled = np.uint64(0), 0
    byte = 0
    for p in range(len(counts_P)):
        before, exponent = 0, mantissa
        for i in range(at, at + counts_P[p]):
            id_ = ids_N[i]
            while id_ >> (exponent + 1):  # ids ascend, and so do exponents
                exponent += 1
            shift = exponent - mantissa
            bin_ = id_ if id_ < 1 << mantissa else ((shift + 1) << mantissa) + (id_ >> shift) - (1 << mantissa)
            steps_N[i] = bin_ - before
            before = bin_
            window |= np.uint64(id_ - bin_start[bin_]) << np.uint64(filled)
            filled += bin_bits[bin_]
            bit += bin_bits[bin_]
            while filled >= 8:
                packed[byte] = window & np.uint64(0xFF)
                byte += 1
                window >>= np.uint64(8)
                filled -= 8
        at += counts_P[p]
    if filled:
        packed[byte] = window & np.uint64(0xFF)
    return bit


@jit
def decode_head(
    codes_N: NDArray[Any], base_P: NDArray[Any], counts_P: NDArray[Any], logprobs_L: NDArray[Any],
    probs_L: NDArray[Any], logprobs_N: NDArray[Any], sums_P: NDArray[Any],
) -> None:  # fmt: skip
    at, last = 0, len(logprobs_L) - 1
    for p in range(len(counts_P)):
        top = np.int64(base_P[p]) + 1
        total = 0.0
        for i in range(at, at + counts_P[p]):
            code = np.int64(codes_N[i])
            level: Any = min(max(top - code, 0), last)
            logprobs_N[i] = logprobs_L[level] if code else -np.inf
            total += probs_L[level] if code else 0.0
        sums_P[p] = total
        at += counts_P[p]


@jit
def shift_heads(logprobs_N: NDArray[Any], counts_P: NDArray[Any], shift_P: NDArray[Any]) -> None:
    at = 0
    for p in range(len(counts_P)):
        for i in range(at, at + counts_P[p]):
            logprobs_N[i] += shift_P[p]
        at += counts_P[p]


@jit
def find_in_heads(ids_N: NDArray[Any], counts_P: NDArray[Any], wanted_P: NDArray[Any], places_P: NDArray[Any]) -> None:
    at = 0
    for p in range(len(counts_P)):
        low, high = at, at + counts_P[p]
        while low < high:
            middle = (low + high) // 2
            if ids_N[middle] < wanted_P[p]:
                low = middle + 1
            else:
                high = middle
        at += counts_P[p]
        places_P[p] = low if low < at and ids_N[low] == wanted_P[p] else -1


@jit
def encode_head(
    logprobs_N: NDArray[Any], counts_P: NDArray[Any], nearest: NDArray[Any], cells_per_nat: float,
    base_P: NDArray[Any], codes_N: NDArray[Any],
) -> None:  # fmt: skip
    at, last = 0, len(nearest) - 1
    for p in range(len(counts_P)):
        base = 0
        for i in range(at, at + counts_P[p]):
            if logprobs_N[i] != -np.inf:
                level = nearest[min(max(int(-logprobs_N[i] * cells_per_nat), 0), last)]
                codes_N[i] = level
                base = max(base, level)
        base_P[p] = base
        for i in range(at, at + counts_P[p]):
            codes_N[i] = base + 1 - codes_N[i] if logprobs_N[i] != -np.inf else 0
        at += counts_P[p]
