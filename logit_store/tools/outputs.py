"""What the store's tools write: files that are whole or not there, and JSON that every parser takes."""

import math
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from logit_store.errors import ConfigError, StoreError
from logit_store.format import TEMPORARY_SUFFIX
from logit_store.storage import Storage


def require_outside(out: Storage, store: Storage) -> None:
    """Raise ConfigError where ``out`` is in the store's directory, which holds nothing but the store."""
    if f"{out.root}/".startswith(f"{store.root}/") and type(out.fs) is type(store.fs):
        raise ConfigError(f"--out {out.url} is inside the store: choose a directory of its own")


@contextmanager
def whole_file(target: Storage, name: str) -> Iterator[IO[bytes]]:
    """A stream whose bytes become the file ``name`` when the block ends well, and nothing otherwise.

    A file that is there is replaced. Through a temporary file: beside it and renamed on local disks, uploaded whole
    elsewhere. Raises StoreError when the disk is full or not writable.
    """
    path = Path(target.path(name))
    folder = path.parent if target.is_local else Path(tempfile.gettempdir())
    temporary = folder / f"{path.name}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if target.is_local:
            os.replace(temporary, path)
        else:
            target.fs.put_file(str(temporary), target.path(name))
    except OSError as error:
        raise StoreError(
            f"cannot write {target.path(name)}: {error.strerror or error}. Complete files stay; make room or choose "
            "another --out and run the same command again"
        ) from error
    finally:
        if folder.is_dir():  # where --out is a file it is not
            temporary.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """The value with null where JSON has no word for a number: infinities and NaN. Arrays become lists."""
    if isinstance(value, np.ndarray):
        return finite(value.tolist())
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
