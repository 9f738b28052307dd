"""A directory on any fsspec file system in which a file, once there, is whole and is never overwritten."""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from logit_store.errors import StoreError
from logit_store.format import TEMPORARY_SUFFIX

PIECE_BYTES = 8 * 2**20
"""Read at a time of files that are looked at whole: large enough for object stores, small beside a shard."""


class Storage:
    """The files below ``url``; names are relative to it and use ``/``."""

    def __init__(self, url: str) -> None:
        self.url = str(url).rstrip("/")
        self.fs: Any
        try:
            self.fs, root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is not installed
            raise StoreError(f"{self.url} cannot be opened: {error}") from error
        self.root = str(root).rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """The file system's own path of ``name``."""
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        return bool(self.fs.exists(self.path(name)))

    def read(self, name: str) -> bytes:
        """All bytes of a file. Raises FileNotFoundError."""
        return bytes(self.fs.cat_file(self.path(name)))

    def map(self, name: str) -> pa.Buffer:
        """All bytes of a file, mapped where it is local. Raises FileNotFoundError."""
        if not self.is_local:
            return pa.py_buffer(self.read(name))
        if not os.path.getsize(self.path(name)):
            return pa.py_buffer(b"")  # nothing cannot be mapped
        return pa.memory_map(self.path(name)).read_buffer()

    def names(self, folder: str) -> list[str]:
        """Sorted names of files and folders in ``folder``, without it; empty where there is no such folder."""
        self.fs.invalidate_cache()
        path = self.path(folder).rstrip("/")
        if not self.fs.exists(path):
            return []
        return sorted(str(p).rstrip("/").rsplit("/", 1)[-1] for p in self.fs.ls(path, detail=False))

    def sizes(self) -> dict[str, int]:
        """Bytes of every file below, in folders of folders too, by name."""
        self.fs.invalidate_cache()
        found = self.fs.find(self.root, detail=True)
        return {str(path).removeprefix(f"{self.root}/"): int(info["size"] or 0) for path, info in sorted(found.items())}

    def pieces(self, name: str, piece_bytes: int = PIECE_BYTES) -> Iterator[bytes]:
        """A file's bytes, ``piece_bytes`` at a time: never a whole shard in memory. Raises FileNotFoundError."""
        with self.fs.open(self.path(name), "rb") as file:
            while piece := file.read(piece_bytes):
                yield piece

    def is_empty(self) -> bool:
        """Whether nothing is stored here, temporary files of dead writers aside."""
        return not any(not name.endswith(TEMPORARY_SUFFIX) for name in self.names(""))

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens where it is gone already."""
        with suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    def create(self, name: str, data: bytes) -> bool:
        """Write ``data`` as ``name`` only if no such file exists; return whether this call made it.

        Atomic: a reader sees the whole file or none, also after a crash. On local disks through a synced
        temporary file and a hard link (which fails where the name exists); elsewhere through the file
        system's own conditional write. Raises StoreError when the disk is full or not writable.
        """
        try:
            return self._create_local(Path(self.path(name)), data) if self.is_local else self._create_remote(name, data)
        except OSError as error:
            raise StoreError(_explain_write_error(self.path(name), len(data), error)) from error

    def _create_remote(self, name: str, data: bytes) -> bool:
        try:
            self.fs.pipe_file(self.path(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    def _create_local(self, path: Path, data: bytes) -> bool:
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
