"""`decant merge`: shards of one job that ran in several places, in one store."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from logit_store import writer
from logit_store.errors import CorruptError, FormatError, StoreError, UnavailableError
from logit_store.format import HEADER, MANIFEST, record_name, unseal
from logit_store.identity import HEADER_IDENTITY, digest, require_equal
from logit_store.manifest import read_manifest, verb_of
from logit_store.record import Facts, check_object, check_record, store_schema
from logit_store.storage import Storage
from logit_store.tools.outputs import require_outside
from logit_store.tools.progress import progress_bar


class Merged(NamedTuple):
    """What a merge came to."""

    num_shards: int
    missing: list[int]
    """Shards that no store has undamaged."""
    damaged: list[str]
    """What was passed over, and why: `FILE reason`."""
    is_finished: bool
    """False where shards are missing, or the tokenizer's files, which only finished stores have."""


def merge(urls: Sequence[str], out: str) -> Merged:
    """Copy the committed shards of several stores of one identity, finished or not, into the store ``out``.

    Objects and records are copied byte for byte, each verified before; of several undamaged ones, the one with the
    fewest rows left out is taken, or the first. A shard that ``out`` has stays. The store is finished if nothing is
    missing; if something is, the command that makes such stores goes on with it.
    Raises IdentityError: the stores are of different jobs, or ``out`` is something else; FormatError: no store;
    UnavailableError: a store does not answer, and the same call goes on when it does.
    """
    sources, target = [Storage(url) for url in urls], Storage(out)
    for source in sources:
        if source.root != target.root:
            require_outside(target, source)
    header = _common_header(sources)
    header = writer.begin(target, header, HEADER_IDENTITY[header["kind"]])
    num_shards, schema = header["num_shards"], store_schema(header)
    damaged: list[str] = []
    with progress_bar("merge", num_shards, "shards") as advance:
        committed = [set(storage.names("shards")) for storage in (target, *sources)]
        for shard in range(num_shards):
            name = record_name(shard).removeprefix("shards/")
            if name not in committed[0]:
                having = [source for source, names in zip(sources, committed[1:], strict=True) if name in names]
                _copy_best(having, target, shard, schema, damaged)
            advance(1)
    missing = np.flatnonzero(~writer.is_committed(target, num_shards)).tolist()
    if not missing and not target.exists(MANIFEST):
        files = _tokenizer_files(sources, damaged)
        if files is not None:
            writer.finish(target, header, files)
    return Merged(num_shards, missing, damaged, target.exists(MANIFEST))


def merge_command(urls: Sequence[str], out: str) -> int:
    """`decant merge`: its exit code, 0 where the store is finished. Raises StoreError."""
    merged = merge(urls, out)
    verb = verb_of(_header(Storage(out)))
    for reason in merged.damaged:
        print(f"passed over: {reason}")
    done = merged.num_shards - len(merged.missing)
    print(f"{out}: {done:,} of {merged.num_shards:,} shards")
    if merged.is_finished:
        return 0
    if merged.missing:
        reason = f"{len(merged.missing):,} shards are missing: {_some(merged.missing)}"
    else:
        reason = "every shard is there, but none of the stores is finished, and only these have the tokenizer's files"
    print(
        f"not finished: {reason}. Run the `decant {verb}` command of this job with this directory; it goes on from here"
    )
    return 1


def _common_header(sources: Sequence[Storage]) -> dict[str, Any]:
    """The first header; what the others say of where they ran is kept beside its own."""
    header, *others = [_header(source) for source in sources]
    if header.get("kind") not in HEADER_IDENTITY:
        raise FormatError(f"{sources[0].url} is of kind {header.get('kind')!r}; decant merges {list(HEADER_IDENTITY)}")
    fields = HEADER_IDENTITY[header["kind"]]
    for source, other in zip(sources[1:], others, strict=True):
        mine, theirs = ({field: h.get(field) for field in fields} for h in (header, other))
        require_equal(theirs, mine, source.url, f"Merge only stores of one job; {sources[0].url} came first")
    provenances = [found for found in (other.get("provenance") for other in others) if found]
    further = [
        found for i, found in enumerate(provenances) if found not in [header.get("provenance"), *provenances[:i]]
    ]
    if further:
        header["provenance"] = {**header.get("provenance", {}), "merged": further}
    return header


def _header(source: Storage) -> dict[str, Any]:
    if not source.exists(HEADER):
        raise FormatError(f"{source.url} holds no decant store (no {HEADER})")
    return unseal(source.read(HEADER), "header", source.path(HEADER))


def _copy_best(sources: Sequence[Storage], target: Storage, shard: int, schema: pa.Schema, damaged: list[str]) -> None:
    """Copy a shard from the store that has it whole and with the fewest rows left out, of equals the first; add to
    ``damaged`` what is passed over.
    """
    found = []
    for source in sources:
        with _noting(source, record_name(shard), damaged):
            sealed = source.read(record_name(shard))
            record = unseal(sealed, "record", source.path(record_name(shard)))
            check_record(record, shard)
            found.append((len(record.get("left_out", {})), source, sealed, record))
    for _, source, sealed, record in sorted(found, key=lambda one: one[0]):
        name, is_whole = record["object"], False
        with _noting(source, name, damaged):
            data = source.read(name)
            check_object([data], Facts.of_record(record), schema)
            is_whole = True
        if is_whole:
            writer.put_object(target, name, data)
            target.create(record_name(shard), sealed)
            return


@contextmanager
def _noting(source: Storage, name: str, damaged: list[str]) -> Iterator[None]:
    """What is wrong with the file is added to ``damaged``. Raises UnavailableError: nothing is known of the file, and
    whatever was taken in its place would stay.
    """
    try:
        yield
    except UnavailableError:
        raise
    except FileNotFoundError:
        damaged.append(f"{source.path(name)} is missing")
    except StoreError as error:
        damaged.append(f"{source.path(name)} {str(error).removeprefix(source.path(name)).strip()}")


def _tokenizer_files(sources: Sequence[Storage], damaged: list[str]) -> dict[str, bytes] | None:
    """The files of the first finished store that has them whole; None where there is none."""
    for source in sources:
        if not source.exists(MANIFEST):
            continue
        try:
            files = {name: (source.read(name), sha256) for name, sha256 in read_manifest(source)["files"].items()}
            for name, (data, sha256) in files.items():
                if digest(data) != sha256:
                    raise CorruptError(f"{source.path(name)} is damaged: its checksum does not match")
        except UnavailableError:
            raise
        except (FileNotFoundError, StoreError) as error:
            damaged.append(str(error))
        else:
            return {name: data for name, (data, _) in files.items()}
    return None


def _some(shards: Sequence[int]) -> str:
    return ", ".join(map(str, shards[:10])) + (", …" if len(shards) > 10 else "")
