"""How a store comes to be: a header first, shards committed by whoever is first, the manifest last."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from logit_store.errors import IdentityError, NotFinishedError
from logit_store.format import (
    HEADER,
    INDEX,
    MANIFEST,
    encode_logits,
    encode_tokens,
    object_name,
    record_name,
    seal,
    unseal,
)
from logit_store.identity import digest, require_equal
from logit_store.rows import LogitRow, TokenRow
from logit_store.storage import Storage

Record = dict[str, Any]


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


def commit_tokens(storage: Storage, shard: int, rows: Sequence[TokenRow]) -> Record:
    """Encode and commit a token shard; the record that stands, whoever wrote it."""
    data, rows_per_batch = encode_tokens(rows, {})
    return _commit(storage, shard, data, rows_per_batch, [row.input_ids_T for row in rows], {})


def commit_logits(storage: Storage, shard: int, rows: Sequence[LogitRow], logprob_dtype: str, labels_id: str) -> Record:
    """Encode and commit a logit shard; the record that stands, whoever wrote it."""
    data, rows_per_batch = encode_logits(rows, logprob_dtype, {"decant.labels_id": labels_id})
    kept_mass = sum(float(-np.expm1(row.targets.tail_logmass_P.astype(np.float64)).sum()) for row in rows)
    ids = [row.tokens.input_ids_T for row in rows]
    return _commit(storage, shard, data, rows_per_batch, ids, {"kept_mass": kept_mass})


def committed(storage: Storage, num_shards: int) -> dict[int, Record]:
    """The commit records that are there, by shard."""
    names = set(storage.names("shards"))
    wanted = [s for s in range(num_shards) if record_name(s).removeprefix("shards/") in names]
    return {shard: _read_record(storage, shard) for shard in wanted}


def finish(storage: Storage, header: dict[str, Any], index: bytes, files: dict[str, bytes]) -> dict[str, Any]:
    """Write index and ``files`` (name → bytes), then the manifest; remove what dead attempts left.

    Raises NotFinishedError when a shard is missing.
    """
    num_shards = int(header["num_shards"])
    records = committed(storage, num_shards)
    if len(records) < num_shards:
        raise NotFinishedError(f"{storage.url}: {num_shards - len(records)} of {num_shards} shards are not committed")
    for name, data in {INDEX: index, **files}.items():
        if not storage.create(name, data) and storage.read(name) != data:
            storage.delete(name)  # left by an attempt that died before the manifest, with another library version
            storage.create(name, data)
    named = {record["object"] for record in records.values()} | {f"{shard:06d}.json" for shard in records}
    for name in storage.names("shards"):
        if name not in named:
            storage.delete(f"shards/{name}")
    manifest = {
        **header,
        "index_sha256": digest(index),
        "files": {name: digest(data) for name, data in sorted(files.items())},
        "shards": [records[shard] for shard in range(num_shards)],
    }
    storage.create(MANIFEST, seal("manifest", manifest))
    return manifest


def _commit(
    storage: Storage, shard: int, data: bytes, rows_per_batch: int, ids: Sequence[np.ndarray], extra: Record
) -> Record:
    sha256 = digest(data)
    record = {
        "object": object_name(shard, sha256),
        "sha256": sha256,
        "bytes": len(data),
        "rows": len(ids),
        "rows_per_batch": rows_per_batch,
        "tokens": sum(len(row) for row in ids),
        "positions": sum(max(len(row) - 1, 0) for row in ids),
        **extra,
    }
    storage.create(f"shards/{record['object']}", data)
    storage.create(record_name(shard), seal("record", record))
    standing = _read_record(storage, shard)
    if standing["object"] != record["object"]:
        storage.delete(f"shards/{record['object']}")
    return standing


def _read_record(storage: Storage, shard: int) -> Record:
    return unseal(storage.read(record_name(shard)), "record", storage.path(record_name(shard)))
