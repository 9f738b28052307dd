"""The commit record of a shard: what it says, and whether the shard's object is the one that it names."""

import base64
import hashlib
import re
import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logit_store.errors import CorruptError
from logit_store.format import describe, object_name
from logit_store.index import COUNTS, HASHES, MEASURES, ShardTable
from logit_store.ipc import IPC_ERRORS
from logit_store.shard import shard_schema

FIELDS: dict[str, type] = {
    "object": str, "sha256": str, "text_sha256": str, "index": str, "sections": dict, "bytes": int, "prefix_bytes": int,
    "prefix_crc32": int, "rows": int, "tokens": int, "positions": int,
}  # fmt: skip
"""What every record says, and of what type it is."""


class Facts(NamedTuple):
    """What is known of a shard's object before it is read."""

    sha256: str
    bytes: int
    prefix_bytes: int
    prefix_crc32: int

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> "Facts":
        """As the commit record says."""
        return cls(*(record[field] for field in cls._fields))

    @classmethod
    def of_table(cls, table: ShardTable, shard: int) -> "Facts":
        """As the table of shards says."""
        return cls(table.hash("sha256", shard), *(int(table.columns[field][shard]) for field in cls._fields[1:]))


def check_record(record: dict[str, Any], shard: int) -> None:
    """Refuse what is sealed but no record of this shard. Raises CorruptError with the reason alone."""
    wrong = [field for field, kind in FIELDS.items() if not isinstance(record.get(field), kind)]
    wrong += [field for field in HASHES if not re.fullmatch("[0-9a-f]{64}", str(record.get(field)))]
    if wrong:
        raise CorruptError(f"is no commit record of ours: it lacks {', '.join(sorted({*wrong}))}")
    if record["object"] != object_name(shard, record["sha256"]):
        raise CorruptError(f"is the commit record of another shard: it names {record['object']}")
    rows_of_record(record)


def rows_of_record(record: dict[str, Any]) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
    """Length and split of each of the shard's rows. Raises CorruptError."""
    try:
        stored = base64.b64decode(record["index"], validate=True)
        lengths_bytes = 4 * record["rows"]
        packed = zlib.decompressobj().decompress(stored, min(lengths_bytes + record["rows"], 2048 * len(stored)) + 1)
    except (ValueError, OverflowError, zlib.error):
        raise CorruptError("is no commit record of ours: its index cannot be unpacked") from None
    if len(packed) != lengths_bytes + record["rows"]:
        raise CorruptError(f"is no commit record of ours: its index is not that of {record['rows']} rows")
    return np.frombuffer(packed[:lengths_bytes], "<i4").astype(np.int32), np.frombuffer(packed[lengths_bytes:], np.int8)


def check_row(table: ShardTable, shard: int, record: dict[str, Any]) -> None:
    """Whether the table of shards says the same as the record. Raises CorruptError with the reason alone."""
    said = {field: record[field] for field in HASHES}
    said |= {field: record.get(field, 0) for field in (*COUNTS, *MEASURES)}
    said |= {f"bytes.{section}": size for section, size in record["sections"].items()}
    found = {field: table.hash(field, shard) for field in HASHES}
    found |= {field: column[shard].item() for field, column in table.columns.items()}
    differing = sorted(field for field in said.keys() | found.keys() if said.get(field, 0) != found.get(field, 0))
    if differing:
        raise CorruptError(f"differs from its row of shards.arrow in {', '.join(differing)}")


def store_schema(header: dict[str, Any]) -> pa.Schema:
    """What the shards of the store with this header have in common (see ``check_object``)."""
    return shard_schema(describe(header), header["columns"], np.zeros(1, np.float32))


def check_object(pieces: Iterable[bytes], facts: Facts, schema: pa.Schema | None) -> None:
    """Whether these are the bytes that were committed, and a shard of the store whose shards have ``schema``.

    Raises CorruptError with the reason alone.
    """
    whole, prefix, size = hashlib.sha256(), bytearray(), 0
    for piece in pieces:
        whole.update(piece)
        size += len(piece)
        prefix += piece[: max(facts.prefix_bytes - len(prefix), 0)]
    if size != facts.bytes:
        raise CorruptError(f"is damaged: it has {size:,} bytes instead of {facts.bytes:,}")
    if whole.hexdigest() != facts.sha256:
        raise CorruptError("is damaged: its SHA-256 is not the one that was committed")
    if len(prefix) != facts.prefix_bytes or zlib.crc32(prefix) != facts.prefix_crc32:
        raise CorruptError("does not begin with the bytes that its commit record describes")
    if schema is not None:
        _check_schema(bytes(prefix), schema)


def _check_schema(prefix: bytes, wanted: pa.Schema) -> None:
    try:
        found = pa.ipc.read_schema(pa.ipc.read_message(pa.BufferReader(prefix[8:])))  # after the magic bytes of a file
    except IPC_ERRORS as error:
        raise CorruptError(f"is no shard of ours ({error})") from None
    if not found.equals(wanted) or found.metadata.get(b"decant") != wanted.metadata[b"decant"]:
        raise CorruptError("is a shard of another store: its columns or its identity differ")
