"""What a row is: its tokens and, at each of its positions, the teacher's distribution.

Shapes: T tokens, P = T − 1 positions, K head entries, S stored temperatures.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "held_out")
"""Names of the splits; the index stores a row's split as its place in this tuple."""


class TokenRow(NamedTuple):
    """One self-contained sequence: the teacher sees exactly these tokens as its context."""

    document: int
    """First 63 bits of the SHA-256 of the document's text; windows of one document share it."""
    split: str
    """One of ``SPLITS``, fixed by the document's hash."""
    input_ids_T: NDArray[np.int32]


class Targets(NamedTuple):
    """The teacher's distributions of one row. Position t is its distribution for ``input_ids[t + 1]``.

    Kept ids are the head and the next token; the tail is everything else, teacher rows beyond the
    tokenizer's vocabulary included.
    """

    head_ids_PK: NDArray[np.int32]
    """The K most probable ids below V, most probable first; ties go to the lower id."""
    head_logprobs_PK: NDArray[np.float32]
    """Their log-probabilities at temperature 1 under the teacher's full softmax."""
    next_logprob_P: NDArray[np.float32]
    """Log-probability of ``input_ids[t + 1]``, whether the head holds it or not."""
    tail_logmass_P: NDArray[np.float32]
    """Log of the summed probability of everything that is not kept; −inf where nothing is left."""
    log_partition_PS: NDArray[np.float32]
    """A_T = log Σ_v p_v^(1/T) for each stored temperature."""


class LogitRow(NamedTuple):
    """A row of a logit store."""

    tokens: TokenRow
    targets: Targets
