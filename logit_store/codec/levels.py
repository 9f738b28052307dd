"""How log-probabilities become bytes: exactly, or within a bound on what the student feels.

The lossy codec rounds −log p to levels that lie ``step`` apart,

    step(x) = min(max_error, scale · exp(x / 2) / sqrt(1 − exp(−x))),   x = −log p.

An error δ in log p moves the KL divergence by about p·(1 − p)·δ²/2, so that steps proportional to 1/sqrt(p·(1 − p))
give every entry the same share of the divergence: of all quantisers with as many bits the one with the least (Bennett
1948; in p it is the Fisher metric of a Bernoulli variable). Far out, where that step would be many nats, ``max_error``
ends it: half a step of rounding and at most half a step of rescaling stay below it. The levels themselves are stored
in the shard, so that a reader needs none of this.
"""

import math
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from logit_store.config import Config
from logit_store.errors import StoreError

RESOLUTION = 2.0**-16
"""Levels are multiples of it, so that differing last bits of exp and sqrt give the same levels everywhere."""

MAX_LEVELS = 65_000
CELLS_PER_NAT = 2048
"""Resolution of the table that finds the nearest level: near the middle of two it may name the farther one."""

MAX_NATS = 2048
"""The smallest log-prob that the lossy codec takes, negated. Softmax over float32 logits seldom goes below −100."""


class CodecConfig(Config):
    """How log-probabilities are stored."""

    kind: Literal["lossy", "exact"] = "lossy"
    """`lossy`: rounded within the two bounds below. `exact`: float32 to the last bit, at about twice the bytes."""
    max_kl: float = Field(1e-4, ge=1e-7, le=1.0)
    """Mean KL divergence in nats, over a shard, that rounding may cost: measured by the writer, which chooses by it."""
    max_error: float = Field(0.5, ge=4e-3, le=4.0)
    """Largest error in nats of any stored log-probability."""


@lru_cache(maxsize=64)
def levels(scale: float, max_error: float, largest: float) -> NDArray[np.float32]:
    """Ascending levels of −log p from 0 to at least ``largest``. Raises StoreError where they would be too many."""
    if largest > MAX_NATS:
        raise StoreError(
            f"a log-probability of {-largest:g} is beyond what the lossy codec takes ({-MAX_NATS}): "
            "set store.codec.kind=exact"
        )
    found, x = [0.0], 0.0
    while x < largest:
        middle = x + _step(x + 1e-9, scale, max_error) / 2
        x = max(round((x + _step(middle, scale, max_error)) / RESOLUTION), round(x / RESOLUTION) + 1) * RESOLUTION
        found.append(x)
        if len(found) > MAX_LEVELS:
            raise StoreError(
                f"log-probabilities down to {-largest:g} need more than {MAX_LEVELS:,} levels at these bounds: set "
                "store.codec.max_kl or store.codec.max_error higher, or store.codec.kind=exact"
            )
    return np.array(found, np.float32)


def _step(x: float, scale: float, max_error: float) -> float:
    if x > 2 * math.log(max_error / scale):
        return max_error
    return min(max_error, scale * math.exp(x / 2) / math.sqrt(-math.expm1(-x)))


class Quantizer:
    """Levels, and what finds the nearest of them."""

    def __init__(self, levels_L: NDArray[np.float32]) -> None:
        self.levels_L = levels_L
        self.logprobs_L = -levels_L
        self.probs_L = np.exp(-levels_L.astype(np.float64))
        self.half_step = float(np.diff(levels_L).max(initial=0.0)) / 2
        """Half of the widest step: no rounding, and no rescaling, moves a log-prob by more."""

    @cached_property
    def nearest(self) -> NDArray[np.uint16]:
        """``nearest[int(x × CELLS_PER_NAT)]`` is the number of the level nearest to x = −log p."""
        edges = (self.levels_L[1:].astype(np.float64) + self.levels_L[:-1]) / 2
        num_cells = int(self.levels_L[-1] * CELLS_PER_NAT) + 2
        begins = np.ceil(edges * CELLS_PER_NAT - 0.5).astype(np.int64)  # first cell whose middle is past the edge
        bounds = np.concatenate([[0], begins, [num_cells]])
        return np.repeat(np.arange(len(self.levels_L), dtype=np.uint16), np.diff(bounds))

    def encode(self, logprobs: NDArray[np.float32]) -> NDArray[np.uint16]:
        """Number of the level nearest to each finite log-prob, which must be within the levels."""
        return np.take(self.nearest, (logprobs * np.float32(-CELLS_PER_NAT)).astype(np.int64), mode="clip")
