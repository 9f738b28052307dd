"""A directory on any fsspec file system in which a file, once there, is whole and is never overwritten."""

import errno
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from logit_store.config import CREDENTIALS, KEEP_CREDENTIALS
from logit_store.errors import StoreError, UnavailableError
from logit_store.format import TEMPORARY_SUFFIX

PIECE_BYTES = 8 * 2**20
"""Read at a time of files that are looked at whole: large enough for object stores, small beside a shard."""

RETRY_DELAYS_S: tuple[float, ...] = (0.1, 0.4, 1.6, 6.4)
"""Pauses between attempts at a call that failed in a way that may pass. Longer outages are for whoever calls."""

LASTING: tuple[type[Exception], ...] = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    StoreError,
    TypeError,
    ValueError,
)
LASTING_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EINVAL, errno.EPERM)
"""Errors that another attempt would only meet again."""

T = TypeVar("T")


class Storage:
    """The files below ``url``; names are relative to it and use ``/``.

    Calls that fail in a way that may pass are tried again, and raise UnavailableError where that does not help.
    Raises StoreError: ``url`` is none that a store can have.
    """

    def __init__(self, url: str) -> None:
        if not url:
            raise StoreError("the path of a store is empty: give a directory or a URL")
        if CREDENTIALS.search(str(url)):
            raise StoreError(f"the path of a store {KEEP_CREDENTIALS}")
        self.url = str(url).rstrip("/")
        self.fs: Any
        try:
            self.fs, root = fsspec.core.url_to_fs(self.url)
        except Exception as error:  # an unknown protocol, no package for it, a host that is not there: no common class
            raise StoreError(f"{self.url} cannot be opened: {_reason(error)}") from error
        self.root = str(root).rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """The file system's own path of ``name``."""
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        return bool(self._patiently(name, lambda: self.fs.exists(self.path(name))))

    def read(self, name: str) -> bytes:
        """All bytes of a file. Raises FileNotFoundError."""
        return bytes(self._patiently(name, lambda: self.fs.cat_file(self.path(name))))

    def read_many(self, names: list[str]) -> list[bytes]:
        """All bytes of several files, asked for at once where the file system can. Raises FileNotFoundError."""
        if self.is_local:
            return [self.read(name) for name in names]
        found = self._patiently(names[0], lambda: self.fs.cat([self.path(name) for name in names])) if names else {}
        return [bytes(found[self.path(name)]) for name in names]

    def map(self, name: str) -> pa.Buffer:
        """All bytes of a file, mapped where it is local. Raises FileNotFoundError."""
        if not self.is_local:
            return pa.py_buffer(self.read(name))

        def mapped() -> pa.Buffer:
            if not os.path.getsize(self.path(name)):
                return pa.py_buffer(b"")  # nothing cannot be mapped
            return pa.memory_map(self.path(name)).read_buffer()

        return self._patiently(name, mapped)

    def fetch(self, name: str, path: str) -> None:
        """Copy a file to the local ``path``. Raises FileNotFoundError."""
        self._patiently(name, lambda: self.fs.get_file(self.path(name), path))

    def names(self, folder: str) -> list[str]:
        """Sorted names of files and folders in ``folder``, without it; empty where there is no such folder."""
        return sorted(self.scan(folder))

    def scan(self, folder: str) -> Iterator[str]:
        """Names of files and folders in ``folder`` in no order, a million of them in bounded memory on a local disk."""
        path = self.path(folder).rstrip("/")
        if self.is_local:
            if os.path.isdir(path):
                with os.scandir(path) as entries:
                    yield from (entry.name for entry in entries)
            return
        self.fs.invalidate_cache()
        if self._patiently(folder, lambda: self.fs.exists(path)):
            found = self._patiently(folder, lambda: self.fs.ls(path, detail=False))
            yield from (str(p).rstrip("/").rsplit("/", 1)[-1] for p in found)

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below, in folders of folders too, by name."""
        self.fs.invalidate_cache()
        found = self._patiently("", lambda: self.fs.find(self.root, detail=True))
        return {str(path).removeprefix(f"{self.root}/"): int(info["size"] or 0) for path, info in sorted(found.items())}

    def pieces(self, name: str, piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
        """A file's bytes, ``piece_bytes`` at a time: never a whole shard in memory. Raises FileNotFoundError."""
        with self.fs.open(self.path(name), "rb") as file:
            while piece := file.read(piece_bytes):
                yield piece

    def is_empty(self) -> bool:
        """Whether nothing is stored here, temporary files of dead writers aside. Raises StoreError: nothing can be."""
        places = (Path(self.root), *Path(self.root).parents) if self.is_local else ()
        if file := next((place for place in places if os.path.isfile(place)), None):
            raise StoreError(f"{file} is a file, where a directory is needed: choose another path than {self.url}")
        return not any(not name.endswith(TEMPORARY_SUFFIX) for name in self.names(""))

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens where it is gone already."""
        with suppress(FileNotFoundError):
            self._patiently(name, lambda: self.fs.rm_file(self.path(name)))

    def create(self, name: str, data: bytes) -> bool:
        """Write ``data`` as ``name`` only if no such file exists; return whether this call made it.

        Atomic: a reader sees the whole file or none, also after a crash. On local disks through a synced
        temporary file and a hard link (which fails where the name exists); elsewhere through the file
        system's own conditional write. Where an attempt failed and its file is there all the same, False is
        returned, as if another writer had been first. Raises StoreError when the disk is full or not writable.
        """
        write = self._create_local if self.is_local else self._create_remote
        try:
            return self._patiently(name, lambda: write(name, data))
        except OSError as error:
            raise StoreError(_explain_write_error(self.path(name), len(data), error)) from error

    def _patiently(self, name: str, call: Callable[[], T]) -> T:
        """What ``call`` returns, at the fifth attempt at the latest. Raises UnavailableError, or what will not pass."""
        for delay in (*RETRY_DELAYS_S, None):
            try:
                return call()
            except LASTING as error:
                if not self.is_local and isinstance(error, (ValueError, NotImplementedError)):
                    raise StoreError(f"{self.path(name)} cannot be opened: {_reason(error)}") from error
                raise
            except Exception as error:
                is_lasting = isinstance(error, OSError) and error.errno in LASTING_NUMBERS
                if is_lasting or (self.is_local and not isinstance(error, OSError)):
                    raise
                if delay is None:
                    reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
                    raise UnavailableError(
                        f"{self.path(name)}: storage fails ({reason}), {len(RETRY_DELAYS_S) + 1} times in a row. "
                        "What is committed stays; run the same command again when it answers"
                    ) from error
                time.sleep(delay)
        raise AssertionError

    def _create_remote(self, name: str, data: bytes) -> bool:
        try:
            self.fs.pipe_file(self.path(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    def _create_local(self, name: str, data: bytes) -> bool:
        path = Path(self.path(name))
        missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in missing:  # or a crash may lose the folder, and with it what was synced inside
            _sync_folder(folder.parent)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except FileNotFoundError:
                if path.exists():  # a finished run has tidied up, and this file is there
                    return False
                raise
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
        return True


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain_write_error(path: str, num_bytes: int, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space left to write {path} ({num_bytes:,} bytes). What is committed stays; "
            "free some space and run the same command again"
        )
    return f"cannot write {path}: {error.strerror or error}"
