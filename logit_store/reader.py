"""Reading a finished store: any row by number, every byte verified before it is believed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logit_store.codec.blocks import Tokens
from logit_store.codec.levels import CodecConfig
from logit_store.errors import CorruptError, StoreError
from logit_store.format import INDEX, SHARDS, object_name
from logit_store.identity import digest
from logit_store.index import Index, ShardTable
from logit_store.manifest import layout_of, read_manifest
from logit_store.record import store_schema
from logit_store.rows import SPLITS, LogitRow, TokenRow
from logit_store.shard import REDO, Shard, split_rows
from logit_store.shard_cache import ShardCache
from logit_store.storage import Storage

RowT = TypeVar("RowT")
T = TypeVar("T")
OPEN_SHARDS = 256
"""Shards kept mapped: a file descriptor and a few kilobytes each."""


class _Store(ABC, Generic[RowT]):
    """What token and logit stores share: manifest, index, and rows by number.

    Also a map-style dataset for ``torch.utils.data.DataLoader``: it has a length, rows by number, and can be sent to
    worker processes, which open it again.
    """

    kind: str

    def __init__(self, storage: Storage, manifest: dict[str, Any], cache: ShardCache | None = None) -> None:
        self.storage, self.manifest = storage, manifest
        self._cache = cache or ShardCache()
        self._layout = layout_of(manifest)
        self._schema = store_schema(manifest)
        self.shards = ShardTable(self._verified(SHARDS, manifest["shards_sha256"]), storage.path(SHARDS))
        """Figures of each shard."""
        if len(self.shards) != manifest["num_shards"] or self.shards.starts[-1] != manifest["num_rows"]:
            raise CorruptError(f"{storage.url}: the manifest and {SHARDS} disagree. Restore the store from a copy")
        index = manifest["index"]
        data = self._map(INDEX)
        self.index = Index(data, index["bytes"], index["crc32"], manifest["num_rows"], storage.path(INDEX))
        """Length and split of each row."""
        self._shard = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)
        self._block = lru_cache(maxsize=2)(self._read_block)
        self._token_block = lru_cache(maxsize=2)(self._read_token_block)

    def __len__(self) -> int:
        return int(self.shards.starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.storage, self.manifest, self._cache)

    def __getitem__(self, row: int) -> RowT:
        """Row number ``row``. Raises IndexError, CorruptError."""
        shard, block, i = self._find(row)
        return self._row(shard, block, i)

    def tokens(self, row: int) -> TokenRow:
        """The tokens of row number ``row``, without the cost of its labels. Raises IndexError, CorruptError."""
        shard, block, i = self._find(row)
        return self._token_block(shard, block)[i]

    def rows(self, split: str | None) -> NDArray[np.int64]:
        """Numbers of the rows in ``split``, or of all (None), ascending."""
        if split is None:
            return np.arange(len(self))
        return np.flatnonzero(self.index.splits_N == SPLITS.index(split))

    @property
    def lengths_N(self) -> NDArray[np.int32]:
        """Tokens of each row."""
        return self.index.lengths_N

    def shard_rows(self, shard: int) -> range:
        """Numbers of a shard's rows."""
        return range(int(self.shards.starts[shard]), int(self.shards.starts[shard + 1]))

    def files(self) -> dict[str, bytes]:
        """The tokenizer's files, verified: name → bytes."""
        return {name: self._verified(name, sha256).to_pybytes() for name, sha256 in self.manifest["files"].items()}

    def shard_name(self, shard: int) -> str:
        """Name of a shard's file."""
        return object_name(shard, self.shards.hash("sha256", shard))

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return int(self.shards.total("bytes"))

    @property
    def num_positions(self) -> int:
        """Positions of all rows: tokens that have a prediction."""
        return int(self.shards.total("positions"))

    @abstractmethod
    def _row(self, shard: int, block: int, i: int) -> RowT:
        """Row ``i`` of a block."""

    def _find(self, row: int) -> tuple[int, int, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a store of {len(self)} rows")
        shard, in_shard = self.shards.shard_of(row)
        return shard, *self._retried(shard, lambda opened: opened.block_of(in_shard))

    def _read_token_block(self, shard: int, block: int) -> list[TokenRow]:
        tokens: Tokens = self._retried(shard, lambda opened: opened.tokens(block))
        return self._shard(shard).token_rows(block, tokens)

    def _read_block(self, shard: int, block: int) -> list[LogitRow]:
        tokens, targets = self._retried(shard, lambda opened: opened.decode(block))
        return list(split_rows(self._shard(shard).token_rows(block, tokens), targets))

    def _retried(self, shard: int, read: Callable[[Shard], T]) -> T:
        """What ``read`` gets of a shard; where a copy of a remote shard was damaged, of a new copy."""
        try:
            return read(self._shard(shard))
        except CorruptError:
            if self.storage.is_local:
                raise
            self._cache.discard(self.shards.hash("sha256", shard))
            self._shard.cache_clear()
            return read(self._shard(shard))

    def _open_shard(self, shard: int) -> Shard:
        columns, name = self.shards.columns, self.shard_name(shard)
        path, data = self.storage.path(name), self._map(name) if self.storage.is_local else self._fetched(shard)
        if data.size != columns["bytes"][shard]:
            raise CorruptError(f"{path} is damaged: it has {data.size:,} bytes of {columns['bytes'][shard]:,}. {REDO}")
        prefix = (int(columns["prefix_bytes"][shard]), int(columns["prefix_crc32"][shard]))
        opened = Shard(data, path, prefix, self._layout, self._schema)
        if opened.first_rows[-1] != columns["rows"][shard]:
            raise CorruptError(f"{path} does not have the rows that {SHARDS} says. {REDO}")
        return opened

    def _fetched(self, shard: int) -> pa.Buffer:
        name = self.shard_name(shard)
        try:
            return pa.memory_map(self._cache.fetch(self.storage, name, self.shards.hash("sha256", shard))).read_buffer()
        except FileNotFoundError:
            raise CorruptError(f"{self.storage.path(name)} is missing. {REDO}") from None

    def _map(self, name: str) -> pa.Buffer:
        try:
            return self.storage.map(name)
        except FileNotFoundError:
            raise CorruptError(f"{self.storage.path(name)} is missing. {REDO}") from None

    def _verified(self, name: str, sha256: str) -> pa.Buffer:
        data = self._map(name)
        if digest(data) != sha256:
            raise CorruptError(f"{self.storage.path(name)} is damaged: its checksum does not match. {REDO}")
        return data


class TokenStore(_Store[TokenRow]):
    """Tokenised text, ready for any teacher."""

    kind = "tokens"

    @classmethod
    def open(cls, url: str, cache: ShardCache | None = None) -> "TokenStore":
        """Open a finished token store. Raises StoreError."""
        return _open(cls, url, cache)

    def _row(self, shard: int, block: int, i: int) -> TokenRow:
        return self._token_block(shard, block)[i]


class LogitStore(_Store[LogitRow]):
    """A teacher's soft labels."""

    kind = "logits"

    @classmethod
    def open(cls, url: str, cache: ShardCache | None = None) -> "LogitStore":
        """Open a finished logit store at a local path or any fsspec URL; of a remote one, shards are kept in ``cache``.

        Raises StoreError.
        """
        return _open(cls, url, cache)

    @property
    def codec(self) -> CodecConfig:
        """How log-probs are stored."""
        return CodecConfig(**self.manifest["codec"])

    @cached_property
    def left_out(self) -> dict[int, str]:
        """Rows that the teacher could not score, and why: they have tokens but no labels."""
        return {int(row): reason for row, reason in self.manifest.get("left_out", {}).items()}

    @property
    def num_labelled(self) -> int:
        """Positions of rows that have labels."""
        return self.num_positions - int(sum(max(self.lengths_N[row] - 1, 0) for row in self.left_out))

    def rows(self, split: str | None) -> NDArray[np.int64]:
        """Numbers of the rows in ``split``, or of all (None), that have labels, ascending."""
        rows = super().rows(split)
        return rows[~np.isin(rows, list(self.left_out))] if self.left_out else rows

    def read(self, rows: Iterable[int]) -> list[LogitRow]:
        """Several rows, in this order; rows of one block are cheapest one after the other."""
        return [self[int(row)] for row in rows]

    def _row(self, shard: int, block: int, i: int) -> LogitRow:
        return self._block(shard, block)[i]


StoreT = TypeVar("StoreT", TokenStore, LogitStore)


def open_store(url: str) -> TokenStore | LogitStore:
    """Open a finished store of either kind. Raises StoreError."""
    storage = Storage(url)
    manifest = read_manifest(storage)
    return LogitStore(storage, manifest) if manifest["kind"] == LogitStore.kind else TokenStore(storage, manifest)


def _open(cls: type[StoreT], url: str, cache: ShardCache | None) -> StoreT:
    storage = Storage(url)
    manifest = read_manifest(storage)
    if manifest["kind"] != cls.kind:
        raise StoreError(f"{url} holds {manifest['kind']}, but {cls.kind} are needed here")
    return cls(storage, manifest, cache)
