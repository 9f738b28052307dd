"""Prefixes of stored rows as tensors, padded to one of a few lengths."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from logit_store import LogitRow, LogitStore, TokenStore
from logit_store.errors import StudentError
from training.batches import Prefix, micro_batches, padded_positions
from training.losses import SparseTargets


class MicroBatch(NamedTuple):
    """B prefixes padded to L positions; N of the B·L positions carry loss."""

    input_ids_BL: Tensor
    """int64; 0 where padded (on the right: under causal attention no real position sees it)."""
    valid_BL: Tensor
    """bool: which positions carry loss."""
    next_ids_N: Tensor
    """int64: the tokens to predict, of the valid positions in order."""
    targets: SparseTargets | None
    """The teacher's labels of the valid positions; None from a token store."""
    max_positions: int
    """The largest N of this micro-batch on any rank: decides in how many chunks every rank applies its head."""

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device."""
        targets = self.targets and SparseTargets(*(column.to(device) for column in self.targets))
        ids, valid, next_ids = (t.to(device) for t in self[:3])
        return MicroBatch(ids, valid, next_ids, targets, self.max_positions)


def rank_batches(
    store: LogitStore | TokenStore,
    prefixes: Sequence[Prefix],
    num_ranks: int,
    rank: int,
    micro_batch_tokens: int,
    temperature: float = 1.0,
    length: int | None = None,
) -> Iterator[MicroBatch]:
    """The micro-batches of ``rank`` when the prefixes are dealt to ``num_ranks``, one at a time.

    None is padded beyond ``length``, the curriculum's (see ``padded_positions``).
    """
    dealt = micro_batches(prefixes, num_ranks, micro_batch_tokens, length)
    for i, group in enumerate(dealt[rank]):
        max_positions = max(sum(prefix.positions for prefix in of_rank[i]) for of_rank in dealt)
        yield collate(store, group, temperature, length)._replace(max_positions=max_positions)


def collate(
    store: LogitStore | TokenStore, prefixes: Sequence[Prefix], temperature: float = 1.0, length: int | None = None
) -> MicroBatch:
    """Read and pad the prefixes. No prefixes give one padded position without loss, so that every rank runs."""
    targets = None
    if isinstance(store, LogitStore):
        rows = [store[prefix.row] for prefix in prefixes]
        tokens = [row.tokens for row in rows]
        targets = _targets(store, rows, prefixes, temperature)
    else:
        tokens = [store[prefix.row] for prefix in prefixes]
    padded = padded_positions(max((prefix.positions for prefix in prefixes), default=1), length)
    input_ids_BL = np.zeros((max(len(prefixes), 1), padded), np.int64)
    valid_BL = np.zeros_like(input_ids_BL, dtype=bool)
    next_ids = [np.zeros(0, np.int64)]
    for i, (prefix, row) in enumerate(zip(prefixes, tokens, strict=True)):
        input_ids_BL[i, : prefix.positions] = row.input_ids_T[: prefix.positions]
        if row.loss_mask_P is not None:
            raise StudentError(f"row {prefix.row} has a loss mask, and the trainer does not know masks yet")
        valid_BL[i, : prefix.positions] = True
        next_ids.append(row.input_ids_T[1 : prefix.positions + 1].astype(np.int64))
    return MicroBatch(
        torch.from_numpy(input_ids_BL),
        torch.from_numpy(valid_BL),
        torch.from_numpy(np.concatenate(next_ids)),
        targets,
        sum(prefix.positions for prefix in prefixes),
    )


def _targets(
    store: LogitStore, rows: Sequence[LogitRow], prefixes: Sequence[Prefix], temperature: float
) -> SparseTargets:
    k, temperatures = store.manifest["k"], store.manifest["temperatures"]
    parts = [(row.targets, prefix.positions) for row, prefix in zip(rows, prefixes, strict=True)]
    heads = [targets.padded_heads(k) for targets, _ in parts]

    def column(values: list[np.ndarray], *width: int, dtype: type = np.float32) -> Tensor:
        return torch.from_numpy(np.concatenate([np.zeros((0, *width), dtype), *values]))

    if temperature == 1.0:
        partitions = [np.zeros(n, np.float32) for _, n in parts]
    else:
        at = temperatures.index(temperature)
        partitions = [t.log_partition_PS[:n, at] for t, n in parts]
    return SparseTargets(
        column([ids_PK[:n] for (ids_PK, _), (_, n) in zip(heads, parts, strict=True)], k, dtype=np.int32).long(),
        column([logprobs_PK[:n] for (_, logprobs_PK), (_, n) in zip(heads, parts, strict=True)], k),
        column([t.next_logprob_P[:n] for t, n in parts]),
        column([t.tail_logmass_P[:n] for t, n in parts]),
        column(partitions),
    )
