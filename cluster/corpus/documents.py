"""Documents as they lie in files of lines and text: how many there are, and reading them from any one on."""

import io
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

from cluster.corpus.files import SourceFile, open_stream
from logit_store.errors import CorpusError

MARK_BYTES = 4 * 2**20
"""Between two places of a file at which reading can begin: 250,000 of them for a terabyte, and milliseconds to skip."""

READ_ERRORS = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""What reading a damaged or foreign file raises; Arrow's errors are among them."""


class Document(NamedTuple):
    """What a corpus holds in one place."""

    values: dict[str, Any]
    """By column, those that were asked for."""
    file: SourceFile
    number: int
    """Its place in the file: of formats in lines the line, otherwise which document it is; from 1."""

    @property
    def place(self) -> str:
        """Where it is, as errors say it."""
        unit = "line" if self.file.format in ("json", "lines") else "document"
        return f"{self.file.name}, {unit} {self.number}"


class Measure(NamedTuple):
    """What has to be known of a file before its documents can be shared out."""

    num_documents: int
    num_bytes: int
    """Of its content, uncompressed, about."""
    marks: NDArray[np.int64]
    """[M, 3]: places where reading can begin, as (documents, bytes, lines) before them. The first is the begin."""


BEGIN = np.zeros((1, 3), np.int64)
"""Marks of a file that was not measured, or that can only be read from its beginning on."""


def measure_lines(file: SourceFile, content: str) -> Measure:
    """Count the documents of a file of lines; each of them is parsed, so that none can stop a run in its middle.

    ``content`` is the column that becomes tokens. A line may leave it out, as JSON does with what is empty, but not all
    of them. Raises CorpusError naming the line that is no document, or the file that has no such column.
    """
    marks = [(0, 0, 0)]
    num_documents = position = 0
    has_content = False
    with reading(file), open_stream(file) as stream:
        for number, line in enumerate(stream):
            if not line.isspace():
                if position >= marks[-1][1] + MARK_BYTES and not file.is_compressed:
                    marks.append((num_documents, position, number))
                has_content |= content in _parse(file, number + 1, line)
                num_documents += 1
            position += len(line)
    if num_documents and not has_content:
        raise CorpusError(f"{file.name} has no column {content!r}, which the corpus' first file has")
    return Measure(num_documents, position, np.array(marks, np.int64))


def read_lines(
    file: SourceFile, marks: NDArray[np.int64], start: int, columns: Sequence[str] | None
) -> Iterator[Document]:
    """The documents of a file of lines from the ``start``-th on, with these columns, or with all."""
    num_documents, position, number = marks[np.searchsorted(marks[:, 0], start, side="right") - 1].tolist()
    with reading(file), open_stream(file) as stream:
        if position:
            stream.seek(position)
        for line in stream:
            number += 1
            if line.isspace():
                continue
            if num_documents >= start:
                values = _parse(file, number, line)
                yield Document(values if columns is None else {c: values.get(c) for c in columns}, file, number)
            num_documents += 1


def measure_text(file: SourceFile) -> Measure:
    """A text file is one document."""
    return Measure(1, sum(len(d.values["text"]) for d in read_text(file, BEGIN, 0, None)), BEGIN)


def read_text(
    file: SourceFile, _marks: NDArray[np.int64], start: int, _columns: Sequence[str] | None
) -> Iterator[Document]:
    """The one document of a text file, with all ends of lines as line feeds."""
    if start == 0:
        with reading(file), open_stream(file) as stream:
            text = io.TextIOWrapper(stream, encoding="utf-8-sig").read()  # the mark of a file's begin is no text
        yield Document({"text": text}, file, 1)


@contextmanager
def reading(file: SourceFile) -> Iterator[None]:
    """Say which file it was that could not be read. Raises CorpusError."""
    try:
        yield
    except READ_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CorpusError(f"{file.name} cannot be read as {file.format}: {reason}") from error


def _parse(file: SourceFile, number: int, line: bytes) -> dict[str, Any]:
    """A line's document. Raises CorpusError: it is none, or holds characters that no encoding can carry."""
    try:
        if file.format == "lines":
            return {"text": line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")}
        document = json.loads(line)
        if rb"\ud" in line.lower():  # half a surrogate pair is no character, and JSON lets it pass
            json.dumps(document, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{file.name} cannot be read as {file.format}: line {number}: {error}") from error
    if not isinstance(document, dict):
        raise CorpusError(
            f"{file.name} cannot be read as json: line {number} holds a {type(document).__name__}, not an object. "
            "Each line must hold one document: an array is turned into lines by `jq -c '.[]'`"
        )
    return document
