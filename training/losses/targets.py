"""A teacher's labels of N positions as tensors, and the ids that all teachers of a position name, each once.

Shapes: N positions, K head places, F forced ids, M draws of the position with most, S stored temperatures, C ids listed
by all teachers together, E = C entries (an id that is listed twice leaves a free entry).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class SparseTargets(NamedTuple):
    """Labels of N positions, every tensor with N rows. See `logit_store/rows.py` for what they mean."""

    head_ids_NK: Tensor
    """int64, below V; ragged heads are padded with any id."""
    head_logprobs_NK: Tensor
    """log p at temperature 1; −inf in free places."""
    next_logprob_N: Tensor
    tail_logmass_N: Tensor
    log_partition_NS: Tensor
    """A_T = log Σ_v p_v^(1/T) of each stored temperature."""
    forced_ids_NF: Tensor
    """int64: ids that the store keeps at every position."""
    forced_logprobs_NF: Tensor
    sampled_ids_NM: Tensor
    """int64: draws from what is not kept, repeats as repeats; −1 in free places."""

    @classmethod
    def of_heads(
        cls, ids_NK: Tensor, logprobs_NK: Tensor, next_N: Tensor, tail_N: Tensor, log_partition_NS: Tensor | None = None
    ) -> "SparseTargets":
        """Targets without forced ids and draws."""
        none_N0 = logprobs_NK[:, :0]
        partition_NS = none_N0 if log_partition_NS is None else log_partition_NS
        return cls(ids_NK, logprobs_NK, next_N, tail_N, partition_NS, ids_NK[:, :0], none_N0, ids_NK[:, :0])

    def part(self, positions: slice) -> "SparseTargets":
        """The labels of some of the positions, as views."""
        return SparseTargets(*(column[positions] for column in self))


class WeightedTargets(NamedTuple):
    """One of several teachers' labels of the same positions: its loss counts ``weight`` times."""

    weight: float
    targets: SparseTargets


class Entries(NamedTuple):
    """The ids that next token and teachers name at each position, each once, in ascending order."""

    ids_NE: Tensor
    """int64; free entries repeat the next token."""
    present_NE: Tensor
    """bool: False in free entries."""
    next_N1: Tensor
    """Which entry is the next token."""


class Labels(NamedTuple):
    """What one teacher says of the entries."""

    logprobs_NE: Tensor
    """log p at temperature 1 of what it keeps (head, next token, forced ids); −inf elsewhere."""
    in_head_NE: Tensor
    """bool: whether the entry is of its head."""
    draws_NE: Tensor
    """How often the entry was drawn, as a float."""
    tail_logmass_N: Tensor


def merge(next_ids_N: Tensor, teachers: Sequence[SparseTargets], dtype: torch.dtype) -> tuple[Entries, list[Labels]]:
    """The entries of N positions, and every teacher's labels on them, log-probs as ``dtype``."""
    lists = [next_ids_N[:, None]]
    for teacher in teachers:
        lists += [teacher.head_ids_NK, teacher.forced_ids_NF, teacher.sampled_ids_NM]
    taken = [torch.ones_like(lists[0], dtype=torch.bool)]
    for teacher in teachers:
        taken += [
            teacher.head_logprobs_NK > -torch.inf,
            torch.ones_like(teacher.forced_ids_NF, dtype=torch.bool),
            teacher.sampled_ids_NM >= 0,
        ]
    ids_NC = torch.where(torch.cat(taken, 1), torch.cat(lists, 1), next_ids_N[:, None])
    sorted_NC, order_NC = ids_NC.sort(-1)
    is_new_NC = torch.cat([torch.ones_like(lists[0], dtype=torch.bool), sorted_NC[:, 1:] != sorted_NC[:, :-1]], 1)
    entry_NC = torch.empty_like(order_NC).scatter_(-1, order_NC, is_new_NC.cumsum(-1) - 1)
    columns = torch.arange(ids_NC.shape[1], device=ids_NC.device)
    entries = Entries(
        next_ids_N[:, None].expand_as(ids_NC).scatter(-1, entry_NC, ids_NC),
        columns < is_new_NC.sum(-1, keepdim=True),
        entry_NC[:, :1],
    )
    at = entry_NC.split([ids.shape[1] for ids in lists], dim=1)
    labels = [
        _labels(teacher, at[0], at[3 * i + 1 : 3 * i + 4], taken[3 * i + 1 : 3 * i + 4], len(columns), dtype)
        for i, teacher in enumerate(teachers)
    ]
    return entries, labels


def _labels(
    teacher: SparseTargets, next_N1: Tensor, at: Sequence[Tensor], taken: Sequence[Tensor], width: int,
    dtype: torch.dtype,
) -> Labels:  # fmt: skip
    head_NK, forced_NF, sampled_NM = at
    # One column more, which takes what stands in free places and is dropped.
    empty_NE = torch.full((len(next_N1), width + 1), -torch.inf, dtype=dtype, device=next_N1.device)
    logprobs_NE = empty_NE.scatter(-1, torch.where(taken[0], head_NK, width), teacher.head_logprobs_NK.to(dtype))
    in_head_NE = logprobs_NE[:, :-1] > -torch.inf
    logprobs_NE.scatter_(-1, next_N1, teacher.next_logprob_N[:, None].to(dtype))
    logprobs_NE.scatter_(-1, forced_NF, teacher.forced_logprobs_NF.to(dtype))
    drawn_NM = torch.where(taken[2], sampled_NM, width)
    draws_NE = torch.zeros_like(empty_NE).scatter_add_(-1, drawn_NM, torch.ones_like(drawn_NM, dtype=dtype))
    return Labels(logprobs_NE[:, :-1], in_head_NE, draws_NE[:, :-1], teacher.tail_logmass_N.to(dtype))
