"""Shards of a remote store, kept on the local disk: fetched once, mapped from there, the longest unused thrown away."""

import os
import time
import uuid
from pathlib import Path

from logit_store.errors import ConfigError, CorruptError, StoreError
from logit_store.identity import digest_file
from logit_store.shard import REDO
from logit_store.storage import Storage

DEFAULT_BYTES = 64 * 2**30
ABANDONED_S = 24 * 3600
"""Age from which a temporary file is one that a killed process left."""


class ShardCache:
    """A folder of shards by content, shared by all stores and processes of a machine."""

    def __init__(self, folder: str | None = None, max_bytes: int | None = None) -> None:
        """By default `$DECANT_CACHE_DIR` (or `~/.cache/decant/shards`) and `$DECANT_CACHE_BYTES` (or 64 GiB)."""
        self.folder = Path(folder or os.environ.get("DECANT_CACHE_DIR") or Path.home() / ".cache/decant/shards")
        limit = os.environ.get("DECANT_CACHE_BYTES", str(DEFAULT_BYTES)) if max_bytes is None else str(max_bytes)
        if not limit.isdigit():
            raise ConfigError(f"DECANT_CACHE_BYTES is {limit!r}: give a number of bytes, such as {DEFAULT_BYTES}")
        self.max_bytes = int(limit)

    def fetch(self, storage: Storage, name: str, sha256: str) -> str:
        """Local path of a copy of the file, whose bytes were verified when it was fetched.

        Raises FileNotFoundError, CorruptError where the remote file does not have this SHA-256, StoreError where it
        cannot be fetched.
        """
        path = self.folder / f"{sha256}.arrow"
        try:
            os.utime(path)  # the modification time says when it was last wanted
            return str(path)
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            storage.fetch(name, str(temporary))
            if digest_file(temporary) != sha256:
                raise CorruptError(f"{storage.path(name)} is damaged: its checksum does not match. {REDO}")
            os.replace(temporary, path)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreError(
                f"{storage.path(name)} cannot be fetched into {self.folder}: {error.strerror or error}. "
                "DECANT_CACHE_DIR and DECANT_CACHE_BYTES say where copies are kept, and how much of them"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        self._shrink(keep=path)
        return str(path)

    def discard(self, sha256: str) -> None:
        """Forget a copy that turned out to be damaged."""
        (self.folder / f"{sha256}.arrow").unlink(missing_ok=True)

    def _shrink(self, keep: Path) -> None:
        """Delete the longest unused copies until the rest fits. Whoever has one mapped can go on reading it."""
        copies = []
        for path in (*self.folder.glob("*.arrow"), *self.folder.glob("*.tmp")):
            try:
                status = path.stat()
                if path.suffix == ".arrow":
                    copies.append((status.st_mtime_ns, status.st_size, path))
                elif status.st_mtime < time.time() - ABANDONED_S:
                    path.unlink()
            except FileNotFoundError:
                continue  # another process was faster
        total = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total <= self.max_bytes:
                break
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size
