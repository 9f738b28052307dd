"""Documents in Parquet and Arrow files: the types of their columns, how many there are, and reading them."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cluster.corpus.documents import BEGIN, Document, Measure, reading
from cluster.corpus.files import SourceFile, open_table
from logit_store.errors import CorpusError

BATCH_ROWS = 256
BUFFER_BYTES = 2**20
"""Of each column of a Parquet file: a row group is decoded as it is read, and never held whole."""

SIMPLE = ("string", "int64", "float64", "bool")
"""Kinds of values whose types files must agree in."""


def kind_of(found: pa.DataType) -> str:
    """What a column's values are to us: one of ``SIMPLE``, ``null``, or Arrow's name for anything else."""
    kind = found.value_type if pa.types.is_dictionary(found) else found
    tests = {
        "string": lambda t: pa.types.is_string(t) or pa.types.is_large_string(t) or pa.types.is_string_view(t),
        "int64": lambda t: pa.types.is_integer(t) and not pa.types.is_uint64(t),
        "float64": pa.types.is_floating,
        "bool": pa.types.is_boolean,
    }
    return next((name for name, test in tests.items() if test(kind)), str(found))


def table_kinds(file: SourceFile) -> dict[str, str]:
    """The kind of each column, from the file's schema alone. Raises CorpusError."""
    with reading(file), open_table(file, footer_only=file.format == "parquet") as opened:
        schema = pq.ParquetFile(opened).schema_arrow if file.format == "parquet" else _open_arrow(opened)[0]
    kinds = {field.name: kind_of(field.type) for field in schema}
    if twice := sorted(name for name in kinds if schema.names.count(name) > 1):
        raise CorpusError(f"{file.name} has more than one column {twice[0]!r}, and which one is meant nobody can tell")
    return kinds


def measure_table(file: SourceFile, wanted: dict[str, str], content: str) -> Measure:
    """Count the documents of a table from its metadata.

    ``wanted`` are the columns that will be read and their kinds in the first file. Raises CorpusError: the file lacks
    one, or holds something else in it.
    """
    _check_kinds(file, table_kinds(file), wanted)
    is_parquet = file.format == "parquet"
    with reading(file), open_table(file, footer_only=is_parquet) as opened:
        if is_parquet:
            metadata = pq.ParquetFile(opened).metadata
            groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
            chunks = (group.column(j) for group in groups for j in range(metadata.num_columns))
            num_bytes = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == content)
            return Measure(metadata.num_rows, num_bytes, BEGIN)
        counts = [(batch.num_rows, batch.column(content).nbytes) for batch in _open_arrow(opened)[1]]
    return Measure(sum(rows for rows, _ in counts), sum(size for _, size in counts), BEGIN)


def read_table(
    file: SourceFile, _marks: NDArray[np.int64], start: int, columns: Sequence[str] | None
) -> Iterator[Document]:
    """The documents of a table from the ``start``-th on, with these columns, or with all."""
    number = start
    with reading(file), open_table(file) as opened:
        batches = _parquet_batches if file.format == "parquet" else _arrow_batches
        for batch in batches(opened, start, columns):
            for values in batch.to_pylist():
                number += 1
                yield Document(values, file, number)


def _parquet_batches(opened: Any, start: int, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    """Batches of the rows from ``start`` on; the row groups before it are not read."""
    table = pq.ParquetFile(opened, buffer_size=BUFFER_BYTES, pre_buffer=False)
    rows = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    ends = np.cumsum([0, *rows])
    group = int(np.searchsorted(ends, start, side="right")) - 1
    skip = start - int(ends[group])
    for batch in table.iter_batches(BATCH_ROWS, row_groups=range(group, len(rows)), columns=columns):
        if skip < batch.num_rows:
            yield batch.slice(skip)
        skip = max(skip - batch.num_rows, 0)


def _arrow_batches(opened: Any, start: int, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    """Pieces of the rows from ``start`` on; of a mapped file, batches before it are looked at and not read."""
    skip = start
    for batch in _open_arrow(opened)[1]:
        rows = batch if columns is None else batch.select(list(columns))
        for first in range(skip, batch.num_rows, BATCH_ROWS):
            yield rows.slice(first, BATCH_ROWS)
        skip = max(skip - batch.num_rows, 0)


def _open_arrow(opened: Any) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Schema and batches of an Arrow IPC file, or of a stream, as `datasets` saves them."""
    try:
        table = pa.ipc.open_file(opened)
    except pa.ArrowInvalid:
        opened.seek(0)
        stream = pa.ipc.open_stream(opened)
        return stream.schema, iter(stream)
    return table.schema, (table.get_batch(i) for i in range(table.num_record_batches))


def _check_kinds(file: SourceFile, kinds: dict[str, str], wanted: dict[str, str]) -> None:
    for name, kind in wanted.items():
        if name not in kinds:
            raise CorpusError(f"{file.name} has no column {name!r}, which the corpus' first file has")
        differ = kinds[name] != kind and "null" not in (kinds[name], kind)
        if differ and (kind in SIMPLE or kinds[name] in SIMPLE):
            raise CorpusError(
                f"column {name!r} holds {kinds[name]} in {file.name}, and {kind} in the corpus' first file"
            )
