"""The bytes of a store, format 0: Arrow schemas, shard encoding, sealed JSON. FORMAT.md is its description."""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logit_store.errors import CorruptError, FormatError
from logit_store.identity import canonical_json, digest
from logit_store.rows import LogitRow, Targets, TokenRow

VERSION = 0
MAX_VOCABULARY_SIZE = 2**24
ZSTD_LEVEL = 3
BATCH_BYTES = 128 * 1024
"""Raw bytes of a record batch. Batches are decompressed whole, so this is what one random row read costs;
8 to 512 rows per batch compress to the same size within 1 %, so nothing is lost by small ones."""

LOGPROB_DTYPES = ("float16", "float32")
HEADER, MANIFEST, INDEX = "header.json", "manifest.json", "index.arrow"
OBJECT_NAME = re.compile(r"\d{6}-[0-9a-f]{16}\.arrow")
FILE_NAME = re.compile(r"tokenizer/[A-Za-z0-9_][A-Za-z0-9_.-]*")


def record_name(shard: int) -> str:
    """Name of a shard's commit record."""
    return f"shards/{shard:06d}.json"


def object_name(shard: int, sha256: str) -> str:
    """Name of a shard's object: no two attempts with different bytes share one."""
    return f"{shard:06d}-{sha256[:16]}.arrow"


