"""How a store comes to be: a header first, shards committed by whoever is first, the manifest last."""

import base64
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logit_store.codec.levels import CodecConfig
from logit_store.encode import Encoded, encode_logits, encode_tokens
from logit_store.errors import CorruptError, IdentityError, NotFinishedError
from logit_store.format import (
    HEADER,
    INDEX,
    MANIFEST,
    OBJECT_NAME,
    RECORD_NAME,
    SHARDS,
    TEMPORARY_SUFFIX,
    describe,
    object_name,
    record_name,
    seal,
    unseal,
)
from logit_store.identity import digest, require_equal, text_id
from logit_store.index import ShardColumns, encode_index, page_checksums
from logit_store.manifest import layout_of, read_manifest
from logit_store.record import rows_of_record
from logit_store.rows import SPLITS, LogitRow, TokenRow
from logit_store.storage import Storage

Record = dict[str, Any]
RECORDS_AT_ONCE = 256
"""Records asked of an object store at the same time."""


def check(storage: Storage, header: dict[str, Any], identity: Sequence[str]) -> bool:
    """Whether the directory holds the beginnings of this very store; False where it is empty. Writes nothing.

    Raises IdentityError: it belongs to another run, or holds something else.
    """
    if not storage.exists(HEADER):
        if not storage.is_empty():
            raise IdentityError(
                f"{storage.url} is not empty and holds no decant store: choose another directory or empty this one"
            )
        return False
    found = unseal(storage.read(HEADER), "header", storage.path(HEADER))
    require_equal(
        {field: found.get(field) for field in identity},
        {field: header.get(field) for field in identity},
        storage.url,
        "Choose another directory, or delete that one if it is not wanted",
    )
    return True


def begin(storage: Storage, header: dict[str, Any], identity: Sequence[str]) -> dict[str, Any]:
    """Create the store's header, or join a store that has one; return the header that is there.

    ``identity`` names the header's fields that must be equal for a run to go on with the store; the
    rest (provenance) stays what the first run wrote.
    Raises IdentityError: the directory belongs to another run, or holds something else.
    """
    if not check(storage, header, identity):
        storage.create(HEADER, seal("header", header))
    check(storage, header, identity)  # another run may have been first
    return unseal(storage.read(HEADER), "header", storage.path(HEADER))


class Prepared(NamedTuple):
    """A shard in memory, ready to be committed."""

    data: bytes
    facts: Record


def prepare_tokens(rows: Sequence[TokenRow], header: dict[str, Any]) -> Prepared:
    """Encode a token shard."""
    return _prepared(encode_tokens(rows, layout_of(header), header["columns"], describe(header)), rows)


def prepare_logits(
    rows: Sequence[LogitRow], header: dict[str, Any], left_out: Mapping[int, str] = MappingProxyType({})
) -> Prepared:
    """Encode a logit shard; ``left_out`` are its rows (by place) that have no labels, and why.

    Raises StoreError: the labels are no distributions, or cannot be stored within the codec's bounds.
    """
    codec = CodecConfig(**header["codec"])
    encoded = encode_logits(rows, layout_of(header), codec, header["columns"], describe(header))
    prepared = _prepared(encoded, [row.tokens for row in rows])
    if left_out:
        prepared.facts["left_out"] = {str(place): left_out[place] for place in sorted(left_out)}
    return prepared


def commit_tokens(storage: Storage, shard: int, rows: Sequence[TokenRow], header: dict[str, Any]) -> Record:
    """Encode and commit a token shard; the record that stands, whoever wrote it."""
    return commit(storage, shard, prepare_tokens(rows, header))


def commit_logits(
    storage: Storage,
    shard: int,
    rows: Sequence[LogitRow],
    header: dict[str, Any],
    left_out: Mapping[int, str] = MappingProxyType({}),
) -> Record:
    """Encode and commit a logit shard (see ``prepare_logits``); the record that stands, whoever wrote it."""
    return commit(storage, shard, prepare_logits(rows, header, left_out))


def is_committed(storage: Storage, num_shards: int) -> NDArray[np.bool_]:
    """For each shard whether its record is there, by names alone: of a million shards in seconds."""
    found = np.zeros(num_shards, np.bool_)
    for name in storage.scan("shards"):
        if RECORD_NAME.fullmatch(name) and int(name[:6]) < num_shards:
            found[int(name[:6])] = True
    return found


def read_record(storage: Storage, shard: int) -> Record:
    """A shard's commit record. Raises CorruptError, FormatError."""
    return unseal(storage.read(record_name(shard)), "record", storage.path(record_name(shard)))


