"""`decant export`: a store's rows in files that Polars, DuckDB, pandas and `datasets` read without us."""

import json
from collections.abc import Iterable, Iterator
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logit_store.errors import ConfigError, IdentityError
from logit_store.format import TEMPORARY_SUFFIX
from logit_store.identity import require_equal
from logit_store.reader import LogitStore, TokenStore, open_store
from logit_store.rows import SPLITS, LogitRow
from logit_store.storage import Storage
from logit_store.tools.dataset_card import dataset_card
from logit_store.tools.outputs import require_outside, whole_file
from logit_store.tools.plain_columns import PlainColumns
from logit_store.tools.progress import Advance, progress_bar
from logit_store.tools.spans import parse_span

FORMATS = {"parquet": "parquet", "arrow": "arrow", "huggingface": "parquet"}
"""What can be written, and how the names of its files end."""

RECORD = "export.json"
"""What a directory holds an export of, so that another export never goes on with it."""

CARD = "README.md"

GROUP_ENTRIES = 2**22
"""Entries of a Parquet row group or an Arrow record batch, about: 32 MiB of ids and log-probs before compression."""


class File(NamedTuple):
    """One file of an export."""

    name: str
    rows_N: NDArray[np.int64]
    """Numbers of its rows in the store, ascending."""


def export(url: str, out: str, form: str = "parquet", rows: str | None = None, split: str | None = None) -> None:
    """Write the rows ``"A:B"`` (default: all) of ``split`` (default: both) below ``out``, one file per shard, or per
    shard and split for ``huggingface``. Files that are there already are complete and are left alone.

    Raises ConfigError: no such format, split or rows; IdentityError: ``out`` holds something else; StoreError.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format {form}: give one of {', '.join(FORMATS)}")
    store, target = open_store(url), Storage(out)
    span = parse_span(rows, len(store), "--rows", "rows")
    chosen_N, columns = choose_rows(store, span, split), PlainColumns(store)
    require_outside(target, store.storage)
    _claim(target, _record(store, columns, form, span, split))
    files = plan_files(store, chosen_N, form)
    todo = [file for file in files if not target.exists(file.name)]
    write = _write_arrow if form == "arrow" else _write_parquet
    with progress_bar("export", sum(len(file.rows_N) for file in todo), "rows") as advance:
        for file in todo:
            with whole_file(target, file.name) as stream:
                write(stream, columns.schema, _batches(store, file.rows_N, columns, advance))
    if form == "huggingface" and not target.exists(CARD):  # it may have been edited
        with whole_file(target, CARD) as stream:
            stream.write(dataset_card(store, columns.columns, chosen_N).encode())
    _remove_strays(target)
    print(f"{len(chosen_N):,} rows in {len(files):,} files below {target.url}", end="")
    print(f" ({len(files) - len(todo):,} of them were there already)" if len(todo) < len(files) else "")


def choose_rows(store: TokenStore | LogitStore, span: range, split: str | None) -> NDArray[np.int64]:
    """Numbers of the rows in ``span`` and in ``split`` that have labels, if they can, ascending.

    Raises ConfigError: there are none.
    """
    if split is not None and split not in SPLITS:
        raise ConfigError(f"--split {split}: give one of {', '.join(SPLITS)}")
    of_split_N = store.rows(split)
    chosen_N = of_split_N[(of_split_N >= span.start) & (of_split_N < span.stop)]
    if not len(chosen_N):
        of_split = f" of split {split}" if split else ""
        raise ConfigError(f"{store.storage.url} has no rows{of_split} among rows {span.start}:{span.stop}")
    return chosen_N


def plan_files(store: TokenStore | LogitStore, chosen_N: NDArray[np.int64], form: str) -> list[File]:
    """The files of an export of these rows. Shards of which no row was chosen have none."""
    edges = np.searchsorted(chosen_N, store.shards.starts)
    files = []
    for shard in range(len(store.shards)):
        rows_N = chosen_N[edges[shard] : edges[shard + 1]]
        if form != "huggingface":
            files.append(File(f"data/{shard:06d}.{FORMATS[form]}", rows_N))
            continue
        splits_N = store.index.splits_N[rows_N]
        for i, split in enumerate(SPLITS):
            files.append(File(f"data/{split}-{shard:06d}.{FORMATS[form]}", rows_N[splits_N == i]))
    return [file for file in files if len(file.rows_N)]


def _record(
    store: TokenStore | LogitStore, columns: PlainColumns, form: str, span: range, split: str | None
) -> dict[str, Any]:
    identity = {field: store.manifest.get(field) for field in ("kind", "labels_id", "text_id", "codec")}
    types = {column.name: str(column.type) for column in columns.columns}
    return {**identity, "format": form, "rows": [span.start, span.stop], "split": split, "columns": types}


def _claim(target: Storage, record: dict[str, Any]) -> None:
    """Go on only in a directory that is empty or holds this very export. Raises IdentityError."""
    if not target.exists(RECORD):
        if not target.is_empty():
            raise IdentityError(f"{target.url} is not empty and holds no export: choose another directory for --out")
        target.create(RECORD, json.dumps(record, indent=2).encode() + b"\n")
    try:
        found = json.loads(target.read(RECORD))
        require_equal(found, record, target.url, "Choose another directory for --out, or delete that one")
    except (ValueError, AttributeError):
        raise IdentityError(f"{target.path(RECORD)} cannot be read: choose another directory for --out") from None


def _remove_strays(target: Storage) -> None:
    """Delete what killed exports left."""
    for name in target.names("data"):
        if name.endswith(TEMPORARY_SUFFIX):
            target.delete(f"data/{name}")


def _batches(
    store: TokenStore | LogitStore, rows_N: NDArray[np.int64], columns: PlainColumns, advance: Advance
) -> Iterator[pa.RecordBatch]:
    numbers: list[int] = []
    rows: list[Any] = []
    size = 0
    for number in rows_N.tolist():
        row = store[number]
        numbers.append(number)
        rows.append(row)
        size += len(row.targets.head_ids_N) if isinstance(row, LogitRow) else len(row.input_ids_T)
        if size >= GROUP_ENTRIES:
            yield columns.batch(numbers, rows)
            advance(len(rows))
            numbers, rows, size = [], [], 0
    if rows:
        yield columns.batch(numbers, rows)
        advance(len(rows))


def _write_parquet(stream: IO[bytes], schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    import pyarrow.parquet as pq

    repeating = _names_of_text(schema)  # a dictionary of ids or log-probs would only be built and thrown away
    options: dict[str, Any] = {"compression": "zstd", "compression_level": 3, "use_dictionary": repeating}
    with pq.ParquetWriter(stream, schema, **options) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _names_of_text(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if pa.types.is_string(field.type)]


def _write_arrow(stream: IO[bytes], schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    with pa.ipc.new_file(stream, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        for batch in batches:
            writer.write_batch(batch)
