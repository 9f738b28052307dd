"""Looking through the files of a corpus once: how many documents each holds, and what its content is."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.corpus.documents import BEGIN, Document, Measure, measure_lines, measure_text, read_lines, read_text
from cluster.corpus.files import SourceFile
from cluster.corpus.tables import measure_table, read_table, table_kinds
from cluster.hashing import file_sha256
from cluster.remembered import recall, remember
from logit_store.identity import digest_json

READERS = {"json": read_lines, "lines": read_lines, "text": read_text, "parquet": read_table, "arrow": read_table}
LOOKED_AT = 1000
"""Documents of a JSON file whose columns and types stand for all of them, since such files have no schema."""

VALUE_KINDS = {str: "string", int: "int64", float: "float64", bool: "bool", type(None): "null"}
VALUE_KINDS |= {list: "a list", dict: "an object"}
"""Kinds of the values that JSON has (see ``kind_of`` for those of tables)."""


class Wanted(NamedTuple):
    """What will be read of every file."""

    content: str
    """The column that becomes tokens."""
    kinds: dict[str, str]
    """All columns that will be read, and their kinds in the first file."""


class Scan(NamedTuple):
    """What is known of a file."""

    content: str
    """SHA-256 of a local file's bytes, otherwise the file's stamp."""
    measure: Measure


def scan_files(wanted: Wanted, files: Sequence[SourceFile]) -> list[Scan]:
    """Look through files. Raises CorpusError: one cannot be read, or is unlike the first."""
    return [Scan(_content(file), _measure(file, wanted)) for file in files]


def known_scan(file: SourceFile, wanted: Wanted) -> Scan | None:
    """What an earlier scan of this very file found."""
    found = recall("scans", _key(file, wanted))
    if found is None:
        return None
    content, num_documents, num_bytes, marks = found
    return Scan(content, Measure(num_documents, num_bytes, np.array(marks, np.int64)))


def keep_scan(file: SourceFile, wanted: Wanted, scan: Scan) -> None:
    """Remember what was found, for this machine's next command."""
    measure = scan.measure
    value = [scan.content, measure.num_documents, measure.num_bytes, measure.marks.tolist()]
    remember("scans", _key(file, wanted), value)


def read_file(
    file: SourceFile, marks: NDArray[np.int64], start: int, columns: Sequence[str] | None
) -> Iterator[Document]:
    """Documents of the file from the ``start``-th on, with these columns, or with all. Raises CorpusError."""
    return READERS[file.format](file, marks, start, columns)


def column_kinds(file: SourceFile) -> dict[str, str]:
    """The columns of a file and their kinds (see ``kind_of``); none where it has no documents. Raises CorpusError."""
    if file.format in ("parquet", "arrow"):
        return table_kinds(file)
    if file.format in ("lines", "text"):
        return {"text": "string"}
    kinds: dict[str, str] = {}
    for document in islice(read_lines(file, BEGIN, 0, None), LOOKED_AT):
        for name, value in document.values.items():
            kinds[name] = _common_kind(kinds.get(name, "null"), VALUE_KINDS[type(value)])
    return kinds


def _common_kind(one: str, other: str) -> str:
    if one == other or other == "null":
        return one
    if one == "null":
        return other
    return "float64" if {one, other} == {"int64", "float64"} else "values of several types"


def _content(file: SourceFile) -> str:
    return file.stamp if file.snapshot or "://" in file.path else file_sha256(file.path)


def _measure(file: SourceFile, wanted: Wanted) -> Measure:
    if file.format in ("parquet", "arrow"):
        return measure_table(file, wanted.kinds, wanted.content)
    return measure_text(file) if file.format == "text" else measure_lines(file, wanted.content)


def _key(file: SourceFile, wanted: Wanted) -> str:
    is_table = file.format in ("parquet", "arrow")
    return digest_json([file.format, file.stamp, wanted.content, sorted(wanted.kinds.items()) if is_table else []])
