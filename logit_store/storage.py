"""A directory on any fsspec file system in which a file, once there, is whole and is never overwritten."""

import errno
import os
import uuid
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from logit_store.errors import StoreError


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

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files in ``folder``, without the folder; empty where there is no such folder."""
        self.fs.invalidate_cache()
        if not self.fs.exists(self.path(folder)):
            return []
        return sorted(str(p).rsplit("/", 1)[-1] for p in self.fs.ls(self.path(folder), detail=False))

    def is_empty(self) -> bool:
        """Whether nothing at all is stored here."""
        return not self.fs.exists(self.root) or not self.fs.ls(self.root, detail=False)

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens where it is gone already."""
        if self.exists(name):
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
        path.parent.mkdir(parents=True, exist_ok=True)
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
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
        return True


TEMPORARY_SUFFIX = ".tmp"


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
