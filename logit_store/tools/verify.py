"""`decant verify`: every byte of a store against what the store says of itself; all problems, not just the first."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from logit_store.errors import CorruptError, FormatError, StoreError
from logit_store.format import (
    FILE_NAME,
    HEADER,
    IN_LOGIT_SHARDS,
    IN_TOKEN_SHARDS,
    INDEX,
    MANIFEST,
    OBJECT_NAME,
    RECORD_NAME,
    SHARDS,
    TEMPORARY_SUFFIX,
    object_name,
    record_name,
    unseal,
)
from logit_store.identity import digest, labels_id, text_id
from logit_store.index import Index, ShardTable, page_checksums
from logit_store.manifest import ADDED_TO_HEADER, read_manifest
from logit_store.record import Facts, check_object, check_record, check_row, rows_of_record, store_schema
from logit_store.storage import Storage
from logit_store.tools.progress import Advance, progress_bar

Sealed = dict[str, Any]


class Problem(NamedTuple):
    """Something that is wrong with a store."""

    file: str
    """Its name below the store's directory."""
    reason: str
    shard: int | None = None
    """The shard that the file belongs to; None where it belongs to the whole store."""
    is_stray: bool = False
    """Whether the file is none of the store's: it is in the way, but nothing is damaged."""


def verify(url: str) -> list[Problem]:
    """All problems of a store of either kind, finished or not; none where every byte is what was committed.

    Each file is read once, in pieces. What a running or a dead job leaves in an unfinished store (temporary files,
    objects without a record) is no problem: finishing the store removes it.
    Raises FormatError where there is no store.
    """
    storage = Storage(url)
    sizes = storage.sizes()
    if HEADER not in sizes and MANIFEST not in sizes:
        raise FormatError(f"{url} holds no decant store (no {MANIFEST}, no {HEADER})")
    with progress_bar("verify", sum(sizes.values()), "bytes") as advance:
        return _Verification(storage, sizes, advance).run()


