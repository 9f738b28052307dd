"""Documents from the Hub or from files, read with `datasets`."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import fsspec

from cluster.config import SourceConfig
from cluster.hashing import file_sha256
from logit_store.errors import ConfigError, CorpusError
from logit_store.shard import COLUMN_TYPES, RESERVED_COLUMNS

ENDINGS = {
    ".json": "json",
    ".jsonl": "json",
    ".jsonl.gz": "json",
    ".jsonl.zst": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
}


def corpus_identity(source: SourceConfig) -> dict[str, Any]:
    """What decides the documents: the Hub commit, or names and content hashes of the files.

    Raises CorpusError: a dataset or a file does not exist.
    """
    if source.dataset is not None:
        commit = _snapshot(source).rstrip("/").rsplit("/", 1)[-1]
        fields: dict[str, Any] = {"dataset": source.dataset, "commit": commit, "name": source.name}
        return fields | {"split": source.split, "files": source.files, "text_column": source.text_column}
    files = _expand(source.files)
    return {
        "files": [[path.rsplit("/", 1)[-1], _content_key(path)] for path in files],
        "format": _format(source, files),
        "text_column": source.text_column,
    }


@lru_cache(maxsize=2)
def _load(source_json: str) -> Any:
    source = SourceConfig.model_validate_json(source_json)
    import datasets

    datasets.disable_progress_bars()
    if source.dataset is not None:
        folder = _snapshot(source)
        return _load_or_explain(folder, source.name, split=source.split, data_files=source.files or None)
    files = _expand(source.files)
    loader = _format(source, files)
    options = {"sample_by": "document"} if loader == "text" else {}
    return _load_or_explain(loader, None, split="train", data_files=files, **options)


def load_documents(source: SourceConfig) -> Any:
    """The corpus as a memory-mapped `datasets.Dataset` with the text column.

    Raises CorpusError: missing, unreadable, without the column, or empty.
    """
    dataset = _load(source.model_dump_json())
    if source.text_column not in dataset.column_names:
        raise CorpusError(
            f"the corpus has no column {source.text_column!r}; its columns are {', '.join(dataset.column_names)}. "
            "Set tokens.source.text_column"
        )
    kind = getattr(dataset.features[source.text_column], "dtype", "a list")
    if kind not in ("string", "large_string", "null"):
        raise CorpusError(
            f"column {source.text_column!r} of the corpus holds {kind}, not text: set tokens.source.text_column"
        )
    if not any(document[source.text_column] for document in dataset):  # stops at the first with any text
        raise CorpusError("the corpus is empty: no document of it has any text")
    return dataset


def column_types(documents: Any, names: Sequence[str]) -> dict[str, str]:
    """The store's types of the columns that rows carry along.

    Raises ConfigError: a column is missing, reserved, or of a type that stores do not carry.
    """
    types: dict[str, str] = {}
    for name in names:
        if name not in documents.column_names or name in RESERVED_COLUMNS:
            raise ConfigError(
                f"tokens.columns names {name!r}: the corpus has {', '.join(documents.column_names)}, "
                f"and {', '.join(RESERVED_COLUMNS)} are the store's own"
            )
        found = str(getattr(documents.features[name], "dtype", "a list"))
        kinds = {"string": "string", "int": "int64", "float": "float64", "bool": "bool", "large_string": "string"}
        kind = next((kind for prefix, kind in kinds.items() if found.startswith(prefix)), None)
        if kind is None:
            raise ConfigError(
                f"tokens.columns names {name!r}, which holds {found}: only {list(COLUMN_TYPES)} are carried"
            )
        types[name] = kind
    return types


def _load_or_explain(path: str, name: str | None, **options: Any) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, name, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise CorpusError(f"the corpus cannot be read as {path}: {type(cause).__name__}: {cause}") from error
    except (ValueError, OSError) as error:
        raise CorpusError(f"the corpus cannot be read as {path}: {' '.join(str(error).split())}") from error
    except (IndexError, StopIteration) as error:  # what `datasets` raises for files without a single row
        raise CorpusError("the corpus is empty: it holds no documents") from error


def _snapshot(source: SourceConfig) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*source.files, "*.md", "*.yaml"] if source.files else None
    try:
        return snapshot_download(
            str(source.dataset), repo_type="dataset", revision=source.revision, allow_patterns=patterns
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CorpusError(
            f"dataset {source.dataset!r} cannot be fetched from the Hub or its cache: {reason}"
        ) from error


def _expand(patterns: list[str]) -> list[str]:
    """Full names of the files that the patterns stand for, sorted within a pattern."""
    files: list[str] = []
    for pattern in patterns:
        try:
            fs, path = fsspec.core.url_to_fs(pattern)
            found = sorted(p for p in fs.glob(path) if fs.isfile(p))
        except (ValueError, ImportError, OSError) as error:
            raise CorpusError(f"file {pattern!r} cannot be looked up: {error}") from error
        if not found:
            raise CorpusError(f"no file matches {pattern!r} (tokens.source.files)")
        files += found if "file" in fs.protocol else [fs.unstrip_protocol(path) for path in found]
    return files


def _format(source: SourceConfig, files: list[str]) -> str:
    if source.format is not None:
        return source.format
    formats = {next((f for ending, f in ENDINGS.items() if path.endswith(ending)), None) for path in files}
    if len(formats) != 1 or None in formats:
        raise CorpusError(
            f"the format of {files[0]} and others is not clear from the ending: set tokens.source.format to "
            "json, parquet, arrow or text"
        )
    return str(formats.pop())


def _content_key(path: str) -> str:
    fs, name = fsspec.core.url_to_fs(path)
    return file_sha256(name) if "file" in fs.protocol else str(fs.ukey(name))
