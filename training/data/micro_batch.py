"""Prefixes of stored rows as tensors, padded to one of a few lengths."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from logit_store import Targets
from logit_store.errors import DecantError
from training.curriculum.batches import Prefix, micro_batches, padded_positions
from training.data.source import Source, SourceRow
from training.losses import SparseTargets, WeightedTargets


class MicroBatch(NamedTuple):
    """B prefixes padded to L positions; S of the B·L positions are fed, and N of these carry loss.

    Which ones is told by numbers, counted here on the host: a mask would make it wait for the GPU to count.
    """

    input_ids_BL: Tensor
    """int64; 0 where padded (on the right: under causal attention no real position sees it)."""
    lengths_B: Tensor
    """int64: positions of each prefix that are no padding."""
    fed_S: Tensor
    """int64: where the positions that are no padding stand among the B·L, row after row."""
    valid_N: Tensor
    """int64: where those stand that carry loss."""
    next_ids_N: Tensor
    """int64: the tokens to predict, of the valid positions in order."""
    targets: tuple[WeightedTargets, ...]
    """Each teacher's labels of the valid positions; none from a token store, or where no labels were wanted."""

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device; from page-locked memory the copy does not wait."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "MicroBatch":
        """The same in page-locked memory, from which a GPU copies while the CPU goes on."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        ids, lengths, fed, valid, next_ids = (change(tensor) for tensor in self[:5])
        targets = tuple(WeightedTargets(w, SparseTargets(*map(change, columns))) for w, columns in self.targets)
        return MicroBatch(ids, lengths, fed, valid, next_ids, targets)

    def kept_mass(self) -> float:
        """Σ over its positions of the mass that is not tail; of several teachers, the weighted mean."""
        return sum(
            t.weight * float((1.0 - t.targets.tail_logmass_N.exp()).sum(dtype=torch.float64)) for t in self.targets
        )


def rank_batches(
    source: Source,
    prefixes: Sequence[Prefix],
    num_ranks: int,
    rank: int,
    micro_batch_tokens: int,
    length: int,
    errors: list[DecantError],
) -> Iterator[MicroBatch]:
    """The micro-batches of ``rank`` when the prefixes are dealt to ``num_ranks``, padded to ``length`` at most.

    One that cannot be read is empty, and ``errors`` says why: other ranks wait for this one in every forward pass.
    """
    for group in micro_batches(prefixes, num_ranks, micro_batch_tokens, length)[rank]:
        try:
            yield collate(source, group, length)
        except DecantError as error:
            errors.append(error)
            yield collate(source, [], length)


def collate(source: Source, prefixes: Sequence[Prefix], length: int | None = None, labels: bool = True) -> MicroBatch:
    """Read and pad the prefixes, with their labels or without; none is padded beyond ``length``, the curriculum's.

    Positions that a row's mask leaves out are fed, carry no loss and have no labels. No prefixes give one padded
    position without loss, so that every rank runs. Raises CorruptError.
    """
    rows = [source[p.row] if labels else SourceRow(source.tokens(p.row), ()) for p in prefixes]
    padded = padded_positions(max((prefix.positions for prefix in prefixes), default=1), length)
    input_ids_BL = np.zeros((max(len(prefixes), 1), padded), np.int64)
    lengths_B = np.array([prefix.positions for prefix in prefixes] or [1])
    valid_BL = np.zeros_like(input_ids_BL, dtype=bool)
    next_ids = [np.zeros(0, np.int64)]
    for i, ((_, positions), (tokens, _)) in enumerate(zip(prefixes, rows, strict=True)):
        valid_P = tokens.carries_loss_P[:positions]
        input_ids_BL[i, :positions] = tokens.input_ids_T[:positions]
        valid_BL[i, :positions] = valid_P
        next_ids.append(tokens.input_ids_T[1 : positions + 1][valid_P].astype(np.int64))
    return MicroBatch(
        torch.from_numpy(input_ids_BL),
        torch.from_numpy(lengths_B),
        torch.from_numpy(np.flatnonzero(np.arange(padded) < lengths_B[:, None])),
        torch.from_numpy(np.flatnonzero(valid_BL)),
        torch.from_numpy(np.concatenate(next_ids)),
        _labels(source, prefixes, rows) if labels and source.has_labels else (),
    )


def _labels(source: Source, prefixes: Sequence[Prefix], rows: Sequence[SourceRow]) -> tuple[WeightedTargets, ...]:
    """Every teacher's labels of the prefixes; a mixture has one teacher per text, and counts as one."""
    found = []
    for teacher, weight in enumerate(source.texts[0].store_weights):
        parts = []
        for prefix, row in zip(prefixes, rows, strict=True):
            text, _ = source.place(prefix.row)
            stored = text.stores[teacher].manifest["temperatures"]
            columns = [stored.index(temperature) for temperature in source.temperatures]
            targets = row.labels[teacher]
            targets = targets._replace(log_partition_PS=targets.log_partition_PS[:, columns])
            parts.append((targets, row.tokens.carries_loss_P[: prefix.positions]))
        forced_ids = source.texts[0].stores[teacher].manifest["forced_ids"]
        found.append(WeightedTargets(weight, sparse_targets(parts, forced_ids, len(source.temperatures))))
    return tuple(found)


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
