"""What a row is: its tokens and, at each of its positions, the teacher's distribution.

Shapes: T tokens, P = T − 1 positions, N head entries and M sampled entries of all positions together,
S stored temperatures, F forced ids.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "held_out")
"""Names of the splits; the files store a row's split as its place in this tuple."""


class TokenRow(NamedTuple):
    """One self-contained sequence: the teacher sees exactly these tokens as its context."""

    document: int
    """First 63 bits of the SHA-256 of the document's text; windows of one document share it."""
    split: str
    """One of ``SPLITS``, fixed by the document's hash."""
    input_ids_T: NDArray[np.int32]
    loss_mask_P: NDArray[np.bool_] | None = None
    """Which positions carry loss; None for all of them, and always so where a reader finds that all do."""
    columns: Mapping[str, Any] = {}
    """Values of the metadata columns that the store carries, by name."""

    @property
    def carries_loss_P(self) -> NDArray[np.bool_]:
        """Which positions carry loss, as an array always."""
        all_of_them = np.ones(max(len(self.input_ids_T) - 1, 0), np.bool_)
        return all_of_them if self.loss_mask_P is None else self.loss_mask_P


class Targets(NamedTuple):
    """The teacher's distributions of one row. Position t is its distribution for ``input_ids[t + 1]``.

    Kept ids are the head, the next token and the forced ids; the tail is everything else, teacher rows
    beyond the tokenizer's vocabulary included. Heads may have any number of entries: those of position t
    are ``head_ids_N[offsets[t] : offsets[t + 1]]`` with ``offsets = offsets_of(head_counts_P)``.
    """

    head_counts_P: NDArray[np.int32]
    """Head entries of each position, 0 to V."""
    head_ids_N: NDArray[np.int32]
    """Their ids, no id twice in a position. A reader gives them in ascending order, a writer takes any."""
    head_logprobs_N: NDArray[np.float32]
    """Their log-probabilities at temperature 1 under the teacher's full softmax."""
    next_logprob_P: NDArray[np.float32]
    """Log-probability of ``input_ids[t + 1]``, whether the head holds it or not."""
    tail_logmass_P: NDArray[np.float32]
    """Log of the summed probability of everything that is not kept; −inf where nothing is left."""
    log_partition_PS: NDArray[np.float32]
    """A_T = log Σ_v p_v^(1/T) for each stored temperature."""
    forced_logprobs_PF: NDArray[np.float32]
    """Log-probabilities of the ids that the store keeps at every position, in the head or not."""
    sampled_counts_P: NDArray[np.int32]
    """Draws from the tail at each position; of m draws each stands for 1/m of the tail's mass."""
    sampled_ids_M: NDArray[np.int32]
    """The drawn ids, repeats kept as repeats, ascending in each position when read."""

    @classmethod
    def of_heads(
        cls,
        head_ids_PK: NDArray[Any],
        head_logprobs_PK: NDArray[Any],
        next_logprob_P: NDArray[Any],
        tail_logmass_P: NDArray[Any],
        log_partition_PS: NDArray[Any] | None = None,
    ) -> "Targets":
        """Targets whose heads all have K entries, without forced ids and samples."""
        num_positions, k = head_ids_PK.shape
        none = np.zeros((num_positions, 0), np.float32)
        return cls(
            np.full(num_positions, k, np.int32),
            head_ids_PK.reshape(-1).astype(np.int32, copy=False),
            head_logprobs_PK.reshape(-1).astype(np.float32, copy=False),
            next_logprob_P,
            tail_logmass_P,
            none if log_partition_PS is None else log_partition_PS,
            none,
            np.zeros(num_positions, np.int32),
            np.zeros(0, np.int32),
        )

    @classmethod
    def of_nothing(cls, num_positions: int, num_temperatures: int, num_forced: int) -> "Targets":
        """What stands where labels are missing: nothing is kept, and all of the mass is tail."""
        impossible_P = np.full(num_positions, -np.inf, np.float32)
        return cls.of_heads(
            np.zeros((num_positions, 0), np.int32),
            np.zeros((num_positions, 0), np.float32),
            impossible_P,
            np.zeros(num_positions, np.float32),
            np.zeros((num_positions, num_temperatures), np.float32),
        )._replace(forced_logprobs_PF=np.repeat(impossible_P[:, None], num_forced, 1))

    @classmethod
    def join(cls, parts: Sequence["Targets"]) -> "Targets":
        """The positions of all parts, one after the other."""
        return parts[0] if len(parts) == 1 else cls(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def split(self, num_positions: Sequence[int]) -> Iterator["Targets"]:
        """Consecutive parts of so many positions each, as views."""
        at_P = offsets_of(np.array(num_positions))
        at_N, at_M = offsets_of(self.head_counts_P), offsets_of(self.sampled_counts_P)
        for start, stop in pairwise(at_P):
            of_part = {name: getattr(self, name)[start:stop] for name in self._fields if "_P" in name}
            n, m = (slice(at[start], at[stop]) for at in (at_N, at_M))
            of_part |= {"head_ids_N": self.head_ids_N[n], "head_logprobs_N": self.head_logprobs_N[n]}
            yield Targets(**of_part, sampled_ids_M=self.sampled_ids_M[m])

    def padded_heads(self, width: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Ids and log-probs as [P, width] arrays; a position's free places hold id 0 with log-prob −inf.

        A view where every head has exactly ``width`` entries. Raises ValueError where one has more.
        """
        shape = (len(self.head_counts_P), width)
        if len(self.head_ids_N) == shape[0] * width and (self.head_counts_P == width).all():
            return self.head_ids_N.reshape(shape), self.head_logprobs_N.reshape(shape)
        if self.head_counts_P.max(initial=0) > width:
            raise ValueError(f"a head of {self.head_counts_P.max()} entries does not fit in {width} places")
        taken_PK = np.arange(width) < self.head_counts_P[:, None]
        ids_PK, logprobs_PK = np.zeros(shape, np.int32), np.full(shape, -np.inf, np.float32)
        ids_PK[taken_PK], logprobs_PK[taken_PK] = self.head_ids_N, self.head_logprobs_N
        return ids_PK, logprobs_PK


class LogitRow(NamedTuple):
    """A row of a logit store."""

    tokens: TokenRow
    targets: Targets


def offsets_of(counts: NDArray[Any]) -> NDArray[np.int64]:
    """``[0, c0, c0 + c1, …]``: where each item's entries begin in a flat array, and where the last end."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def sum_entries(values_N: NDArray[Any], counts_P: NDArray[np.int32], dtype: Any = None) -> NDArray[np.float64]:
    """Sum of the values of each position, of which some may have none; summed as ``dtype``, or as they are."""
    sums_P, filled_P = np.zeros(len(counts_P)), counts_P > 0
    if len(values_N):
        sums_P[filled_P] = np.add.reduceat(values_N, offsets_of(counts_P)[:-1][filled_P], dtype=dtype)
    return sums_P