def finish(storage: Storage, header: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    """Write index, table of shards and ``files`` (name → bytes), then the manifest; remove what dead attempts left.

    Raises NotFinishedError when a shard is missing.
    """
    if storage.exists(MANIFEST):  # another run was faster: what it wrote stands
        return read_manifest(storage)
    num_shards = int(header["num_shards"])
    if num_missing := num_shards - int(is_committed(storage, num_shards).sum()):
        raise NotFinishedError(f"{storage.url}: {num_missing} of {num_shards} shards are not committed")
    index, table, left_out = _gather(storage, num_shards)
    texts = [table.hash("text_sha256", shard) for shard in range(num_shards)]
    found = text_id(header["tokenizer"]["vocabulary_sha256"], texts)
    if header.get("text_id", found) != found:
        raise IdentityError(
            f"{storage.url}: its shards are not of text_id {header['text_id'][:12]}…: the token "
            "shards have changed since it was begun. Make the store again in an empty directory"
        )
    shards = table.encode()
    for name, data in {INDEX: index, SHARDS: shards, **files}.items():
        if not storage.create(name, data) and storage.read(name) != data:
            if storage.exists(MANIFEST):
                return read_manifest(storage)
            storage.delete(name)  # left by an attempt that died before the manifest, with another library version
            storage.create(name, data)
    _remove_strays(storage, table)
    manifest = {
        **header,
        "text_id": found,
        "index": {"bytes": len(index), "crc32": page_checksums(index)},
        "shards_sha256": digest(shards),
        "files": {name: digest(data) for name, data in sorted(files.items())},
        **{f"num_{name}": table.numbers[name].sum().item() for name in ("rows", "tokens", "positions", "bytes")},
    }
    if left_out:
        manifest["left_out"] = left_out
    storage.create(MANIFEST, seal("manifest", manifest))
    return read_manifest(storage)


def _gather(storage: Storage, num_shards: int) -> tuple[bytes, ShardColumns, dict[str, str]]:
    """Of all commit records, read a few at a time (the records of a million shards would fill gigabytes): the bytes of
    the index, the columns of the table, and the store's rows without labels and why.
    """
    lengths, splits, table, left_out = array("i"), array("b"), ShardColumns(num_shards), dict[str, str]()
    for shard, record in enumerate(_records(storage, num_shards)):
        first = len(lengths)
        left_out |= {str(first + int(place)): reason for place, reason in record.get("left_out", {}).items()}
        lengths_R, splits_R = rows_of_record(record)
        lengths.frombytes(lengths_R.tobytes())
        splits.frombytes(splits_R.tobytes())
        table.put(shard, record)
    return encode_index(np.asarray(lengths, np.int32), np.asarray(splits, np.int8)), table, left_out


def _records(storage: Storage, num_shards: int) -> Iterator[Record]:
    """The commit records in order."""
    for start in range(0, num_shards, RECORDS_AT_ONCE):
        names = [record_name(shard) for shard in range(start, min(start + RECORDS_AT_ONCE, num_shards))]
        for name, sealed in zip(names, storage.read_many(names), strict=True):
            yield unseal(sealed, "record", storage.path(name))


def _remove_strays(storage: Storage, table: ShardColumns) -> None:
    """Delete what no record names."""

    def is_stray(name: str) -> bool:
        if not (RECORD_NAME.fullmatch(name) or OBJECT_NAME.fullmatch(name)) or int(name[:6]) >= table.num_shards:
            return True
        shard = int(name[:6])
        return f"shards/{name}" not in (record_name(shard), object_name(shard, table.hash("sha256", shard)))

    for name in [name for name in storage.scan("shards") if is_stray(name)]:
        storage.delete(f"shards/{name}")
    for folder in ("", "tokenizer/"):
        for name in storage.names(folder):
            if name.endswith(TEMPORARY_SUFFIX):
                storage.delete(folder + name)


def put_object(storage: Storage, name: str, data: bytes) -> None:
    """Write a shard's object. One that is there has these very bytes, unless a dead attempt left it and it was damaged
    since, before any record named it; or an attempt that lost deletes it just now.
    """
    while not storage.create(name, data):
        try:
            if storage.read(name) == data:
                return
        except FileNotFoundError:
            continue
        if storage.exists(record_name(int(name.split("/")[1][:6]))):
            return  # somebody has committed this shard by now: nobody's object is ours to touch
        storage.delete(name)


def commit(storage: Storage, shard: int, prepared: Prepared) -> Record:
    """Put a shard in its place, unless somebody was faster; the record that stands, whoever wrote it."""
    sha256 = prepared.facts["sha256"]
    record = {"object": object_name(shard, sha256), **prepared.facts}
    put_object(storage, record["object"], prepared.data)
    storage.create(record_name(shard), seal("record", record))
    standing = read_record(storage, shard)
    if standing["object"] != record["object"]:
        storage.delete(record["object"])
    elif not storage.exists(record["object"]):
        raise CorruptError(
            f"{storage.path(record['object'])} vanished while it was committed: somebody deletes files here"
        )
    return standing


def _prepared(encoded: Encoded, rows: Sequence[TokenRow]) -> Prepared:
    lengths = np.array([len(row.input_ids_T) for row in rows], "<i4")
    splits = np.array([SPLITS.index(row.split) for row in rows], np.int8)
    facts = {
        "sha256": digest(encoded.data),
        "bytes": len(encoded.data),
        "prefix_crc32": zlib.crc32(encoded.data[: encoded.facts["prefix_bytes"]]),
        "index": base64.b64encode(zlib.compress(lengths.tobytes() + splits.tobytes())).decode(),
        **encoded.facts,
    }
    return Prepared(encoded.data, facts)
