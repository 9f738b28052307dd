"""What can be read off a row's labels, position by position.

Shapes: P positions, N head entries of all of them.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from logit_store.codec.blocks import held_elsewhere
from logit_store.labels import kept_sums
from logit_store.rows import Targets, sum_entries

OUTSIDE = 0
"""The rank of a token that the head does not hold."""


def next_ranks(targets: Targets, next_ids_P: NDArray[np.int32]) -> NDArray[np.int32]:
    """The next token's rank in the head, 1 for the most probable; ``OUTSIDE`` where the head lacks it.

    Ties go to the lower id. The lossy codec makes ties: ranks are those of the stored log-probs.
    """
    counts_P, ids_N, logprobs_N = targets.head_counts_P, targets.head_ids_N, targets.head_logprobs_N
    wanted_N = np.repeat(next_ids_P, counts_P)
    is_next_N = ids_N == wanted_N
    its_logprob_P = sum_entries(np.where(is_next_N, logprobs_N, np.float32(0)), counts_P, np.float64)
    its_logprob_N = np.repeat(its_logprob_P.astype(np.float32), counts_P)
    is_before_N = (logprobs_N > its_logprob_N) | ((logprobs_N == its_logprob_N) & (ids_N < wanted_N))
    ranks_P = 1 + sum_entries(is_before_N, counts_P, np.float64)
    return np.where(sum_entries(is_next_N, counts_P, np.float64) > 0, ranks_P, OUTSIDE).astype(np.int32)


def kept_masses(targets: Targets) -> NDArray[np.float64]:
    """1 − tail, of the kept ids together: exact, since the tail is."""
    return np.abs(np.expm1(np.minimum(targets.tail_logmass_P, 0).astype(np.float64)))  # no −0


def entropies(targets: Targets, next_ids_P: NDArray[np.int32], forced_ids: Sequence[int]) -> NDArray[np.float64]:
    """−Σ p log p in nats over the kept ids, each once, and the tail as one outcome: at most the teacher's own."""
    elsewhere = held_elsewhere(targets, next_ids_P, forced_ids)
    logprobs = (targets.head_logprobs_N, targets.next_logprob_P, targets.forced_logprobs_PF)
    return kept_sums(targets, elsewhere, [_surprise(of) for of in logprobs]) + _surprise(targets.tail_logmass_P)


def _surprise(logprobs: NDArray[np.float32]) -> NDArray[np.float64]:
    """−p log p; 0 at p = 0, and where rounding left p a little above 1."""
    wide = np.minimum(logprobs, 0).astype(np.float64)
    wide[np.isneginf(wide)] = 0.0
    return np.exp(wide) * np.abs(wide)
