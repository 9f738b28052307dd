"""Prefixes of stored rows as tensors, padded to one of a few lengths."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from logit_store import LogitRow, LogitStore, Targets, TokenStore
from training.batches import Prefix, micro_batches, padded_positions
from training.losses import SparseTargets, WeightedTargets


class MicroBatch(NamedTuple):
    """B prefixes padded to L positions; N of the B·L positions carry loss."""

    input_ids_BL: Tensor
    """int64; 0 where padded (on the right: under causal attention no real position sees it)."""
    valid_BL: Tensor
    """bool: which positions carry loss."""
    next_ids_N: Tensor
    """int64: the tokens to predict, of the valid positions in order."""
    targets: tuple[WeightedTargets, ...]
    """Each teacher's labels of the valid positions; none from a token store."""

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device."""
        ids, valid, next_ids = (t.to(device) for t in self[:3])
        targets = tuple(
            WeightedTargets(w, SparseTargets(*(c.to(device) for c in labels))) for w, labels in self.targets
        )
        return MicroBatch(ids, valid, next_ids, targets)


def rank_batches(
    store: LogitStore | TokenStore,
    prefixes: Sequence[Prefix],
    num_ranks: int,
    rank: int,
    micro_batch_tokens: int,
    length: int | None = None,
) -> Iterator[MicroBatch]:
    """The micro-batches of ``rank`` when the prefixes are dealt to ``num_ranks``, one at a time.

    None is padded beyond ``length``, the curriculum's (see ``padded_positions``).
    """
    for group in micro_batches(prefixes, num_ranks, micro_batch_tokens, length)[rank]:
        yield collate(store, group, length)


def collate(store: LogitStore | TokenStore, prefixes: Sequence[Prefix], length: int | None = None) -> MicroBatch:
    """Read and pad the prefixes; positions that a row's mask leaves out carry no loss and have no labels.

    No prefixes give one padded position without loss, so that every rank runs.
    """
    rows = [store[prefix.row] for prefix in prefixes]
    tokens = [row.tokens if isinstance(row, LogitRow) else row for row in rows]
    padded = padded_positions(max((prefix.positions for prefix in prefixes), default=1), length)
    input_ids_BL = np.zeros((max(len(prefixes), 1), padded), np.int64)
    valid_BL = np.zeros_like(input_ids_BL, dtype=bool)
    next_ids = [np.zeros(0, np.int64)]
    for i, (prefix, row) in enumerate(zip(prefixes, tokens, strict=True)):
        valid_P = row.carries_loss_P[: prefix.positions]
        input_ids_BL[i, : prefix.positions] = row.input_ids_T[: prefix.positions]
        valid_BL[i, : prefix.positions] = valid_P
        next_ids.append(row.input_ids_T[1 : prefix.positions + 1][valid_P].astype(np.int64))
    targets: tuple[WeightedTargets, ...] = ()
    if isinstance(store, LogitStore):
        labelled = zip((row for row in rows if isinstance(row, LogitRow)), prefixes, strict=True)
        parts = [(row.targets, row.tokens.carries_loss_P[: prefix.positions]) for row, prefix in labelled]
        forced, num_stored = store.manifest["forced_ids"], len(store.manifest["temperatures"])
        targets = (WeightedTargets(1.0, sparse_targets(parts, forced, num_stored)),)
    next_ids_N = torch.from_numpy(np.concatenate(next_ids))
    return MicroBatch(torch.from_numpy(input_ids_BL), torch.from_numpy(valid_BL), next_ids_N, targets)


def sparse_targets(
    parts: Sequence[tuple[Targets, np.ndarray]], forced_ids: Sequence[int], num_temperatures: int
) -> SparseTargets:
    """Labels of the positions that carry loss, which is a bool for each of a row's first positions.

    ``forced_ids`` and the number of stored temperatures are the store's.
    """
    width = max((int(t.head_counts_P[: len(valid_P)].max(initial=0)) for t, valid_P in parts), default=0)
    draws = max((int(t.sampled_counts_P[: len(valid_P)].max(initial=0)) for t, valid_P in parts), default=0)
    columns: list[list[np.ndarray]] = []
    for whole, valid_P in parts:
        targets = next(whole.split([len(valid_P)]))
        ids_PK, logprobs_PK = targets.padded_heads(width)
        sampled_PM = np.full((len(valid_P), draws), -1, np.int64)
        sampled_PM[np.arange(draws) < targets.sampled_counts_P[:, None]] = targets.sampled_ids_M
        forced_PF = np.repeat(np.asarray(forced_ids, np.int64)[None], len(valid_P), 0)
        values = (
            *(ids_PK.astype(np.int64), logprobs_PK, targets.next_logprob_P, targets.tail_logmass_P),
            *(targets.log_partition_PS, forced_PF, targets.forced_logprobs_PF, sampled_PM),
        )
        columns.append([column[valid_P] for column in values])
    if not columns:
        wide = [np.zeros((0, n), np.float32) for n in (num_temperatures, len(forced_ids))]
        none, ids = np.zeros(0, np.float32), np.zeros((0, 0), np.int64)
        columns = [[ids, ids.astype(np.float32), none, none, wide[0], wide[1].astype(np.int64), wide[1], ids]]
    return SparseTargets(*(torch.from_numpy(np.concatenate(c)) for c in zip(*columns, strict=True)))