class _Verification:
    """One walk through a store; ``run`` gives its problems."""

    def __init__(self, storage: Storage, sizes: dict[str, int], advance: Advance) -> None:
        self.storage, self.sizes, self.advance = storage, sizes, advance
        self.is_finished = MANIFEST in sizes
        self.problems: list[Problem] = []
        self.looked_at: set[str] = set()
        """Names of the files that belong to the store."""

    def run(self) -> list[Problem]:
        self.header = self._header()
        self.manifest = self._manifest() if self.is_finished else None
        self.described = self.header or self.manifest
        """What is to be believed about the store as a whole; None where neither file is sound."""
        self._check_manifest()
        table, index = self._table(), self._index()
        records = self._records(table)
        self._check_objects(records, table)
        self._check_labels_id()
        if self.described is not None and len(records) == self.described["num_shards"]:
            ordered = [records[shard] for shard in sorted(records)]
            self._check_text_id(ordered)
            self._check_rows(ordered, index)
        self._check_files()
        self._check_strays()
        return self.problems

    def _header(self) -> Sealed | None:
        with self._reporting(HEADER):
            header = unseal(self._read(HEADER), "header", HEADER)
            fields = IN_LOGIT_SHARDS if header.get("kind") == "logits" else IN_TOKEN_SHARDS
            lacking = [field for field in (*fields, "tokenizer", "num_shards") if field not in header]
            if lacking:
                raise CorruptError(f"is no header of ours: it lacks {', '.join(lacking)}")
            return header
        return None

    def _manifest(self) -> Sealed | None:
        with self._reporting(MANIFEST):
            self.looked_at.add(MANIFEST)
            self.advance(self.sizes[MANIFEST])
            return read_manifest(self.storage)
        return None

    def _check_manifest(self) -> None:
        """A manifest is its header and a few fields more."""
        if self.header is None or self.manifest is None:
            return
        added = {*ADDED_TO_HEADER, "text_id"} - self.header.keys()
        there, wanted = ({k: v for k, v in body.items() if k not in added} for body in (self.manifest, self.header))
        differing = sorted(k for k in {*there, *wanted} if (k in there, there.get(k)) != (k in wanted, wanted.get(k)))
        if differing:
            self._report(MANIFEST, f"differs from {HEADER} in {', '.join(differing)}")

    def _table(self) -> ShardTable | None:
        if self.manifest is None:
            return None
        with self._reporting(SHARDS):
            data = self._read(SHARDS)
            if digest(data) != self.manifest["shards_sha256"]:
                raise CorruptError("is damaged: its checksum does not match")
            table = ShardTable(pa.py_buffer(data), SHARDS)
            if len(table) != self.manifest["num_shards"]:
                raise CorruptError(f"has {len(table)} rows for {self.manifest['num_shards']} shards")
            return table
        return None

    def _index(self) -> Index | None:
        if self.manifest is None:
            return None
        with self._reporting(INDEX):
            data, said = self._read(INDEX), self.manifest["index"]
            pages = page_checksums(data)
            if len(data) != said["bytes"] or pages != said["crc32"]:
                raise CorruptError("is damaged: its checksums do not match")
            return Index(pa.py_buffer(data), len(data), pages, self.manifest["num_rows"], INDEX)
        return None

    def _records(self, table: ShardTable | None) -> dict[int, Sealed]:
        """The commit records that are sound, by shard."""
        named = [name.removeprefix("shards/") for name in self.sizes if name.startswith("shards/")]
        found = sorted(int(name[:6]) for name in named if RECORD_NAME.fullmatch(name))
        num_shards = max(found, default=-1) + 1 if self.described is None else self.described["num_shards"]
        records: dict[int, Sealed] = {}
        for shard in range(num_shards) if self.is_finished else [shard for shard in found if shard < num_shards]:
            name = record_name(shard)
            with self._reporting(name, shard):
                record = unseal(self._read(name), "record", name)
                check_record(record, shard)
                records[shard] = record
                if table is not None:
                    check_row(table, shard, record)
        return records

    def _check_objects(self, records: dict[int, Sealed], table: ShardTable | None) -> None:
        """Every object that a record names, or, where the record is damaged, the table of shards."""
        facts = {} if table is None else {shard: Facts.of_table(table, shard) for shard in range(len(table))}
        facts |= {shard: Facts.of_record(record) for shard, record in records.items()}
        schema = None if self.described is None else store_schema(self.described)
        for shard in sorted(facts):
            name = object_name(shard, facts[shard].sha256)
            with self._reporting(name, shard):
                check_object(self._pieces(name), facts[shard], schema)

    def _check_labels_id(self) -> None:
        said = self.described or {}
        if said.get("kind") == "logits" and labels_id(said.get("labels") or {}) != said["labels_id"]:
            self._report(HEADER, f"has labels_id {said['labels_id'][:12]}…, which is not the hash of its labels")

    def _check_text_id(self, records: list[Sealed]) -> None:
        assert self.described is not None
        texts = [record["text_sha256"] for record in records]
        found = text_id(self.described["tokenizer"]["vocabulary_sha256"], texts)
        for name, body in ((HEADER, self.header), (MANIFEST, self.manifest)):
            said = (body or {}).get("text_id", found)
            if said != found:
                self._report(name, f"has text_id {said[:12]}…, but that of its shards is {found[:12]}…")

    def _check_rows(self, records: list[Sealed], index: Index | None) -> None:
        """What the manifest and the index say of all shards together."""
        for count in ("rows", "tokens", "positions", "bytes"):
            total = sum(record[count] for record in records)
            said = (self.manifest or {}).get(f"num_{count}", total)
            if said != total:
                self._report(MANIFEST, f"says {said:,} {count}, but the shards have {total:,}")
        if index is not None:
            rows = [rows_of_record(record) for record in records]
            lengths_N, splits_N = (np.concatenate([[], *(row[i] for row in rows)]) for i in range(2))
            with self._reporting(INDEX):
                if not (np.array_equal(index.lengths_N, lengths_N) and np.array_equal(index.splits_N, splits_N)):
                    raise CorruptError("does not hold the rows of the commit records")

    def _check_files(self) -> None:
        for name, sha256 in (self.manifest or {"files": {}})["files"].items():
            with self._reporting(name):
                if digest(self._read(name)) != sha256:
                    raise CorruptError("is damaged: its checksum does not match")

    def _check_strays(self) -> None:
        """Files that belong to nothing."""
        damaged = {problem.shard for problem in self.problems}
        for name in sorted(self.sizes.keys() - self.looked_at):
            in_shards = name.removeprefix("shards/") if name.startswith("shards/") else ""
            is_object = bool(OBJECT_NAME.fullmatch(in_shards))
            if is_object and int(in_shards[:6]) in damaged:
                continue  # nobody knows whether it is the one; it is dropped with its shard
            if self.manifest is None and (name in (INDEX, SHARDS) or FILE_NAME.fullmatch(name)):
                continue  # there is nothing to compare it with: finishing the store writes it again
            if is_object or name.endswith(TEMPORARY_SUFFIX):
                if self.is_finished:
                    self._report(name, "was left by a writer that lost or died: delete it", is_stray=True)
            else:
                self._report(name, "belongs to no store: move it elsewhere", is_stray=True)

    @contextmanager
    def _reporting(self, file: str, shard: int | None = None) -> Iterator[None]:
        """What goes wrong within the block becomes a problem of the file."""
        try:
            yield
        except FileNotFoundError:
            self._report(file, "is missing", shard)
        except OSError as error:
            self._report(file, f"cannot be read: {error.strerror or error}", shard)
        except StoreError as error:
            reason = str(error).removeprefix(self.storage.path("")).removeprefix(f"{file} ")
            self._report(file, reason, shard)

    def _report(self, file: str, reason: str, shard: int | None = None, is_stray: bool = False) -> None:
        self.problems.append(Problem(file, reason, shard, is_stray))

    def _read(self, name: str) -> bytes:
        return b"".join(self._pieces(name))

    def _pieces(self, name: str) -> Iterator[bytes]:
        self.looked_at.add(name)
        for piece in self.storage.pieces(name):
            self.advance(len(piece))
            yield piece