def seal(kind: str, body: dict[str, Any]) -> bytes:
    """JSON text of ``body`` that carries its format version and its own checksum."""
    sealed = {"decant": kind, "format": VERSION, "sha256": digest(canonical_json(body)), "body": body}
    return (json.dumps(sealed, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def unseal(data: bytes, kind: str, name: str) -> dict[str, Any]:
    """The body of a sealed file.

    Raises FormatError: not such a file, or of another version; CorruptError: the checksum does not match.
    """
    try:
        sealed = json.loads(data)
    except ValueError:
        raise CorruptError(f"{name} is damaged: it is not JSON. Restore it or make the store again") from None
    if not isinstance(sealed, dict) or sealed.get("decant") != kind:
        raise FormatError(f"{name} is not the {kind} of a decant store")
    if sealed.get("format") != VERSION:
        raise FormatError(
            f"{name} has format {sealed.get('format')!r}; this version of decant reads format {VERSION}. "
            "Use the version that wrote it, or make the store again"
        )
    body = sealed.get("body")
    if not isinstance(body, dict) or digest(canonical_json(body)) != sealed.get("sha256"):
        raise CorruptError(f"{name} is damaged: its checksum does not match. Restore it or make the store again")
    if data != seal(kind, body):
        raise CorruptError(f"{name} is damaged: bytes outside its checksum have changed. Restore it")
    return body


def encode_tokens(rows: Sequence[TokenRow], metadata: dict[str, str]) -> tuple[bytes, int]:
    """Arrow file bytes of a token shard, and its rows per record batch."""
    return _encode(_token_columns(rows), metadata)


def encode_logits(rows: Sequence[LogitRow], logprob_dtype: str, metadata: dict[str, str]) -> tuple[bytes, int]:
    """Arrow file bytes of a logit shard, and its rows per record batch. A shard without rows has no label columns.

    ``logprob_dtype`` is how head log-probs are stored; the other columns are float32 always.
    """
    if not rows:
        return encode_tokens([], metadata)
    targets = [row.targets for row in rows]
    positions = _offsets([len(t.next_logprob_P) for t in targets])
    columns = _token_columns([row.tokens for row in rows]) | {
        "head_ids": _list_of_lists(positions, [t.head_ids_PK for t in targets], np.dtype(np.int32)),
        "head_logprobs": _list_of_lists(positions, [t.head_logprobs_PK for t in targets], np.dtype(logprob_dtype)),
        "next_logprob": _list(positions, [t.next_logprob_P for t in targets], np.dtype(np.float32)),
        "tail_logmass": _list(positions, [t.tail_logmass_P for t in targets], np.dtype(np.float32)),
    }
    if targets[0].log_partition_PS.shape[1]:
        columns["log_partition"] = _list_of_lists(
            positions, [t.log_partition_PS for t in targets], np.dtype(np.float32)
        )
    return _encode(columns, metadata)


def encode_index(lengths_N: NDArray[np.int32], splits_N: NDArray[np.int8]) -> bytes:
    """Arrow file bytes of the index, uncompressed so that it can be mapped: a length and a split per row."""
    batch = pa.record_batch({"length": pa.array(lengths_N, pa.int32()), "split": pa.array(splits_N, pa.int8())})
    return _write([batch], batch.schema, pa.ipc.IpcWriteOptions())


def decode_tokens(batch: pa.RecordBatch, i: int) -> TokenRow:
    """Row ``i`` of a token or logit record batch."""
    ids_T = _row(batch["input_ids"], i).to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
    return TokenRow(batch["document"][i].as_py(), batch["split"][i].as_py(), ids_T)


def decode_logits(batch: pa.RecordBatch, i: int) -> LogitRow:
    """Row ``i`` of a logit record batch, its head rescaled so that each position sums to one."""
    tokens = decode_tokens(batch, i)
    head_ids_PK = _matrix(_row(batch["head_ids"], i))
    stored_PK = _matrix(_row(batch["head_logprobs"], i))
    next_P = _row(batch["next_logprob"], i).to_numpy()
    tail_P = _row(batch["tail_logmass"], i).to_numpy()
    logprobs_PK = stored_PK
    if stored_PK.dtype == np.float16:
        next_in_head_P = (head_ids_PK == tokens.input_ids_T[1:, None]).any(1)
        logprobs_PK = _rescale(stored_PK, np.where(next_in_head_P, -np.inf, next_P), tail_P)
    partition_PS = np.zeros((len(next_P), 0), np.float32)
    if "log_partition" in batch.schema.names:
        partition_PS = _matrix(_row(batch["log_partition"], i))
    return LogitRow(tokens, Targets(head_ids_PK, logprobs_PK, next_P, tail_P, partition_PS))


def _rescale(
    stored_PK: NDArray[np.float16], next_outside_P: NDArray[np.float32], tail_P: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Shift each position's rounded head so that head + next token outside it + tail is 1.

    The head's true mass is 1 − tail − next, known to about 1e-7 since both are float32. Rounding to
    float16 moves a log-prob by at most 2^-11 of its size, so a true shift is never larger than that for
    the largest |log-prob| of the head; the clip keeps a head of tiny mass from absorbing the 1e-7.
    """
    head_PK = stored_PK.astype(np.float64)
    mass_P = -np.expm1(tail_P.astype(np.float64)) - np.exp(next_outside_P.astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        shift_P = np.log(np.maximum(mass_P, 0.0)) - np.log(np.exp(head_PK).sum(1))
        finite_PK = np.where(np.isfinite(head_PK), head_PK, 0.0)
        bound_P = np.abs(finite_PK).max(1, initial=0.0) * 2.0**-11
        shift_P = np.clip(np.nan_to_num(shift_P, nan=0.0), -bound_P, bound_P)
    return (head_PK + shift_P[:, None]).astype(np.float32)


def _token_columns(rows: Sequence[TokenRow]) -> dict[str, pa.Array]:
    offsets = _offsets([len(row.input_ids_T) for row in rows])
    return {
        "document": pa.array([row.document for row in rows], pa.int64()),
        "split": pa.array([row.split for row in rows], pa.string()),
        "input_ids": _list(offsets, [row.input_ids_T for row in rows], np.dtype(np.int32)),
    }


def _offsets(lengths: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), pa.int64())


def _list(offsets: pa.Array, parts: Sequence[NDArray[Any]], dtype: np.dtype[Any]) -> pa.Array:
    flat = np.concatenate(parts) if parts else np.zeros(0, dtype)
    return pa.LargeListArray.from_arrays(offsets, pa.array(flat.astype(dtype, copy=False)))


def _list_of_lists(offsets: pa.Array, parts: Sequence[NDArray[Any]], dtype: np.dtype[Any]) -> pa.Array:
    flat = np.concatenate(parts).astype(dtype, copy=False)
    inner = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), flat.shape[1])
    return pa.LargeListArray.from_arrays(offsets, inner)


def _encode(columns: dict[str, pa.Array], metadata: dict[str, str]) -> tuple[bytes, int]:
    table = pa.record_batch(columns)
    table = table.replace_schema_metadata({"decant.format": str(VERSION), **metadata})
    rows_per_batch = max(1, BATCH_BYTES * table.num_rows // max(table.nbytes, 1))
    batches = [table.slice(start, rows_per_batch) for start in range(0, table.num_rows, rows_per_batch)]
    options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=ZSTD_LEVEL))
    return _write(batches, table.schema, options), rows_per_batch


def _write(batches: Sequence[pa.RecordBatch], schema: pa.Schema, options: pa.ipc.IpcWriteOptions) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return bytes(sink.getvalue())


def _row(column: pa.LargeListArray, i: int) -> pa.Array:
    start, stop = column.offsets[i].as_py(), column.offsets[i + 1].as_py()
    return column.values[start:stop]


def _matrix(column: pa.FixedSizeListArray) -> NDArray[Any]:
    width = column.type.list_size
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width))
