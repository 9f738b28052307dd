"""Reading a finished store: any row by number, each shard's checksum verified when it is first touched."""

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any, Generic, TypeVar

import fsspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logit_store.errors import CorruptError, FormatError, NotFinishedError, StoreError
from logit_store.format import (
    FILE_NAME,
    HEADER,
    INDEX,
    MANIFEST,
    OBJECT_NAME,
    decode_logits,
    decode_tokens,
    record_name,
    unseal,
)
from logit_store.identity import digest
from logit_store.rows import SPLITS, LogitRow, TokenRow
from logit_store.storage import Storage

RowT = TypeVar("RowT")


class _Store(ABC, Generic[RowT]):
    """What token and logit stores share: manifest, index, and rows by number."""

    kind: str

    def __init__(self, storage: Storage, manifest: dict[str, Any]) -> None:
        self.storage = storage
        self.manifest = manifest
        index = self._verified(INDEX, manifest["index_sha256"])
        columns = pa.ipc.open_file(pa.py_buffer(index)).read_all()
        self.lengths_N: NDArray[np.int32] = columns["length"].to_numpy()
        """Tokens of each row."""
        self._splits_N: NDArray[np.int8] = columns["split"].to_numpy()
        counts = [shard["rows"] for shard in manifest["shards"]]
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        if self._starts[-1] != len(self.lengths_N):
            raise CorruptError(f"{storage.url}: index and shards disagree on the number of rows")
        self._reader = lru_cache(maxsize=256)(self._open_shard)
        self._verified_shards: set[int] = set()
        self._batch = lru_cache(maxsize=2)(self._read_batch)

    def __len__(self) -> int:
        return len(self.lengths_N)

    def __getitem__(self, row: int) -> RowT:
        """Row number ``row``. Raises IndexError, CorruptError."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a store of {len(self)} rows")
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        batch, i = divmod(row - int(self._starts[shard]), self.manifest["shards"][shard]["rows_per_batch"])
        return self._decode(self._batch(shard, batch), i)

    def rows(self, split: str) -> NDArray[np.int64]:
        """Numbers of the rows in ``split``, ascending."""
        return np.flatnonzero(self._splits_N == SPLITS.index(split))

    def shard_rows(self, shard: int) -> range:
        """Numbers of a shard's rows."""
        return range(int(self._starts[shard]), int(self._starts[shard + 1]))

    def files(self) -> dict[str, bytes]:
        """The tokenizer's files, verified: name → bytes."""
        for name in self.manifest["files"]:
            if not FILE_NAME.fullmatch(name):
                raise CorruptError(f"{self.storage.url}: the manifest names a file {name!r} that no store has")
        return {name: self._verified(name, sha256) for name, sha256 in self.manifest["files"].items()}

    def index(self) -> bytes:
        """The index file's bytes, verified."""
        return self._verified(INDEX, self.manifest["index_sha256"])

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard["bytes"] for shard in self.manifest["shards"])

    @property
    def num_positions(self) -> int:
        """Positions of all rows: tokens that have a prediction."""
        return sum(shard["positions"] for shard in self.manifest["shards"])

    @abstractmethod
    def _decode(self, batch: pa.RecordBatch, i: int) -> RowT:
        """Row ``i`` of a record batch."""

    def _read_batch(self, shard: int, batch: int) -> pa.RecordBatch:
        return self._reader(shard).get_batch(batch)

    def _open_shard(self, shard: int) -> pa.RecordBatchFileReader:
        record = self.manifest["shards"][shard]
        if not OBJECT_NAME.fullmatch(record["object"]):
            raise CorruptError(f"{self.storage.url}: shard {shard} names an object {record['object']!r}")
        name = f"shards/{record['object']}"
        path = self.storage.path(name)
        try:
            if not self.storage.is_local:  # fetched once to a local temporary file, then mapped like any other
                path = fsspec.open_local(f"simplecache::{self.storage.fs.unstrip_protocol(path)}")
            data = pa.memory_map(path).read_buffer()
        except FileNotFoundError:
            raise CorruptError(f"{self.storage.path(name)} is missing. {_REDO}") from None
        if shard not in self._verified_shards and digest(data) != record["sha256"]:
            raise CorruptError(f"{self.storage.path(name)} is damaged: its checksum does not match. {_REDO}")
        self._verified_shards.add(shard)
        return pa.ipc.open_file(data)

    def _verified(self, name: str, sha256: str) -> bytes:
        try:
            data = self.storage.read(name)
        except FileNotFoundError:
            raise CorruptError(f"{self.storage.path(name)} is missing. {_REDO}") from None
        if digest(data) != sha256:
            raise CorruptError(f"{self.storage.path(name)} is damaged: its checksum does not match. {_REDO}")
        return data


_REDO = "Restore it from a copy, or make the store again"


class TokenStore(_Store[TokenRow]):
    """Tokenised text, ready for any teacher."""

    kind = "tokens"

    @classmethod
    def open(cls, url: str) -> "TokenStore":
        """Open a finished token store. Raises StoreError."""
        return _open(cls, url)

    def _decode(self, batch: pa.RecordBatch, i: int) -> TokenRow:
        return decode_tokens(batch, i)


class LogitStore(_Store[LogitRow]):
    """A teacher's soft labels."""

    kind = "logits"

    @classmethod
    def open(cls, url: str) -> "LogitStore":
        """Open a finished logit store. Raises StoreError."""
        return _open(cls, url)

    def _decode(self, batch: pa.RecordBatch, i: int) -> LogitRow:
        return decode_logits(batch, i)


StoreT = TypeVar("StoreT", TokenStore, LogitStore)


def open_store(url: str) -> TokenStore | LogitStore:
    """Open a finished store of either kind. Raises StoreError."""
    storage = Storage(url)
    manifest = read_manifest(storage)
    return LogitStore(storage, manifest) if manifest["kind"] == LogitStore.kind else TokenStore(storage, manifest)


def _open(cls: type[StoreT], url: str) -> StoreT:
    storage = Storage(url)
    manifest = read_manifest(storage)
    if manifest["kind"] != cls.kind:
        raise StoreError(f"{url} holds {manifest['kind']}, but {cls.kind} are needed here")
    return cls(storage, manifest)


def read_manifest(storage: Storage) -> dict[str, Any]:
    """The manifest of a finished store. Raises FormatError, NotFinishedError, CorruptError."""
    if storage.exists(MANIFEST):
        return unseal(storage.read(MANIFEST), "manifest", storage.path(MANIFEST))
    if not storage.exists(HEADER):
        raise FormatError(f"{storage.url} holds no decant store (no {MANIFEST}, no {HEADER})")
    header = unseal(storage.read(HEADER), "header", storage.path(HEADER))
    total = int(header["num_shards"])
    names = set(storage.names("shards"))
    done = sum(record_name(shard).removeprefix("shards/") in names for shard in range(total))
    verb = "cache" if header["kind"] == LogitStore.kind else "tokenize"
    raise NotFinishedError(
        f"{storage.url} is not finished: {done} of {total} shards are committed. "
        f"Run the same `decant {verb}` command again; it goes on from there"
    )
