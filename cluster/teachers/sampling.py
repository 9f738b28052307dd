"""Draws of ids from what is not kept: the same for a position of the store on every worker, CPU or CUDA.

Shapes: N positions, V ids, M draws of the position that has most.
"""

import hashlib

import torch
from torch import Tensor

FRACTION_BITS = 38
"""Bits to which weights in [0, 1] are cut before they are summed: 2^24 ids, the most that a vocabulary has, then sum to
at most 2^62. Integers, because a CUDA cumsum of floats adds in another order each time."""


def seed_of(labels_id: str) -> int:
    """A signed 64-bit number that stands for a store's labels."""
    return int.from_bytes(hashlib.sha256(labels_id.encode()).digest()[:8], "little", signed=True)


def uniforms(seed: int, rows_N: Tensor, positions_N: Tensor, num_draws: int) -> Tensor:
    """Numbers in [0, 1) as float64 [N, ``num_draws``]: a function of (seed, row, position, draw) and nothing else.

    SplitMix64's mixer (Steele, Lea, Flood 2014) after each part of the counter. torch multiplies int64 modulo 2^64, so
    that the bits are the same on every device.
    """
    state_N = _mixed(_mixed(rows_N.long() + seed) + positions_N.long())
    state_NM = _mixed(state_N[:, None] + torch.arange(num_draws, device=rows_N.device))
    return _shifted(state_NM, 11).double() * 2.0**-53


def systematic(offsets_N1: Tensor, counts_N1: Tensor) -> Tensor:
    """Points ``(offset + j) / count`` for j from 0 as float64 [N, M], M the largest count; they go on to and beyond 1
    where a position has fewer than M.
    """
    steps_M = torch.arange(int(counts_N1.max()), device=counts_N1.device)
    return (offsets_N1 + steps_M) / counts_N1.double()


def draw(weights_NV: Tensor, points_NM: Tensor) -> Tensor:
    """The ids at ``points_NM``, float64 shares of the cumulated weights [N, M]; ``weights_NV`` is overwritten.

    Plain code: ``ids[n, j] = searchsorted(cumsum(weights[n]), points[n, j] · sum(weights[n]), right=True)``. Weights
    are float32 in [0, 1], the largest of a position 1. They are cut to multiples of 2^-38: an id below that is never
    drawn, and the probabilities of all ids together are off by less than V · 2^-38 (6e-7 at V = 151,936, what float32
    itself costs). Points from 1 on give the last id that has weight; a position without any weight gives the id V.
    """
    units_NV = weights_NV.mul_(2.0**FRACTION_BITS).long()
    torch.cumsum(units_NV, -1, out=units_NV)
    return torch.searchsorted(units_NV, units_at(points_NM, units_NV[:, -1:]), right=True)


def units_at(points_NM: Tensor, total_N1: Tensor) -> Tensor:
    """The integers below ``total_N1`` at ``points_NM``, float64 shares of it."""
    return (points_NM * total_N1.double()).long().minimum((total_N1 - 1).clamp(min=0))


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's next output from the state ``x``."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """``x >> bits`` as if ``x`` were unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(constant: int) -> int:
    """The int64 of the same bits."""
    return constant - (1 << 64) if constant >= 1 << 63 else constant
