"""The index: a length and a split per row, and a table of the shards. Mapped, so that any store opens at once."""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logit_store.errors import CorruptError
from logit_store.ipc import IPC_ERRORS, read_batch, write_batch

PAGE_BYTES = 2**20
"""Bytes of the index that share a checksum: verified when one of them is first read."""

COUNTS = ("bytes", "rows", "tokens", "positions", "entries", "draws", "prefix_bytes", "prefix_crc32")
MEASURES = ("kept_mass", "mean_kl", "max_error", "sum_error")
HASHES = ("sha256", "text_sha256")


def encode_index(lengths_N: NDArray[np.int32], splits_N: NDArray[np.int8]) -> bytes:
    """Arrow file bytes of the index."""
    return write_batch(
        pa.record_batch({"length": pa.array(lengths_N, pa.int32()), "split": pa.array(splits_N, pa.int8())})
    )


def page_checksums(data: bytes) -> list[int]:
    """CRC-32 of each page."""
    return [zlib.crc32(data[start : start + PAGE_BYTES]) for start in range(0, len(data), PAGE_BYTES)]


class Index:
    """Length and split of every row, each page verified when it is first read. Raises CorruptError."""

    def __init__(self, data: pa.Buffer, num_bytes: int, checksums: Sequence[int], num_rows: int, name: str) -> None:
        self._name = name
        self._data = data
        self._checksums = checksums
        if data.size != num_bytes or len(checksums) != -(-num_bytes // PAGE_BYTES):
            raise self._damaged("its size is not that of the manifest")
        self._unverified = set(range(len(checksums)))
        self._verify(0, 1)
        try:
            batch = read_batch(data)
            batch.validate()  # that its buffers are as long as its rows, without a look at them
        except IPC_ERRORS as error:
            raise self._damaged(str(error)) from None
        is_ours = batch.schema.types == [pa.int32(), pa.int8()] and not any(c.null_count for c in batch.columns)
        if not is_ours or len(batch) != num_rows:
            raise self._damaged("it does not hold a length and a split for each row")
        self._lengths_N, self._splits_N = (column.to_numpy() for column in batch.columns)
        self._offsets = [column.buffers()[1].address - data.address for column in batch.columns]

    def length(self, row: int) -> int:
        """Tokens of a row."""
        at = self._offsets[0] + 4 * row
        self._verify(at, at + 4)
        return int(self._lengths_N[row])

    @property
    def lengths_N(self) -> NDArray[np.int32]:
        """Tokens of every row, mapped."""
        self._verify(self._offsets[0], self._offsets[0] + 4 * len(self._lengths_N))
        return self._lengths_N

    @property
    def splits_N(self) -> NDArray[np.int8]:
        """Split of every row, mapped."""
        self._verify(self._offsets[1], self._offsets[1] + len(self._splits_N))
        return self._splits_N

    def _verify(self, start: int, stop: int) -> None:
        pages = range(start // PAGE_BYTES, -(-stop // PAGE_BYTES))
        for page in self._unverified.intersection(pages) if len(pages) > 1 else pages:
            if page in self._unverified:
                if zlib.crc32(self._page(page)) != self._checksums[page]:
                    raise self._damaged(f"the checksum of its page {page} does not match")
                self._unverified.discard(page)

    def _page(self, page: int) -> pa.Buffer:
        start = page * PAGE_BYTES
        return self._data.slice(start, min(PAGE_BYTES, self._data.size - start))

    def _damaged(self, reason: str) -> CorruptError:
        return CorruptError(
            f"{self._name} is damaged: {reason}. Restore it from a copy, or delete it and manifest.json and run the "
            "command that made the store again"
        )


class ShardColumns:
    """What the table of shards will say, taken from commit records, of which nothing else stays in memory."""

    def __init__(self, num_shards: int) -> None:
        self.hashes = {name: np.zeros((num_shards, 32), np.uint8) for name in HASHES}
        self.numbers: dict[str, NDArray[Any]] = {name: np.zeros(num_shards, np.int64) for name in COUNTS}
        self.numbers |= {name: np.zeros(num_shards, np.float64) for name in MEASURES}
        self.sections: dict[str, NDArray[np.int64]] = {}

    def put(self, shard: int, record: dict[str, Any]) -> None:
        """Take a shard's record."""
        for name, hashes_S in self.hashes.items():
            hashes_S[shard] = np.frombuffer(bytes.fromhex(record[name]), np.uint8)
        for name, numbers_S in self.numbers.items():
            numbers_S[shard] = record.get(name, 0)
        for section, size in record["sections"].items():
            self.sections.setdefault(section, np.zeros(self.num_shards, np.int64))[shard] = size

    @property
    def num_shards(self) -> int:
        """How many shards the table has."""
        return len(self.numbers["rows"])

    def hash(self, column: str, shard: int) -> str:
        """A shard's SHA-256 (`sha256`, `text_sha256`) as hexadecimal text."""
        return self.hashes[column][shard].tobytes().hex()

    def encode(self) -> bytes:
        """Arrow file bytes of the table."""
        columns: dict[str, pa.Array] = {
            name: pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(column), [None, pa.py_buffer(column)])
            for name, column in self.hashes.items()
        }
        columns |= {name: pa.array(column) for name, column in self.numbers.items()}
        columns |= {f"bytes.{section}": pa.array(self.sections[section]) for section in sorted(self.sections)}
        return write_batch(pa.record_batch(columns))


class ShardTable:
    """What the commit records say of each shard, as columns."""

    def __init__(self, data: pa.Buffer, name: str) -> None:
        """``data`` must have been verified. Raises CorruptError where it is not such a table."""
        try:
            batch = read_batch(data)
            batch.validate(full=True)
        except IPC_ERRORS as error:
            raise CorruptError(f"{name} is no table of shards ({error}). Make the store again") from None
        fields = {field.name: field.type for field in batch.schema}
        wanted = dict.fromkeys(HASHES, pa.binary(32)) | dict.fromkeys(COUNTS, pa.int64())
        wanted |= dict.fromkeys(MEASURES, pa.float64())
        wanted |= dict.fromkeys((field for field in fields if field.startswith("bytes.")), pa.int64())
        if fields != wanted or any(column.null_count for column in batch.columns):
            raise CorruptError(f"{name} is no table of shards: it does not have their columns. Make the store again")
        self._hashes = {column: batch[column] for column in HASHES}
        self.columns = {column: batch[column].to_numpy() for column in fields if column not in HASHES}
        if any((self.columns[column] < 0).any() for column in COUNTS):
            raise CorruptError(f"{name} is no table of shards: it counts less than nothing. Make the store again")
        self.starts = np.concatenate([[0], np.cumsum(self.columns["rows"])])
        """Number of each shard's first row, and the number of rows."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def hash(self, column: str, shard: int) -> str:
        """A shard's SHA-256 (`sha256`, `text_sha256`) as hexadecimal text."""
        return str(self._hashes[column][shard].as_py().hex())

    def total(self, column: str) -> Any:
        """Sum of a column over all shards."""
        return self.columns[column].sum().item()

    def section_bytes(self) -> dict[str, int]:
        """Stored bytes by section, over all shards."""
        return {c.removeprefix("bytes."): self.total(c) for c in self.columns if c.startswith("bytes.")}

    def shard_of(self, row: int) -> tuple[int, int]:
        """The shard of a row, and the row's place in it."""
        shard = int(np.searchsorted(self.starts, row, side="right")) - 1
        return shard, row - int(self.starts[shard])
