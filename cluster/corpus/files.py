"""The files of a corpus, in order: found by globs or named by the Hub, and opened wherever they lie."""

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import pyarrow as pa
from fsspec.utils import infer_compression

from cluster.config import SourceConfig
from cluster.corpus import hub
from logit_store.errors import CorpusError
from logit_store.identity import digest_json

ENDINGS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".md": "text",
}
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
BUFFER_BYTES = 2**20


class SourceFile(NamedTuple):
    """One file, at the same place for every node."""

    name: str
    """What errors and the corpus' identity call it: its last part, or its path in the Hub repository."""
    path: str
    """Local path, URL, or path in the Hub repository."""
    format: str
    """One of `SourceConfig.format`."""
    stamp: str
    """Changes when the file does, and is the same on every node: of path, size and time; of what the file system knows;
    of the Hub commit."""
    num_bytes: float
    """Its size where it is local, infinite elsewhere."""
    snapshot: hub.Snapshot | None = None
    """The commit of the Hub repository that holds it."""

    @property
    def is_compressed(self) -> bool:
        """Whether it can only be read from its beginning on."""
        return infer_compression(self.path) is not None


def find_files(source: SourceConfig) -> list[SourceFile]:
    """The files of a corpus, in the order of their documents.

    Raises CorpusError: no file matches, the dataset is not there, or the format is not clear.
    """
    if source.dataset is not None:
        snapshot = hub.resolve(source.dataset, source.revision)
        data_format, paths = hub.data_files(snapshot, source)
        return [
            SourceFile(path, path, data_format, digest_json([*snapshot[:2], path]), inf, snapshot) for path in paths
        ]
    found = _expand(source.files)
    paths = [path for path, _, _ in found]
    if twice := sorted(path for path, count in Counter(paths).items() if count > 1):
        raise CorpusError(
            f"{twice[0]} is named twice by tokens.source.files, and each of its documents would be in the store twice: "
            "let one pattern match it"
        )
    data_format = source.format or _format(paths)
    return [SourceFile(path.rsplit("/", 1)[-1], path, data_format, stamp, size) for path, stamp, size in found]


CHANGE_WITH_CONTENT = (
    "etag", "md5hash", "content-md5", "content_md5", "crc32c", "generation",
    "last-modified", "lastmodified", "last_modified", "mtime", "modified", "updated",
)  # fmt: skip
"""What file systems tell of a file that is another one for another content: the first that is told is taken, since a
listing tells more or less of it than a question for one file, and times in other forms."""


@contextmanager
def open_stream(file: SourceFile) -> Iterator[io.BufferedReader]:
    """The file's bytes, decompressed. Raises OSError, EOFError: the file is cut short, if it is compressed."""
    if infer_compression(file.path) != "zstd":
        with fsspec.open(_path(file), "rb", compression="infer") as raw:
            yield io.BufferedReader(raw, BUFFER_BYTES)
        return
    # fsspec's reader takes the end of a file for the end of what was compressed.
    with fsspec.open(_path(file), "rb") as raw, pa.PythonFile(raw, "r") as opened:
        yield io.BufferedReader(pa.CompressedInputStream(opened, "zstd"), BUFFER_BYTES)


@contextmanager
def open_table(file: SourceFile, footer_only: bool = False) -> Iterator[Any]:
    """The file as Arrow reads it: mapped where it is local.

    ``footer_only``: of a Hub file that is not in the cache only what is read is fetched, and not the whole of it.
    """
    path = hub.url(file.snapshot, file.path) if footer_only and file.snapshot else _path(file)
    if "://" not in path:
        with pa.memory_map(path) as mapped:
            yield mapped
        return
    with fsspec.open(path, "rb") as raw, pa.PythonFile(raw, "r") as opened:
        yield opened


def _path(file: SourceFile) -> str:
    """Where it can be opened on this node; a Hub file is fetched into the node's Hub cache first."""
    return file.path if file.snapshot is None else hub.fetch(file.snapshot, file.path)


def _expand(patterns: list[str]) -> list[tuple[str, str, float]]:
    """Full names, stamps and sizes of the files that the patterns stand for, sorted within a pattern."""
    files: list[tuple[str, str, float]] = []
    for pattern in patterns:
        try:
            fs, path = fsspec.core.url_to_fs(pattern)
            found = sorted(p for p in fs.glob(path) if fs.isfile(p))
            if not found:
                _say_why(fs, path)
            files += [(_name(fs, p), *_stamp(fs, p)) for p in found]
        except (ValueError, ImportError, OSError) as error:
            raise CorpusError(f"file {pattern!r} cannot be looked up: {error}") from error
        if not found:
            raise CorpusError(f"no file matches {pattern!r} (tokens.source.files)")
    return files


def _say_why(fs: Any, path: str) -> None:
    """Raise what kept a file from being found: on a host of the web that does not answer it may be there."""
    try:
        fs.info(path)
    except FileNotFoundError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise error.__cause__ from None


def check_unchanged(file: SourceFile) -> None:
    """Refuse a file that is another one than when it was found. Raises CorpusError."""
    if file.snapshot is not None:  # a commit never changes
        return
    try:
        found, _ = _stamp(*fsspec.core.url_to_fs(file.path))
    except Exception as error:  # remote file systems raise what their libraries raise
        raise CorpusError(f"{file.name} cannot be found any more: {error}") from error
    if found != file.stamp:
        raise CorpusError(
            f"{file.name} has changed since the corpus was looked through (its size, time or checksum): begin again in "
            "another tokens.path, and leave the files alone until it is finished"
        )


def _name(fs: Any, path: str) -> str:
    return path if "file" in fs.protocol else str(fs.unstrip_protocol(path))


def _stamp(fs: Any, path: str) -> tuple[str, float]:
    """The file's stamp, and its size where it is local."""
    if "file" in fs.protocol:
        stat = Path(path).stat()
        return digest_json([path, stat.st_size, stat.st_mtime_ns]), stat.st_size
    told = {key.lower(): str(value) for key, value in fs.info(path).items()}
    changing = next((told[key] for key in CHANGE_WITH_CONTENT if key in told), None)
    return digest_json([_name(fs, path), told.get("size"), changing or str(fs.ukey(path))]), inf


def _format(paths: list[str]) -> str:
    formats = {_format_of_ending(path) for path in paths}
    if len(formats) != 1 or None in formats:
        raise CorpusError(
            f"the format of {paths[0]} and others is not clear from the ending: set tokens.source.format to "
            "json, parquet, arrow, lines or text"
        )
    return str(formats.pop())


def _format_of_ending(path: str) -> str | None:
    bare = next((path.removesuffix(ending) for ending in COMPRESSIONS if path.endswith(ending)), path)
    return next((name for ending, name in ENDINGS.items() if bare.endswith(ending)), None)
