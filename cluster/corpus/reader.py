"""A corpus: documents in the order of their files, of which any stretch can be read without the rest."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.config import SourceConfig
from cluster.corpus.documents import BEGIN, Document
from cluster.corpus.files import SourceFile, check_unchanged
from cluster.corpus.scan import Scan, Wanted, column_kinds, read_file
from cluster.corpus.tables import SIMPLE
from logit_store.errors import ConfigError, CorpusError
from logit_store.identity import digest_json
from logit_store.shard import COLUMN_TYPES, RESERVED_COLUMNS

CONTENT_KEYS = ("text_column", "messages_column", "ids_column", "mask_column")


class Corpus(NamedTuple):
    """What a task must know to read any stretch: a few numbers for each file, and none of the documents."""

    files: list[SourceFile]
    marks: list[NDArray[np.int64]]
    """Of each file, where reading can begin (see ``Measure``)."""
    starts: NDArray[np.int64]
    """[F + 1]: the corpus' documents before each file, and all of them."""
    columns: tuple[str, ...]
    """What is read of each document."""

    @classmethod
    def of_scans(cls, files: list[SourceFile], scans: Sequence[Scan], columns: Iterable[str]) -> "Corpus":
        """The corpus of these files."""
        counts = [scan.measure.num_documents for scan in scans]
        starts = np.cumsum([0, *counts], dtype=np.int64)
        return cls(files, [scan.measure.marks for scan in scans], starts, tuple(columns))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> Iterator[Document]:
        """The documents ``start`` to ``stop``, one at a time. Raises CorpusError: a file is not what was scanned."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        for i in range(first, len(self.files)):
            begin, end = int(self.starts[i]), int(self.starts[i + 1])
            if begin >= stop:
                return
            if start < end:
                check_unchanged(self.files[i])
                documents = read_file(self.files[i], self.marks[i], max(start - begin, 0), self.columns)
                yield from take(documents, min(stop, end) - max(start, begin))


def take(documents: Iterator[Document], count: int) -> Iterator[Document]:
    """The next ``count`` documents, and not a look at the one after them. Raises CorpusError: there are fewer."""
    for i in range(count):
        document = next(documents, None)
        if document is None:
            raise CorpusError(f"the corpus has changed while it was read: {count - i:,} documents fewer in one place")
        yield document


def first_documents(files: Sequence[SourceFile], columns: Sequence[str]) -> Iterator[Document]:
    """All documents, of files that nobody has looked through yet."""
    for file in files:
        yield from read_file(file, BEGIN, 0, columns)


def wanted_columns(files: Sequence[SourceFile], source: SourceConfig, carried: Sequence[str]) -> Wanted:
    """What will be read, checked against the first file that holds any documents.

    Raises CorpusError: the corpus is empty, or lacks the source's columns; ConfigError: it lacks one of ``carried``,
    or a store cannot carry it.
    """
    kinds = next((found for file in files if (found := column_kinds(file))), {})
    if not kinds:
        raise CorpusError("the corpus is empty: it holds no documents")
    content = [name for name in (source.content_column, source.mask_column) if name is not None]
    for name in content:
        if name not in kinds:
            key = next(key for key in CONTENT_KEYS if getattr(source, key) == name)
            raise CorpusError(
                f"the corpus has no column {name!r}; its columns are {', '.join(kinds)}. Set tokens.source.{key}"
            )
    kind = kinds[source.content_column]
    if source.text_column is not None and kind not in ("string", "null"):
        raise CorpusError(
            f"column {source.text_column!r} of the corpus holds {kind}, not text: set tokens.source.text_column"
        )
    _check_carried(kinds, carried)
    return Wanted(source.content_column, {name: kinds[name] for name in dict.fromkeys([*content, *carried])})


def corpus_identity(
    source: SourceConfig, files: Sequence[SourceFile], scans: Sequence[Scan], template_sha256: str | None, loss_on: str
) -> dict[str, Any]:
    """What decides the documents and how they become rows: the Hub commit or the files' contents, and the columns."""
    snapshot = files[0].snapshot
    origin: dict[str, Any] = {}
    if snapshot is not None:
        origin = {"dataset": snapshot.dataset, "commit": snapshot.commit, "name": source.name, "split": source.split}
        origin["files"] = source.files
    columns = {key: getattr(source, key) for key in CONTENT_KEYS if getattr(source, key) is not None}
    chat = {"loss_on": loss_on, "chat_template_sha256": template_sha256} if source.messages_column else {}
    contents = [[file.name, scan.content] for file, scan in zip(files, scans, strict=True)]
    return {
        **origin,
        "num_files": len(files),
        "files_sha256": digest_json(contents),
        "format": files[0].format,
        **columns,
        **chat,
    }


def carried_value(kind: str, name: str, document: Document) -> Any:
    """A carried column's value, of its kind or None. Raises CorpusError where the document holds another type."""
    value = document.values[name]
    fits = type(value) is not int or -(2**63) <= value < 2**63
    if value is None or (fits and type(value) is {"string": str, "int64": int, "float64": float, "bool": bool}[kind]):
        return value
    if kind == "float64" and type(value) is int:
        return float(value)
    raise CorpusError(
        f"{document.place}: column {name!r} holds a {type(value).__name__}, and the corpus' first documents hold "
        f"{kind}: give it one type, or leave it out of tokens.columns"
    )


def _check_carried(kinds: dict[str, str], carried: Sequence[str]) -> None:
    for name in carried:
        if name not in kinds or name in RESERVED_COLUMNS:
            raise ConfigError(
                f"tokens.columns names {name!r}: the corpus has {', '.join(kinds)}, "
                f"and {', '.join(RESERVED_COLUMNS)} are the store's own"
            )
        if kinds[name] not in SIMPLE:
            raise ConfigError(
                f"tokens.columns names {name!r}, which holds {kinds[name]}: only {list(COLUMN_TYPES)} are carried"
            )
