"""A shuffled order of rows that needs no memory: any place of it can be computed, so that a place is all its state."""

import hashlib

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8
"""Rounds of the Feistel network: four give a permutation that cannot be told from a random one by its places (Luby and
Rackoff 1988, with ideal round functions), eight allow for ours."""


class Order:
    """All of ``num_rows`` rows once per epoch, in an order of each epoch's own, without end.

    Place i of the order is a pure function of (seed, i). An epoch is a permutation made by a Feistel network over the
    smallest even number of bits that holds the rows; numbers beyond the rows walk on until they fall among them (cycle
    walking, Black and Rogaway 2002), which takes less than four steps on average.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        if num_rows < 1:
            raise ValueError("an order needs at least one row")
        self.num_rows, self.seed = num_rows, seed
        self._half_bits = np.uint64(max(1, ((num_rows - 1).bit_length() + 1) // 2))

    def places(self, start: int, stop: int) -> NDArray[np.int64]:
        """The rows at places ``start`` to ``stop`` of the order, across epochs."""
        parts, n = [np.zeros(0, np.int64)], self.num_rows
        for epoch in range(start // n, -(-stop // n)):
            first, last = max(start - epoch * n, 0), min(stop - epoch * n, n)
            parts.append(self._permuted(epoch, np.arange(first, last, dtype=np.uint64)))
        return np.concatenate(parts)

    def _permuted(self, epoch: int, numbers: NDArray[np.uint64]) -> NDArray[np.int64]:
        key = hashlib.sha256(f"decant order {self.seed} {epoch}".encode()).digest()
        keys = np.frombuffer(key + hashlib.sha256(key).digest(), "<u8")[:ROUNDS]
        numbers = self._network(numbers, keys)
        while len(beyond := np.flatnonzero(numbers >= self.num_rows)):
            numbers[beyond] = self._network(numbers[beyond], keys)
        return numbers.astype(np.int64)

    def _network(self, numbers: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        half = self._half_bits
        mask = (np.uint64(1) << half) - np.uint64(1)
        left, right = numbers >> half, numbers & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        return left << half | right


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
