"""Rows side by side: padded arrays that a model takes, allocated once and filled again and again.

Shapes: B rows, T tokens and P = T − 1 positions of the longest, K entries of the widest head, M draws of the position
with the most, S temperatures, F forced ids.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logit_store.rows import LogitRow

Allocate = Callable[[tuple[int, ...], Any], NDArray[Any]]


class Shape(NamedTuple):
    """How large the arrays of a batch are."""

    rows: int
    tokens: int
    head: int
    temperatures: int = 0
    forced: int = 0
    sampled: int = 0


class Batch(NamedTuple):
    """Labels of B rows. Free places hold id 0, log-prob −inf, count 0 and no loss."""

    lengths_B: NDArray[np.int32]
    input_ids_BT: NDArray[np.int32]
    loss_mask_BP: NDArray[np.bool_]
    """Which positions carry loss; False where there is none."""
    head_counts_BP: NDArray[np.int32]
    head_ids_BPK: NDArray[np.int32]
    head_logprobs_BPK: NDArray[np.float32]
    next_logprob_BP: NDArray[np.float32]
    tail_logmass_BP: NDArray[np.float32]
    log_partition_BPS: NDArray[np.float32]
    forced_logprobs_BPF: NDArray[np.float32]
    sampled_counts_BP: NDArray[np.int32]
    sampled_ids_BPM: NDArray[np.int32]

    @classmethod
    def allocate(cls, shape: Shape, allocate: Allocate = np.empty) -> "Batch":
        """Arrays of this shape, not filled. ``allocate``: ``pinned`` for arrays that CUDA copies without waiting."""
        b, p = shape.rows, max(shape.tokens - 1, 0)
        return cls(
            allocate((b,), np.int32),
            allocate((b, shape.tokens), np.int32),
            allocate((b, p), np.bool_),
            allocate((b, p), np.int32),
            allocate((b, p, shape.head), np.int32),
            allocate((b, p, shape.head), np.float32),
            allocate((b, p), np.float32),
            allocate((b, p), np.float32),
            allocate((b, p, shape.temperatures), np.float32),
            allocate((b, p, shape.forced), np.float32),
            allocate((b, p), np.int32),
            allocate((b, p, shape.sampled), np.int32),
        )

    @property
    def shape(self) -> Shape:
        """How large the arrays are."""
        rows, tokens = self.input_ids_BT.shape
        ends = (self.head_ids_BPK, self.log_partition_BPS, self.forced_logprobs_BPF, self.sampled_ids_BPM)
        head, temperatures, forced, sampled = (array.shape[2] for array in ends)
        return Shape(rows, tokens, head, temperatures, forced, sampled)

    def part(self, shape: Shape) -> "Batch":
        """The first places of the arrays, as views. Raises ValueError where they are smaller than ``shape``."""
        if any(wanted > there for wanted, there in zip(shape, self.shape, strict=True)):
            raise ValueError(f"a batch of {shape} does not fit in one of {self.shape}: allocate a larger one")
        b, t, k, s, f, m = (slice(size) for size in shape)
        p = slice(max(shape.tokens - 1, 0))
        return Batch(
            self.lengths_B[b],
            self.input_ids_BT[b, t],
            self.loss_mask_BP[b, p],
            self.head_counts_BP[b, p],
            self.head_ids_BPK[b, p, k],
            self.head_logprobs_BPK[b, p, k],
            self.next_logprob_BP[b, p],
            self.tail_logmass_BP[b, p],
            self.log_partition_BPS[b, p, s],
            self.forced_logprobs_BPF[b, p, f],
            self.sampled_counts_BP[b, p],
            self.sampled_ids_BPM[b, p, m],
        )

    def fill(self, rows: Sequence[LogitRow]) -> "Batch":
        """Write these rows into the arrays, which must have their number; returns the batch."""
        for i, (tokens, targets) in enumerate(rows):
            t = len(tokens.input_ids_T)
            p = max(t - 1, 0)
            head_ids_PK, head_logprobs_PK = targets.padded_heads(self.head_ids_BPK.shape[2])
            drawn_PM = np.zeros((p, self.sampled_ids_BPM.shape[2]), np.int32)
            drawn_PM[np.arange(drawn_PM.shape[1]) < targets.sampled_counts_P[:, None]] = targets.sampled_ids_M
            self.lengths_B[i] = t
            _fill(self.input_ids_BT[i], tokens.input_ids_T, 0)
            _fill(self.loss_mask_BP[i], tokens.carries_loss_P, False)
            _fill(self.head_counts_BP[i], targets.head_counts_P, 0)
            _fill(self.head_ids_BPK[i], head_ids_PK, 0)
            _fill(self.head_logprobs_BPK[i], head_logprobs_PK, -np.inf)
            _fill(self.next_logprob_BP[i], targets.next_logprob_P, -np.inf)
            _fill(self.tail_logmass_BP[i], targets.tail_logmass_P, -np.inf)
            _fill(self.log_partition_BPS[i], targets.log_partition_PS, 0)
            _fill(self.forced_logprobs_BPF[i], targets.forced_logprobs_PF, -np.inf)
            _fill(self.sampled_counts_BP[i], targets.sampled_counts_P, 0)
            _fill(self.sampled_ids_BPM[i], drawn_PM, 0)
        return self

    def to_torch(self) -> dict[str, Any]:
        """The arrays as tensors that share their memory, by field name without the shape (`input_ids`, …)."""
        import torch

        return {name.rsplit("_", 1)[0]: torch.from_numpy(array) for name, array in self._asdict().items()}


def _fill(places: NDArray[Any], values: NDArray[Any], free: Any) -> None:
    places[: len(values)] = values
    places[len(values) :] = free


def shape_of(rows: Sequence[LogitRow]) -> Shape:
    """The smallest shape that holds these rows."""
    targets = [row.targets for row in rows]
    return Shape(
        len(rows),
        max((len(row.tokens.input_ids_T) for row in rows), default=0),
        max((int(t.head_counts_P.max(initial=0)) for t in targets), default=0),
        max((t.log_partition_PS.shape[1] for t in targets), default=0),
        max((t.forced_logprobs_PF.shape[1] for t in targets), default=0),
        max((int(t.sampled_counts_P.max(initial=0)) for t in targets), default=0),
    )


def pad(rows: Sequence[LogitRow], out: Batch | None = None) -> Batch:
    """Rows as a batch: in new arrays, or in the first places of ``out``.

    Also a ``collate_fn``: ``DataLoader(store, batch_size=8, collate_fn=pad)``. Raises ValueError where ``out`` is too
    small.
    """
    shape = shape_of(rows)
    return (Batch.allocate(shape) if out is None else out.part(shape)).fill(rows)


def pinned(shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
    """An array in page-locked memory where CUDA is there, an ordinary one where it is not."""
    import torch

    dtypes = {np.dtype(np.int32): torch.int32, np.dtype(np.float32): torch.float32, np.dtype(np.bool_): torch.bool}
    tensor = torch.empty(shape, dtype=dtypes[np.dtype(dtype)], pin_memory=torch.cuda.is_available())
    array: NDArray[Any] = tensor.numpy()
    return array
