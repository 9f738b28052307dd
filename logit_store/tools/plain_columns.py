"""A store's rows as plain Arrow columns, which need no code of ours to be read.

Shapes: B rows with T tokens and P positions together, N head entries, M draws, S temperatures, F forced ids.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logit_store.identity import canonical_json
from logit_store.reader import LogitStore, TokenStore
from logit_store.rows import LogitRow, Targets, TokenRow, offsets_of
from logit_store.shard import COLUMN_TYPES

METADATA_PREFIX = "metadata_"
_IDS, _LOGPROBS = pa.list_(pa.int32()), pa.list_(pa.float32())


class Column(NamedTuple):
    """A column of an export."""

    name: str
    type: pa.DataType
    meaning: str


class PlainColumns:
    """Which columns a store's rows have outside it, and how they are made.

    A carried metadata column keeps its name unless one of ours has it: then it is prefixed with ``METADATA_PREFIX``.
    """

    def __init__(self, store: TokenStore | LogitStore) -> None:
        stored = store.manifest["columns"]
        self._carried = {_free_name(name, stored): name for name in stored}
        """Names in the export → names in the store."""
        carried = [
            Column(exported, COLUMN_TYPES[stored[name]], "carried from the corpus" + _was(name, exported))
            for exported, name in self._carried.items()
        ]
        labels = _label_columns(store) if isinstance(store, LogitStore) else []
        self.columns = [*_TOKEN_COLUMNS[:3], *carried, *_TOKEN_COLUMNS[3:], *labels]
        """In the order of the file: what names a row, metadata, tokens, labels."""
        fields = [pa.field(column.name, column.type) for column in self.columns]
        self.schema = pa.schema(fields, {"decant": canonical_json(_origin(store.manifest))})

    def batch(self, numbers: Sequence[int], rows: Sequence[TokenRow | LogitRow]) -> pa.RecordBatch:
        """The rows, whose numbers in the store are ``numbers``, as one record batch."""
        tokens = [row.tokens if isinstance(row, LogitRow) else row for row in rows]
        arrays = _token_arrays(numbers, tokens)
        if isinstance(rows[0], LogitRow):
            targets = [row.targets for row in rows if isinstance(row, LogitRow)]
            joined = Targets(*(np.concatenate(column) for column in zip(*targets, strict=True)))
            arrays |= _label_arrays(joined, [len(t.head_counts_P) for t in targets])
        for exported, name in self._carried.items():
            values = [row.columns.get(name) for row in tokens]
            arrays[exported] = pa.array(values, self.schema.field(exported).type)
        return pa.record_batch([arrays[name] for name in self.schema.names], schema=self.schema)


def has_draws(store: LogitStore) -> bool:
    """Whether any position keeps draws from its tail."""
    return bool(store.shards.total("draws"))


_TOKEN_COLUMNS = (
    Column("row", pa.int64(), "number of the row in the store"),
    Column("document", pa.int64(), "first 63 bits of the SHA-256 of the document's text"),
    Column("split", pa.string(), "`train` or `held_out`, fixed by the document"),
    Column("input_ids", _IDS, "the T tokens of the sequence; the teacher saw exactly these as its context"),
    Column("loss_mask", pa.list_(pa.bool_()), "for each of the T − 1 positions whether it carries loss; null: all do"),
)
_LABEL_COLUMNS = (
    Column("head_ids", pa.list_(_IDS), "for each position the ids that the teacher's head keeps, ascending"),
    Column("head_logprobs", pa.list_(_LOGPROBS), "their log-probabilities under the full softmax, temperature 1"),
    Column("next_logprob", _LOGPROBS, "log-probability of the token at t + 1, in the head or not"),
    Column("tail_logmass", _LOGPROBS, "log of the mass of everything that is not kept; −∞ where nothing is left"),
    Column("log_partition", pa.list_(_LOGPROBS), "log Σ p^(1/T) over the vocabulary for each stored temperature T"),
    Column("forced_logprobs", pa.list_(_LOGPROBS), "log-probabilities of the ids that are kept at every position"),
    Column("sampled_ids", pa.list_(_IDS), "draws from the tail, repeats kept; of m draws each stands for 1/m of it"),
)


_OURS = {column.name for column in (*_TOKEN_COLUMNS, *_LABEL_COLUMNS)}


def _free_name(name: str, stored: Iterable[str]) -> str:
    """The name that a metadata column has in an export: its own, unless one of ours has it."""
    exported = name
    while exported in _OURS or (exported != name and exported in stored):
        exported = METADATA_PREFIX + exported
    return exported


def _was(name: str, exported: str) -> str:
    return "" if name == exported else f", where it is `{name}`"


def _label_columns(store: LogitStore) -> list[Column]:
    absent = {"forced_logprobs"} if not store.manifest["forced_ids"] else set()
    absent |= set() if has_draws(store) else {"sampled_ids"}
    return [column for column in _LABEL_COLUMNS if column.name not in absent]


def _origin(manifest: dict[str, Any]) -> dict[str, Any]:
    fields = ("kind", "labels_id", "text_id", "k", "temperatures", "forced_ids", "codec", "vocabulary_size")
    return {field: manifest[field] for field in fields if field in manifest}


def _token_arrays(numbers: Sequence[int], rows: Sequence[TokenRow]) -> dict[str, pa.Array]:
    masks = [None if row.loss_mask_P is None or row.loss_mask_P.all() else row.loss_mask_P for row in rows]
    at_P = offsets_of(np.array([0 if mask is None else len(mask) for mask in masks]))
    given = [np.zeros(0, np.bool_), *(mask for mask in masks if mask is not None)]
    is_null = pa.array([mask is None for mask in masks], pa.bool_())
    return {
        "row": pa.array(numbers, pa.int64()),
        "document": pa.array([row.document for row in rows], pa.int64()),
        "split": pa.array([row.split for row in rows], pa.string()),
        "input_ids": _lists(
            [len(row.input_ids_T) for row in rows], pa.array(np.concatenate([row.input_ids_T for row in rows]))
        ),
        "loss_mask": pa.ListArray.from_arrays(_int32(at_P), pa.array(np.concatenate(given)), mask=is_null),
    }


def _label_arrays(targets: Targets, positions_B: Sequence[int]) -> dict[str, pa.Array]:
    def of_positions(values: pa.Array) -> pa.ListArray:
        return _lists(positions_B, values)

    def of_entries(counts_P: Any, values: NDArray[Any]) -> pa.ListArray:
        return of_positions(_lists(counts_P, pa.array(np.ascontiguousarray(values).reshape(-1))))

    p, num_forced = targets.forced_logprobs_PF.shape
    return {
        "head_ids": of_entries(targets.head_counts_P, targets.head_ids_N),
        "head_logprobs": of_entries(targets.head_counts_P, targets.head_logprobs_N),
        "next_logprob": of_positions(pa.array(targets.next_logprob_P)),
        "tail_logmass": of_positions(pa.array(targets.tail_logmass_P)),
        "log_partition": of_entries([targets.log_partition_PS.shape[1]] * p, targets.log_partition_PS),
        "forced_logprobs": of_entries([num_forced] * p, targets.forced_logprobs_PF),
        "sampled_ids": of_entries(targets.sampled_counts_P, targets.sampled_ids_M),
    }


def _lists(counts: Any, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(_int32(offsets_of(np.asarray(counts, np.int64))), values)


def _int32(offsets: NDArray[np.int64]) -> pa.Array:
    assert offsets[-1] < 2**31, "a batch of fewer entries was meant to come"
    return pa.array(offsets.astype(np.int32))
