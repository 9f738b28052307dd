"""Prefixes of stored rows as tensors, padded to the longest of their micro-batch."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from logit_store import Targets
from logit_store.errors import StudentError
from training.batches import Prefix, micro_batches
from training.losses import SparseTargets, WeightedTargets
from training.source import Source, SourceRow


class MicroBatch(NamedTuple):
    """B prefixes padded to L positions; N of the B·L positions carry loss."""

    input_ids_BL: Tensor
    """int64; 0 where padded (on the right: under causal attention no real position sees it)."""
    lengths_B: Tensor
    """int64: positions of each prefix that are no padding."""
    valid_BL: Tensor
    """bool: which positions carry loss."""
    next_ids_N: Tensor
    """int64: the tokens to predict, of the valid positions in order."""
    targets: tuple[WeightedTargets, ...]
    """Each teacher's labels of the valid positions; none from a token store, or where no labels were wanted."""
    max_positions: int
    """The largest N of this micro-batch on any rank: decides in how many chunks every rank applies its head."""

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device; from page-locked memory the copy does not wait."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "MicroBatch":
        """The same in page-locked memory, from which a GPU copies while the CPU goes on."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "MicroBatch":
        ids, lengths, valid, next_ids = (change(tensor) for tensor in self[:4])
        targets = tuple(WeightedTargets(w, SparseTargets(*map(change, columns))) for w, columns in self.targets)
        return MicroBatch(ids, lengths, valid, next_ids, targets, self.max_positions)

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
    temperature: float = 1.0,
) -> Iterator[MicroBatch]:
    """The micro-batches of ``rank`` when the prefixes are dealt to ``num_ranks``, one at a time."""
    for group, max_positions in rank_groups(prefixes, num_ranks, rank, micro_batch_tokens):
        yield collate(source, group, temperature)._replace(max_positions=max_positions)


def rank_groups(
    prefixes: Sequence[Prefix], num_ranks: int, rank: int, micro_batch_tokens: int
) -> list[tuple[list[Prefix], int]]:
    """Prefixes of each micro-batch of ``rank``, and the most positions that any rank has in it."""
    dealt = micro_batches(prefixes, num_ranks, micro_batch_tokens)
    largest = [
        max(sum(prefix.positions for prefix in group) for group in groups) for groups in zip(*dealt, strict=True)
    ]
    return list(zip(dealt[rank], largest, strict=True))


def collate(source: Source, prefixes: Sequence[Prefix], temperature: float = 1.0, labels: bool = True) -> MicroBatch:
    """Read and pad the prefixes, with their labels or without.

    No prefixes give one padded position without loss, so that every rank runs. Raises CorruptError, StudentError.
    """
    rows = [source[p.row] if labels else SourceRow(source.tokens(p.row), ()) for p in prefixes]
    length = max((prefix.positions for prefix in prefixes), default=1)
    input_ids_BL = np.zeros((max(len(prefixes), 1), length), np.int64)
    valid_BL = np.zeros_like(input_ids_BL, dtype=bool)
    next_ids = [np.zeros(0, np.int64)]
    for i, (prefix, row) in enumerate(zip(prefixes, rows, strict=True)):
        input_ids_BL[i, : prefix.positions] = row.tokens.input_ids_T[: prefix.positions]
        if row.tokens.loss_mask_P is not None:
            raise StudentError(f"row {prefix.row} has a loss mask, and the trainer does not know masks yet")
        valid_BL[i, : prefix.positions] = True
        next_ids.append(row.tokens.input_ids_T[1 : prefix.positions + 1].astype(np.int64))
    return MicroBatch(
        torch.from_numpy(input_ids_BL),
        torch.tensor([prefix.positions for prefix in prefixes] or [1]),
        torch.from_numpy(valid_BL),
        torch.from_numpy(np.concatenate(next_ids)),
        _labels(source, prefixes, rows, temperature) if labels and source.has_labels else (),
        sum(prefix.positions for prefix in prefixes),
    )


def _labels(
    source: Source, prefixes: Sequence[Prefix], rows: Sequence[SourceRow], temperature: float
) -> tuple[WeightedTargets, ...]:
    """Every teacher's labels of the prefixes; a mixture has one teacher per text, and counts as one."""
    weights = source.texts[0].store_weights
    found = []
    for teacher, weight in enumerate(weights):
        parts = []
        for prefix, row in zip(prefixes, rows, strict=True):
            text, _ = source.place(prefix.row)
            parts.append((row.labels[teacher], prefix.positions, text.stores[teacher].manifest["temperatures"]))
        k = max(text.stores[teacher].manifest["k"] for text in source.texts)
        found.append(WeightedTargets(weight, _targets(parts, k, temperature)))
    return tuple(found)


def _targets(parts: Sequence[tuple[Targets, int, list[float]]], k: int, temperature: float) -> SparseTargets:
    """Labels of the first positions of each part, heads of ``k`` places; parts tell the temperatures they have."""
    heads = [targets.padded_heads(k) for targets, *_ in parts]

    def column(values: list[np.ndarray], *width: int, dtype: type = np.float32) -> Tensor:
        return torch.from_numpy(np.concatenate([np.zeros((0, *width), dtype), *values]))

    if temperature == 1.0:
        partitions = [np.zeros(n, np.float32) for _, n, _ in parts]
    else:
        partitions = [t.log_partition_PS[:n, stored.index(temperature)] for t, n, stored in parts]
    return SparseTargets(
        column([ids_PK[:n] for (ids_PK, _), (_, n, _) in zip(heads, parts, strict=True)], k, dtype=np.int32).long(),
        column([logprobs_PK[:n] for (_, logprobs_PK), (_, n, _) in zip(heads, parts, strict=True)], k),
        column([t.next_logprob_P[:n] for t, n, _ in parts]),
        column([t.tail_logmass_P[:n] for t, n, _ in parts]),
        column(partitions),
    )
