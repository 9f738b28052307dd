"""How far two sets of labels of one row are apart.

Shapes: P positions, N and M entries that one or both keep, all positions together, F forced ids.

Entries are compared by key, position << 24 | id: ids are below 2^24, so that one sorted array of integers holds all
positions and set operations on it are those of every position at once.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from logit_store.rows import Targets, offsets_of

LIKELY = 1e-3
"""Probability from which an id is one that students feel: below, codecs round coarsely."""


class Labels(NamedTuple):
    """A row's targets and the ids that are kept at each of its positions."""

    targets: Targets
    forced_ids: Sequence[int] = ()


class Difference(NamedTuple):
    """How far labels are apart, in nats where nothing else is said: of a row, or of many rows together."""

    positions: int = 0
    common_ids: int = 0
    """Head ids that both hold."""
    possible_ids: int = 0
    """Head ids that both could hold: those of the shorter head, position by position."""
    compared: int = 0
    """Kept ids of both: head, next token and forced ids, each once."""
    sum_error: float = 0.0
    """Σ |Δ log p| over them."""
    max_error: float = 0.0
    """Largest |Δ log p| over them."""
    max_likely_error: float = 0.0
    """Largest |Δ log p|, or excess over the other's cut, of ids of which either says p ≥ ``LIKELY``."""
    max_next_error: float = 0.0
    """Largest |Δ log p| of next tokens."""
    max_cut_error: float = 0.0
    """By how much an id that only one head holds is above the least probable entry of the other: at least so far are
    the two apart on it. 0 where a head is only shorter."""
    sum_tail_error: float = 0.0
    """Σ |Δ mass| (a probability) of all that is not kept by both: the tails, where heads hold the same ids."""
    max_tail_error: float = 0.0
    sum_kl: float = 0.0
    """Σ KL(first ‖ second), one outcome for each id that both keep and one for the rest."""
    draws: int = 0
    """Sampled ids, of the one that has more."""
    differing_draws: int = 0

    @classmethod
    def total(cls, parts: Iterable["Difference"]) -> "Difference":
        """Of many rows: what is named `max_` is the largest, everything else the sum."""
        rows = [cls(), *parts]
        return cls(
            *(
                (max if name.startswith("max_") else sum)(column)
                for name, column in zip(cls._fields, zip(*rows, strict=True), strict=True)
            )
        )


class _Kept(NamedTuple):
    """What a row's positions keep, every id once, by ascending key."""

    keys_N: NDArray[np.int64]
    logprobs_N: NDArray[np.float64]
    in_head_N: NDArray[np.bool_]


def compare(first: Labels, second: Labels, next_ids_P: NDArray[np.int32]) -> Difference:
    """How far two labellings of the same tokens are apart. Heads of any sizes; only ids that both keep are compared."""
    num_positions = len(next_ids_P)
    if not num_positions:
        return Difference()
    one, other = _kept(first, next_ids_P), _kept(second, next_ids_P)
    keys_M, at_one, at_other = np.intersect1d(one.keys_N, other.keys_N, assume_unique=True, return_indices=True)
    logprobs_M, other_logprobs_M = one.logprobs_N[at_one], other.logprobs_N[at_other]
    error_M = _errors(logprobs_M, other_logprobs_M)
    likely_M = np.maximum(logprobs_M, other_logprobs_M) >= np.log(LIKELY)
    cut_error, likely_cut_error = np.maximum(_cut_errors(one, other, second), _cut_errors(other, one, first))
    mass_P, other_mass_P = _mass_besides(first, one, at_one), _mass_besides(second, other, at_other)
    draws, differing = _draws(first.targets, second.targets)
    return Difference(
        positions=num_positions,
        common_ids=int((one.in_head_N[at_one] & other.in_head_N[at_other]).sum()),
        possible_ids=int(np.minimum(first.targets.head_counts_P, second.targets.head_counts_P).sum()),
        compared=len(keys_M),
        sum_error=float(error_M.sum()),
        max_error=_largest(error_M),
        max_likely_error=max(_largest(error_M[likely_M]), float(likely_cut_error)),
        max_next_error=_largest(_errors(first.targets.next_logprob_P, second.targets.next_logprob_P)),
        max_cut_error=float(cut_error),
        sum_tail_error=float(np.abs(mass_P - other_mass_P).sum()),
        max_tail_error=_largest(np.abs(mass_P - other_mass_P)),
        sum_kl=_kl(logprobs_M, other_logprobs_M) + _kl(_log(mass_P), _log(other_mass_P)),
        draws=draws,
        differing_draws=differing,
    )


def _kept(labels: Labels, next_ids_P: NDArray[np.int32]) -> _Kept:
    targets, p = labels.targets, len(next_ids_P)
    positions_P = np.arange(p, dtype=np.int64) << 24
    keys = [np.repeat(positions_P, targets.head_counts_P) | targets.head_ids_N, positions_P | next_ids_P]
    keys += [positions_P | forced for forced in labels.forced_ids]
    values = [targets.head_logprobs_N, targets.next_logprob_P, *targets.forced_logprobs_PF.T]
    keys_N, firsts_N = np.unique(np.concatenate(keys), return_index=True)
    return _Kept(keys_N, np.concatenate(values).astype(np.float64)[firsts_N], firsts_N < len(targets.head_ids_N))


def _errors(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """|Δ log p|; 0 where both are −inf."""
    with np.errstate(invalid="ignore"):
        error = np.abs(first.astype(np.float64) - second)
    error[np.isneginf(first) & np.isneginf(second)] = 0.0
    return error


def _mass_besides(labels: Labels, kept: _Kept, common: NDArray[np.intp]) -> NDArray[np.float64]:
    """Mass of each position without what both keep."""
    only = np.ones(len(kept.keys_N), np.bool_)
    only[common] = False
    tail_P = np.exp(labels.targets.tail_logmass_P.astype(np.float64))
    positions = kept.keys_N[only] >> 24
    return tail_P + np.bincount(positions, np.exp(kept.logprobs_N[only]), len(tail_P))


def _cut_errors(own: _Kept, other: _Kept, labels: Labels) -> tuple[float, float]:
    """By how much head entries that the other's head lacks are above its least probable entry: all, and likely ones."""
    counts_P, logprobs_N = labels.targets.head_counts_P, labels.targets.head_logprobs_N
    lacking = own.in_head_N & ~np.isin(own.keys_N, other.keys_N[other.in_head_N], assume_unique=True)
    cuts_P = np.full(len(counts_P), np.inf)  # an empty head lacks nothing
    if len(logprobs_N):
        cuts_P[counts_P > 0] = np.minimum.reduceat(logprobs_N, offsets_of(counts_P)[:-1][counts_P > 0])
    logprobs, cuts = own.logprobs_N[lacking], cuts_P[own.keys_N[lacking] >> 24]
    excess = np.where(np.isneginf(logprobs), 0.0, logprobs - cuts)
    return _largest(excess), _largest(excess[logprobs >= np.log(LIKELY)])


def _kl(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Σ p·(log p − log q)."""
    p = np.exp(first)
    with np.errstate(invalid="ignore"):
        terms = p * (first - second)
    return float(terms[p > 0].sum())


def _log(masses: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        return np.log(masses)


def _draws(first: Targets, second: Targets) -> tuple[int, int]:
    """Sampled ids of the one that has more, and how many of these the other does not have, repeats counted."""
    keys = [
        np.repeat(np.arange(len(t.sampled_counts_P), dtype=np.int64) << 24, t.sampled_counts_P) | t.sampled_ids_M
        for t in (first, second)
    ]
    most = max(len(keys[0]), len(keys[1]))
    (keys_a, counts_a), (keys_b, counts_b) = (np.unique(k, return_counts=True) for k in keys)
    _, at_a, at_b = np.intersect1d(keys_a, keys_b, assume_unique=True, return_indices=True)
    return most, most - int(np.minimum(counts_a[at_a], counts_b[at_b]).sum())


def _largest(values: NDArray[np.float64]) -> float:
    return float(values.max(initial=0.0))
